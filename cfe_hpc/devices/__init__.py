"""Accelerators behind one small protocol."""
