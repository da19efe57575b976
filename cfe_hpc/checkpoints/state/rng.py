"""The random generators that a run's numbers come from: Python's, numpy's, torch's and the accelerator's."""

from __future__ import annotations

import random
import sys
from typing import Any

__all__ = ["capture_rng", "restore_rng"]

_ACCELERATORS = ("cuda", "hpu", "xpu")


def capture_rng() -> dict[str, Any]:
    """The state of every global generator of this process whose module is imported; a tree for the codec.

    An accelerator's is that of the current device, and only when the accelerator has been used.
    """
    state: dict[str, Any] = {"python": random.getstate()}
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    if torch is not None:
        state["torch"] = torch.get_rng_state()
        for name, module in _used(torch).items():
            state[name] = module.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Set every generator that `capture_rng` saw."""
    random.setstate(state["python"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])
    if "torch" in state:
        import torch

        torch.set_rng_state(state["torch"])
        for name in _ACCELERATORS:
            if name in state:
                getattr(torch, name).set_rng_state(state[name])


def _used(torch: Any) -> dict[str, Any]:
    modules = {name: getattr(torch, name, None) for name in _ACCELERATORS}
    return {
        name: module
        for name, module in modules.items()
        if module is not None and module.is_available() and module.is_initialized()
    }
