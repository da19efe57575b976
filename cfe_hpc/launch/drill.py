"""A drill: a running run gets exactly the signals of a preemption, and everything that must follow is looked for."""

from __future__ import annotations

import getpass
import os
import shlex
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from cfe_hpc.checkpoints.folders import step_name
from cfe_hpc.checkpoints.keeping.verified import verify
from cfe_hpc.checkpoints.reader import read_manifest
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import CorruptCheckpoint, SchedulerError, UsageError
from cfe_hpc.files import read_ndjson
from cfe_hpc.launch.backend import backend_for
from cfe_hpc.launch.jobs import latest_attempt, latest_job
from cfe_hpc.launch.script import prologue
from cfe_hpc.launch.states import JobState
from cfe_hpc.launch.verdict import Check, Evidence, checks, times_s
from cfe_hpc.process import CommandError, run
from cfe_hpc.ranks import poke
from cfe_hpc.ranks.nodelist import expand
from cfe_hpc.ranks.successor import clean_environment
from cfe_hpc.recovery.ledger import summarise
from cfe_hpc.runfolder import RunFolder

__all__ = ["Report", "drill"]

_POLL_S = 0.2
_SQUEUE_POLL_S = 2.0
_COMMAND_TIMEOUT_S = 60.0
_TAIL_BYTES = 1 << 16
_SETTLED_S = 1.5
"""On a node that it was just taken from, Slurm (22.05) fails to start a job within the same second."""

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of a drill.

    Attributes:
        signal: what the job was sent.
        direct: it went to direct children of the scheduler's daemons alone.
        times_s: seconds from the telling to what followed, by name.
    """

    run_id: str
    job_id: str
    attempt: int
    signal: str
    direct: bool
    checks: tuple[Check, ...]
    times_s: dict[str, float]

    @property
    def passed(self) -> bool:
        return all(check.ok for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {**asdict(self), "passed": self.passed}


def drill(folder: RunFolder, *, direct: bool, timeout_s: float, say: Say) -> Report:
    """Tell a run to stop as its site would, and see it saved, requeued, resumed and training on.

    Args:
        direct: signal only the direct children of slurmstepd (of the supervisor, on this machine), as
            proctrack/cgroup does.
        timeout_s: seconds from the telling until what has not been seen counts as missing.
        say: gets a line for each stage.

    Raises:
        UsageError: no attempt of the run is training now.
        SchedulerError: the scheduler cannot be reached, or refused.
    """
    spec = RunSpec.read(folder.run_toml)
    watch = _Watch(folder, timeout_s)
    job, known = _running(folder, spec)
    attempt = latest_attempt(folder)
    if attempt is None:
        raise UsageError(
            f"{folder.run_id}: its ranks are only just starting; drill it when `cfe-hpc status` has a step"
        )
    started = _started(folder, attempt)
    # A `command` counts its steps in the run from when it joins.
    joined = spec.job.entry is not None or started.get("total_steps") is not None
    if joined and not watch.wait(lambda: _beat(folder, attempt, after=-1)):
        raise UsageError(f"{folder.run_id}: attempt {attempt} has done no step within {timeout_s:g} s; try again later")
    lost_before = summarise(folder).lost_steps
    signame = spec.plan.signal if spec.plan.preemption.user_signal and spec.site.scheduler == "slurm" else "TERM"
    watch.begin()
    folder.note(f"drill-{attempt}", "a drill begins", user=getpass.getuser(), signal=signame, direct=direct)
    num_ranks = started.get("world_size", spec.plan.world_size)  # an elastic attempt may have fewer than planned
    seen = Evidence(attempt=attempt, told_s=time.time(), joined=joined, num_ranks=num_ranks)
    say(f"{signame} to job {known.job_id}" + (", to its tasks alone" if direct else ""))
    _tell(folder, spec, job, known, signame, direct=direct)
    _follow(folder, spec, watch, seen, say)
    seen.events = watch.events()
    if seen.first_beat is not None:
        seen.lost_steps = summarise(folder).lost_steps - lost_before
    return Report(
        run_id=folder.run_id,
        job_id=known.job_id,
        attempt=attempt,
        signal=signame,
        direct=direct,
        checks=tuple(checks(seen)),
        times_s=times_s(seen),
    )


class _Watch:
    """The run's events since the drill began, and the drill's clock."""

    def __init__(self, folder: RunFolder, timeout_s: float) -> None:
        self._folder, self._timeout_s = folder, timeout_s
        self._begun = 0
        self._deadline_s = time.monotonic() + timeout_s

    def begin(self) -> None:
        """What comes now counts, and the time runs from now."""
        self._begun = sum(1 for _ in self._folder.events())
        self._deadline_s = time.monotonic() + self._timeout_s

    def events(self) -> list[dict[str, Any]]:
        return list(self._folder.events())[self._begun :]

    def wait(self, ready: Callable[[], T | None], *, every_s: float = _POLL_S) -> T | None:
        """Ask until there is an answer; None when the time is over, or the run is."""
        while (answer := ready()) is None:
            if time.monotonic() > self._deadline_s or self._folder.result() is not None:
                return ready()
            time.sleep(every_s)
        return answer


def _running(folder: RunFolder, spec: RunSpec) -> tuple[dict[str, Any], JobState]:
    job = latest_job(folder)
    known = None if job is None else backend_for(spec.site.scheduler).states([job]).get(str(job["job_id"]))
    if job is None or known is None or known.state != "RUNNING":
        state = (folder.result() or {}).get("state") or ("gone" if known is None else known.state)
        raise UsageError(f"{folder.run_id}: is not running ({state}); a drill needs a run that trains")
    return job, known


def _started(folder: RunFolder, attempt: int) -> dict[str, Any]:
    """What an attempt said of itself when it started; of several times, the last."""
    facts: dict[str, Any] = {}
    for event in folder.events():
        if event["event"] == "started" and event.get("attempt") == attempt:
            facts.update(event.get("detail") or {})
    return facts


def _beat(folder: RunFolder, attempt: int, *, after: int) -> dict[str, Any] | None:
    """The first heartbeat of an attempt beyond a step, as far as the end of the file still holds it."""
    for beat in read_ndjson(folder.heartbeat_path, last_bytes=_TAIL_BYTES):
        step = beat.get("step")
        if beat.get("attempt") == attempt and isinstance(step, int) and step > after:
            return beat
    return None


def _tell(
    folder: RunFolder, spec: RunSpec, job: dict[str, Any], known: JobState, signame: str, *, direct: bool
) -> None:
    if spec.site.scheduler != "slurm":
        if direct:
            poke.poke(list(poke.children_of_daemons(folder.path, supervisor=job["pid"])), signame)
        else:
            backend_for("local").cancel(job)  # TERM to the supervisor: without control/cancel, a preemption
        return
    if direct:
        _ask(_poke_command(folder, spec, known, signame))
        return
    for name in ("CONT", signame):
        _ask(["scancel", f"--signal={name}", known.job_id])


def _poke_command(folder: RunFolder, spec: RunSpec, known: JobState, signame: str) -> list[str]:
    """A step of one task on each of the job's nodes, beside the ranks, in the environment of the job's script."""
    nodes = len(expand(known.nodes))
    task = [spec.provenance.python, "-m", "cfe_hpc.ranks.poke", str(folder.path), signame]
    script = "\n".join([*prologue(spec, folder), f"exec {shlex.join(task)}"])
    step = ["srun", "--overlap", f"--jobid={known.job_id}", f"--nodes={nodes}", f"--ntasks={nodes}"]
    return [*step, "--ntasks-per-node=1", "bash", "-c", script]


def _ask(argv: list[str]) -> None:
    try:
        run(argv, timeout_s=_COMMAND_TIMEOUT_S, env=clean_environment(os.environ))
    except CommandError as error:
        raise SchedulerError(f"{error}; drill from a machine that has Slurm's commands, as the run's user") from error


def _follow(folder: RunFolder, spec: RunSpec, watch: _Watch, seen: Evidence, say: Say) -> None:
    """Wait for one thing after the other; what is not seen is missing in `seen`."""

    def happened(name: str, *, later: bool = False) -> dict[str, Any] | None:
        seen.events = watch.events()
        found = seen.event(name, later=later)
        return None if found is None else dict(found)

    if watch.wait(lambda: happened("requeued")) is None:
        return
    say("requeued")
    with ThreadPoolExecutor(1) as beside:
        # Beside the wait: the next attempt's rotation may take this checkpoint away before long.
        looked: Future[tuple[int, str | None]] | None = None
        if seen.step is not None and seen.event("checkpoint_saved") is not None:
            looked = beside.submit(_look, folder, spec, watch, folder.checkpoints / step_name(seen.step))
        _hurry(folder, spec, watch, seen.attempt)
        if watch.wait(lambda: happened("started", later=True)) is not None:
            say("started again")
            resumed = watch.wait(lambda: happened("resumed", later=True)) if seen.joined else None
            if resumed is not None:
                step = int(resumed.get("step", 0))
                seen.first_beat = watch.wait(lambda: _beat(folder, seen.attempt + 1, after=step))
        seen.checkpoint = None if looked is None else looked.result()


def _look(folder: RunFolder, spec: RunSpec, watch: _Watch, checkpoint: Path) -> tuple[int, str | None]:
    """(ranks that saved it, why it cannot be used or None)."""
    if spec.job.checkpoint.local:  # it may be on the nodes alone, until the next attempt brings it home
        watch.wait(lambda: checkpoint.exists() or None)
    reason = verify(checkpoint, folder.run_id)
    try:
        return read_manifest(checkpoint, folder.run_id).identity.world_size, reason
    except CorruptCheckpoint as error:
        return 0, reason or str(error)


def _hurry(folder: RunFolder, spec: RunSpec, watch: _Watch, attempt: int) -> None:
    """Let a requeued job, or its successor, start as soon as there is room: Slurm has it wait for up to two minutes."""
    if spec.site.scheduler != "slurm":
        return
    backend = backend_for("slurm")

    def waiting() -> str | None:
        job = latest_job(folder)
        known = None if job is None else backend.states([job]).get(str(job["job_id"]))
        started = latest_attempt(folder) != attempt
        return known.job_id if known is not None and (known.state == "PENDING" or started) else None

    job_id = watch.wait(waiting, every_s=min(_SQUEUE_POLL_S, spec.site.slurm.poll_interval))
    if job_id is None:
        return
    time.sleep(_SETTLED_S)
    # Refused where it is another user's job, or already running: then it starts when it does.
    run(["scontrol", "update", f"JobId={job_id}", "StartTime=now"], timeout_s=_COMMAND_TIMEOUT_S, check=False)
