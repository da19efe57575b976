"""The kinds of things that a clean-up removes."""

from __future__ import annotations

from typing import Literal

__all__ = ["KINDS", "Kind"]

Kind = Literal["runs", "checkpoints", "logs", "snapshots", "trash"]
KINDS: dict[Kind, str] = {
    "runs": "whole run folders",
    "checkpoints": "of runs that stay: all checkpoints but the last, the best and those that are marked",
    "logs": "of runs that stay: their logs",
    "snapshots": "copies of code that no run has any more",
    "trash": "what an earlier clean-up left half deleted",
}
"""What may be asked to go."""
