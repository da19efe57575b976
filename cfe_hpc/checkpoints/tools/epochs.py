"""The checkpoints that ended epochs, and their weights as files, one for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cfe_hpc.checkpoints import marks
from cfe_hpc.checkpoints.keeping.rotation import inventory
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.state.weights import weights
from cfe_hpc.checkpoints.tools.export import export_safetensors, size_bytes

__all__ = ["export_epochs", "of_epochs", "total_bytes"]


def of_epochs(root: Path) -> dict[int, Path]:
    """The checkpoint of each epoch, by its number; of several the last one committed."""
    found: dict[int, Path] = {}
    for kept in inventory(root):
        facts = marks.read(kept.path, "epoch") if "epoch" in kept.marks else None
        if facts and isinstance(facts.get("epoch"), int):
            found.setdefault(facts["epoch"], kept.path)
    return dict(sorted(found.items()))


def export_epochs(
    root: Path, out: Path, *, run_id: str, dtype: str | None, progress: Callable[[int], object] = int
) -> dict[int, Path]:
    """Write `out`/epoch-00003.safetensors for each epoch that has none yet: the model's weights, by their plain names.

    Args:
        dtype: a key of export.DTYPES; as they are when None.

    Returns:
        The files that were written, by epoch.

    Raises:
        CheckpointError: a checkpoint is damaged, or it does not tell which weights are the model's.
        OSError: a file cannot be written.
    """
    made = {}
    for epoch, (folder, path) in _missing(root, out).items():
        out.mkdir(exist_ok=True)
        opened = Opened.at(folder, run_id)
        export_safetensors(opened, weights(opened), path, dtype=dtype, progress=progress)
        made[epoch] = path
    return made


def total_bytes(root: Path, out: Path, *, run_id: str) -> int:
    """Bytes that `export_epochs` would read. Raises CheckpointError."""
    opened = (Opened.at(folder, run_id) for folder, _ in _missing(root, out).values())
    return sum(size_bytes(weights(each)) for each in opened)


def _missing(root: Path, out: Path) -> dict[int, tuple[Path, Path]]:
    paths = {epoch: (folder, out / f"epoch-{epoch:05d}.safetensors") for epoch, folder in of_epochs(root).items()}
    return {epoch: pair for epoch, pair in paths.items() if not pair[1].exists()}
