"""The door to a scheduler: one small protocol, two implementations (Slurm, and our own supervisor here)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from cfe_hpc.config.run import RunSpec
from cfe_hpc.launch.states import JobState
from cfe_hpc.runfolder import RunFolder

__all__ = ["Backend", "backend_for"]


class Backend(Protocol):
    """What the verbs ask of a scheduler. Jobs are the records of control/job: dicts with `job_id` at least."""

    def preview(self, spec: RunSpec, folder: RunFolder) -> str:
        """The text of the script that `submit` would send; touches nothing and needs no scheduler."""

    def submit(self, spec: RunSpec, folder: RunFolder, *, after: Sequence[RunFolder] = ()) -> str:
        """Write submission.sh and send it, to start when all runs of `after` have completed; the job id, recorded in
        control/.

        Raises:
            SchedulerError: it was refused, or the scheduler cannot be reached.
            UsageError: one of `after` has ended otherwise.
        """

    def resubmit(self, spec: RunSpec, folder: RunFolder, *, next_attempt: int, after: Sequence[RunFolder] = ()) -> str:
        """Send the folder's submission.sh once more, as a job whose first attempt has number `next_attempt`, to start
        when all runs of `after`, none of which has ended, have completed."""

    def submit_tasks(
        self, spec: RunSpec, sweep: RunFolder, tasks: Sequence[int], *, after: Sequence[RunFolder] = ()
    ) -> list[str]:
        """Send tasks of a sweep by the submission.sh that `submit` wrote, to start when all runs of `after`, none of
        which has ended, have completed; the ids of the jobs, recorded in control/.

        Raises:
            SchedulerError: as `submit`; nothing was sent.
        """

    def states(self, jobs: Sequence[dict[str, Any]]) -> dict[str, JobState]:
        """Job id to state, for those that the scheduler still knows; one call for all of them."""

    def cancel(self, job: dict[str, Any]) -> None:
        """End the job for good. Nothing happens when it has ended."""

    def request_save(self, job: dict[str, Any], spec: RunSpec) -> None:
        """Send the running ranks the signal that makes them save and end the attempt."""

    def release(self, job: dict[str, Any]) -> None:
        """Let a job that is held in the queue start again."""


def backend_for(scheduler: str) -> Backend:
    """The backend of a site's `scheduler`, "slurm" or "local"."""
    if scheduler == "slurm":
        from cfe_hpc.launch.slurm import SlurmBackend

        return SlurmBackend()
    from cfe_hpc.launch.local import LocalBackend

    return LocalBackend()
