"""Training, from settings to the last checkpoint."""
