"""cfe_hpc: training on Slurm clusters that loses no step to a preemption or a time limit.

The public surface is small: `python -m cfe_hpc` (see `--help`) on the login node, and `join()` in a
training script. Importing this package loads nothing else; `join` pulls in the rank side on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfe_hpc.ranks.run import Run as Run
    from cfe_hpc.ranks.run import join as join

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "join"]


def __getattr__(name: str) -> Any:
    if name in ("Run", "join"):
        from importlib import import_module

        # By dotted name: the login node must never load the rank side because something imported `cfe_hpc`.
        return getattr(import_module("cfe_hpc.ranks.run"), name)
    raise AttributeError(f"module 'cfe_hpc' has no attribute {name!r}")
