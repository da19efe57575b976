"""A day at the cluster, case by case: each module has a list CASES of functions that take a Stage.

tests/test_day_slurm.py runs them all on one cluster, a few at a time, as tests/recovery_cases are: a case submits to
nodes that it takes whole, hurts none but those of its own runs, and waits for nothing without a limit.
"""
