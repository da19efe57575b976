"""What is done with a checkpoint apart from training."""
