"""Rank 0's own clock for the time limit, where the signal that Slurm was asked for comes too late for this run."""

from __future__ import annotations

import logging
import os
import threading
import time

from cfe_hpc.config.run import Plan
from cfe_hpc.errors import CfeError
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.ranks.scheduler import TIMER, show_job
from cfe_hpc.ranks.signals import STOP_SIGNALS, StopFlag

__all__ = ["TIMER_BIT", "StopTimer", "allocated_s", "names"]

logger = logging.getLogger(__name__)

TIMER_BIT = 1 << (len(STOP_SIGNALS) + 1)
"""Among the bits of stop signals on which ranks agree: rank 0's timer."""

_MARGIN_S = 10.0
"""Beside a step and a save: for agreeing, and for the requeue."""

_ASK_EVERY_S = 600.0
"""The limit of a running job may be changed, but slurmctld has many jobs to answer for."""


def allocated_s() -> float | None:
    """Epoch seconds at which this attempt got its nodes, as its batch script or supervisor says; None without one."""
    try:
        return float(os.environ.get("CFE_ALLOCATED_S", ""))
    except ValueError:
        return None


def names(bits: int) -> list[str]:
    """What agreed bits ask to stop for: the signals by name, and the timer."""
    return StopFlag.names(bits) + ([TIMER] if bits & TIMER_BIT else [])


class StopTimer:
    """Tells when to stop for the time limit. `--signal` of a job cannot be changed once it is queued: what the run has
    learned since is used here. It does nothing as long as the planned lead is enough. Rank 0's.
    """

    def __init__(self, facts: RankFacts, plan: Plan) -> None:
        self._facts, self._plan = facts, plan
        self._need_s: float | None = None
        self._end_s: float | None = None
        self._asker: threading.Thread | None = None
        self._spent = False

    def need(self, seconds: float) -> None:
        """Say how long a stop takes, from the signal to the committed checkpoint."""
        limit_s = self._plan.time_s
        if limit_s is None:
            return
        # Of a short limit a stop may be given no more than a part: each attempt would stop as it begins.
        needed_s = min(seconds + min(_MARGIN_S, limit_s / 4), limit_s / 2)
        self._need_s = needed_s if needed_s > self._plan.signal_lead_s else None
        if self._need_s is None or self._asker is not None:
            return
        began_s = allocated_s()
        if self._facts.scheduler == "local" and began_s is not None:
            self._end_s = began_s + limit_s
        elif self._facts.scheduler == "slurm":
            self._asker = threading.Thread(target=self._keep_asking, name="cfe-end-time", daemon=True)
            self._asker.start()

    def due(self) -> bool:
        """Whether it is time to stop; True once. Costs next to nothing."""
        end_s, need_s = self._end_s, self._need_s
        if end_s is None or need_s is None or self._spent or time.time() < end_s - need_s:
            return False
        logger.info("%.0f s to the time limit, and a stop is given %.0f s", end_s - time.time(), need_s)
        self._spent = True
        return True

    def _keep_asking(self) -> None:
        while not self._spent:
            try:
                self._end_s = show_job(self._facts.job_id).end_time
            except CfeError as error:
                logger.warning("when does the time limit come? %s", error)
            time.sleep(_ASK_EVERY_S)
