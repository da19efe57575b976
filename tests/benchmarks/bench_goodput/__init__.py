"""Goodput under preemptions: cfe_hpc beside submitit and hand-written scripts; see scripts/bench_goodput --help."""
