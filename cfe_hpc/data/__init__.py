"""Text to tokens in HDF5, and the loader that feeds ranks."""
