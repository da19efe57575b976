"""`debug` on this machine, talked to in a terminal; what it refuses, and what it would start on a cluster."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from dialogue import dialogue
from spine.harness import LiveRun, cfe, site_file, write_job

from cfe_hpc.cli.main import main
from cfe_hpc.config.load import load
from cfe_hpc.errors import UsageError
from cfe_hpc.launch.debug import shrink
from cfe_hpc.launch.plan import plan
from cfe_hpc.ranks.debugging import under_debugger
from cfe_hpc.runfolder import RunFolder

PDB = "(Pdb) "
PROMPT = "$ "
STEPS = {"steps": 4, "pause_s": 0.0, "variant": "a"}
ENV = {name: value for name, value in os.environ.items() if not name.startswith(("CFE_", "SLURM_"))}


def job(folder: Path, **tables: Any) -> str:
    tables = {"name": "look", "entry": "entries:counting", "params": STEPS, **tables}
    return str(write_job(folder, **tables))


def the_run(folder: Path) -> RunFolder:
    (path,) = (folder / "runs" / "look-debug").iterdir()
    return RunFolder(path)


def state(folder: Path) -> tuple[str, str | None]:
    result = the_run(folder).result() or {}
    return result["state"], result.get("reason")


def test_pdb_holds_rank_0_and_the_other_ranks_end_with_it(tmp_path: Path) -> None:
    with dialogue("debug", job(tmp_path), "--ranks", "2", cwd=tmp_path, env=ENV) as shown:
        shown.expect_exact("-> count = Count()")
        shown.expect_exact(PDB)
        shown.sendline("run.rank, run.world_size, run.attempt")
        shown.expect_exact("(0, 2, 0)")
        shown.expect_exact(PDB)
        shown.sendline("q")
        assert shown.ended() == 0
    assert state(tmp_path) == ("CANCELLED", "the debug session has ended")
    logs = the_run(tmp_path).logs
    assert [path.name.rpartition(".0.")[2] for path in sorted(logs.iterdir())] == ["1.err", "1.out"]


def test_an_error_is_looked_at_where_it_was_raised(tmp_path: Path) -> None:
    path = job(tmp_path, entry="broken:run")
    (tmp_path / "broken.py").write_text("def run(run):\n    wanted = 41 + 1\n    raise ValueError('no such answer')\n")
    with dialogue("debug", path, cwd=tmp_path, env=ENV) as shown:
        shown.expect_exact(PDB)
        shown.sendline("c")
        shown.expect_exact("ValueError: no such answer")
        shown.expect_exact("post-mortem")
        shown.expect_exact(PDB)
        shown.sendline("wanted")
        shown.expect_exact("42")
        shown.expect_exact(PDB)
        shown.sendline("q")
        assert shown.ended() == 1


def test_a_python_command_is_debugged_with_its_arguments(tmp_path: Path) -> None:
    path = job(tmp_path, entry=None, command=["python", "-u", "mine.py", "--lr", "{params.lr}"], params={"lr": 0.5})
    (tmp_path / "mine.py").write_text("import os, sys\nprint('lr', sys.argv[2], 'rank', os.environ['RANK'])\n")
    with dialogue("debug", path, cwd=tmp_path, env=ENV) as shown:
        shown.expect_exact("mine.py(1)<module>()")
        shown.expect_exact(PDB)
        shown.sendline("c")
        shown.expect_exact("lr 0.5 rank 0")
        shown.expect_exact(PDB)
        shown.sendline("q")
        assert shown.ended() == 0


def test_a_shell_is_interrupted_and_starts_the_rank(tmp_path: Path) -> None:
    path = job(tmp_path, launch={"environment": {"GREETING": "it's me"}})
    with dialogue("debug", path, "--shell", cwd=tmp_path, env=ENV) as shown:
        shown.expect(r"`(.* -m cfe_hpc.ranks .*)` starts this rank")
        start = shown.match[1]
        shown.expect_exact(PROMPT)
        # What is told by a child is told when the terminal is the child's.
        shown.sendline("""sh -c 'echo "$GREETING, $RANK of $WORLD_SIZE at $MASTER_ADDR"; exec sleep 600'""")
        shown.expect_exact("it's me, 0 of 1 at 127.0.0.1")
        shown.interrupt()
        shown.expect_exact(PROMPT)
        shown.sendline(f"{start}; echo status $?")
        shown.expect_exact("status 0")
        shown.expect_exact(PROMPT)
        shown.sendline("exit 3")
        assert shown.ended() == 3
    assert state(tmp_path) == ("COMPLETED", None)


def test_a_session_is_cancelled_from_elsewhere(tmp_path: Path) -> None:
    with dialogue("debug", job(tmp_path), "--shell", cwd=tmp_path, env=ENV) as shown:
        shown.expect_exact(PROMPT)
        (known,) = json.loads(cfe("status", "--json", cwd=tmp_path, env=ENV).stdout)
        assert known["state"] == "RUNNING"
        assert cfe("cancel", "look", cwd=tmp_path, env=ENV).returncode == 0
        assert shown.ended() != 0
    assert state(tmp_path) == ("CANCELLED", "cancelled by the user")


def test_no_slurm_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    nowhere = {**ENV, "PATH": "/nowhere"}
    with dialogue("debug", job(tmp_path), "--site", site_file(tmp_path), cwd=tmp_path, env=nowhere) as shown:
        shown.expect_exact("error: srun: command not found; debug from a machine that has Slurm's commands")
        assert shown.ended() == 3
    assert not list((tmp_path / "runs").glob("*/*"))


def test_a_wait_in_the_queue_is_given_up_though_srun_does_not_hear(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    deaf = 'trap "" INT TERM; echo "srun: job 71 queued and waiting for resources" >&2; while :; do sleep 0.1; done'
    for name, text in (("srun", deaf), ("scancel", f"echo $* >> {shlex.quote(str(tmp_path / 'cancelled'))}")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = {**ENV, "PATH": f"{tmp_path / 'bin'}:{ENV['PATH']}"}
    with dialogue("debug", job(tmp_path), "--site", site_file(tmp_path), cwd=tmp_path, env=env) as shown:
        shown.expect_exact("job 71 queued and waiting")
        shown.interrupt()
        shown.expect_exact("error: srun: gave no session (status 137")
        assert shown.ended() == 3
    assert (tmp_path / "cancelled").read_text().split() == ["71"]
    assert not list((tmp_path / "runs").glob("*/*"))


def test_a_shell_beside_a_running_rank_leaves_it_alone(tmp_path: Path) -> None:
    params = {"steps": 400, "pause_s": 0.1, "variant": "a"}
    run = LiveRun.submit(Path(job(tmp_path, params=params)), "local", cwd=tmp_path, env=ENV)
    try:
        run.wait_step(1, attempt=0)
        with dialogue("debug", "--attach", run.run_id, cwd=tmp_path, env=ENV) as shown:
            shown.expect(r"rank 0 of 1 is process (\d+) here")
            pid = int(shown.match[1])
            shown.expect_exact(PROMPT)
            shown.sendline('echo "$RANK of $WORLD_SIZE in $CFE_JOB_ID, $CFE_RUN_DIR"')
            shown.expect_exact(f"0 of 1 in {run.job_id}, {run.folder.path}")
            shown.expect_exact(PROMPT)
            shown.sendline("exit")
            assert shown.ended() == 0
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
        assert b"cfe_hpc.ranks" in words
        refused = cfe("debug", "--attach", run.run_id, "--rank", "1", "--dry-run", cwd=tmp_path, env=ENV)
        assert (refused.returncode, refused.stderr) == (
            2,
            f"error: --rank: {run.run_id} has ranks 0 to 0 (1); give one of them\n",
        )
    finally:
        cfe("cancel", run.run_id, cwd=tmp_path, env=ENV)
        run.wait_result()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["job.toml"], "debug: needs a terminal to talk to you in; start it from one, or see --dry-run"),
        (["job.toml", "--attach", "x"], "debug: give either JOB or --attach RUN"),
        (["job.toml", "--ranks", "0"], "--ranks: not a number of ranks (0); give 1 or more"),
        (["job.toml", "--time", "long", "--dry-run"], "--time: "),
        (["--attach", "nothing", "--dry-run"], "nothing: no such run"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    job(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, (out, err) = main(["debug", *words]), capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {said}")


def test_what_would_be_started_on_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resources = {"nodes": 4, "devices_per_node": 4, "time": "12h", "memory": "4000MiB", "partition": "spot"}
    path = job(tmp_path, resources=resources)
    debug = {"hardware": "h200", "queue": "dbg", "time_limit": "20m", "account": "proj", "options": ["--exclusive"]}
    site = site_file(tmp_path, debug_partition="debug", partitions={"debug": debug})
    monkeypatch.chdir(tmp_path)
    assert main(["debug", path, "--site", site, "--ranks", "2", "--dry-run"]) == 0
    srun, _, script = capsys.readouterr().out.partition("\n\n")
    assert srun.startswith(
        "srun --pty --job-name=look-debug --partition=dbg --account=proj --gres=gpu:h200:2 --mem=2000M --time=00:20:00 "
        "--nodes=1 --ntasks=2 --ntasks-per-node=2 --cpus-per-task=2 --export=ALL --kill-on-bad-exit=1 --wait=0 "
        "--exclusive bash "
    )
    assert "\nexport OMP_NUM_THREADS=1\n" in script
    assert not (tmp_path / "runs").exists()


def test_a_session_is_as_long_as_it_may_be_and_as_wide_as_asked(tmp_path: Path) -> None:
    path = job(tmp_path, resources={"devices_per_node": 4, "partition": "gaudi"})
    site = site_file(tmp_path, debug_partition="gpu")
    loaded = load(path, site)
    assert plan(*_of(shrink(loaded, ranks=8, time_s=None))).nodes == 2
    # The debug partition has other devices than the job asks for.
    assert shrink(loaded, ranks=1, time_s=60.0).job.resources.partition == "gaudi"
    chosen = shrink(load(path, site, ["resources.partition=spot"]), ranks=1, time_s=None)
    assert (chosen.job.resources.partition, chosen.job.resources.time) == ("spot", 3600.0)
    with pytest.raises(UsageError, match="6 do not divide among nodes with 4 devices"):
        shrink(loaded, ranks=6, time_s=None)


def _of(loaded: Any) -> tuple[Any, Any]:
    return loaded.job, loaded.site


@pytest.mark.parametrize(
    ("command", "debugged"),
    [
        ("python train.py --lr 1", "python -m pdb train.py --lr 1"),
        ("/opt/bin/python3.12 -u -X dev train.py -m x", "/opt/bin/python3.12 -u -X dev -m pdb train.py -m x"),
        ("python -m pkg.train -c 1", "python -m pdb -m pkg.train -c 1"),
        ("python", None),
        ("python -c pass", None),
        ("bash run.sh", None),
        ("./train", None),
    ],
)
def test_python_programs_go_under_pdb(command: str, debugged: str | None) -> None:
    if debugged is not None:
        assert under_debugger(command.split()) == debugged.split()
        return
    with pytest.raises(UsageError, match=r"starts no Python program that pdb could hold .*; give --shell"):
        under_debugger(command.split())
