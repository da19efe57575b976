"""What can be tracked, and as what it is saved."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["bare", "is_sharded", "is_trackable", "kind_of"]


def is_trackable(thing: Any) -> bool:
    """Whether `capture` can take it: the Sharded protocol, or state_dict and load_state_dict."""
    return is_sharded(thing) or all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict"))


def is_sharded(thing: Any) -> bool:
    """Whether it has the Sharded protocol."""
    methods = ("checkpoint_layout", "checkpoint_state", "load_checkpoint_state")
    return all(callable(getattr(thing, name, None)) for name in methods)


def bare(thing: Any) -> Any:
    """What is saved in an object's place: the module inside DDP or torch.compile, a DeepSpeed engine's adapter."""
    if "deepspeed" in sys.modules and not is_sharded(thing):
        from cfe_hpc.checkpoints.state.deepspeed import DeepSpeedState, is_deepspeed_engine

        if is_deepspeed_engine(thing):
            return DeepSpeedState(thing)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(thing, torch.nn.Module):
        return thing
    parallel = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    while isinstance(thing, parallel) or hasattr(thing, "_orig_mod"):
        thing = thing.module if isinstance(thing, parallel) else thing._orig_mod
    return thing


def kind_of(thing: Any) -> str:
    """How a bare object is saved and loaded: "sharded", "module", "optimizer" or "object"."""
    torch = sys.modules.get("torch")
    if is_sharded(thing):
        return "sharded"
    if torch is not None and isinstance(thing, torch.nn.Module):
        return "module"
    return "optimizer" if torch is not None and isinstance(thing, torch.optim.Optimizer) else "object"
