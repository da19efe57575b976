"""One run of a campaign: submitted, hurt fault by fault, and brought back each time."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_disks import Disk
from slurm.cluster import Cluster
from spine.harness import SMALL, LiveRun, site_file
from spine.stage import Stage, rank_pids

from chaos.kinds import kind
from chaos.plan import INTERVAL, STEPS, Fault, RunPlan

__all__ = ["ACTS", "Delivered", "Surroundings", "Ward"]

_PACE_S, _SLOW_S = 0.2, 1.0
_PROGRESS_S, _REQUEUED_S = 120.0, 150.0
_LOOK_S, _SILENT_S = 2.0, 5.0
_STATE_BYTES = 2 << 20
# A rank of the training alone takes half of it; what `memory` takes, twice.
_MEMORY = "1500MiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the runs of a campaign share.

    Attributes:
        data: token file of the training.
        disk: a small filesystem for the runs of a stage; None where none is to be filled.
        pushgateway: process id and URL of the one that runs push to; None without.
    """

    data: Path
    disk: Callable[[Path], contextlib.AbstractContextManager[Disk]] | None = None
    pushgateway: tuple[int, str] | None = None


@dataclass(slots=True, kw_only=True)
class Delivered:
    """A fault that has hurt its run: the attempt it ended, or in which it came."""

    fault: Fault
    attempt: int
    seconds: float


@dataclass(slots=True)
class Ward:
    """A run in the hands of a campaign."""

    stage: Stage
    plan: RunPlan
    around: Surroundings
    delivered: list[Delivered] = field(default_factory=list)
    disk: Disk | None = None
    submitted: LiveRun | None = None
    looked_s: float = 0.0

    @property
    def run(self) -> LiveRun:
        assert self.submitted is not None, "not submitted yet"
        return self.submitted

    @property
    def cluster(self) -> Cluster:
        return self.stage.cluster

    @contextlib.contextmanager
    def equipped(self) -> Iterator[None]:
        """Have what its faults need; the run folder is there only within."""
        needs_disk = any(fault.kind == "full-disk" for fault in self.plan.faults)
        if not needs_disk or self.around.disk is None:
            yield
            return
        with self.around.disk(self.stage.folder / "disk") as self.disk:
            yield

    def go_through(self) -> None:
        """Submit, hurt, and wait for the end. What became of it is in the run folder.

        Raises:
            AssertionError: something that was to follow a fault did not, in time.
        """
        self.submitted = self._submit()
        for fault in self.plan.faults:
            began_s = time.monotonic()
            attempt = self._ready(fault)
            ACTS[fault.kind](self, fault)
            self.delivered.append(Delivered(fault=fault, attempt=attempt, seconds=time.monotonic() - began_s))
            if self.ended():
                break
        self.run.pace(0)
        self.run.wait(lambda: self._hurry() or self.ended(), 180, "ended")
        self.cluster.wait_for_end(self.run.job_id)

    def _submit(self) -> LiveRun:
        plan, disk, gateway = self.plan, self.disk, self.around.pushgateway
        params: dict[str, Any] = {"steps": STEPS, "state_bytes": _STATE_BYTES, "pause_s": 0.0}
        if plan.workload == "training":
            params = {**SMALL, "steps": STEPS, "eval_every": 50, "data": str(self.around.data)}
        resources = {"nodes": 2, "devices_per_node": 1, "cpus_per_device": 8, "time": "20m", "partition": "spot"}
        if any(fault.kind == "memory" for fault in plan.faults):
            resources["memory"] = _MEMORY
        changes = {} if disk is None else {"storage": {"runs_root": str(disk.path)}}
        tables: dict[str, Any] = {
            "name": f"chaos-{plan.number}",
            "entry": f"entries_chaos:{plan.workload}",
            "resources": resources,
            "engine": {"kind": "torch"},
            "checkpoint": {"every_steps": INTERVAL, "async": plan.beside},
            # Short where a rank is stopped; elsewhere what takes long on a busy machine is no hang.
            "recovery": {
                "hang_after": "6s" if any(fault.kind == "stop-rank" for fault in plan.faults) else "10m",
                "communication_errors": 9,
                **plan.budgets,
            },
            "params": params,
        }
        if gateway is not None:
            tables["metrics"] = {"pushgateway": gateway[1]}
        run = self.stage.submit("spot", site=site_file(self.stage.folder, **changes), **tables)
        run.pace(_PACE_S)
        (run.folder.path / "chaos").mkdir()
        return run

    # Before and after a fault

    def _ready(self, fault: Fault) -> int:
        """Wait until an attempt that no fault has ended yet has left the run further than it found it; its number."""
        ended = max((each.attempt for each in self.delivered if kind(each.fault.kind).reasons), default=-1)

        def there() -> bool:
            self._hurry()
            attempt = self.run.attempt()
            events = [event for event in self.run.events("checkpoint_saved") if event["attempt"] == attempt]
            saved = [event["step"] for event in events if "seconds" in event]
            beats = [beat for beat in self.run.folder.heartbeats() if beat["attempt"] == attempt]
            return attempt > ended and bool(saved and beats) and self._is_time(saved, beats, fault.after)

        self.run.wait(there, _PROGRESS_S, "training on")
        return self.run.attempt()

    def _hurry(self) -> None:
        """Let an attempt begin that has sent itself back, off a node that is avoided."""
        if time.monotonic() - self.looked_s < _LOOK_S or self.ended() or self._trains():
            return
        self.looked_s = time.monotonic()
        if self.cluster.state(self.run.job_id) == "PENDING":
            with contextlib.suppress(AssertionError):  # it has just begun
                self.cluster.hurry(self.run.job_id)

    def _trains(self) -> bool:
        """Whether it has said so lately: then the controller, which may be paused, need not be asked."""
        beats = self.run.folder.heartbeat_path
        return beats.exists() and time.time() - beats.stat().st_mtime < _SILENT_S

    @staticmethod
    def _is_time(saved: list[int], beats: list[dict[str, Any]], after: int) -> bool:
        return saved[-1] + after <= beats[-1]["step"] < saved[-1] + INTERVAL

    def ended(self) -> bool:
        """Whether the run is held, or ended otherwise."""
        return self.run.folder.result() is not None

    def _requeued(self, before: int) -> bool:
        """Wait until Slurm has the job back in its queue, or the run has ended; whether it is to go on."""

        def there() -> bool:
            return self.cluster.restarts(self.run.job_id) > before or self.ended()

        self.run.wait(there, _REQUEUED_S, "requeued or held")
        return not self.ended()

    def end_attempt(self, act: Callable[[], object], *, between: Callable[[], None] = lambda: None) -> None:
        """Do something that ends the attempt, see the job requeued, and let it start again."""
        before = self.cluster.restarts(self.run.job_id)
        act()
        if self._requeued(before):
            between()
            self.cluster.resume(self.run.job_id, timeout_s=_REQUEUED_S)

    def node(self, rank: int) -> str:
        """The node of a rank."""
        nodes = self.cluster.job(self.run.job_id)["NodeList"]
        return self.cluster.scontrol("show", "hostnames", nodes).split()[rank]

    def order(self, word: str, fault: Fault) -> None:
        """Have a rank hurt itself in its next step."""
        (self.run.folder.path / "chaos" / f"{word}.{fault.rank}").touch()


# The acts, one for each kind


def _preempt(ward: Ward, fault: Fault, between: Callable[[], None] = lambda: None) -> None:
    sent: list[str] = []

    def free() -> None:
        ward.cluster.scancel(*sent)
        ward.cluster.wait_for_end(sent[0])
        between()

    try:
        ward.end_attempt(lambda: sent.append(ward.cluster.preempt(ward.run.job_id)), between=free)
    finally:
        ward.cluster.scancel(*sent)


def _corrupt(ward: Ward, fault: Fault) -> None:
    _preempt(ward, fault, between=lambda: _flip_a_byte(ward.run))


def _flip_a_byte(run: LiveRun) -> None:
    newest = max(path for path in run.folder.checkpoints.glob("step-?????????") if (path / "manifest.json").exists())
    shard = max((path for path in newest.rglob("*") if path.suffix != ".json" and path.is_file()), key=_size)
    with open(shard, "r+b") as stream:
        stream.seek(_size(shard) // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))


def _size(path: Path) -> int:
    return path.stat().st_size


def _requeue(ward: Ward, fault: Fault) -> None:
    ward.end_attempt(lambda: ward.stage.cfe("requeue", str(ward.run.folder.path)))


def _scontrol_requeue(ward: Ward, fault: Fault) -> None:
    ward.end_attempt(lambda: ward.cluster.scontrol("requeue", ward.run.job_id))


def _time_limit(ward: Ward, fault: Fault) -> None:
    job_id = ward.run.job_id
    ward.run.pace(_SLOW_S)
    started = time.mktime(time.strptime(ward.cluster.job(job_id)["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    minutes = int((time.time() - started) // 60) + 1

    def more() -> None:
        ward.run.pace(_PACE_S)
        ward.cluster.scontrol("update", f"JobId={job_id}", "TimeLimit=20")

    ward.end_attempt(lambda: ward.cluster.scontrol("update", f"JobId={job_id}", f"TimeLimit={minutes}"), between=more)


def _signal(number: int) -> Callable[[Ward, Fault], None]:
    def act(ward: Ward, fault: Fault) -> None:
        ward.end_attempt(lambda: os.kill(rank_pids(ward.run)[fault.rank], number))

    return act


def _lose(hurt: Callable[[Cluster, str], None]) -> Callable[[Ward, Fault], None]:
    def act(ward: Ward, fault: Fault) -> None:
        node = ward.node(fault.rank)
        ward.run.pace(_SLOW_S)
        try:
            ward.end_attempt(lambda: hurt(ward.cluster, node), between=lambda: ward.run.pace(_PACE_S))
        finally:
            ward.cluster.start_node(node)

    return act


def _nan(ward: Ward, fault: Fault) -> None:
    before = len(ward.run.events("rolled_back"))
    ward.order("nan", fault)
    ward.run.wait(lambda: len(ward.run.events("rolled_back")) > before or ward.ended(), 60, "rolled back or held")


def _memory(ward: Ward, fault: Fault) -> None:
    ward.end_attempt(lambda: ward.order("memory", fault))


def _full_disk(ward: Ward, fault: Fault) -> None:
    assert ward.disk is not None, "the campaign has no disks"
    ballast = ward.disk.fill()
    time.sleep(2 * INTERVAL * _PACE_S)  # at least one save comes due
    ballast.unlink()


def _no_pushgateway(ward: Ward, fault: Fault) -> None:
    assert ward.around.pushgateway is not None, "the campaign has no Pushgateway"
    os.kill(ward.around.pushgateway[0], signal.SIGSTOP)
    time.sleep(INTERVAL * _PACE_S)
    os.kill(ward.around.pushgateway[0], signal.SIGCONT)


def _no_controller(ward: Ward, fault: Fault) -> None:
    def act() -> None:
        with ward.cluster.controller_paused():
            os.kill(rank_pids(ward.run)[fault.rank], signal.SIGTERM)
            time.sleep(20)

    ward.end_attempt(act)


ACTS: dict[str, Callable[[Ward, Fault], None]] = {
    "preempt": _preempt,
    "requeue": _requeue,
    "scontrol-requeue": _scontrol_requeue,
    "time-limit": _time_limit,
    "kill-rank": _signal(signal.SIGKILL),
    "kill-slurmd": _lose(Cluster.kill_slurmd),
    "kill-node": _lose(Cluster.kill_node),
    "stop-rank": _signal(signal.SIGSTOP),
    "nan": _nan,
    "memory": _memory,
    "full-disk": _full_disk,
    "corrupt-shard": _corrupt,
    "no-pushgateway": _no_pushgateway,
    "no-controller": _no_controller,
}
