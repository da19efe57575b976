"""What must hold between the values of a job, or of a site profile, beyond the form of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from cfe_hpc.config.checks import ignore_problems
from cfe_hpc.config.job import Job
from cfe_hpc.config.layers import dotted
from cfe_hpc.config.nearest import nearest
from cfe_hpc.config.node_environment import environment_problems
from cfe_hpc.config.problems import toml_value
from cfe_hpc.config.site import Site
from cfe_hpc.config.template import missing_parameters
from cfe_hpc.errors import Problem
from cfe_hpc.units import format_duration

__all__ = ["OWNED_DEEPSPEED_KEYS", "OWNED_OPTIONS", "OWNED_VARIABLES", "job_problems", "site_problems", "text_problems"]

Path = tuple[str | int, ...]
Report = Callable[..., Problem]

OWNED_DEEPSPEED_KEYS: dict[str, str] = {
    "train_batch_size": "set the batch in [params]",
    "train_micro_batch_size_per_gpu": "set the batch in [params]",
    "gradient_accumulation_steps": "set gradient accumulation in [params]",
    "zero_optimization.stage": "set engine.zero_stage",
    "bf16.enabled": 'set engine.precision = "bf16"',
    "fp16.enabled": 'set engine.precision = "bf16" or "fp32"',
}
"""DeepSpeed keys that cfe_hpc writes itself, and where they are set instead."""

OWNED_VARIABLES = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "NODE_RANK"}
)
"""Variables that each rank gets from cfe_hpc."""

OWNED_OPTIONS: dict[str, str] = {
    "--requeue": "cfe_hpc always gives it",
    "--no-requeue": "cfe_hpc requeues every run; set [recovery] budgets instead",
    "--open-mode": "cfe_hpc always appends",
    "--signal": "set slurm.signal and slurm.signal_lead",
    "--job-name": "the job's name is used",
    "--nodes": "set resources.nodes in the job",
    "--ntasks": "set resources.devices_per_node in the job",
    "--ntasks-per-node": "set resources.devices_per_node in the job",
    "--cpus-per-task": "set resources.cpus_per_device in the job",
    "--mem": "set resources.memory in the job",
    "--time": "set resources.time in the job",
    "--partition": "set queue of the partition",
    "--account": "set account of the partition",
    "--qos": "set qos of the partition",
    "--constraint": "set resources.constraint in the job",
    "--gres": "set gres of the hardware",
    "--array": "submit a sweep",
    "--output": "logs lie in the run folder",
    "--error": "logs lie in the run folder",
}
"""#SBATCH options that cfe_hpc writes itself, and where they are set instead."""

# What becomes the value of an #SBATCH option: a space or a line end there would begin another one.
_ONE_WORD = re.compile(r"[^\s\x00-\x1f\x7f\"'`\\]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"--[a-z][a-z0-9-]*(=.*)?")


def text_problems(tree: Mapping[str, Any], origin: Callable[[Path], str]) -> Iterator[tuple[Path, Problem]]:
    """Text that no program can be given: NUL ends every argument, variable and path."""

    def walk(value: Any, path: Path) -> Iterator[tuple[Path, Problem]]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from walk(item, (*path, key))
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                yield from walk(item, (*path, index))
        elif isinstance(value, str) and "\0" in value:
            shown = value.replace("\0", "\\0")
            what, remedy = "holds a NUL character", "take it out"
            yield path, Problem(file=origin(path), key=dotted(path), what=what, value=shown, remedy=remedy)

    yield from walk(tree, ())


def _reporter(origin: Callable[[Path], str]) -> Report:
    def report(path: Path, what: str, remedy: str, value: Any = None, *, check: str = "schema") -> Problem:
        shown = None if value is None else toml_value(value)
        return Problem(file=origin(path), key=dotted(path), what=what, value=shown, remedy=remedy, check=check)

    return report


def job_problems(job: Job, origin: Callable[[Path], str]) -> Iterator[Problem]:
    """Rules of a job whose every value is well formed."""
    report = _reporter(origin)
    if job.entry is not None and job.command is not None:
        yield report(("command",), "given together with entry", "keep one of the two", job.command)
    if job.entry is None and job.command is None:
        remedy = 'write entry = "package.module:function", or command = ["python", "train.py"]'
        yield report(("entry",), "neither entry nor command is given", remedy)
    if job.entry is not None and ".py:" in job.entry:
        remedy = f'name the module: entry = "{job.entry.replace(".py:", ":")}"'
        yield report(("entry",), "names a file", remedy, job.entry)
    for key in ("partition", "account", "qos", "constraint"):
        yield from _word_problems(getattr(job.resources, key), ("resources", key), report)
    yield from _command_problems(job, report)
    if job.launch.nodes_min is not None and job.launch.nodes_min > job.resources.nodes:
        remedy = f"lower it, or raise resources.nodes ({job.resources.nodes})"
        yield report(("launch", "nodes_min"), "more than resources.nodes", remedy, job.launch.nodes_min)
    if job.launch.restarts and job.launch.launcher != "torchrun":
        remedy = 'set launcher = "torchrun", or raise recovery.failures instead'
        yield report(("launch", "restarts"), "only torchrun restarts ranks", remedy, job.launch.restarts)
    yield from _variable_problems(job.launch.environment, ("launch", "environment"), report)
    yield from _variable_problems(job.environment.variables, ("environment", "variables"), report)
    yield from environment_problems(job.environment, ("environment",), report)
    yield from _deepspeed_problems(job.engine.deepspeed, report)
    for key in ("pushgateway", "otlp_endpoint"):
        yield from _url_problems(getattr(job.metrics, key), ("metrics", key), report)
    yield from _tier_problems(job, report)
    if job.checks.ignore:
        yield from ignore_problems(job.checks.ignore, file=origin(("checks", "ignore")), key="checks.ignore")


def _tier_problems(job: Job, report: Report) -> Iterator[Problem]:
    """The node-local tier and the remote one."""
    checkpoint, path = job.checkpoint, ("checkpoint",)
    if checkpoint.local and not checkpoint.async_:
        yield report((*path, "local"), "needs checkpoint.async", "set async = true", True)
    if checkpoint.partner and not checkpoint.local:
        yield report((*path, "partner"), "needs checkpoint.local", "set local = true, or take it out", True)
    if checkpoint.partner and job.resources.nodes == 1:
        yield report((*path, "partner"), "needs two nodes", "raise resources.nodes, or take it out", True)
    url = checkpoint.remote
    if url is None:
        if checkpoint.remote_keep_last is not None:
            yield report((*path, "remote_keep_last"), "needs checkpoint.remote", "name one, or take it out")
        if checkpoint.remote_every_steps is not None:
            yield report((*path, "remote_every_steps"), "needs checkpoint.remote", "name one, or take it out")
        return
    scheme, separator, rest = url.partition("://")
    if "@" in rest.partition("/")[0]:
        # Without the value, as for other URLs.
        remedy = "take them out; fsspec reads credentials from the environment and from its own configuration"
        yield report((*path, "remote"), "holds a user or a password", remedy, check="secret-in-address")
    elif not (separator and re.fullmatch(r"[a-z][a-z0-9+]*", scheme) and rest.strip("/")):
        yield report((*path, "remote"), "is no URL", "write for example s3://bucket/checkpoints", url, check="address")


def _command_problems(job: Job, report: Report) -> Iterator[Problem]:
    for index, word in enumerate(job.command or ()):
        for name in missing_parameters(word, job.params):
            near = nearest(name, job.params)
            hint = f"did you mean {{params.{near}}}?" if near else f"add {name} to [params]"
            what = f"asks for a parameter that is not in [params]: {name}"
            yield report(("command", index), what, hint, word, check="command-parameter")
    if job.command and not job.command[0]:
        yield report(("command", 0), "is empty", "name the program to run")


def _deepspeed_problems(deepspeed: Mapping[str, Any], report: Report) -> Iterator[Problem]:
    for dotted_key, remedy in OWNED_DEEPSPEED_KEYS.items():
        value: Any = deepspeed
        parts = dotted_key.split(".")
        for part in parts:
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            key = ("engine", "deepspeed", *parts)
            yield report(key, "is written by cfe_hpc", f"take it out and {remedy}", value, check="deepspeed-owned")
    if deepspeed.get("steps_per_print") == 0:
        # DeepSpeed 0.19.8 divides by it in the first step.
        path = ("engine", "deepspeed", "steps_per_print")
        yield report(path, "must be at least 1", "leave it out, or set a large number to print seldom", 0)


def _variable_problems(variables: Mapping[str, str], path: Path, report: Report) -> Iterator[Problem]:
    for name, value in variables.items():
        if not _VARIABLE.fullmatch(name):
            remedy = "use letters, digits and _ only, no digit first"
            yield report((*path, name), "is no name for an environment variable", remedy, value)
        elif name in OWNED_VARIABLES or name.startswith("SLURM_"):
            yield report((*path, name), "is set for every rank by cfe_hpc or Slurm", "take it out", value)


def _word_problems(text: str | None, path: Path, report: Report) -> Iterator[Problem]:
    if text is not None and not _ONE_WORD.fullmatch(text):
        yield report(path, "is no single word", "leave out spaces, quotes and line ends", text)


def _url_problems(url: str | None, path: Path, report: Report) -> Iterator[Problem]:
    if url is None:
        return
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if "@" in url.partition("://")[2].partition("/")[0]:
        # Without the value: it would land in terminals and logs, and in run.toml if it were let through.
        remedy = "take them out; CFE_PUSHGATEWAY_USER and CFE_PUSHGATEWAY_PASSWORD hold the gateway's"
        yield report(path, "holds a user or a password", remedy, check="secret-in-address")
        return
    if not good:
        yield report(path, "is no URL", "write for example http://host:9091", url, check="address")


def site_problems(site: Site, origin: Callable[[Path], str]) -> Iterator[Problem]:
    """Rules of a site profile whose every value is well formed."""
    report = _reporter(origin)
    if site.default_partition not in site.partitions:
        yield _unknown_name(report, ("default_partition",), site.default_partition, site.partitions, "partitions")
    if site.debug_partition is not None and site.debug_partition not in site.partitions:
        yield _unknown_name(report, ("debug_partition",), site.debug_partition, site.partitions, "partitions")
    yield from _partition_problems(site, report)
    for name in site.qos:
        yield from _word_problems(name, ("qos", name), report)
    for name, hardware in site.hardware.items():
        yield from _word_problems(hardware.gres, ("hardware", name, "gres"), report)
        yield from _placeholder_problems(hardware.gres or "", ("hardware", name, "gres"), report)
        yield from _option_problems(hardware.request, ("hardware", name, "request"), report)
        for index, option in enumerate(hardware.request):
            yield from _placeholder_problems(option, ("hardware", name, "request", index), report)
    yield from _word_problems(site.network.interface, ("network", "interface"), report)
    yield from _variable_problems(site.network.environment, ("network", "environment"), report)
    yield from _variable_problems(site.environment.variables, ("environment", "variables"), report)
    yield from environment_problems(site.environment, ("environment",), report)
    for key in ("pushgateway", "otlp_endpoint"):
        yield from _url_problems(getattr(site.metrics, key), ("metrics", key), report)
    if not site.storage.runs_root.strip():
        yield report(("storage", "runs_root"), "is empty", 'write for example runs_root = "runs"')


def _placeholder_problems(text: str, path: Path, report: Report) -> Iterator[Problem]:
    for placeholder in re.findall(r"\{([^{}]*)\}", text):
        if placeholder != "devices":
            yield report(path, f"unknown placeholder {{{placeholder}}}", "the only one known is {devices}", text)


def _partition_problems(site: Site, report: Report) -> Iterator[Problem]:
    for name, partition in site.partitions.items():
        path = ("partitions", name)
        if partition.hardware not in site.hardware:
            yield _unknown_name(report, (*path, "hardware"), partition.hardware, site.hardware, "hardware")
        limit, default = partition.time_limit, partition.default_time
        if limit is not None and default is not None and default > limit:
            yield report(
                (*path, "default_time"),
                f"longer than time_limit, {format_duration(limit)}",
                "lower it",
                format_duration(default),
            )
        queue_path = path if partition.queue is None else (*path, "queue")
        yield from _word_problems(None if partition.queue == "" else partition.queue_of(name), queue_path, report)
        fewest, most = partition.nodes_min, partition.nodes_max
        if fewest is not None and most is not None and fewest > most:
            yield report((*path, "nodes_min"), f"more than nodes_max, {most}", "lower it", fewest)
        for key in ("account", "qos", "constraint", "reservation"):
            yield from _word_problems(getattr(partition, key), (*path, key), report)
        yield from _option_problems(partition.options, (*path, "options"), report)


def _unknown_name(report: Report, path: Path, name: str, known: Mapping[str, Any], table: str) -> Problem:
    near = nearest(name, known)
    hint = f"did you mean {near}? " if near else ""
    return report(path, f"not a name of [{table}]", f"{hint}there are: {', '.join(known)}", name)


def _option_problems(options: Sequence[str], path: Path, report: Report) -> Iterator[Problem]:
    for index, option in enumerate(options):
        name = option.split("=", 1)[0].split(" ", 1)[0]
        if not _OPTION.fullmatch(option):
            remedy = 'write for example "--exclusive" or "--reservation=night"'
            yield report((*path, index), "is no single long option", remedy, option)
        elif name in OWNED_OPTIONS:
            yield report((*path, index), "is written by cfe_hpc", f"take it out: {OWNED_OPTIONS[name]}", option)
