"""One process a node, where a launcher starts the ranks: it gives the launcher its command line and sees it through.

The scheduler signals the agent; on sites that signal only a step's direct children, nobody else. The launcher is
started with stop signals blocked, so that the half minute never begins after which it would kill its ranks: the agent
signals the ranks themselves.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cfe_hpc import log
from cfe_hpc.config.run import RunSpec
from cfe_hpc.ranks.child import Child
from cfe_hpc.ranks.command import decided, exit_code, see_through
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.ranks.launchers import launch_words, shutdown_timeout_s
from cfe_hpc.ranks.rendezvous import Meeting, meet
from cfe_hpc.runfolder import RunFolder

__all__ = ["run_agent"]

logger = logging.getLogger(__name__)

_POLL_S = 0.1


def run_agent(folder: RunFolder, spec: RunSpec, facts: RankFacts) -> int:
    """Start this node's ranks through the run's launcher and see them to their end. Each node's agent calls it.

    Args:
        facts: the agent's: its rank is the node's, its world the nodes.

    Returns:
        The status to exit with. What becomes of the run is said in the run folder: by the ranks of an entry, by the
        first node's agent for a command.
    """
    log.configure(rank=facts.rank)
    meeting = meet(facts, token=spec.run_id, control_ports=spec.plan.restarts + 1)
    environment = {**os.environ, **_for_ranks(folder, spec, facts, meeting)}
    with _scratch(spec, facts) as scratch:
        argv = launch_words(spec, facts, meeting, os.environ, scratch=scratch)
        logger.info("node %d of %d, attempt %d: %s", facts.rank, facts.num_nodes, facts.attempt, " ".join(argv))
        if spec.job.command is not None:
            return see_through(folder, spec, facts, argv, environment)
        return exit_code(_attend(folder, spec, facts, Child(argv, environment, launcher=True)))


@contextmanager
def _scratch(spec: RunSpec, facts: RankFacts) -> Iterator[Path]:
    """A folder on this node that is gone at the end; what an attempt that was killed has left goes now."""
    prefix = f"cfe-{spec.run_id}.node{facts.rank}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _for_ranks(folder: RunFolder, spec: RunSpec, facts: RankFacts, meeting: Meeting) -> dict[str, str]:
    """What the ranks cannot learn from their launcher."""
    return {
        # All ranks of a node have its one task's cores together; torchrun would give each a single thread.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(spec.plan.cpus_per_device)),
        # The name of the option in those releases that have no option.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(shutdown_timeout_s(spec)),
        "CFE_RUN_DIR": str(folder.path),
        "CFE_SCHEDULER": facts.scheduler,
        "CFE_HOSTS": ",".join(facts.hosts),
        "CFE_NODE_RANK": str(facts.node_rank),
        "CFE_NUM_NODES": str(facts.num_nodes),
        "CFE_ATTEMPT": str(facts.attempt),
        "CFE_JOB_ID": facts.job_id,
        "CFE_CONTROL_PORT": str(meeting.control_port),
    }


def _attend(folder: RunFolder, spec: RunSpec, facts: RankFacts, child: Child) -> int:
    """Wait for the launcher's end; its status.

    Ranks of an entry end together, when it is written down what becomes of the run. One that ends before that has
    failed, and the others, deaf to TERM until their step is done, may wait for it for ever: as srun does, they are
    killed after the site's kill_wait.
    """
    failed_s: float | None = None
    while (status := child.poll()) is None:
        if not child.roster.some_have_ended():
            failed_s = None
        elif failed_s is None:
            failed_s = time.monotonic()
        elif time.monotonic() > failed_s + spec.site.slurm.kill_wait:
            failed_s = float("inf")
            if not decided(folder, facts.attempt):
                logger.error("a rank of this node has failed, and the others do not end: killed")
                child.roster.kill()
        time.sleep(_POLL_S)
    return status
