"""What a live cluster says of itself, as a profile, and against one."""
