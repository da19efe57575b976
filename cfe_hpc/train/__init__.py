"""The training that cfe_hpc ships."""
