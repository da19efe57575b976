"""Finds run folders: all under the runs roots, or the one that a user's word means."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cfe_hpc.config import shipped
from cfe_hpc.config.nearest import nearest
from cfe_hpc.config.roots import DEFAULT_RUNS_ROOT, DEFAULT_SITE, expanded
from cfe_hpc.errors import ConfigError, UsageError
from cfe_hpc.files import read_toml
from cfe_hpc.ranks.jobrecords import records
from cfe_hpc.runfolder import RUN_ID, RunFolder

__all__ = ["find_run", "run_paths", "runs_roots", "runs_under"]

_JOB_ID = re.compile(r"^(\d+|local-\d+)([_.+]\S*)?$")
_TASK = re.compile(r"(?P<sweep>.+)\.(?P<number>\d{1,6})")


def runs_roots(site_ref: str | None = None, environ: Mapping[str, str] | None = None) -> list[Path]:
    """Folders that hold runs: the site's when one is named; else those of the default site and of every profile
    that a bare name reaches, as far as they exist.

    Of the profiles no more is read than their runs roots: whether they are right is for others to say.

    Raises:
        ConfigError: the named, or default, site's profile cannot be read. Other such profiles are passed over.
    """
    environ = os.environ if environ is None else environ
    ref = site_ref or environ.get("CFE_SITE", "").strip() or DEFAULT_SITE
    roots = [_runs_root(shipped.resolve(ref, "site_configs"), environ)]
    if site_ref is None:
        for path in shipped.available("site_configs").values():
            try:
                roots.append(_runs_root(path, environ))
            except ConfigError:
                continue
    return [root for root in dict.fromkeys(roots) if root.is_dir()]


def _runs_root(path: Path, environ: Mapping[str, str]) -> Path:
    """The runs root of a profile. Its models would take ten times as long, and nothing here needs them."""
    file = shipped.shown(path)
    storage = read_toml(path, shown_as=file).get("storage")
    root = storage.get("runs_root", DEFAULT_RUNS_ROOT) if isinstance(storage, dict) else DEFAULT_RUNS_ROOT
    return expanded(str(root), environ, file=file)


def run_paths(roots: Sequence[Path]) -> Iterator[str]:
    """The path of every run folder under the roots, oldest first within each job. Sweeps are one folder each."""
    for root in roots:
        for job in _folders(str(root)):
            yield from (f"{job}/{name}" for name in _names(job) if RUN_ID.match(name))


def runs_under(roots: Sequence[Path]) -> Iterator[RunFolder]:
    """Every run folder under the roots, oldest first within each job."""
    return (RunFolder(Path(path)) for path in run_paths(roots))


def _folders(path: str) -> list[str]:
    return [f"{path}/{name}" for name in _names(path)]


def _names(path: str) -> list[str]:
    """Names of the folders in a folder, sorted; none where it cannot be read."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except OSError:
        return []


def find_run(ref: str, roots: Sequence[Path]) -> RunFolder:
    """The one run that `ref` means: a run folder, a run id, a unique prefix of one, or a job id of the scheduler.

    A path wins over everything, a whole run id over prefixes, a job id over prefixes. Array tasks and steps of a
    job (`123_4`, `123.0`) are found by the array's record first, then by the job's. A task of a sweep is meant by the
    sweep's id, or a prefix of it, a dot and its number, or by its job in the array.

    Raises:
        UsageError: there is none, or several; lists them.
    """
    path = Path(ref).expanduser()
    if (path / "run.toml").is_file():
        return RunFolder(path.resolve())
    if not ref.strip():
        raise UsageError("RUN: is empty; give a run id, a prefix of one, a run folder or a job id")
    if os.sep not in ref and (task := _task(ref, roots)) is not None:
        return task
    if os.sep in ref:
        raise UsageError(f"{ref}: no such run folder; see `cfe-hpc status` for the runs there are")
    runs = list(runs_under(roots))
    for matches in (
        [run for run in runs if run.run_id == ref],
        _with_job(runs, ref) if _JOB_ID.match(ref) else [],
        [run for run in runs if run.run_id.startswith(ref)],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            shown = ", ".join(run.run_id for run in matches[:5]) + (", …" if len(matches) > 5 else "")
            raise UsageError(f"{ref}: means {len(matches)} runs ({shown}); give more of the run id")
    near = nearest(ref, [run.run_id for run in runs])
    where = ", ".join(map(str, roots)) or "any runs root that exists"
    hint = f"did you mean {near}?" if near else "see `cfe-hpc status`, or name its folder or --site"
    raise UsageError(f"{ref}: no such run under {where}; {hint}")


def _task(ref: str, roots: Sequence[Path]) -> RunFolder | None:
    """The task of a sweep that `ref` means; None when it means none.

    Raises:
        UsageError: it means one that has no folder, for it has not started.
    """
    named, job = _TASK.fullmatch(ref), re.fullmatch(r"(\d+)_(\d+)", ref)
    if named is None and job is None:
        return None
    found = []
    for sweep in runs_under(roots):
        if named is not None and sweep.run_id.startswith(named["sweep"]) and sweep.is_sweep:
            found.append(sweep.task(int(named["number"])))
        if job is not None:
            arrays = [each for each in records(sweep, "job") if str(each.get("job_id")) == job[1] and "offset" in each]
            found += [sweep.task(int(array["offset"]) + int(job[2])) for array in arrays]
    if len(found) != 1:
        return None
    if not found[0].path.is_dir():
        sweep_id = found[0].top.run_id
        raise UsageError(f"{ref}: has not started, or is no task of it; see `cfe-hpc status {sweep_id}`")
    return found[0]


def _with_job(runs: Sequence[RunFolder], job_id: str) -> list[RunFolder]:
    base = re.split(r"[_.+]", job_id)[0]
    ids = [(run, _job_ids(run)) for run in runs]
    return [run for run, known in ids if job_id in known] or [run for run, known in ids if base in known]


def _job_ids(run: RunFolder) -> set[str]:
    """Ids of all the scheduler's jobs that the run has had."""
    ids, count, record = set(), 0, run.promised("job")
    while record is not None:
        ids.add(str(record.get("job_id")))
        count += 1
        record = run.promised(f"job-{count}")
    return ids
