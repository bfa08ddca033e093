"""Repair of images: the part for people with a photo and a mask."""
