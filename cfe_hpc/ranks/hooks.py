"""Being called before torch changes what is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["before_any_step"]


def before_any_step(act: Callable[[], None]) -> Callable[[], None]:
    """Call `act` before every step of a torch optimizer, those inside DeepSpeed's included; returns what ends that."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        act()

    return register_optimizer_step_pre_hook(hook).remove
