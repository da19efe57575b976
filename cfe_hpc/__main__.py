"""`python -m cfe_hpc` is the console script `cfe-hpc`."""

from cfe_hpc.cli.main import script

script()
