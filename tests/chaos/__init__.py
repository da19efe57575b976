"""Runs of two nodes on a real Slurm, hurt on purpose in a seeded order, and what must have become of them."""
