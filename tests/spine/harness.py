"""Submit a run through the command line, watch it through its run folder, and get in its way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from cfe_hpc.files import read_toml
from cfe_hpc.runfolder import RunFolder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

T = TypeVar("T")


def cfe(*words: str, cwd: Path, env: Mapping[str, str], timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """`python -m cfe_hpc WORDS`, run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cfe_hpc", *words],
        cwd=cwd,
        env=dict(env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )


def write_job(folder: Path, **tables: Any) -> Path:
    """job.toml in `folder`, with the tests' entries beside it so that ranks find them."""
    for entries in HERE.glob("entries*.py"):
        shutil.copy(entries, folder / entries.name)
    path = folder / "job.toml"
    path.write_text(tomli_w.dumps({key: table for key, table in tables.items() if table is not None}), encoding="utf-8")
    return path


SMALL = {
    "d_model": 32,
    "layers": 3,
    "heads": 2,
    "seq_len": 32,
    "global_batch": 8,
    "micro_batch": 2,
    "steps": 90,
    "warmup_steps": 4,
    "eval_every": 16,
    "eval_batches": 1,
}


def training_job(
    folder: Path, *, kind: str, zero_stage: int, variant: str, data: Path, partition: str, cpus: int = 2, **more: Any
) -> Path:
    """A small training on two nodes of the mini Slurm, one rank with `cpus` cores on each; `more` tables go first."""
    tables: dict[str, Any] = {
        "name": f"{kind}-{zero_stage}-{variant}",
        "entry": "entries:paced",
        "resources": {
            "nodes": 2,
            "devices_per_node": 1,
            "cpus_per_device": cpus,
            "time": "20m",
            "partition": partition,
        },
        "engine": {"kind": kind, "zero_stage": zero_stage, "precision": "bf16" if zero_stage % 2 else "fp32"},
        "params": {**SMALL, "data": str(data), "rope_variant": variant},
    }
    return write_job(folder, **{**tables, **more})


class LiveRun:
    """A submitted run, seen from the login node."""

    def __init__(self, submitted: Mapping[str, Any], cwd: Path, env: Mapping[str, str]) -> None:
        self.run_id: str = submitted["run_id"]
        self.job_id: str = submitted["job_id"]
        self.folder = RunFolder(cwd / submitted["run_dir"])
        self.cwd, self.env = cwd, dict(env)

    @classmethod
    def submit(
        cls,
        job: Path,
        site: str,
        *,
        cwd: Path,
        env: Mapping[str, str],
        sets: tuple[str, ...] = (),
        words: tuple[str, ...] = (),
        pace_s: float = 0,
    ) -> LiveRun:
        """`submit --json`, with further words; fails with what it said when it does not end with 0."""
        words += tuple(word for value in sets for word in ("--set", value))
        done = cfe("submit", str(job), "--site", site, *words, "--json", cwd=cwd, env=env)
        assert done.returncode == 0, done.stderr
        run = cls(json.loads(done.stdout), cwd, env)
        if pace_s:
            run.pace(pace_s)
        return run

    def pace(self, seconds: float) -> None:
        """Pause each step of the paced entry for so long from now on."""
        aside = self.folder.path / ".pace"
        aside.write_text(str(seconds))
        aside.replace(self.folder.path / "pace")

    def step(self) -> int:
        """Steps done, as the newest heartbeat tells."""
        beats = list(self.folder.heartbeats())
        return int(beats[-1]["step"]) if beats else 0

    def events(self, *names: str) -> list[dict[str, Any]]:
        """The events so far; only those of the given names if any."""
        return [event for event in self.folder.events() if not names or event["event"] in names]

    def attempt(self) -> int:
        """Number of the newest attempt that has started; -1 before the first."""
        return max((int(event["attempt"]) for event in self.events("started")), default=-1)

    def wait(self, ready: Callable[[], T], timeout_s: float, what: str) -> T:
        """Ask until the answer is true; fails with the run's own words when time is up or the run has ended badly."""
        deadline = time.monotonic() + timeout_s
        while not (answer := ready()):
            result = self.folder.result()
            bad = result is not None and result["state"] in ("FAILED", "HELD")
            if bad or time.monotonic() > deadline:
                answer = ready()
                assert answer, f"{self.run_id}: not {what}\n{self.diagnosis()}"
                return answer
            time.sleep(0.1)
        return answer

    def wait_step(self, step: int, *, attempt: int, timeout_s: float = 150.0) -> None:
        """Wait until the given attempt has done so many steps."""

        def there() -> bool:
            beats = list(self.folder.heartbeats())
            return bool(beats) and beats[-1]["attempt"] >= attempt and beats[-1]["step"] >= step

        self.wait(there, timeout_s, f"at step {step} in attempt {attempt}")

    def wait_result(self, timeout_s: float = 240.0) -> dict[str, Any]:
        """Wait until the run has ended; what result.json says."""
        return self.wait(self.folder.result, timeout_s, "ended")

    def log(self, ending: str = "err") -> str:
        """All ranks' logs, one after the other."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')}"
            for path in sorted(self.folder.logs.glob(f"*.{ending}"))
        )

    def diagnosis(self) -> str:
        """Events, result and the ends of the logs."""
        events = "\n".join(json.dumps(event) for event in self.events())
        return f"{events}\nresult: {self.folder.result()}\nstep {self.step()}\n{self.log()[-6000:]}"


def site_file(folder: Path, name: str = "minislurm", **changes: Any) -> str:
    """A copy of a shipped site profile in `folder`, with changed values, tables merged into its own; its path."""
    table = read_toml(ROOT / "site_configs" / f"{name}.toml")
    for key, value in changes.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, Mapping) else value
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return str(path)
