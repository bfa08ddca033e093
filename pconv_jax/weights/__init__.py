"""Trained weights: the bundled network, downloads, and files of other projects."""
