"""Images and masks from files, as batches of NumPy arrays."""
