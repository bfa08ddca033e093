"""Repair of images: the Inpainter, image files, and the page in the browser."""
