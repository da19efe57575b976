"""Programs that stand for Slurm's, where a test is about what they are told: a fixture to import."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

__all__ = ["calls", "slurm"]

_PROGRAMS = {
    "sbatch": """
n=$(cat "$FAKE/id")
echo sbatch "$@" >> "$FAKE/calls"
if [ "$n" = "$(cat "$FAKE/refused")" ]; then echo "sbatch: error: Invalid qos specification" >&2; exit 1; fi
echo $((n + 1)) > "$FAKE/id"
echo "$n"
""",
    "squeue": 'echo "$@" >> "$FAKE/asked"; cat "$FAKE/queue"',
    "scancel": 'echo scancel "$@" >> "$FAKE/calls"',
    "scontrol": """
echo scontrol "$@" >> "$FAKE/calls"
case "$2" in JobId=66) echo "Job dependency problem" >&2; exit 1;; esac
""",
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Their folder: `calls` is what they were told, `asked` squeue's arguments, `queue` what it prints, `id` the next
    job's, `refused` the id that sbatch refuses to give."""
    fake = tmp_path / "fake"
    fake.mkdir()
    for name, lines in _PROGRAMS.items():
        program = fake / name
        program.write_text(f"#!/bin/sh\n{lines}\n")
        program.chmod(0o755)
    for name, text in {"calls": "", "asked": "", "queue": "", "id": "41\n", "refused": "none\n"}.items():
        (fake / name).write_text(text)
    monkeypatch.setenv("PATH", f"{fake}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(fake))
    return fake


def calls(slurm: Path) -> list[str]:
    """What the programs were told, in order."""
    return (slurm / "calls").read_text().splitlines()
