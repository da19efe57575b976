"""Rotation by a helper process: after a commit, when nobody waits for it."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints.agree import reason
from cfe_hpc.checkpoints.keeping.rotation import Retention, Rotation

__all__ = ["Tidying"]


class Tidying:
    """What rank 0's helper does after its answers."""

    def __init__(self) -> None:
        self._rotation: Rotation | None = None
        self._protect: Collection[int] | None = None

    def due(self, root: Path, policy: Mapping[str, Any], protect: Collection[int]) -> None:
        """A checkpoint was committed in `root`: older ones are to go, as `policy`, a Retention's fields, says.

        Both are the same each time: what was once read of checkpoints need not be read again.
        """
        self._rotation = self._rotation or Rotation(root, Retention(**policy))
        self._protect = protect

    def tidy(self) -> None:
        """Rotate, if that is due. Failures are told on standard error."""
        protect, self._protect = self._protect, None
        if self._rotation is None or protect is None:
            return
        try:
            self._rotation.rotate(protect=protect)
        except OSError as error:
            print(f"cfe_hpc: older checkpoints were not deleted: {reason(error)}", file=sys.stderr)
