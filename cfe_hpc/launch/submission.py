"""From a planned job to a run: the frozen run.toml, the run folder, and the job in the queue."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cfe_hpc.config.load import Loaded
from cfe_hpc.config.run import Plan, RunSpec
from cfe_hpc.config.site import expand_runs_root
from cfe_hpc.errors import ConfigError, Problem
from cfe_hpc.files import write_atomic
from cfe_hpc.launch.backend import backend_for
from cfe_hpc.launch.provenance import WorkTree, provenance
from cfe_hpc.runfolder import RunFolder, new_run_id, safe_name

if TYPE_CHECKING:
    from cfe_hpc.launch.snapshot import Packed, Told

__all__ = ["Submitted", "prepare", "preview", "submit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A run that the scheduler has taken, and the snapshot that its ranks run."""

    folder: RunFolder
    job_id: str
    spec: RunSpec
    packed: Packed | None = None


def preview(loaded: Loaded, planned: Plan, work_tree: WorkTree) -> tuple[RunSpec, RunFolder, str]:
    """What `submit` would do now: run.toml, the folder (which is not made) and the script. Writes nothing."""
    run_id = new_run_id(loaded.job.name)
    folder = RunFolder(_runs_root(loaded) / safe_name(loaded.job.name) / run_id)
    snapshot = _would_be_packed(loaded, work_tree)
    spec = _freeze(loaded, planned, work_tree, run_id, snapshot=snapshot)
    return spec, folder, backend_for(loaded.site.scheduler).preview(spec, folder)


def submit(
    loaded: Loaded,
    planned: Plan,
    work_tree: WorkTree,
    *,
    after: Sequence[RunFolder] = (),
    told: Told | None = None,
) -> Submitted:
    """Make the run folder, freeze the run and its code, and send it, to start when all runs of `after` have completed.

    Args:
        told: as for `snapshot.take`.

    Raises:
        ConfigError: the runs root cannot be written, or the code is too large.
        SchedulerError: it was refused; nothing is left behind but the snapshot of the code, which the next one uses.
    """
    packed = _packed(loaded, work_tree, told)
    with _new_folder(loaded, loaded.job.name) as folder:
        snapshot = None if packed is None else packed.folder
        spec = _freeze(loaded, planned, work_tree, folder.run_id, after, snapshot=snapshot)
        spec.write(folder.run_toml)
        if spec.job.sweep is not None:
            from cfe_hpc.config.sweep_rules import read_tasks  # late: few jobs are sweeps

            write_atomic(folder.sweep_json, read_tasks(spec.job.sweep).dump())
        job_id = backend_for(loaded.site.scheduler).submit(spec, folder, after=after)
    # It is sent, whatever the disk says by now.
    folder.note_event("submitted", attempt=None, detail={"job_id": job_id, "site": loaded.site.name})
    return Submitted(folder=folder, job_id=job_id, spec=spec, packed=packed)


def prepare(loaded: Loaded, planned: Plan, work_tree: WorkTree, *, name: str) -> tuple[RunSpec, RunFolder]:
    """A run that is frozen in a folder of its own, under `name` in the runs root, and sent nowhere.

    Raises:
        ConfigError: the runs root cannot be written.
    """
    with _new_folder(loaded, name) as folder:
        spec = _freeze(loaded, planned, work_tree, folder.run_id)
        spec.write(folder.run_toml)
    return spec, folder


def _would_be_packed(loaded: Loaded, work_tree: WorkTree) -> Path | None:
    if work_tree.listing is None:
        return None
    from cfe_hpc.launch.snapshot import folder_of  # late: whoever is in no work tree has no use for it

    return folder_of(loaded, work_tree, _runs_root(loaded))


def _packed(loaded: Loaded, work_tree: WorkTree, told: Told | None) -> Packed | None:
    if work_tree.listing is None:
        return None
    from cfe_hpc.launch.snapshot import take  # late, as above

    return take(loaded, work_tree, _runs_root(loaded), told=told)


@contextlib.contextmanager
def _new_folder(loaded: Loaded, name: str) -> Iterator[RunFolder]:
    """A new run folder for the body to fill. When that fails nothing is left behind."""
    runs_root = _runs_root(loaded)
    made = [path for path in (runs_root / safe_name(name), runs_root) if not path.exists()]
    folder = None
    try:
        folder = RunFolder.create(runs_root, name)
        yield folder
    except BaseException as error:
        _discard(folder, made)
        if isinstance(error, OSError):
            raise ConfigError([_unwritable(loaded, runs_root, error)]) from error
        raise


def _freeze(
    loaded: Loaded,
    planned: Plan,
    work_tree: WorkTree,
    run_id: str,
    after: Sequence[RunFolder] = (),
    *,
    snapshot: Path | None = None,
) -> RunSpec:
    # The parts have been validated; building a validator of the whole would cost as much as all of theirs.
    return RunSpec.model_construct(
        run_id=run_id,
        job=loaded.job,
        site=loaded.site,
        plan=planned,
        provenance=provenance(loaded, work_tree, snapshot=snapshot),
        after=[str(folder.path) for folder in after],
        origins=dict(loaded.origins),
    )


def _runs_root(loaded: Loaded) -> Path:
    return Path(os.path.abspath(expand_runs_root(loaded.site, os.environ)))


def _unwritable(loaded: Loaded, runs_root: Path, error: OSError) -> Problem:
    full = "make room there, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    origin = loaded.origins.get("site.storage.runs_root", "default")
    return Problem(
        file=loaded.site_file if origin == "default" else origin,
        key="storage.runs_root",
        what=f"cannot be written: {error.strerror}",
        value=str(runs_root),
        remedy=f"{full}name a folder of yours that every node sees: --set site.storage.runs_root=FOLDER",
    )


def _discard(folder: RunFolder | None, made: list[Path]) -> None:
    """Remove the folder of a run that never came to be, and the folders above that were made for it."""
    if folder is not None:
        shutil.rmtree(folder.path, ignore_errors=True)
    for path in made:
        with contextlib.suppress(OSError):  # another run has moved in meanwhile
            path.rmdir()
