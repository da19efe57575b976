"""What a terminal shows of a snapshot of the code: a bar while a large one is copied, and what was left out."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cfe_hpc.cli.progress import bar

if TYPE_CHECKING:
    from cfe_hpc.launch.provenance import WorkTree
    from cfe_hpc.launch.snapshot import Packed

__all__ = ["packing", "tell_left_out"]

_SOON_S = 0.5
_MOST_SHOWN = 5


@contextlib.contextmanager
def packing() -> Iterator[Callable[[int, int], None]]:
    """What `snapshot.take` tells how far it is; nothing is shown of copies that are made in no time."""
    began_s, seen_bytes = time.monotonic(), 0
    with contextlib.ExitStack() as stack:
        advance: Callable[[int], None] | None = None

        def told(done_bytes: int, total_bytes: int) -> None:
            nonlocal advance, seen_bytes
            if advance is None:
                if time.monotonic() - began_s < _SOON_S:
                    return
                advance = stack.enter_context(bar("copying code", total_bytes, quiet=False))
            advance(done_bytes - seen_bytes)
            seen_bytes = done_bytes

        yield told


def tell_left_out(packed: Packed | None, work_tree: WorkTree, *, wanted: bool) -> None:
    """Say on standard error that a work tree has no snapshot though one is `wanted`, or which tracked files are in
    none, since they look like secrets."""
    if wanted and work_tree.unlisted is not None:
        print(f"warning: no snapshot of the code, which stays as it is by then: {work_tree.unlisted}", file=sys.stderr)
    if packed is None or not packed.secrets:
        return
    more = len(packed.secrets) - _MOST_SHOWN
    shown = ", ".join(packed.secrets[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")
    print(f"note: the snapshot of the code leaves out what looks like a secret: {shown}; ranks reach it through a link",
          file=sys.stderr)  # fmt: skip
