"""What may be tried again, and how often."""
