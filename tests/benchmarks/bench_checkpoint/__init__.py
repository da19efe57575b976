"""Checkpoints beside their limits and beside other ways of saving; see scripts/bench_checkpoint --help."""
