"""Completion in real shells: what is typed, a TAB, and the words that the shell then has."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dialogue import talking

PROMPT = "READY> "
MINE = """
name = "mine"
command = ["true"]
[params]
greeting = "hello"
[[stage]]
name = "train"
"""
RUN_ID = "look-20260101-000000-abcd"

SHELLS = {
    "bash": ["--noprofile", "--norc", "-i"],
    "zsh": ["-f", "-i"],
}
SETUP = {
    "bash": 'eval "$(cfe-hpc completion bash)"',
    "zsh": 'unsetopt zle_bracketed_paste; autoload -Uz compinit; compinit -D -u; eval "$(cfe-hpc completion zsh)"',
}

CHECK = ["check", "train_seq"]
SITED = [*CHECK, "--site", "minislurm"]
TYPED = {
    "a partition": ("check train_seq --site minislurm --partition gau", [*SITED, "--partition", "gaudi"]),
    "a stage": ("check ./mine.toml --stage tr", ["check", "./mine.toml", "--stage", "train"]),
    "a check": ("check train_seq --ignore data-dam", ["check", "train_seq", "--ignore", "data-damaged"]),
    "a verb": ("subm", ["submit"]),
    "a shipped job": ("submit train", ["submit", "train_seq"]),
    "a job file": ("submit ./mi", ["submit", "./mine.toml"]),
    "an option": ("submit train_seq --dry", ["submit", "train_seq", "--dry-run"]),
    "a site": ("check train_seq --site mini", [*CHECK, "--site", "minislurm"]),
    "an action": ("sites det", ["sites", "detect"]),
    "a run": ("status lo", ["status", RUN_ID]),
    "a run to wait for": ("submit train_seq --after lo", ["submit", "train_seq", "--after", RUN_ID]),
    "a key": ("submit train_seq --set resources.nod", ["submit", "train_seq", "--set", "resources.nodes="]),
    "a value": ("submit train_seq --set engine.kind=to", ["submit", "train_seq", "--set", "engine.kind=torch"]),
    "a parameter": ("submit ./mine.toml --set params.gr", ["submit", "./mine.toml", "--set", "params.greeting="]),
    "a site's key": (
        "check train_seq --set site.storage.r",
        ["check", "train_seq", "--set", "site.storage.runs_root="],
    ),
}


@pytest.fixture(scope="module", params=list(SHELLS))
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A shell in a folder with a job and a run of one's own, ready to complete."""
    name = request.param
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    folder = tmp_path_factory.mktemp(name)
    (folder / "mine.toml").write_text(
        'name = "mine"\ncommand = ["true"]\n[params]\ngreeting = "hello"\n[[stage]]\nname = "train"\n'
    )
    (folder / "runs" / "look" / RUN_ID).mkdir(parents=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"PATH": path, "PS1": PROMPT, "TERM": "dumb", "HOME": str(folder), "LC_ALL": "C.UTF-8"}
    with talking([name, *SHELLS[name]], cwd=folder, env=env, columns=200) as child:
        child.sendline(SETUP[name])
        child.sendline("echo up-$((1+1))")
        child.expect_exact("up-2")
        yield child


@pytest.mark.parametrize("case", TYPED)
def test_a_tab_completes(shell: Any, case: str) -> None:
    typed, words = TYPED[case]
    # In front of the line, so that it is shown and not run: to its beginning (^A), and a function's name.
    shell.send(f"cfe-hpc {typed}\t\x01printf '<%s>' got-$((1+1)) \n")
    shell.expect(r"<got-2>((?:<[^<>]*>)+)[^<>]")  # to the prompt after it: it may come in pieces
    assert shell.match[1] == "".join(f"<{word}>" for word in ["cfe-hpc", *words])
