"""Sharded, verified, rotated checkpoints."""
