"""DeepSpeed's own checkpoints: taken over at any world size, and written for those who go on with DeepSpeed alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints.agree import all_ranks, first_rank
from cfe_hpc.checkpoints.state.deepspeed import DeepSpeedState
from cfe_hpc.checkpoints.state.deepspeed_reader import DeepSpeedReader
from cfe_hpc.checkpoints.state.torch_group import TorchGroup
from cfe_hpc.errors import CheckpointError
from cfe_hpc.files import fsync_dir, fsync_file, write_atomic

__all__ = ["Imported", "load_deepspeed_checkpoint", "save_deepspeed_checkpoint"]

LATEST = "latest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A DeepSpeed checkpoint that was loaded.

    Attributes:
        step: the engine's global_steps.
        world_size: ranks that saved it.
        client_state: what its saver gave `save_checkpoint` to keep.
    """

    step: int
    world_size: int
    client_state: dict[str, Any]


def load_deepspeed_checkpoint(
    engine: Any, directory: str | Path, tag: str | None = None, *, safe_globals: Iterable[Any] = ()
) -> Imported:
    """Load what `engine.save_checkpoint` wrote, on any number of ranks, into a DeepSpeedEngine. Collective.

    Masters, moments, each group's settings and steps, counters, schedule, buffers and loss scale are as they were
    saved; ZeRO's stage and world size may differ. Each rank reads the intervals that it holds, and nothing is
    converted on disk. Nothing but plain data is unpickled.

    Args:
        directory: as given to `save_checkpoint`.
        tag: as given to `save_checkpoint`; what `latest` names when None.
        safe_globals: classes and functions of the client state that may be unpickled all the same.

    Raises:
        CheckpointError: it is no checkpoint of ZeRO 1, 2 or 3, or holds what is not safe to unpickle; on every rank.
        CheckpointMismatch: it is of another model or optimizer; on every rank.
        CorruptCheckpoint: a file is missing, torn, or of another step; on every rank.
    """
    group = TorchGroup(engine.seq_data_parallel_group)
    state = DeepSpeedState(engine)
    readers: list[DeepSpeedReader] = []

    def opened() -> bytes:
        readers.append(DeepSpeedReader(Path(directory, tag or _latest(Path(directory))), safe_globals))
        return b""

    all_ranks(group, opened)
    (reader,) = readers
    state.load_checkpoint_state(reader, reader.tree)
    return Imported(step=int(engine.global_steps), world_size=reader.world_size, client_state=dict(reader.client_state))


def save_deepspeed_checkpoint(
    engine: Any, directory: str | Path, tag: str | None = None, *, client_state: Mapping[str, Any] | None = None
) -> Path:
    """Save as `engine.save_checkpoint` does, but durably: for `engine.load_checkpoint` at this world size. Collective.

    `latest` names the new checkpoint only after every rank's files are on the disk.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: files could not be synced; `latest` is as it was.
    """
    group = TorchGroup(engine.seq_data_parallel_group)
    tag = tag or f"global_step{engine.global_steps}"
    root = Path(directory)
    engine.save_checkpoint(str(root), tag, client_state=dict(client_state or {}), save_latest=False)

    def sync() -> bytes:
        for path in (root / tag).iterdir():
            if f"zero_pp_rank_{group.rank}_" in path.name or (group.rank == 0 and "pp_rank" not in path.name):
                fsync_file(path)
        fsync_dir(root / tag)
        return b""

    def publish() -> bytes:
        write_atomic(root / LATEST, tag)
        return b""

    all_ranks(group, sync)
    first_rank(group, publish)
    return root / tag


def _latest(directory: Path) -> str:
    try:
        return (directory / LATEST).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise CheckpointError(f"{directory / LATEST} cannot be read: {error.strerror}; name the tag") from error
