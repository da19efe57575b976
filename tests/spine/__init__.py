"""Whole runs on the real Slurm or the local backend, disturbed on purpose."""
