"""What training holds, as named tensors and trees, and back."""
