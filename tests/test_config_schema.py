"""The JSON Schemas of job files and site profiles say what the models say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from pydantic import ValidationError

from cfe_hpc.cli.main import main
from cfe_hpc.config.schema import FOLDER, KINDS, Kind, schema, schema_text
from cfe_hpc.files import tomllib

REPOSITORY = Path(__file__).resolve().parent.parent
BROKEN = REPOSITORY / "tests" / "broken"
SHIPPED: list[tuple[Kind, Path]] = [
    *(("job", path) for path in sorted((REPOSITORY / "jobs").glob("*.toml"))),
    *(("site", path) for path in sorted((REPOSITORY / "site_configs").glob("*.toml"))),
    ("job", BROKEN / "good-job.toml"),
]
BEYOND = {
    "job-checkpoint-every-zero": "zero has as many spellings as there are units",
    "job-entry-newline": "Python's $ is also before a last line end; that of JSON Schema, in JavaScript, is not",
    "job-time-infinite": "JSON has no such number",
}
VALIDATORS = {kind: Draft7Validator(schema(kind)) for kind in KINDS}


def _table(path: Path) -> dict[str, Any] | None:
    """What a file says; None where it is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError:
        return None


def _model_accepts(kind: Kind, table: dict[str, Any]) -> bool:
    try:
        KINDS[kind].model_validate(table, by_alias=True, by_name=False)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_file_is_current(kind: Kind) -> None:
    # Otherwise: python -m cfe_hpc.config.schema
    assert (FOLDER / f"{kind}.json").read_text(encoding="utf-8") == schema_text(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_schema_and_every_example_in_it_is_valid(kind: Kind) -> None:
    made = schema(kind)
    Draft7Validator.check_schema(made)
    tried = 0
    for table in [made, *made["definitions"].values()]:
        for key, entry in table.get("properties", {}).items():
            for value in [*entry.get("examples", ()), *([entry["default"]] if "default" in entry else [])]:
                validator = Draft7Validator({**entry, "definitions": made["definitions"]})
                assert not list(validator.iter_errors(value)), (key, value)
                tried += 1
    assert tried > 60


@pytest.mark.parametrize(("kind", "path"), SHIPPED, ids=lambda value: getattr(value, "stem", value))
def test_what_is_shipped_validates(kind: Kind, path: Path) -> None:
    assert [error.message for error in VALIDATORS[kind].iter_errors(_table(path))] == []


def _broken() -> list[tuple[Kind, Path]]:
    found: list[tuple[Kind, Path]] = []
    for kind in KINDS:
        found += [(kind, path) for path in sorted(BROKEN.glob(f"{kind}-*.toml")) if _table(path) is not None]
    return found


@pytest.mark.parametrize(("kind", "path"), _broken(), ids=lambda value: getattr(value, "stem", value))
def test_a_broken_file_fails_where_the_model_does(kind: Kind, path: Path) -> None:
    table = _table(path)
    assert table is not None
    assert VALIDATORS[kind].is_valid(table) is (path.stem in BEYOND or _model_accepts(kind, table))


def test_files_fail_for_their_structure_and_pass_where_only_rules_between_keys_are_broken() -> None:
    verdicts = {path.stem: VALIDATORS[kind].is_valid(_table(path)) for kind, path in _broken()}
    assert not verdicts["job-nodes-zero"] and not verdicts["site-preemption-mode"]
    assert verdicts["job-entry-and-command"] and verdicts["site-default-partition"]
    assert sum(not valid for valid in verdicts.values()) > 50


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        *((good, True) for good in ("4h", "1h30m", "1-12:00:00", "02:30:00", 90, "90", 1.5)),
        *((bad, False) for bad in ("4 hours", "", "h", -1, True, "2:30")),
    ],
)
def test_durations_are_written_as_people_write_them(value: Any, valid: bool) -> None:
    table = {"name": "j", "entry": "a:b", "resources": {"time": value}}
    assert VALIDATORS["job"].is_valid(table) is _model_accepts("job", table) is valid


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        *((good, True) for good in ("64GiB", "80 GB", "16G", 1024, "1.5TB", "512")),
        *((bad, False) for bad in ("64 gigs", "", -1, False, "GiB")),
    ],
)
def test_sizes_too(value: Any, valid: bool) -> None:
    table = {"name": "j", "entry": "a:b", "resources": {"memory": value}}
    assert VALIDATORS["job"].is_valid(table) is _model_accepts("job", table) is valid


def test_parameters_are_known_where_the_entry_is_the_training_that_is_shipped() -> None:
    table = {"name": "j", "entry": "cfe_hpc.train.main:run", "params": {"stepps": 4}}
    (error,) = VALIDATORS["job"].iter_errors(table)
    assert "stepps" in error.message
    assert VALIDATORS["job"].is_valid({**table, "entry": "mine:run"})


def test_keys_of_a_stage_are_known() -> None:
    table: dict[str, Any] = {"name": "j", "command": ["true"], "stage": [{"name": "a"}, {"name": "b", "after": ["a"]}]}
    assert VALIDATORS["job"].is_valid(table)
    table["stage"][1]["resources"] = {"nodes": 0}
    assert not VALIDATORS["job"].is_valid(table)
    table["stage"][1] = {"name": "b", "aftr": ["a"]}
    assert not VALIDATORS["job"].is_valid(table)


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_prints_it(kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema", kind]) == 0
    assert json.loads(capsys.readouterr().out) == schema(kind)
