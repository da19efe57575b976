"""Keeping a Slurm job off the nodes that are avoided: when it is sent, when it is requeued, and when it begins.

A job that is sent is told with `--exclude`, one that is requeued with ExcNodeList: Slurm (22.05) takes it from the
job's owner as soon as the requeue is asked for, before the processes have ended, and not while the job runs. A job
that Slurm requeues by itself is told nothing; an attempt that finds itself on such a node sends itself back.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection

from cfe_hpc.config.run import Plan
from cfe_hpc.process import CommandError, run
from cfe_hpc.ranks.nodelist import expand
from cfe_hpc.recovery.exclusions import Exclusion, choose, excluded, exclusions_folder, runs_root
from cfe_hpc.runfolder import RunFolder

__all__ = ["exclude_option", "heeded", "tell_requeued"]

logger = logging.getLogger(__name__)

_TIMEOUT_S = 15.0
_UPDATE_S = 5.0
_RETRY_S = 0.25

_OWN = re.compile(r"--exclude=(.+)")
# What sinfo adds to the state of a node that does not answer, is powered down, and so on.
_FLAGS = "*~#!%$@^-+"
_USABLE = frozenset({"idle", "alloc", "mix", "comp", "resv", "plnd", "blocked"})


def heeded(
    folder: RunFolder, plan: Plan, *, among: Collection[str] | None = None
) -> tuple[list[Exclusion], list[Exclusion]]:
    """(exclusions that a job of this plan heeds, those that it does not so that it can run at all).

    Empty where Slurm does not say which nodes the job might get: a name that Slurm no longer knows would have it
    refuse the job.

    Args:
        among: only exclusions of these nodes are asked for; all when None.
    """
    found = excluded(runs_root(folder), now_s=time.time())
    if not any(among is None or exclusion.node in among for exclusion in found) or any(
        "/" in text for text in _own(plan)
    ):  # sbatch would read that file; nothing can be added to it
        return [], []
    usable, known = _nodes(plan)
    own = {node for text in _own(plan) for node in expand(text)}
    # To avoid a node that is down anyway costs the job nothing: those come first.
    found = sorted((each for each in found if each.node in known - own), key=lambda each: each.node in usable)
    candidates = (usable | {exclusion.node for exclusion in found}) - own
    avoided, _ = choose(found, nodes=plan.nodes, nodes_max=len(candidates))
    asked = [exclusion for exclusion in found if among is None or exclusion.node in among]
    heed = [exclusion for exclusion in asked if exclusion.node in avoided]
    return heed, [exclusion for exclusion in asked if exclusion not in heed]


def exclude_option(folder: RunFolder, plan: Plan) -> list[str]:
    """Options of sbatch that keep a job of this plan off the nodes that are avoided now. Writes down what is spared."""
    names = _names(folder, plan, attempt=None)
    return [f"--exclude={','.join(names)}"] if names else []


def tell_requeued(folder: RunFolder, plan: Plan, job_id: str, *, attempt: int) -> None:
    """Keep a job that was just requeued off the nodes that are avoided now; what it was told before is replaced.

    Where that fails the next attempt finds out by itself: it is a warning.
    """
    if not exclusions_folder(runs_root(folder)).is_dir():
        return
    names = ",".join(_names(folder, plan, attempt=attempt) or _own(plan))
    deadline_s = time.monotonic() + _UPDATE_S
    while True:
        try:
            run(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={names}"], timeout_s=_TIMEOUT_S)
            return
        except CommandError as error:
            if time.monotonic() > deadline_s:
                logger.warning("the next attempt may get a node that is avoided (%s): %s", names, error)
                return
        time.sleep(_RETRY_S)


def _names(folder: RunFolder, plan: Plan, *, attempt: int | None) -> list[str]:
    """Node names for Slurm, with those that the plan's own options exclude: an option of sbatch replaces the script's.
    Empty when nothing is avoided."""
    heed, spared = heeded(folder, plan)
    for exclusion in spared:
        detail = {"node": exclusion.node, "why": f"the job takes {plan.nodes} nodes, and no more are left"}
        folder.note_event("degraded", attempt=attempt, host=exclusion.node, reason="exclusion_spared", detail=detail)
    return [*(exclusion.node for exclusion in heed), *_own(plan)] if heed else []


def _own(plan: Plan) -> list[str]:
    return [match[1] for option in plan.options if (match := _OWN.fullmatch(option))]


def _nodes(plan: Plan) -> tuple[set[str], set[str]]:
    """(nodes of the plan's partition that can run a job, all of its nodes)."""
    where = ["-p", plan.queue] if plan.queue else []
    try:
        shown = _asked(["sinfo", "-h", "-N", *where, "-o", "%N %t"])
    except CommandError as error:
        logger.warning("no node is avoided: %s", error)
        return set(), set()
    states = [line.split() for line in shown.splitlines() if len(line.split()) == 2]
    usable = {node for node, state in states if state.rstrip(_FLAGS) in _USABLE and not state.endswith("*")}
    return usable, {node for node, _ in states}


def _asked(argv: list[str]) -> str:
    """What a command prints; it is given once more when a signal ended it. Those of a requeue, which is asked for just
    before, may reach every process of the job."""
    try:
        return run(argv, timeout_s=_TIMEOUT_S).stdout
    except CommandError as error:
        if error.completed is None or error.completed.returncode >= 0:
            raise
        return run(argv, timeout_s=_TIMEOUT_S).stdout
