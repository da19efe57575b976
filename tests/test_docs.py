"""What the documents say is so: links lead somewhere, commands and files exist, tables agree with the code."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest

from cfe_hpc import errors
from cfe_hpc.cli.main import VERBS, main
from cfe_hpc.config.load import load, load_site
from cfe_hpc.config.stage import load_pipeline
from cfe_hpc.files import tomllib
from cfe_hpc.metrics.families import FAMILIES, LOGGED
from cfe_hpc.ranks.scheduler import Cause
from cfe_hpc.recovery.buckets import BUCKETS
from cfe_hpc.runfolder import EVENTS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
MINIMAL_JOB = 'name = "fragment"\ncommand = ["true"]\n'

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def blocks(language: str) -> list[tuple[Path, str]]:
    return [
        (path, body)
        for path in DOCUMENTS
        for found, body in FENCE.findall(path.read_text(encoding="utf-8"))
        if found == language
    ]


def anchors(path: Path) -> set[str]:
    """Headings as links spell them: lower case, punctuation dropped, spaces as dashes; repeated ones are numbered."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE):
        found.append(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return set(found)


def table(path: Path, heading: str) -> list[list[str]]:
    """Rows of the first table under a heading, its head first, as cells."""
    section = path.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    assert section, f"{path.name} has no {heading}"
    lines = re.search(r"(^\|.*\n)+", section, re.MULTILINE)
    assert lines is not None
    head, _, *rows = lines[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in (head, *rows)]


def column(rows: list[list[str]], name: str) -> list[str]:
    at = rows[0].index(name)
    return [row[at] for row in rows[1:]]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200


def test_the_index_names_every_document() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(([\w-]+\.md)\)", index))
    assert named == {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(document)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@every_document
def test_files_and_modules_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w./-])((?:tests|scripts|docs|cfe_hpc|\.ci)/[\w./-]*\w)(?![\w<])", text):
        assert (ROOT / name).exists(), name
    for module in re.findall(r"python3? (?:-u )?-m (cfe_hpc\.[\w.]*\w)", text):
        assert find_spec(module) is not None, module


@cache
def options(verb: str) -> dict[str, set[str]]:
    """Options of a verb by action; those of a verb without actions under ""."""
    parser = argparse.ArgumentParser(prog=verb)
    import_module(f"cfe_hpc.cli.{VERBS[verb][0]}").configure(parser)
    found = {"": set(parser._option_string_actions)}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update({name: set(sub._option_string_actions) for name, sub in action.choices.items()})
    return found


def commands(text: str) -> Iterator[tuple[str, str]]:
    """(verb, the rest of its line) of every command line in a text; what an arrow leads to is another command."""
    for found in re.finditer(r"(?:cfe-hpc|python -m cfe_hpc) ([a-z]+)([^\n─═]*)", text):
        yield found[1], found[2]


@every_document
def test_commands_exist_with_their_options(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    shown = "\n".join([*(body for _, body in FENCE.findall(text)), *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))])
    for verb, rest in commands(shown):
        assert verb in VERBS, f"{verb}{rest}"
        by_action = options(verb)
        action = rest.split()[0] if len(by_action) > 1 and rest.split() else ""
        assert action in by_action, f"{verb}{rest}"
        unknown = {word for word in OPTION.findall(rest) if word not in by_action[action]}
        assert not unknown, f"{verb}{rest}"


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_described(verb: str) -> None:
    section = re.search(rf"^## {verb}\n(.*?)^## ", (ROOT / "docs/cli.md").read_text(encoding="utf-8"), re.M | re.S)
    assert section is not None
    described = set(OPTION.findall(section[1]))
    for action, known in options(verb).items():
        assert action in section[1]
        assert known - {"-h", "--help"} <= described, action


def test_toml_is_accepted(tmp_path: Path) -> None:
    found = blocks("toml")
    assert found
    for number, (document, body) in enumerate(found):
        file = tmp_path / f"{document.stem}-{number}.toml"
        keys = tomllib.loads(body)
        file.write_text(body if "name" in keys else MINIMAL_JOB + body, encoding="utf-8")
        if "scheduler" in keys:
            load_site(str(file), {})
        else:
            try:
                load(str(file), "local", [], {})
            except errors.PipelineError:
                load_pipeline(str(file), "local", [], {})


def test_python_is_python() -> None:
    for document, body in blocks("python"):
        compile(body, document.name, "exec")


def test_every_event_is_described_and_no_other() -> None:
    described = column(table(ROOT / "docs/design.md", "### Events"), "event")
    assert [name.strip("`") for name in described] == list(EVENTS)


def test_reasons_and_events_of_stops_are_those_of_the_code() -> None:
    rows = table(ROOT / "docs/preemption.md", "## What cfe_hpc does")
    events = {name for cell in column(rows, "events, in order") for name in re.findall(r"`(\w+)`", cell)}
    reasons = {name for cell in column(rows, "reason") for name in re.findall(r"`(\w+)`", cell)}
    assert {"signal", "checkpoint_saved", "preempted", "requeued", "cancelled"} <= events
    # "as for `preempted`" names a reason, which is an event as well.
    assert events <= set(EVENTS)
    assert reasons == set(get_args(Cause))


@pytest.mark.parametrize("document", ["docs/cli.md", "docs/preemption.md"])
def test_exit_codes_are_those_of_the_errors(document: str) -> None:
    listed = {int(code) for code in column(table(ROOT / document, "## Exit codes"), "code")}
    raised = {getattr(errors, name).exit_code for name in errors.__all__ if hasattr(getattr(errors, name), "exit_code")}
    assert listed == {0} | raised


def test_metrics_are_those_of_the_code() -> None:
    listed = column(table(ROOT / "docs/metrics.md", "## What there is"), "name")
    assert [name.strip("`").partition("{")[0] for name in listed] == [family.name for family in (*FAMILIES, LOGGED)]


def test_the_buckets_of_time_are_those_of_the_ledger() -> None:
    listed = column(table(ROOT / "docs/goodput.md", "## Buckets"), "bucket")
    assert [name.strip("`") for name in listed] == list(BUCKETS)


@pytest.mark.parametrize(
    "words", [["submit", "--nope", "job"], ["logs"], ["checkpoints", "ls"], ["statu"]], ids=" ".join
)
def test_wrong_command_lines_are_told_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(words)
    except SystemExit as end:
        code = end.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert line.startswith("error: cfe-hpc") and "; " in line
