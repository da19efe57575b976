"""`python -m cfe_hpc` is the console script `cfe-hpc`."""

import sys

from cfe_hpc.cli.main import main

sys.exit(main())
