"""Inpainting methods that need no network."""
