"""Which checkpoints stay, and what is known of those that do."""
