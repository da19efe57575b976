"""What became of an attempt that ended without a word: the next one asks Slurm, before anything else.

A node that dies takes its ranks and perhaps the batch script along, and Slurm requeues the job by itself: nobody has
counted that, and the node, idle now, is the first one to get a job again.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Sequence
from typing import Any

from cfe_hpc.config.run import RunSpec
from cfe_hpc.files import read_ndjson
from cfe_hpc.process import CommandError, run
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.ranks.records import record
from cfe_hpc.ranks.stopping import hold
from cfe_hpc.recovery.attempts import Attempt, read_attempts
from cfe_hpc.recovery.budgets import decide
from cfe_hpc.recovery.effects import carry_out
from cfe_hpc.recovery.evidence import slurm_end
from cfe_hpc.recovery.result import write_result
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import epoch_s

__all__ = ["dead_nodes", "examine"]

logger = logging.getLogger(__name__)

_TIMEOUT_S = 15.0
_LAST_BEAT_BYTES = 4096
# A node in such a state has failed. Flags come after a plus sign, a "*" says that its slurmd does not answer.
_DEAD = re.compile(r"DOWN|NO_RESPOND|NOT_RESPONDING|\*")
# Ends that sacct tells of and that are no node's doing.
_OTHERWISE = frozenset({"PREEMPTED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "COMPLETED", "DEADLINE"})


def examine(folder: RunFolder, spec: RunSpec, facts: RankFacts) -> int | None:
    """Count a node failure that nobody has counted, and have the node avoided. Rank 0 calls it, before it meets the
    others.

    Returns:
        The status to exit with when the budget is spent and the run is held; None to go on.
    """
    if facts.scheduler != "slurm" or facts.attempt == 0 or facts.restart or folder.result() is not None:
        return None
    events = list(folder.events())
    attempts = [attempt for attempt in read_attempts(events) if attempt.number < facts.attempt]
    if not attempts or attempts[-1].number != facts.attempt - 1:
        return None
    last = attempts[-1]
    # Slurm has told the ranks on the nodes that are left to stop, and not why it has requeued the job.
    by_slurm = any(_is_of(e, "requeued", last) and e.get("reason") == "requeued_already" for e in events)
    if last.bad_hosts or not (by_slurm or _unexplained(last)):
        return None
    found = _asked(folder, last)
    if not found:
        return None
    for host, why in found:
        logger.warning("attempt %d: %s", last.number, why)
        folder.note_event("failed", attempt=last.number, host=host, cause="node_failure", reason=why)
    # Without the word that it is requeued: it is this end that is to be judged now, not the next one.
    known = [e for e in folder.events() if not _is_of(e, "requeued", last)]
    decision = decide(spec.job.recovery, known, cause="node_failure")
    carry_out(folder, decision.effects, attempt=last.number)
    if decision.action == "requeue":
        if by_slurm:
            folder.note_event("requeued", attempt=last.number, reason="node_failure", detail=found[0][1])
        return None
    hold(folder, attempt=facts.attempt, step=None, why=decision.why, cause="node_failure")
    write_result(folder, "HELD", attempts=facts.attempt + 1, reason=decision.why)
    return 1


def _is_of(event: dict[str, Any], name: str, attempt: Attempt) -> bool:
    return (event.get("event"), event.get("attempt")) == (name, attempt.number)


def _unexplained(attempt: Attempt) -> bool:
    """Whether nobody has said why it ended, or only that a node has failed and not which."""
    return attempt.ended_by == "node_failure" or (not attempt.requeued and attempt.ended_by in (None, attempt.cause))


def _asked(folder: RunFolder, last: Attempt) -> list[tuple[str | None, str]]:
    """The nodes that failed, as Slurm tells, each with a sentence; (None, a sentence) when it does not say which."""
    beats = deque(read_ndjson(folder.heartbeat_path, last_bytes=_LAST_BEAT_BYTES), maxlen=1)
    beat_s = epoch_s(beats[0].get("time")) if beats and beats[0].get("attempt") == last.number else None
    state, _ = slurm_end(last.job_id) or ("", None) if last.job_id else ("", None)
    if state in _OTHERWISE:
        return []
    dead = dead_nodes(last.hosts, since_s=max(last.last_sign_s, beat_s or 0.0))
    if dead:
        return [(host, f"node {host} failed: {why}") for host, why in dead.items()]
    return [(None, "a node failed: sacct says NODE_FAIL")] if state == "NODE_FAIL" else []


def dead_nodes(hosts: Sequence[str], *, since_s: float) -> dict[str, str]:
    """Those of the nodes that Slurm takes for dead, or whose slurmd was started after `since_s` (epoch seconds), with
    what it says of them. Empty where it says nothing."""
    if not hosts:
        return {}
    try:
        shown = run(["scontrol", "show", "node", "-o", ",".join(hosts)], timeout_s=_TIMEOUT_S).stdout
    except CommandError as error:
        logger.warning("which node failed? %s", error)
        return {}
    found: dict[str, str] = {}
    for line in shown.splitlines():
        words = record(line)
        state, began_s = words.get("State", ""), epoch_s(words.get("SlurmdStartTime"))
        if _DEAD.search(state):
            found[words.get("NodeName", "")] = f"it is {state}"
        elif began_s is not None and began_s > since_s:
            found[words.get("NodeName", "")] = f"its slurmd was started again at {words['SlurmdStartTime']}"
    return {node: why for node, why in found.items() if node in hosts}
