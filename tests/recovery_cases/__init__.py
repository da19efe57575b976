"""What may become of a run, case by case: each module has a list CASES of functions that take a Stage.

tests/test_recovery_slurm.py runs them all on one cluster, a few at a time. So a case submits to nodes that it takes
whole, hurts none but those of its own runs, and waits for nothing without a limit.
"""
