"""The one error that users of scripts/slurm see as a line."""

from __future__ import annotations

__all__ = ["MinislurmError"]


class MinislurmError(Exception):
    """Something that keeps the cluster from doing what was asked, and what to do about it."""
