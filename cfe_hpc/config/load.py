"""From files, environment and command line to one job and one site, and where each value came from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from importlib import import_module
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cfe_hpc.config import shipped
from cfe_hpc.config.environment import TRAIN_ENTRY, environment_layers
from cfe_hpc.config.job import Job
from cfe_hpc.config.layers import Layers, dotted
from cfe_hpc.config.problems import Path, field_at, key_of, translate
from cfe_hpc.config.roots import DEFAULT_SITE
from cfe_hpc.config.rules import job_problems, site_problems, text_problems
from cfe_hpc.config.site import Site
from cfe_hpc.errors import ConfigError, Problem
from cfe_hpc.files import read_toml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["DEFAULT_SITE", "PRECEDENCE", "SET", "Loaded", "load", "load_site", "sweep_table"]

SET = "--set"
SWEEP = "--sweep"

PRECEDENCE: tuple[tuple[str, str], ...] = (
    ("package defaults", "what the reference names as the default of a key; shown as `default`"),
    ("site", "values of the site profile that stand in for the job's own: [metrics] and [environment]"),
    ("job", "the job file"),
    ("CFE_* environment", "the variables that docs/configuration.md lists, of the shell that submits"),
    ("--set", "KEY=VALUE of the command line; of two for one key the later one"),
)
"""The layers, each winning over those before it."""

# Reached by dotted name: `train` lies above this layer. Such a function imports nothing heavy.
PARAMS_CHECKS = {TRAIN_ENTRY: "cfe_hpc.train.config:read_params"}
"""Entries whose [params] are checked before submission: entry to `module:function(table, *, file, origins)`."""

ModelT = TypeVar("ModelT", bound=BaseModel)
Rules = Callable[[Any, Callable[[Path], str]], Iterator[Problem]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A job and a site, checked, and their history.

    Attributes:
        origins: dotted key, beginning with `job.` or `site.`, to the layer it came from: a file as messages name
            it, a `CFE_*` variable, `--set`, or `default`.
        job_file: the job file as messages name it.
        site_file: the site profile as messages name it.
        tasks: of a sweep, of which the job is one; 1 otherwise.
    """

    job: Job
    site: Site
    origins: Mapping[str, str]
    job_file: str
    site_file: str
    tasks: int = 1


def load(
    job_ref: str,
    site_ref: str | None = None,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    stage: str | None = None,
    sweep: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read, lay over one another and check all that makes a job.

    Args:
        job_ref: path of a job file, or the name of one in jobs/ or shipped with the package.
        site_ref: path or name of a site profile; CFE_SITE when None, `local` when that is unset.
        overrides: `KEY=VALUE`, VALUE in TOML, a bare word is text; KEY of the job, or of the site after `site.`.
        environ: where CFE_* are looked up; nowhere when None.
        stage: the one that is meant of a job with stages.
        sweep: what the command line says of [sweep], see `sweep_table`; laid below the overrides.

    Raises:
        ConfigError: holds every problem of the site, the job, the environment and the overrides.
        PipelineError: the job has stages, and none was named.
        UsageError: it has none of that name.
    """
    environ = {} if environ is None else environ
    problems: list[Problem] = []
    settings = [setting for text in overrides if (setting := _parse_setting(text, problems))]
    site_settings = [(path[1:], value, raw) for path, value, raw in settings if path[0] == "site"]
    job_settings = [setting for setting in settings if setting[0][0] != "site"]
    site, site_layers, site_file = _gathered(problems, lambda: _site(site_ref, environ, site_settings, problems))
    job, job_layers, job_file = _gathered(
        problems, lambda: _job(job_ref, site, site_file, environ, job_settings, stage, sweep or {}, problems)
    )
    if problems or job is None or site is None:
        raise ConfigError(problems)
    origins = {
        **{f"job.{key}": origin for key, origin in _origins(job, job_layers, ())},
        **{f"site.{key}": origin for key, origin in _origins(site, site_layers, ())},
    }
    return Loaded(job=job, site=site, origins=origins, job_file=job_file, site_file=site_file)


def load_site(site_ref: str | None = None, environ: Mapping[str, str] | None = None) -> tuple[Site, str]:
    """A site profile alone, and its file as messages name it. Arguments and errors as for `load`."""
    problems: list[Problem] = []
    site, _, site_file = _gathered(problems, lambda: _site(site_ref, environ or {}, [], problems))
    if problems or site is None:
        raise ConfigError(problems)
    return site, site_file


Setting = tuple[tuple[str, ...], Any, str]
Parts = tuple[ModelT | None, Layers, str]


def _gathered(problems: list[Problem], read: Callable[[], Parts[ModelT]]) -> Parts[ModelT]:
    try:
        return read()
    except ConfigError as error:  # the file itself cannot be found or read: nothing more to say of it
        problems.extend(error.problems)
        return None, Layers(""), ""


def _site(
    site_ref: str | None, environ: Mapping[str, str], settings: Sequence[Setting], problems: list[Problem]
) -> Parts[Site]:
    ref = site_ref or environ.get("CFE_SITE", "").strip() or DEFAULT_SITE
    path = shipped.resolve(ref, "site_configs")
    file = shipped.shown(path)
    layers = Layers(file)
    layers.lay(read_toml(path, shown_as=file), file)
    return _checked(Site, layers, settings, site_problems, problems), layers, file


def _job(
    job_ref: str,
    site: Site | None,
    site_file: str,
    environ: Mapping[str, str],
    settings: Sequence[Setting],
    stage: str | None,
    sweep: Mapping[str, Any],
    problems: list[Problem],
) -> Parts[Job]:
    path = shipped.resolve(job_ref, "jobs")
    file = shipped.shown(path)
    layers = Layers(file)
    if site is not None:
        layers.lay({"metrics": site.metrics.model_dump(exclude_none=True)}, site_file)
        layers.lay({"environment": site.environment.model_dump(exclude_unset=True)}, site_file)
    table = read_toml(path, shown_as=file)
    if stage is None and "stage" not in table:
        layers.lay(table, file)
    else:
        from cfe_hpc.config.stage import lay_stage  # late: few jobs have stages

        settings = lay_stage(layers, table, stage, file, settings)
    for variable, table in environment_layers(environ, layers.tree, problems):
        layers.lay(table, variable)
    if sweep:
        layers.lay({"sweep": sweep}, SWEEP)

    def check_params(params: Mapping[str, Any]) -> None:
        entry = layers.tree.get("entry")
        if isinstance(entry, str) and entry in PARAMS_CHECKS:
            module, _, function = PARAMS_CHECKS[entry].partition(":")
            origins = {f"job.{key}": origin for key, origin in _origin_of(params, layers, ("params",))}
            getattr(import_module(module), function)(params, file=file, origins=origins)

    def rules(job: Job, origin: Callable[[Path], str]) -> Iterator[Problem]:
        if job.sweep is None:
            return job_problems(job, origin)
        from cfe_hpc.config.sweep_rules import sweep_problems  # late: few jobs are sweeps

        return sweep_problems(job, layers.tree, origin, check_params)

    job = _checked(Job, layers, settings, rules, problems)
    params = layers.tree.get("params", {})
    if "sweep" not in layers.tree and isinstance(params, Mapping):
        check_params(params)
    return job, layers, file


def sweep_table(axes: Sequence[str], max_parallel: int | None = None) -> dict[str, Any]:
    """What `--sweep KEY=V1,V2` and `--max-parallel N` say, as a table for `load`; empty when they say nothing.

    Raises:
        ConfigError: holds a problem for each text that is no axis.
    """
    table: dict[str, Any] = {} if max_parallel is None else {"max_parallel": max_parallel}
    if not axes:
        return table
    from cfe_hpc.config.sweep_rules import parse_axis
    from cfe_hpc.config.tasks import laid

    problems = []
    for text in axes:
        axis = parse_axis(text, _toml_or_text)
        if axis is None:
            remedy = "write for example params.lr=0.001,0.0001 or params.seed={range=[0,10]}"
            problems.append(Problem(file=SWEEP, key="", what="not KEY=V1,V2", value=text, remedy=remedy))
        else:
            table = laid(table, ["axes", *axis[0]], axis[1])
    if problems:
        raise ConfigError(problems)
    return table


def _parse_setting(text: str, problems: list[Problem]) -> Setting | None:
    """`KEY=VALUE` as (path, value, VALUE as written)."""
    key, equals, raw = text.partition("=")
    if not equals:
        problems.append(
            Problem(file=SET, key="", what="not KEY=VALUE", value=text, remedy="write for example resources.nodes=2")
        )
        return None
    try:
        table: Any = tomllib.loads(f"{key.strip()} = 0") if "\n" not in key else {}
    except tomllib.TOMLDecodeError:
        table = {}
    path: list[str] = []
    while isinstance(table, dict) and len(table) == 1:
        name, table = next(iter(table.items()))
        path.append(name)
    if table != 0 or path[:1] == ["site"] == path:
        problems.append(
            Problem(file=SET, key="", what="not a dotted key", value=key, remedy="write for example resources.nodes=2")
        )
        return None
    return tuple(path), _toml_or_text(raw.strip()), raw


def _toml_or_text(raw: str) -> Any:
    # A "#" outside quotes and brackets would cut the rest off as a comment: nobody means that on a command line.
    if "#" in raw and raw[:1] not in "\"'[{":
        return raw
    try:
        table = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError:
        return raw
    value = table.get("value")
    # 02:30:00 is a local time to TOML; to whoever types it, a duration.
    return raw if table.keys() != {"value"} or isinstance(value, (date, time)) else value


def _nest(path: Sequence[str], value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    assert isinstance(value, dict)  # a setting's path is never empty
    return value


def _checked(
    model: type[ModelT], layers: Layers, settings: Sequence[Setting], rules: Rules, problems: list[Problem]
) -> ModelT | None:
    """Lay the settings on, and the model of it all; None, and more problems, when something is wrong."""
    for path, value, raw in settings:
        _, field = field_at(model, path)
        wants_text = field is not None and field.annotation in (str, str | None)
        plain = isinstance(value, (int, float)) and wants_text  # account=1234 is text although it looks otherwise
        layers.lay(_nest(path, raw if plain else value), SET)
    found, checked, unsure = _validated(model, layers)
    found.extend(problem for _, problem in text_problems(layers.tree, layers.origin))
    if checked is not None:
        found.extend(problem for problem in rules(checked, layers.origin) if not _about(problem.key, unsure))
    problems.extend(found)
    return None if found else checked


def _validated(model: type[ModelT], layers: Layers) -> tuple[list[Problem], ModelT | None, set[str]]:
    """What pydantic finds, and a model with the broken values left out, so that the rules between the others
    are checked in the same go. The set names the keys that the model does not hold as they were written."""
    tree, found, unsure = layers.tree, list[Problem](), set[str]()
    for _ in range(3):  # leaving a broken value out can bring up a missing one, which then gets a stand-in
        try:
            # By the names in files alone: `async_` is how Python must spell `async`.
            return found, model.model_validate(tree, by_alias=True, by_name=False), unsure
        except ValidationError as error:
            details = error.errors(include_url=False)
        for path, problem in translate(details, model, layers.origin):
            if problem.key not in unsure:
                found.append(problem)
            unsure |= {problem.key, problem.key.partition("[")[0]}
            tree = _mended(model, tree, path, missing=problem.what == "missing")
    return found, None, unsure


def _mended(model: type[BaseModel], tree: dict[str, Any], path: Path, *, missing: bool) -> dict[str, Any]:
    """A copy of `tree` with the value at `path` left out, or with a stand-in where it was missing."""
    names = path[: next((i for i, part in enumerate(path) if isinstance(part, int)), len(path))]
    if not names:
        return tree
    mended = dict(tree)
    here = mended
    for name in names[:-1]:
        if not isinstance(here.get(str(name)), Mapping):
            return mended
        here[str(name)] = dict(here[str(name)])
        here = here[str(name)]
    here.pop(str(names[-1]), None)
    _, field = field_at(model, path)
    if missing and field is not None and field.examples:
        here[str(names[-1])] = tomllib.loads(f"value = {field.examples[0]}")["value"]
    return mended


def _about(key: str, unsure: set[str]) -> bool:
    if unsure & {"entry", "command"} and key in ("entry", "command"):
        return True
    if "params" in unsure and key.startswith("command["):
        return True
    return any(key == known or key.startswith((f"{known}.", f"{known}[")) for known in unsure)


def _origins(value: BaseModel, layers: Layers, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(dotted key, origin) of every value of a model, in its order; free tables value by value."""
    for name, field in type(value).model_fields.items():
        yield from _origin_of(getattr(value, name), layers, (*path, key_of(name, field)))


def _origin_of(value: Any, layers: Layers, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, BaseModel):
        yield from _origins(value, layers, path)
    elif isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _origin_of(item, layers, (*path, key))
    else:
        yield dotted(path), layers.origin_of_value(path) or "default"
