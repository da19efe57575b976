"""What a live cluster says of itself."""
