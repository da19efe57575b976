"""Why an attempt failed, from run folders as ranks, srun and slurmstepd leave them."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from cfe_hpc.recovery.attempts import KILLED
from cfe_hpc.recovery.evidence import Fault, find, first_word, oom_kills, slurm_end
from cfe_hpc.runfolder import RunFolder

GLOO = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:10895"


class Scene:
    """A run folder, filled step by step."""

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        for sub in (self.folder.logs, self.folder.control):
            sub.mkdir(parents=True)

    def failed(self, rank: int, reason: str, *, at_s: float = 0.0, attempt: int = 0, **fields: Any) -> None:
        fields = {"host": f"n{rank}", "rank": rank, "time": f"2026-01-31T10:00:{at_s:06.3f}Z", **fields}
        self.folder.append_event("failed", attempt=attempt, reason=reason, **fields)

    def log(self, rank: int, *lines: str, attempt: int = 0) -> None:
        (self.folder.logs / f"41.{attempt}.{rank}.err").write_text("".join(f"{line}\n" for line in lines))

    def batch(self, *lines: str) -> None:
        with open(self.folder.logs / "41.batch.err", "a", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in lines)

    def find(self, attempt: int = 0, **known: Any) -> Fault:
        return find(self.folder, attempt=attempt, **known)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "run")


def test_the_echoes_of_an_error_come_after_it_whatever_the_clocks_say(scene: Scene) -> None:
    scene.failed(0, GLOO, at_s=1.0)
    scene.failed(2, GLOO, at_s=1.1)
    scene.failed(1, "ValueError: bad batch", at_s=3.0)
    fault = scene.find()
    assert (fault.cause, fault.why, fault.rank, fault.host) == ("failed", "ValueError: bad batch", 1, "n1")
    word = first_word(scene.folder.events(), attempt=0)
    assert word is not None and word["rank"] == 1


def test_of_two_errors_the_earlier_one_counts_by_clocks_set_right(scene: Scene) -> None:
    nodes = [{"host": "n0", "skew_s": 0.0}, {"host": "n1", "skew_s": 9.0}]
    scene.folder.append_event("started", attempt=0, detail={"preflight": {"nodes": nodes}})
    scene.failed(0, "DataError: tokens.h5: damaged", at_s=5.0)
    scene.failed(1, "NonFinite: loss is nan", at_s=10.0)
    assert scene.find().cause == "nan"


def test_only_echoes_are_an_error_of_communication(scene: Scene) -> None:
    scene.failed(1, GLOO, at_s=2.0)
    scene.failed(0, GLOO, at_s=1.0)
    assert (scene.find().cause, scene.find().rank) == ("communication", 0)


def test_a_rank_that_was_killed_explains_the_echoes(scene: Scene) -> None:
    scene.log(0, "one", "two")
    scene.failed(1, GLOO)
    scene.batch("srun: error: n7: task 0: Killed", "srun: error: n8: task 1: Exited with exit code 1")
    fault = scene.find(status=137)
    assert (fault.cause, fault.why, fault.rank, fault.host) == ("failed", "rank 0: killed", 0, "n7")
    assert (fault.log, fault.line) == ("logs/41.0.0.err", "two")


def test_ranks_that_srun_ends_explain_nothing(scene: Scene) -> None:
    scene.log(0, GLOO)
    scene.failed(0, GLOO)
    scene.batch("srun: error: n7: task 0: Exited with exit code 1", "srun: error: n8: task 1: Killed")
    assert scene.find().cause == "communication"


@pytest.mark.parametrize(
    ("said", "rank", "host"),
    [
        (
            "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=41.0. Some of the tasks have been OOM Killed.",
            1,
            "n1",
        ),
        ("srun: error: n1: task 1: Out Of Memory", 1, "n1"),
        # It kills all of the step there: srun's first word need not be of the one that took too much.
        ("slurmstepd: error: StepId=41.0 exceeded memory limit (612345 > 512000), being killed", None, None),
        ("slurmstepd-n2: error: StepId=41.0 exceeded memory limit (612345 > 512000), being killed", None, "n2"),
    ],
)
def test_a_lack_of_memory_that_slurm_tells_of_wins_over_a_kill(
    scene: Scene, said: str, rank: int | None, host: str | None
) -> None:
    scene.log(1, "step 3")
    scene.failed(0, GLOO)
    scene.batch(said, "srun: error: n1: task 1: Killed")
    fault = scene.find(status=137)
    assert (fault.cause, fault.rank, fault.host) == ("oom_host", rank, host)
    assert (fault.log, fault.line) == ("logs/41.batch.err", said)


def test_counts_of_the_kernel_explain_a_kill(scene: Scene) -> None:
    scene.failed(1, "rank 1 was killed by SIGKILL", detail=KILLED)
    scene.failed(0, GLOO)
    assert scene.find().cause == "failed"
    assert (scene.find(oom_kills=1).cause, scene.find(oom_kills=1).rank) == ("oom_host", 1)


def test_a_helper_that_the_kernel_killed_does_not_hide_an_error_that_is_known(scene: Scene) -> None:
    scene.failed(0, "DataError: tokens.h5: damaged")
    assert scene.find(oom_kills=1).cause == "data"


def test_a_node_that_srun_lost_explains_its_peers_errors(scene: Scene) -> None:
    scene.log(0, GLOO)
    scene.failed(0, GLOO)
    scene.batch("srun: error: Node failure on n8", "srun: error: n7: task 0: Killed")
    assert (scene.find().cause, scene.find().host) == ("node_failure", "n8")


def test_what_slurm_said_of_an_earlier_attempt_is_not_of_this_one(scene: Scene) -> None:
    scene.log(0, "one")
    scene.batch("srun: error: n1: task 0: Out Of Memory")
    size_bytes = (scene.folder.logs / "41.batch.err").stat().st_size
    scene.folder.promise("ended-0", status=137, job_id="41", batch_err_bytes=size_bytes)
    scene.log(0, "two", attempt=2)
    scene.batch("srun: error: n1: task 0: Segmentation fault")
    assert scene.find().cause == "oom_host"
    assert (scene.find(2).cause, scene.find(2).why) == ("failed", "rank 0: segmentation fault")


def test_the_log_of_a_command_says_more_than_its_status(scene: Scene) -> None:
    scene.log(0, "step 1", GLOO, "Traceback", attempt=1)
    scene.log(1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.", "bye", attempt=1)
    scene.failed(0, "exit status 1", at_s=1.0, attempt=1)
    scene.failed(1, "exit status 1", at_s=2.0, attempt=1)
    fault = scene.find(1)
    assert (fault.cause, fault.rank) == ("oom_device", 1)
    assert fault.why == "exit status 1: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert fault.line == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."


WATCHDOG = "[rank1]:[E321 ProcessGroupNCCL.cpp:607] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(…)"


def test_a_rank_that_aborts_has_said_why_to_its_log(scene: Scene) -> None:
    scene.log(1, "step 3", WATCHDOG, "terminate called after throwing an instance of 'c10::DistBackendError'")
    scene.failed(0, GLOO)
    scene.batch("srun: error: n8: task 1: Aborted (core dumped)")
    assert (scene.find().cause, scene.find().rank, scene.find().line) == ("hang", 1, WATCHDOG)
    scene.failed(1, "rank 1 was killed by SIGABRT", detail=KILLED)
    assert (scene.find().cause, scene.find().rank) == ("hang", 1)


def test_the_log_of_a_rank_that_was_killed_says_nothing_of_it(scene: Scene) -> None:
    scene.log(1, "OSError: [Errno 28] No space left on device, trying again")
    scene.failed(1, "rank 1 was killed by SIGKILL", detail=KILLED)
    assert scene.find().cause == "failed"


def test_an_error_that_no_row_knows_is_told_with_the_status(scene: Scene) -> None:
    scene.log(0, "Traceback (most recent call last):", "mine.StrangeError: odd", "bye")
    scene.failed(0, "exit status 1")
    assert (scene.find().cause, scene.find().why) == ("failed", "exit status 1: mine.StrangeError: odd")


def test_the_line_is_that_of_the_error_and_not_the_last_one(scene: Scene) -> None:
    scene.log(1, "KeyError: 'a'", "ValueError: bad batch", "  \t", "a warning on the way out", "")
    scene.failed(1, "ValueError: bad batch")
    assert scene.find().line == "ValueError: bad batch"
    (scene.folder.logs / "41.0.1.err").unlink()
    assert (scene.find().log, scene.find().line) == (None, None)


TORCHRUN = """torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
=======================================================
train.py FAILED
-------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-22_12:25:26
  host      : n7
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 29665)  (SIGTERM)
  error_file: <N/A>
-------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_12:25:26
  host      : {host}
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 29666)  ({name})
  error_file: <N/A>
=======================================================
"""


def torchrun(scene: Scene, node: int, *, rank: int, code: int, name: str = "") -> None:
    text = TORCHRUN.format(host=f"n{node}", rank=rank, code=code, name=name)
    (scene.folder.logs / f"41.0.node{node}.err").write_text(text)


def test_torchrun_tells_which_of_its_ranks_was_killed(scene: Scene) -> None:
    torchrun(scene, 0, rank=1, code=-15, name="SIGTERM")
    torchrun(scene, 1, rank=2, code=-9, name="SIGKILL")
    scene.failed(0, GLOO)
    scene.folder.append_event("failed", attempt=0, host="n1", reason="torchrun: exit status 1")
    scene.batch("srun: error: n1: task 1: Exited with exit code 1")
    fault = scene.find()
    assert (fault.cause, fault.why, fault.rank, fault.host) == ("failed", "rank 2: killed by SIGKILL", 2, "n1")


def test_the_rank_that_torchrun_names_has_a_log_that_says_more(scene: Scene) -> None:
    torchrun(scene, 0, rank=1, code=1)
    scene.log(1, "RuntimeError: CUDA error: out of memory", "bye")
    scene.folder.append_event("failed", attempt=0, host="n0", reason="torchrun: exit status 1")
    assert (scene.find().cause, scene.find().rank) == ("oom_device", 1)
    scene.failed(1, "ValueError: the rank's own words", cause="failed")
    assert scene.find().why == "ValueError: the rank's own words"


def test_words_of_torchrun_that_nobody_knows_do_no_harm(scene: Scene) -> None:
    (scene.folder.logs / "41.0.node0.err").write_text("Root Cause (first observed failure):\n  rank : many\n")
    scene.folder.append_event("failed", attempt=0, host="n0", reason="torchrun: exit status 1")
    assert (scene.find(status=1).cause, scene.find(status=1).why) == ("failed", "the ranks ended with status 1")


def test_where_nobody_names_a_rank_their_logs_are_read(scene: Scene) -> None:
    scene.log(0, GLOO)
    scene.log(1, "DataError: tokens.h5: damaged")
    scene.folder.append_event("failed", attempt=0, host="n0", reason="deepspeed: exit status 1")
    fault = scene.find(status=1)
    assert (fault.cause, fault.rank, fault.log) == ("data", 1, "logs/41.0.1.err")
    word = first_word(scene.folder.events(), attempt=0)
    assert word is not None and word["reason"] == "deepspeed: exit status 1"


def test_after_a_restart_only_what_came_after_it_counts(scene: Scene) -> None:
    scene.failed(0, "DataError: tokens.h5: damaged")
    scene.folder.append_event("started", attempt=0, detail={"restart": 1})
    scene.failed(0, "NonFinite: loss is nan")
    assert (scene.find().cause, scene.find(restart=1).cause) == ("data", "nan")


@pytest.mark.parametrize(
    ("status", "cause", "why"),
    [
        (127, "configuration", "the ranks ended with status 127"),
        (1, "failed", "the ranks ended with status 1"),
        (None, "failed", "the ranks ended without a result"),
    ],
)
def test_a_status_alone_tells_little(scene: Scene, status: int | None, cause: str, why: str) -> None:
    assert (scene.find(status=status).cause, scene.find(status=status).why) == (cause, why)


SACCT = """#!/bin/sh
echo 'PREEMPTED|2026-01-31T10:00:00'
echo 'CANCELLED by 1000|2026-01-31T11:00:00'
echo 'RUNNING|Unknown'
"""


def test_sacct_is_asked_for_the_newest_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_end("41") is None
    sacct = tmp_path / "sacct"
    sacct.write_text(SACCT)
    sacct.chmod(sacct.stat().st_mode | stat.S_IXUSR)
    ended = slurm_end("41")
    assert ended is not None and ended[0] == "CANCELLED" and ended[1] is not None
    sacct.write_text("#!/bin/sh\necho 'PENDING|Unknown'\n")
    assert slurm_end("41") is None


@pytest.mark.skipif(not os.path.exists("/proc/self/cgroup"), reason="no cgroups here")
def test_kills_in_another_jobs_cgroup_are_not_counted() -> None:
    assert oom_kills(job_id="no such job") is None
