"""`[[stage]]` of a job file: a pipeline, each stage of which is a run with the job's keys, but for those it changes.

"{stage.NAME.run_dir}" in the command, the parameters or `checkpoint.resume_from` of a stage is replaced, when the
pipeline is submitted, by the run folder of a stage that it waits for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field, ValidationError

from cfe_hpc.config.job import Job
from cfe_hpc.config.layers import Layers, dotted
from cfe_hpc.config.load import SET, Loaded, Setting, load
from cfe_hpc.config.nearest import nearest
from cfe_hpc.config.problems import translate
from cfe_hpc.errors import ConfigError, PipelineError, Problem, UsageError

__all__ = ["REFERENCES", "Stage", "StageJob", "filled_in", "lay_stage", "load_pipeline", "referenced"]

REFERENCES: dict[str, str] = {
    "run_dir": "its run folder",
    "run_id": "its run id",
    "checkpoints": "the folder of its checkpoints",
    "exports": "the folder of the weights it exports",
}
"""What "{stage.NAME.…}" may ask of another stage."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_REFERENCE = re.compile(r"\{stage\.([A-Za-z0-9_-]+)\.([A-Za-z_]+)\}")
_PROGRAMS = ("entry", "command")


class Stage(Job):
    """One table of [[stage]]: a name, what it waits for, and the job's keys that it changes."""

    name: str = Field(
        min_length=1,
        max_length=40,
        description='names the stage; its run is called "<job>-<stage>"',
        examples=['"train"'],
    )
    after: list[str] | None = Field(
        None,
        description="stages that must have completed before it starts; when left out the one before",
        examples=['["data"]'],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageJob:
    """A stage as a job of its own.

    Attributes:
        after: names of the stages that it starts after.
    """

    name: str
    after: tuple[str, ...]
    loaded: Loaded


def load_pipeline(
    job_ref: str, site_ref: str | None = None, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> list[StageJob]:
    """The stages of a job file that has some, in its order. Arguments as for `config.load.load`; `--set
    stage.NAME.KEY=VALUE` is for one stage alone, any other for all of them.

    Raises:
        ConfigError: holds every problem of every stage, each told once.
        UsageError: the job has no stages.
    """
    stages = stages_of(job_ref, site_ref, overrides, environ)
    problems: dict[str, Problem] = {}
    jobs = []
    for name, after in stages.items():
        try:
            loaded = load(job_ref, site_ref, overrides, environ, stage=name)
        except ConfigError as error:
            problems.update({str(problem): problem for problem in error.problems})
            continue
        jobs.append(StageJob(name=name, after=after, loaded=loaded))
        for problem in _reference_problems(loaded, name, stages):
            problems[str(problem)] = problem
    if problems:
        raise ConfigError(problems.values())
    return jobs


def stages_of(
    job_ref: str, site_ref: str | None = None, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> dict[str, tuple[str, ...]]:
    """Each stage of a job file, and those that it starts after. Arguments and errors as for `load_pipeline`."""
    try:
        loaded = load(job_ref, site_ref, overrides, environ)
    except PipelineError as error:
        return error.stages
    raise UsageError(f"{loaded.job_file}: has no [[stage]]; leave out what is about stages")


def lay_stage(
    layers: Layers, table: Mapping[str, Any], chosen: str | None, file: str, settings: Sequence[Setting]
) -> list[Setting]:
    """Lay on the table of a job file with stages, and that of the one that was chosen.

    Args:
        settings: those of --set; the ones that begin with `stage.NAME` are for that stage alone.

    Returns:
        The settings for this stage, without that beginning.

    Raises:
        ConfigError: the stages are wrong.
        PipelineError: none was chosen.
        UsageError: there are no stages, or none of that name.
    """
    stages = _read(table, file)
    named = [(path[1] if len(path) > 2 else "", path) for path, *_ in settings if path[0] == "stage"]
    problems = [_unknown(name, stages, SET, dotted(path)) for name, path in named if name not in stages]
    if problems:
        raise ConfigError(problems)
    if chosen is None:
        raise PipelineError(
            f"{file}: is a pipeline, with stages {', '.join(stages)}; name the one that is meant: --stage NAME",
            {name: tuple(stage["after"]) for name, stage in stages.items()},
        )
    if chosen not in stages:
        raise UsageError(f"--stage: {_unknown(chosen, stages, file, 'stage')}")
    own = {key: value for key, value in stages[chosen].items() if key not in ("name", "after")}
    program = any(key in own for key in _PROGRAMS)
    base = {key: value for key, value in table.items() if key != "stage" and not (program and key in _PROGRAMS)}
    layers.lay(base, file)
    origin = f"{file}, stage {chosen}"
    layers.lay(own, origin)
    if isinstance(base.get("name"), str):
        layers.lay({"name": f"{base['name']}-{chosen}"}, origin)
    return [*_settings_for(chosen, settings)]


def _settings_for(stage: str, settings: Iterable[Setting]) -> Iterator[Setting]:
    """Those that are for all stages, and this stage's own without their `stage.NAME`."""
    for path, value, raw in settings:
        if path == ("name",):
            yield path, f"{value}-{stage}", f"{raw}-{stage}"
        elif path[:2] == ("stage", stage):
            yield path[2:], value, raw
        elif path[0] != "stage":
            yield path, value, raw


def _read(table: Mapping[str, Any], file: str) -> dict[str, dict[str, Any]]:
    """The tables of the stages by name, each with its `after` spelt out.

    Raises:
        ConfigError: holds everything that is wrong with them, but for what only a whole job can tell.
    """
    if "stage" not in table:
        raise UsageError(f"--stage: {file}: has no [[stage]]; leave the option out")
    listed = table["stage"]
    if not isinstance(listed, list) or not listed or not all(isinstance(stage, dict) for stage in listed):
        what, remedy = "must be a list of tables", "begin each stage with [[stage]]"
        raise ConfigError([Problem(file=file, key="stage", what=what, remedy=remedy)])
    problems: list[Problem] = []
    stages: dict[str, dict[str, Any]] = {}
    for index, stage in enumerate(listed):
        problems.extend([*_form_problems(stage, index, file)] or _stage_problems(stage, index, file, stages))
        # Also one with mistakes, so that those that wait for it have none because of them.
        stages[str(stage.get("name"))] = {**stage, "after": stage.get("after", [*stages][-1:])}
    if problems:
        raise ConfigError(problems)
    return stages


def _form_problems(stage: dict[str, Any], index: int, file: str) -> Iterator[Problem]:
    try:
        Stage.model_validate(stage, by_alias=True, by_name=False)
    except ValidationError as error:
        for _, problem in translate(error.errors(include_url=False), Stage, lambda _: file):
            yield replace(problem, key=f"{dotted(('stage', index))}.{problem.key}")


def _stage_problems(stage: dict[str, Any], index: int, file: str, earlier: Mapping[str, Any]) -> Iterator[Problem]:
    path, name = ("stage", index), stage["name"]
    if not _NAME.fullmatch(name):
        remedy = "use letters, digits, - and _ only"
        yield Problem(file=file, key=dotted((*path, "name")), what="is no name for a stage", value=name, remedy=remedy)
    if name in earlier:
        what = "is the name of two stages"
        yield Problem(file=file, key=dotted((*path, "name")), what=what, value=name, remedy="give each its own")
    if "stage" in stage:
        yield Problem(
            file=file, key=dotted((*path, "stage")), what="a stage has no stages", remedy="list them one after another"
        )
    for number, other in enumerate(stage.get("after") or ()):
        if other not in earlier:
            yield _unknown(other, earlier, file, dotted((*path, "after", number)))


def _unknown(name: str, known: Iterable[str], file: str, key: str) -> Problem:
    names = list(known)
    near = nearest(name, names)
    hint = f"did you mean {near}? " if near else ""
    remedy = f"{hint}there are: {', '.join(names)}" if names else "the first stage waits for none"
    what = "no stage listed before it has that name" if ".after" in key else "no such stage"
    return Problem(file=file, key=key, what=what, value=name, remedy=remedy)


def _reference_problems(loaded: Loaded, stage: str, stages: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    """References of a stage to what is not there, or not yet there when it starts."""
    known = upstream(stage, stages)
    for key, text in _texts(loaded.job):
        for name, field in _REFERENCE.findall(text):
            file = loaded.origins.get(f"job.{key.partition('[')[0]}", loaded.job_file)
            about = {"file": file, "key": key, "value": text}
            if name not in stages:
                near = nearest(name, stages)
                remedy = f"did you mean {near}?" if near else f"there are: {', '.join(stages)}"
                yield Problem(**about, what=f"refers to a stage that is not there: {name}", remedy=remedy)
            elif name not in known:
                remedy = f'add "{name}" to its after'
                yield Problem(**about, what=f"refers to stage {name}, which {stage} does not wait for", remedy=remedy)
            elif field not in REFERENCES:
                remedy = f"of a stage there are: {', '.join(REFERENCES)}"
                yield Problem(**about, what=f"asks stage {name} for what it does not have: {field}", remedy=remedy)


def upstream(stage: str, stages: Mapping[str, Sequence[str]]) -> set[str]:
    """Every stage that must have completed before this one starts."""
    direct = set(stages[stage])
    return direct.union(*(upstream(each, stages) for each in direct))


def referenced(job: Job) -> set[str]:
    """Names of the stages whose folders the job asks for."""
    return {name for _, text in _texts(job) for name, _ in _REFERENCE.findall(text)}


def filled_in(job: Job, values: Mapping[str, Mapping[str, str]]) -> Job:
    """The job with every reference to a stage replaced.

    Args:
        values: by stage, what REFERENCES lists.
    """

    def fill(text: str) -> str:
        return _REFERENCE.sub(lambda match: values[match[1]][match[2]], text)

    command = None if job.command is None else [fill(word) for word in job.command]
    checkpoint = job.checkpoint.model_copy(update={"resume_from": _mapped(job.checkpoint.resume_from, fill)})
    changed = {"command": command, "checkpoint": checkpoint, "params": _mapped(job.params, fill)}
    return job.model_copy(update=changed)


def _texts(job: Job) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of whatever may hold a reference."""
    for index, word in enumerate(job.command or ()):
        yield dotted(("command", index)), word
    if job.checkpoint.resume_from is not None:
        yield "checkpoint.resume_from", job.checkpoint.resume_from
    yield from _inner(job.params, ("params",))


def _inner(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield dotted(path), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _inner(item, (*path, str(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _inner(item, (*path, index))


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value
