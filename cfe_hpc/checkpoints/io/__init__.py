"""Bytes on their way between memory and data files."""
