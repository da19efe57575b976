"""Checkpoints elsewhere than on the shared filesystem: on nodes, and at a remote."""
