"""Before the model is built: does every node have what its ranks need? One that does not is named, and left.

Only what another node of the attempt has can be missing on one: what all of them lack is the job's fault, or the
site's, and excluding nodes would not mend it. An attempt on one node is judged by an earlier one of the same run that
passed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from cfe_hpc.checkpoints.protocols import SoloGroup
from cfe_hpc.checkpoints.tiers.nodelocal import expand_home, make_home
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import CfeError, CheckpointError
from cfe_hpc.ranks.avoiding import heeded
from cfe_hpc.ranks.bootstrap import Place
from cfe_hpc.ranks.control import GlooGroup
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.ranks.scheduler import choose
from cfe_hpc.ranks.stopping import Ended, send_back
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import format_size

__all__ = ["Preflight", "leave_avoided", "require"]

logger = logging.getLogger(__name__)

_SUM_BYTES = 1 << 20
_SUM_LIMIT_S = 60.0
_LIMIT_S = 20.0
"""For a filesystem to answer."""

_WRITE_BYTES = 4096
_LEAST_SHARE = 0.9
"""Of the memory that the site's profile says a device has."""

_REASON_LENGTH = 500
_LOCAL_LEAST_BYTES = 1 << 30
"""Room that a node's own disk must have, unless the job wants less."""

_SKEW_WARN_S = 5.0
_SKEW_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one rank has found.

    Attributes:
        node: its number among the attempt's.
        time_s: its clock, when all ranks had come to the same point.
        sum_seconds: that summing 1 MiB over all ranks took; None with one rank.
        memory_bytes: of its device; 0 where that is not known.
        proven: an earlier attempt of the run has passed: what it needs is to be had somewhere. Rank 0 looks.
        lacks: what is missing, by the name of the check, in words that do not name the node.
    """

    node: int
    time_s: float = 0.0
    sum_seconds: float | None = None
    memory_bytes: int = 0
    proven: bool = False
    lacks: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What all ranks have found, the same on each of them.

    Attributes:
        seconds: that it took on rank 0.
        skew_s: the largest distance of a node's clock from the others'.
        bandwidth_bytes_per_s: of summing 1 MiB over the control plane's network; None with one rank.
        unfit: host to what it lacks. Under Slurm the attempt ends here unless it is empty.
        nodes: for each, in the order of their numbers: host, skew_s, and memory_bytes of a device where it is known.
    """

    seconds: float
    skew_s: float
    bandwidth_bytes_per_s: float | None
    unfit: dict[str, str]
    nodes: list[dict[str, Any]]

    def facts(self) -> dict[str, Any]:
        """For the `started` event."""
        return {name: value for name, value in asdict(self).items() if name != "unfit" and value is not None}


def require(folder: RunFolder, spec: RunSpec, place: Place) -> Preflight | None:
    """Test the nodes; return only if they are fit. Collective: every rank calls it once, after `bootstrap`.

    Returns:
        What was found; None with `recovery.preflight` off, and for a script run by hand.

    Raises:
        Ended: Slurm has given a node that is unfit. It is named in a `failed` event and avoided from now on; the run is
            requeued, or held.
        CfeError: this rank's device is not there and that is no fault of its node, or the network spoils data.
        RuntimeError: the network did not answer, or a rank is gone.
    """
    if not spec.job.recovery.preflight or place.facts.scheduler == "none":
        if place.device_error is not None:
            raise place.device_error
        return None
    began_s = time.monotonic()
    reports = _exchange(place, _look(folder, spec, place))
    found = replace(judge(reports, place.facts), seconds=round(time.monotonic() - began_s, 3))
    if found.unfit and place.facts.scheduler == "slurm":  # locally there are no other nodes to be had
        _leave(folder, spec, place, found)
    if place.device_error is not None:
        raise place.device_error
    if any("network" in report.lacks for report in reports):
        raise CfeError("preflight: a sum over all ranks came out wrong; test the network of these nodes")
    if place.facts.rank == 0:
        _tell(folder, place.facts, found, reports)
    return found


def leave_avoided(folder: RunFolder, spec: RunSpec, facts: RankFacts) -> int | None:
    """Send an attempt back that Slurm has put on a node to avoid; once for each node, lest it goes round in circles.

    Nothing has failed: it spends no budget. Rank 0 calls it before it meets the others, whom the requeue ends.

    Returns:
        The status to exit with; None to go on.
    """
    if facts.scheduler != "slurm":
        return None
    for exclusion in heeded(folder, spec.plan, among=facts.hosts)[0]:
        if _first_time(folder, exclusion.node):
            why = f"{exclusion.node} is avoided since {exclusion.run_id} failed there: {exclusion.why}"
            logger.warning("%s; the run is sent back", why)
            verdict = send_back(
                folder,
                choose(folder, facts, spec.plan),
                spec,
                SoloGroup(),
                cause="requeue_requested",
                why=why,
                attempt=facts.attempt,
            )
            return verdict.exit_code
    return None


def _first_time(folder: RunFolder, node: str) -> bool:
    try:
        return folder.promise(f"left-{node}")
    except OSError:  # without a memory of it, it might be left again and again
        return False


def judge(reports: Sequence[Report], facts: RankFacts) -> Preflight:
    """Which nodes are unfit, from what all ranks have found, in the order of their numbers."""
    first = {report.node: report for report in reversed(reports)}
    several = len(first) > 2  # of two clocks that differ nobody can tell which one is wrong
    clock_s = statistics.median(report.time_s for report in first.values()) if several else first[0].time_s
    skews_s = {node: round(report.time_s - clock_s, 3) for node, report in sorted(first.items())}
    lacks: dict[int, dict[str, str]] = {node: {} for node in skews_s}
    for report in reports:
        lacks[report.node].update(report.lacks)
    for node, skew_s in skews_s.items():
        if several and abs(skew_s) > _SKEW_LIMIT_S:
            lacks[node]["clock"] = f"its clock is {skew_s:+.0f} s from the others'"
    # A lone node that an earlier attempt did better than has nobody else to share the fault with.
    common = set() if len(lacks) == 1 and reports[0].proven else set.intersection(*map(set, lacks.values()))
    own = {
        node: "; ".join(what for check, what in found.items() if check not in common) for node, found in lacks.items()
    }
    slowest_s = max((report.sum_seconds for report in reports if report.sum_seconds), default=None)
    return Preflight(
        seconds=0.0,
        skew_s=max(map(abs, skews_s.values())),
        bandwidth_bytes_per_s=None if slowest_s is None else round(_SUM_BYTES / slowest_s),
        unfit={facts.hosts[node]: what for node, what in own.items() if what},
        nodes=[
            {"host": facts.hosts[node], "skew_s": skew_s}
            | ({"memory_bytes": first[node].memory_bytes} if first[node].memory_bytes else {})
            for node, skew_s in skews_s.items()
        ],
    )


def _exchange(place: Place, report: Report) -> list[Report]:
    """The reports of all ranks, in their order. Collective."""
    group, lacks, seconds = place.group, dict(report.lacks), None
    group.barrier()
    time_s = time.time()
    if isinstance(group, GlooGroup):
        right, seconds = group.try_sum(_SUM_BYTES, _SUM_LIMIT_S)
        if not right:
            lacks["network"] = "a sum over all ranks came out wrong"
    mine = replace(report, time_s=time_s, sum_seconds=seconds, lacks=lacks)
    return [Report(**json.loads(each)) for each in group.all_gather(json.dumps(asdict(mine)).encode())]


def _leave(folder: RunFolder, spec: RunSpec, place: Place, found: Preflight) -> NoReturn:
    """Name the unfit nodes, avoid them, and end this attempt. Collective."""
    facts = place.facts
    named = [f"{host}: {' '.join(what.split())}" for host, what in found.unfit.items()]
    if facts.rank == 0:
        for host, text in zip(found.unfit, named, strict=True):
            reason = f"preflight: {text}"[:_REASON_LENGTH]
            folder.note_event("failed", attempt=facts.attempt, host=host, cause="node_unfit", reason=reason)
    why = f"preflight: {'; '.join(named)}"
    logger.error("%s", why)
    scheduler = choose(folder, facts, spec.plan)
    verdict = send_back(folder, scheduler, spec, place.group, cause="node_unfit", why=why, attempt=facts.attempt)
    raise Ended(verdict.exit_code)


def _tell(folder: RunFolder, facts: RankFacts, found: Preflight, reports: Sequence[Report]) -> None:
    """Say what is wrong though no reason to stop."""
    for what in sorted({what for report in reports for what in report.lacks.values()}):
        logger.warning("preflight: %s", what)
    if found.skew_s > _SKEW_WARN_S:
        logger.warning("preflight: clocks of the nodes differ by %.1f s", found.skew_s)
        folder.note_event("degraded", attempt=facts.attempt, reason="clock_skew", detail={"nodes": found.nodes})


def _look(folder: RunFolder, spec: RunSpec, place: Place) -> Report:
    """What this rank finds on its node; the first of a node's ranks looks for all of them."""
    facts, lacks = place.facts, {}
    memory_bytes, missing = _device(spec, place)
    if missing is not None:
        lacks["device"] = missing
    if facts.local_rank == 0:
        path = folder.control / f".preflight-{facts.attempt}.{facts.node_rank}"
        checks = {"run folder": lambda: _try_write(path)}
        if spec.job.checkpoint.local and spec.site.storage.node_local is not None:
            home, size_bytes = spec.site.storage.node_local, spec.job.checkpoint.local_size
            checks["node-local space"] = lambda: _try_local(home, spec.run_id, size_bytes)
        lacks |= {name: what for name, check in checks.items() if (what := _within(_LIMIT_S, check)) is not None}
    proven = facts.rank == 0 and facts.attempt > 0 and any(e["event"] == "started" for e in folder.events())
    return Report(node=facts.node_rank, memory_bytes=memory_bytes, proven=proven, lacks=lacks)


def _device(spec: RunSpec, place: Place) -> tuple[int, str | None]:
    """(the memory of this rank's device, 0 where it is not known; what is wrong with the device)."""
    if place.device_error is not None:
        return 0, str(place.device_error)
    if place.device.name != "cuda":  # a Gaudi is this process's only once its collectives are set up
        return 0, None
    try:
        memory_bytes = place.device.memory().limit_bytes
    except RuntimeError as error:
        return 0, f"its device does not answer: {error}"
    partition = spec.site.partitions.get(spec.plan.partition)
    promised = None if partition is None else spec.site.hardware[partition.hardware].device_memory
    if promised is not None and memory_bytes < _LEAST_SHARE * promised:
        return memory_bytes, f"a device has {format_size(memory_bytes)} of memory, not {format_size(promised)}"
    return memory_bytes, None


def _within(limit_s: float, check: Callable[[], str | None]) -> str | None:
    """What `check` says, or that it has not said so in time: a filesystem that hangs does not even return an error."""
    said: list[str | None] = []
    thread = threading.Thread(target=lambda: said.append(check()), name="cfe-preflight", daemon=True)
    thread.start()
    thread.join(limit_s)
    return said[0] if said else f"a filesystem gave no answer within {limit_s:g} s"


def _try_write(path: Path) -> str | None:
    """What keeps this node from writing to the run folder. Not synced: that would wait for all that others write."""
    try:
        path.write_bytes(os.urandom(_WRITE_BYTES))
        path.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        # A full disk is no node's fault, and training goes on without its journals.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return None if full else f"it cannot write to the run folder ({error.strerror})"
    return None


def _try_local(node_local: str, run_id: str, size_bytes: int | None) -> str | None:
    """What keeps this node from taking copies of checkpoints on its own disk."""
    try:
        home = expand_home(node_local, run_id, os.environ)
        make_home(home)
        free_bytes = shutil.disk_usage(home).free
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{node_local}: {error.strerror}"
    least_bytes = min(size_bytes or _LOCAL_LEAST_BYTES, _LOCAL_LEAST_BYTES)
    if free_bytes < least_bytes and free_bytes + _held_bytes(home) < least_bytes:
        return f"{home.parent}: {format_size(free_bytes)} are free, and checkpoints need {format_size(least_bytes)}"
    return None


def _held_bytes(home: Path) -> int:
    """What copies of this run take there already: they make room for the next ones."""
    sizes = []
    for path in home.rglob("*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            sizes.append(path.lstat().st_size)
    return sum(sizes)
