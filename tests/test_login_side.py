"""The login side stays light: it never loads what only ranks need, and --help loads no models either."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import cfe_hpc
from cfe_hpc.cli.main import VERBS

HEAVY = {"torch", "deepspeed", "h5py", "numpy"}
LOGIN_PACKAGES = ("cli", "screen", "launch", "reports", "sites", "recovery", "config")
LOGIN_MODULES = ("runfolder", "caches", "files", "process", "units", "log", "errors")
JOB = Path(__file__).resolve().parent / "broken" / "good-job.toml"


def _loaded_after(program: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `program`; its other output goes to standard error."""
    listing = "\nimport json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", program + listing], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def _verb(*words: str) -> str:
    return (
        "import contextlib, sys\n"
        "from cfe_hpc.cli.main import main\n"
        "with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):\n"
        f"    main({list(words)!r})\n"
    )


def test_importing_every_login_module_loads_nothing_heavy() -> None:
    root = Path(cfe_hpc.__file__).parent
    names = [f"cfe_hpc.{name}" for name in LOGIN_MODULES]
    for package in LOGIN_PACKAGES:
        names += [f"cfe_hpc.{package}.{module.name}" for module in pkgutil.iter_modules([str(root / package)])]
    assert len(names) > 20
    assert not HEAVY & _loaded_after(f"import importlib\nfor name in {names!r}: importlib.import_module(name)\n")


@pytest.mark.parametrize(
    "words",
    [("check", str(JOB)), ("check", "train_seq"), ("config", "show", "train_seq"), ("sites", "list")],
    ids=" ".join,
)
def test_a_verb_loads_nothing_heavy(words: tuple[str, ...]) -> None:
    assert not HEAVY & _loaded_after(_verb(*words))


@pytest.mark.parametrize("words", [("--help",), *((verb, "--help") for verb in VERBS)], ids=" ".join)
def test_help_loads_no_models(words: tuple[str, ...]) -> None:
    assert not (HEAVY | {"pydantic", "submitit"}) & _loaded_after(_verb(*words))
