"""The bridge's torch half."""
