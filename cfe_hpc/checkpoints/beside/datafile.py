"""A rank's data file, made and written on a thread, while the rank still copies, and before its index is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints import drafts
from cfe_hpc.checkpoints.beside.hand import Hand
from cfe_hpc.checkpoints.beside.nodewriter import staged
from cfe_hpc.checkpoints.io.hugepages import HugePages
from cfe_hpc.checkpoints.io.shard import NewFile
from cfe_hpc.checkpoints.io.staging import Arena
from cfe_hpc.checkpoints.manifest import data_name

__all__ = ["DataFile"]


class DataFile:
    """The file of one save.

    Attributes:
        draft: the save's.
    """

    def __init__(
        self,
        request: Mapping[str, Any],
        arena: Arena,
        *,
        hand: Hand,
        pages: HugePages,
        beat: Callable[[], None],
    ) -> None:
        """Have `hand` begin with it.

        Args:
            request: of a writer, to `open` or to `write`.
            pages: stay where they are meanwhile.
            beat: called as bytes move.
        """
        self.draft = Path(request["draft"])

        def write(request: Mapping[str, Any]) -> tuple[NewFile, tuple[int, ...]]:
            rank = request["rank"]
            drafts.enter(self.draft, rank, request["needed_bytes"])
            # To find room for the file the filesystem may have to look at the disk, which keeps a question waiting as
            # soon as another rank's shard is on its way there: the earlier, the better.
            file = NewFile(self.draft / data_name(rank), request["data_bytes"])
            return file, file.write(staged(arena, request, beat))

        self._written = hand.submit(partial(pages.held(write), request))

    def result(self) -> tuple[NewFile, tuple[int, ...]]:
        """The file, waited for, still to be synced, and crc32c of each of its chunks. Raises what went wrong."""
        return self._written.result()

    def leave(self) -> None:
        """Wait until the thread has done with it, and close it: its rank has given up."""
        if self._written.exception() is None:
            self._written.result()[0].close()
