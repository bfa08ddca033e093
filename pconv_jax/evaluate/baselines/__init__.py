"""Baselines: inpainting methods that need no network."""
