"""The table of causes against what programs, schedulers and kernels really print."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError
from test_docs import column, table

from cfe_hpc import errors
from cfe_hpc.config.job import Recovery
from cfe_hpc.recovery.causes import CAUSES, Cause, of_exception, of_text, row

ROOT = Path(__file__).resolve().parent.parent

NONE = "\N{EN DASH}"
CAPTURED = Path(__file__).resolve().parent / "captured" / "errors.txt"
LINES = [line.split(": ", 1) for line in CAPTURED.read_text(encoding="utf-8").splitlines()[1:]]


@pytest.mark.parametrize(("cause", "line"), LINES, ids=lambda value: value[:60])
def test_a_line_is_known(cause: Cause, line: str) -> None:
    text = line.replace("\\n", "\n")
    assert of_text(text) == cause
    # As it stands in a log, with more around it.
    assert of_text(f"step 11 loss 0.25\n{text}\nstep 12 loss 0.25") == cause


def test_every_cause_that_has_texts_is_among_them() -> None:
    assert {cause for cause, _ in LINES} == {each.cause for each in CAUSES if each.pattern} | {"failed"}
    assert of_text("") == "failed"


def _named(module: str, name: str, base: type[BaseException] = RuntimeError) -> type[BaseException]:
    return type(name, (base,), {"__module__": module})


RAISED: list[tuple[Cause, BaseException]] = [
    ("oom_device", _named("torch", "OutOfMemoryError")("anything")),
    ("oom_device", _named("mine", "Wrapped", _named("torch.cuda", "OutOfMemoryError"))("anything")),
    ("oom_device", RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    ("oom_host", MemoryError()),
    ("oom_host", OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))),
    ("nan", errors.NonFinite("loss is nan at step 12")),
    ("node_unfit", errors.NodeUnfit("n3: no device")),
    ("disk_full", errors.DiskFull("no room")),
    ("disk_full", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x")),
    ("disk_full", OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))),
    ("data", errors.DataError("tokens.h5: damaged")),
    ("configuration", errors.ConfigError([])),
    ("configuration", errors.CheckpointMismatch("another model")),
    ("configuration", ModuleNotFoundError("No module named 'x'")),
    ("configuration", IndentationError("unexpected indent")),
    ("communication", ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))),
    ("communication", BrokenPipeError()),
    ("communication", _named("torch.distributed", "DistBackendError", _named("torch.distributed", "DistError"))("?")),
    ("hang", _named("torch.distributed", "DistBackendError")("Watchdog caught collective operation timeout: WorkNCCL")),
    ("failed", errors.CorruptCheckpoint("torn")),
    ("failed", KeyError("CUDA")),
    ("failed", KeyboardInterrupt()),
]


@pytest.mark.parametrize(("cause", "error"), RAISED, ids=lambda value: repr(value)[:40])
def test_an_exception_is_known(cause: Cause, error: BaseException) -> None:
    assert of_exception(error) == cause


def _caught(raise_it: str) -> BaseException:
    try:
        exec(raise_it, {})
    except BaseException as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("cause", "program"),
    [
        ("oom_host", "try: raise MemoryError\nexcept MemoryError as e: raise RuntimeError('training failed') from e"),
        ("oom_host", "try: raise MemoryError\nfinally: raise ConnectionResetError(104, 'reset')"),
        ("communication", "try: raise ValueError\nfinally: raise ConnectionResetError(104, 'reset')"),
        ("communication", "try: raise MemoryError\nexcept MemoryError: raise ConnectionResetError from None"),
        ("failed", "try: import nonesuch\nexcept ImportError: raise ValueError('neither does this')"),
        ("configuration", "try: raise ConnectionResetError\nexcept OSError: import nonesuch"),
    ],
)
def test_what_an_exception_came_from(cause: Cause, program: str) -> None:
    assert of_exception(_caught(program)) == cause


def test_a_chain_that_bites_its_tail_ends() -> None:
    first, second = ConnectionResetError(), ConnectionResetError()
    first.__cause__, second.__cause__ = second, first
    assert of_exception(first) == "communication"


def test_an_allocation_that_torch_refuses_is_the_devices() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert of_exception(caught.value) == "oom_device"


def test_each_cause_has_one_row_with_a_budget_that_exists() -> None:
    assert [each.cause for each in CAUSES if row(each.cause) is each] == [each.cause for each in CAUSES]
    assert {each.cause for each in CAUSES} == set(get_args(Cause))
    assert CAUSES[-1].cause == "failed"
    assert len({each.word for each in CAUSES}) == len(CAUSES)
    for each in CAUSES:
        assert (each.budget is not None) == (each.retried == "budget"), each.cause
        assert each.budget is None or each.budget in Recovery.model_fields
    assert {each.cause for each in CAUSES if each.symptom} == {"communication"}


def test_names_of_errors_are_true() -> None:
    torch = pytest.importorskip("torch")
    known = [*vars(errors).values(), torch.OutOfMemoryError, torch.distributed.DistError, ValidationError]
    known += [MemoryError, ConnectionError, ImportError, SyntaxError]
    names = {f"{each.__module__}.{each.__qualname__}" for each in known if isinstance(each, type)}
    older = {"torch.cuda.OutOfMemoryError"}  # torch before 2.5
    assert {name for each in CAUSES for name in each.types} <= names | older


def test_the_documents_table_is_the_codes() -> None:
    rows = [row for row in table(ROOT / "docs" / "recovery.md", "## Causes") if row]
    head, *body = rows
    assert head[0] == "cause" and head[2:] == ["budget", "then", "same error", "brought about for real by"]
    told = [(row[0], row[2], row[3], row[4]) for row in body]
    assert told == [
        (
            f"`{each.cause}`",
            f"`{each.budget}`" if each.budget else NONE,
            NONE if each.retried == "always" else {"hold": "held", "fail": "failed"}[each.spent],
            "yes" if each.same_error_holds else "no",
        )
        for each in CAUSES
    ]


def test_every_cause_is_brought_about_for_real_by_a_test() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for name in column(table(ROOT / "docs" / "recovery.md", "## Causes"), "brought about for real by"):
        assert f"\ndef {name.strip('`')}(" in tests, name
