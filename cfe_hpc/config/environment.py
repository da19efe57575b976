"""The `CFE_*` variables that change a job: the layer between its file and --set."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cfe_hpc.config.nearest import nearest
from cfe_hpc.errors import ConfigError, Problem
from cfe_hpc.files import read_toml

__all__ = ["HONOURED", "INTERNAL", "OTLP_ENDPOINT", "PROMETHEUS_PORT", "TRAIN_ENTRY", "environment_layers"]

TRAIN_ENTRY = "cfe_hpc.train.main:run"
PROMETHEUS_PORT = 9464
OTLP_ENDPOINT = "http://localhost:4318"

HONOURED: dict[str, str] = {
    "CFE_LAUNCHER": "`launch.launcher`",
    "CFE_DS_CONFIG": "path of a JSON or TOML file laid over `engine.deepspeed`",
    "CFE_GATE_MODE": f"`params.gate_mode` of jobs whose entry is `{TRAIN_ENTRY}`; others ignore it",
    "CFE_ROPE_VARIANT": f"`params.rope_variant` of jobs whose entry is `{TRAIN_ENTRY}`; others ignore it",
    "CFE_IROPE_GROUPS": f"`params.irope_groups` of jobs whose entry is `{TRAIN_ENTRY}`; others ignore it",
    "CFE_PROM_ENABLED": "0 takes `metrics.port` and `metrics.pushgateway` away; 1 sets "
    f"`metrics.port` to {PROMETHEUS_PORT} when neither is given",
    "CFE_PROM_PORT": "`metrics.port`",
    "CFE_OTEL_ENABLED": f"0 takes `metrics.otlp_endpoint` away; 1 sets it to `{OTLP_ENDPOINT}` when none is given",
    "CFE_OTEL_ENDPOINT": "`metrics.otlp_endpoint`",
}
"""Variable to what it sets. An empty variable counts as unset."""

INTERNAL = frozenset(
    {
        "CFE_ALLOCATED_S",
        "CFE_ATTEMPT",
        "CFE_ATTEMPT_BASE",
        "CFE_CONTROL_PORT",
        "CFE_HOSTS",
        "CFE_JOB_ID",
        "CFE_LOCAL_RANK",
        "CFE_LOCAL_WORLD_SIZE",
        "CFE_NODE_RANK",
        "CFE_NUM_NODES",
        "CFE_PIDS",
        "CFE_PUSHGATEWAY_PASSWORD",
        "CFE_PUSHGATEWAY_PASSWORD_FILE",
        "CFE_PUSHGATEWAY_USER",
        "CFE_RANK",
        "CFE_RELAY",
        "CFE_RELAY_PID",
        "CFE_RESTART",
        "CFE_RUN_DIR",
        "CFE_SCHEDULER",
        "CFE_SITE",
        "CFE_WORKER",
        "CFE_WORLD_SIZE",
    }
)
"""Variables of our own that change no job: facts for ranks, credentials, and CFE_SITE, the default site's name."""

_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def environment_layers(
    environ: Mapping[str, str], tree: Mapping[str, Any], problems: list[Problem]
) -> list[tuple[str, dict[str, Any]]]:
    """What the environment lays over a job, in order: (variable, table).

    Args:
        tree: the job as the layers below made it; not checked yet.
        problems: grows by what is wrong with a variable itself. Wrong values are found when the job is checked.
    """
    given = {name: value for name in HONOURED if (value := environ.get(name, "").strip())}
    problems.extend(_near_misses(environ))
    layers: list[tuple[str, dict[str, Any]]] = []

    def put(name: str, table: str, key: str, read: Callable[[str], Any] = str) -> None:
        if name in given:
            layers.append((name, {table: {key: read(given[name])}}))

    put("CFE_LAUNCHER", "launch", "launcher")
    if "CFE_DS_CONFIG" in given:
        try:
            layers.append(("CFE_DS_CONFIG", {"engine": {"deepspeed": _read_table(given["CFE_DS_CONFIG"])}}))
        except ConfigError as error:
            problems.extend(error.problems)
    if tree.get("entry") == TRAIN_ENTRY:
        put("CFE_GATE_MODE", "params", "gate_mode")
        put("CFE_ROPE_VARIANT", "params", "rope_variant")
        put("CFE_IROPE_GROUPS", "params", "irope_groups", _whole_number)
    put("CFE_PROM_PORT", "metrics", "port", _whole_number)
    put("CFE_OTEL_ENDPOINT", "metrics", "otlp_endpoint")
    return layers + _switches(given, _metrics_so_far(tree, layers), problems)


def _switches(
    given: Mapping[str, str], metrics: Mapping[str, Any], problems: list[Problem]
) -> list[tuple[str, dict[str, Any]]]:
    """What the two *_ENABLED variables lay over `metrics`."""
    layers: list[tuple[str, dict[str, Any]]] = []
    for name, keys, fallback in (
        ("CFE_PROM_ENABLED", ("port", "pushgateway"), PROMETHEUS_PORT),
        ("CFE_OTEL_ENABLED", ("otlp_endpoint",), OTLP_ENDPOINT),
    ):
        if name not in given:
            continue
        wanted = _WORDS.get(given[name].lower())
        if wanted is None:
            remedy = "set it to 1 or 0"
            problems.append(Problem(file=name, key="", what="is neither on nor off", value=given[name], remedy=remedy))
        elif not wanted:
            layers.append((name, {"metrics": dict.fromkeys(keys)}))
        elif not any(metrics.get(key) for key in keys):
            layers.append((name, {"metrics": {keys[0]: fallback}}))
    return layers


def _metrics_so_far(tree: Mapping[str, Any], layers: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    base = tree.get("metrics")
    metrics = dict(base) if isinstance(base, Mapping) else {}
    for _, table in layers:
        metrics.update(table.get("metrics", {}))
    return metrics


def _whole_number(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _near_misses(environ: Mapping[str, str]) -> list[Problem]:
    problems = []
    for name in sorted(environ):
        if not name.startswith("CFE_") or name in HONOURED or name in INTERNAL:
            continue
        near = nearest(name, [*HONOURED, "CFE_SITE"], cutoff=0.85)
        if near:
            remedy = f"did you mean {near}? rename or unset it"
            problems.append(Problem(file=name, key="", what="unknown variable", value=environ[name], remedy=remedy))
    return problems


def _read_table(ref: str) -> dict[str, Any]:
    path = Path(ref).expanduser()
    if path.suffix != ".json":
        return read_toml(path, shown_as=f"CFE_DS_CONFIG: {ref}")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what, remedy = f"cannot be read: {error.strerror}", "check the path"
    except ValueError as error:
        what, remedy = f"not valid JSON: {error}", "mend the file"
    else:
        if isinstance(table, dict):
            return table
        what, remedy = "is no JSON object", "write { … } around DeepSpeed's keys"
    raise ConfigError([Problem(file=f"CFE_DS_CONFIG: {ref}", key="", what=what, remedy=remedy)])
