"""What tests drive the real Slurm with; the cluster itself comes from scripts/slurm."""
