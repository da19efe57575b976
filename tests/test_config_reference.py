"""docs/configuration.md holds the reference that the models give today."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from cfe_hpc.config.job import Job
from cfe_hpc.config.problems import nested_model
from cfe_hpc.config.reference import BEGIN, END, with_reference
from cfe_hpc.config.site import Site
from cfe_hpc.files import tomllib

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"


def test_the_document_is_current() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    # Otherwise: python -m cfe_hpc.config.reference docs/configuration.md
    assert with_reference(text) == text


def _keys(model: type[BaseModel], path: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, field in model.model_fields.items():
        inner = nested_model(field.annotation)
        if inner is None:
            found.append((f"{path}{name}", field))
        else:
            found += _keys(inner, f"{path}{name}.")
    return found


def test_every_key_has_a_meaning_and_an_example_that_is_valid() -> None:
    for model in (Job, Site):
        for key, field in _keys(model, ""):
            assert field.description, key
            (example,) = field.examples
            assert "value" in tomllib.loads(f"value = {example}"), key


def test_every_example_is_accepted() -> None:
    for model in (Job, Site):
        for name, field in model.model_fields.items():
            inner = nested_model(field.annotation)
            for table in [inner] if inner else []:
                example = {
                    inner_field.alias or inner_name: tomllib.loads(f"value = {inner_field.examples[0]}")["value"]
                    for inner_name, inner_field in table.model_fields.items()
                    if nested_model(inner_field.annotation) is None
                }
                assert table.model_validate(example), name
