"""A real multi-node Slurm with accounting on one machine; see docs/testing.md. Standard library only."""
