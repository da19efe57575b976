"""Stops where Slurm tracks processes by cgroups, as most real clusters do: only a step's direct children hear of them,
and a step out of memory is killed by the kernel. CFE_TEST_FULL=1 runs them; they need a machine that lends cgroups v1,
and no other such cluster on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
from slurm.cluster import why_impossible
from spine.stage import Stage, assert_counted, ended, on_one_cluster, reasons

# Not marked `slurm`: CI must not need cgroups, and takes a skipped test of that mark for a failure.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not os.environ.get("CFE_TEST_FULL"), reason="CFE_TEST_FULL is not set"),
    pytest.mark.skipif(why_impossible() is not None, reason=f"{why_impossible()}"),
    pytest.mark.skipif(not os.access("/sys/fs/cgroup/freezer/tasks", os.W_OK), reason="no cgroups v1 here"),
]

SCRIPT = "import cfe_hpc, entries\n\nentries.counting(cfe_hpc.join())\n"


def _preempted_twice(stage: Stage, **tables: object) -> None:
    (stage.folder / "script.py").write_text(SCRIPT)
    run = stage.submit("spot", nodes=2, **tables)
    for attempt in range(2):
        run.wait_step(run.step() + 3, attempt=attempt)
        stage.cluster.preempt_once(run.job_id)
    assert_counted(run, attempts=3)
    assert stage.cluster.wait_for_end(run.job_id) == "COMPLETED"
    assert reasons(run) == ["preempted", "preempted"]


def ranks_under_srun(stage: Stage) -> None:
    _preempted_twice(stage)


def ranks_under_torchrun(stage: Stage) -> None:
    _preempted_twice(stage, launch={"launcher": "torchrun"})


def ranks_below_a_shell_of_the_users_own(stage: Stage) -> None:
    _preempted_twice(stage, command=["sh", "-c", f"{sys.executable} script.py; exit $?"])


def a_rank_that_takes_too_much_memory(stage: Stage) -> None:
    resources = {"nodes": 2, "devices_per_node": 1, "cpus_per_device": 8, "time": "20m", "partition": "gpu"}
    run = stage.submit(
        "gpu",
        entry="entries_chaos:bulky",
        resources={**resources, "memory": "1GiB"},
        checkpoint={"every_steps": 5},
        params={"steps": 40, "state_bytes": 1 << 20, "pause_s": 0.15},
    )
    (run.folder.path / "chaos").mkdir()
    run.wait_step(8, attempt=0)
    (run.folder.path / "chaos" / "memory.1").touch()
    stage.requeued(run, 1)
    result = ended(run, "COMPLETED")
    assert (result["attempts"], result["metrics"]["total"]) == (2, sum(range(40))), run.diagnosis()
    assert reasons(run) == ["oom_host"], run.diagnosis()


CASES: list[Callable[[Stage], None]] = [
    ranks_under_srun,
    ranks_under_torchrun,
    ranks_below_a_shell_of_the_users_own,
    a_rank_that_takes_too_much_memory,
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[None]]]:
    """Each case's outcome, by its name; all of them go on at the same time."""
    cases = {case.__name__: case for case in CASES}
    options = ("--nodes", str(2 * len(CASES)), "--gaudi-nodes", "0", "--cgroups")
    with on_one_cluster(cases, tmp_path_factory.mktemp("cgroups"), *options, at_a_time=len(CASES)) as found:
        yield found


@pytest.mark.parametrize("name", [case.__name__ for case in CASES])
def test_where_only_direct_children_are_signalled(outcomes: dict[str, Future[None]], name: str) -> None:
    outcomes[name].result(timeout=550)
