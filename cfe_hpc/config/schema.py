"""JSON Schemas of job files and site profiles, from the models: `python -m cfe_hpc.config.schema` writes the files
beside this module, for editors that complete and check TOML."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import PydanticUndefined, core_schema

from cfe_hpc.config.base import DURATION, SIZE, spelt
from cfe_hpc.config.environment import TRAIN_ENTRY
from cfe_hpc.config.job import Job
from cfe_hpc.config.problems import key_of, nested_model
from cfe_hpc.config.site import Site
from cfe_hpc.config.stage import Stage
from cfe_hpc.files import write_atomic

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["FOLDER", "KINDS", "Kind", "main", "schema", "schema_text"]

Kind = Literal["job", "site"]
KINDS: dict[Kind, type[BaseModel]] = {"job": Job, "site": Site}
FOLDER = Path(__file__).resolve().parent / "schemas"

# The newest that taplo, the language server of most editors, has always understood.
_DIALECT = "http://json-schema.org/draft-07/schema#"
_TITLES: dict[Kind, str] = {"job": "cfe_hpc job file", "site": "cfe_hpc site profile"}

_CLOCK = r"(\d+-)?\d+:\d\d:\d\d|\d+-\d+:\d\d"
_PARTS = r"(\s*\d+(\.\d+)?\s*([mM][sS]|[wdhmsWDHMS]))+"
# Read by functions of ours, which accept more than the number that comes out.
_SPELT: dict[Any, JsonSchemaValue] = {
    DURATION: {
        "type": ["string", "number"],
        "pattern": rf"^\s*(\d+(\.\d+)?|{_CLOCK}|{_PARTS})\s*$",
        "minimum": 0,
    },
    SIZE: {
        "type": ["string", "integer"],
        "pattern": r"^\s*\d+(\.\d+)?\s*[kmgtpKMGTP]?[iI]?[bB]?\s*$",
        "minimum": 0,
    },
}


class _Generator(GenerateJsonSchema):
    """Pydantic's, for files that people write in TOML."""

    schema_dialect = _DIALECT

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        """TOML has no null: a key that may be None may be left out."""
        return self.generate_inner(schema["schema"])

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        """Durations and sizes as they are written."""
        known = _SPELT.get(schema["function"]["function"])
        return dict(known) if known is not None else super().function_before_schema(schema)

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        """Without the default, which is put in as people write it."""
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Keys have descriptions; titles would only repeat their names."""
        return False


def schema(kind: Kind) -> dict[str, Any]:
    """The JSON Schema (draft 7) of a file of this kind. Rules between keys are beyond it: `check` knows them."""
    made = _made(KINDS[kind])
    definitions = made.pop("$defs", {})
    top = {"$schema": _DIALECT, **made, "title": _TITLES[kind], "definitions": definitions}
    if kind == "job":
        _add_params(top)
        _add_stages(top)
    tables = {KINDS[kind].__name__: top, **definitions}
    for definition in definitions.values():
        definition.pop("title", None)
    for model in _models(KINDS[kind]):
        _annotate(model, tables[model.__name__])
    return top


def schema_text(kind: Kind) -> str:
    """The text of the file that is shipped."""
    return json.dumps(schema(kind), indent=1, ensure_ascii=False) + "\n"


def _add_params(top: dict[str, Any]) -> None:
    """Let the keys of `[params]` be known where the entry is the training that is shipped."""
    model: type[BaseModel] = import_module("cfe_hpc.train.config").Params
    table = _made(model)
    _annotate(model, table)
    top["definitions"]["Params"] = table
    is_ours = {"properties": {"entry": {"const": TRAIN_ENTRY}}, "required": ["entry"]}
    top["allOf"] = [{"if": is_ours, "then": {"properties": {"params": {"$ref": "#/definitions/Params"}}}}]


def _add_stages(top: dict[str, Any]) -> None:
    """Let the keys of `[[stage]]` be known, which a job takes as they are until one of its stages is chosen."""
    table = _made(Stage)
    table.pop("$defs", None)
    for key in ("stage", "sweep"):
        table["properties"].pop(key)
    _annotate(Stage, table)
    top["definitions"]["Stage"] = table
    top["properties"]["stage"]["items"] = {"$ref": "#/definitions/Stage"}


def _made(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(by_alias=True, ref_template="#/definitions/{model}", schema_generator=_Generator)


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        inner = nested_model(field.annotation)
        if inner is not None:
            yield from _models(inner)


def _annotate(model: type[BaseModel], table: dict[str, Any]) -> None:
    """Say of a model's plain keys what they default to, with an example, as TOML spells both."""
    table["description"] = (model.__doc__ or "").partition("\n")[0].replace("`", "")
    for name, field in model.model_fields.items():
        entry = table["properties"].get(key_of(name, field))
        if entry is None or nested_model(field.annotation) is not None:
            continue
        default = _default(field)
        if default is not None:
            entry["default"] = default
        if field.examples:
            entry["examples"] = [tomllib.loads(f"value = {example}")["value"] for example in field.examples]


def _default(field: FieldInfo) -> Any:
    """What a file that leaves the key out gets; None where that is nothing."""
    value = field.get_default(call_default_factory=True, validated_data={})
    return None if value is PydanticUndefined else spelt(field, value)


def main() -> int:
    """Write both files beside this module."""
    FOLDER.mkdir(exist_ok=True)
    for kind in KINDS:
        write_atomic(FOLDER / f"{kind}.json", schema_text(kind))
    return 0


if __name__ == "__main__":
    sys.exit(main())
