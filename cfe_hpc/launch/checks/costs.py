"""What an attempt costs."""

from __future__ import annotations

from cfe_hpc.config.load import Loaded
from cfe_hpc.config.run import Plan

__all__ = ["cost_of_attempt"]


def cost_of_attempt(loaded: Loaded, plan: Plan) -> float | None:
    """Price of one attempt that uses up its time, in the site's currency; None when price or time is unknown."""
    price = loaded.site.hardware[loaded.site.partitions[plan.partition].hardware].cost_per_node_hour
    return None if price is None or plan.time_s is None else price * plan.nodes * plan.time_s / 3600
