"""Numbers of tensors rounded and compared, by a process that has numpy: this one does without it."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from cfe_hpc.checkpoints.layout import DTYPE_BYTES
from cfe_hpc.errors import CheckpointError

__all__ = ["BATCH_BYTES", "CONVERTED", "Arithmetic", "Difference"]

CONVERTED = ("float16", "bfloat16", "float32")
"""Types that `convert` takes; the others are no weights, or would be rounded twice."""

BATCH_BYTES = 64 << 20
"""Numbers for one question: eight chunks of a data file, which are read together; nine when they begin within one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How two runs of numbers differ.

    Attributes:
        differing: numbers whose bits differ.
        max_abs: the largest distance of two of them; None where there is none, or the type has no arithmetic here.
        max_rel: the largest distance in shares of the larger of the two, by magnitude.
        not_finite: pairs whose distance is no finite number.
    """

    differing: int = 0
    max_abs: float | None = None
    max_rel: float | None = None
    not_finite: int = 0

    def __add__(self, other: Difference) -> Difference:
        return Difference(
            differing=self.differing + other.differing,
            max_abs=_larger(self.max_abs, other.max_abs),
            max_rel=_larger(self.max_rel, other.max_rel),
            not_finite=self.not_finite + other.not_finite,
        )


def _larger(one: float | None, other: float | None) -> float | None:
    return max((value for value in (one, other) if value is not None), default=None)


class Arithmetic:
    """A worker with shared memory: put numbers into `first` (and `second`), then ask. To be used in a `with`.

    The worker starts with the first question and loads numpy then.

    Attributes:
        first, second: room for BATCH_BYTES of numbers each.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("cfe-arithmetic")
        self._size_bytes = 3 * BATCH_BYTES  # bf16 that becomes fp32 takes twice its room
        os.ftruncate(self._fd, self._size_bytes)
        self._memory = memoryview(mmap.mmap(self._fd, self._size_bytes))
        self.first = self._memory[:BATCH_BYTES]
        self.second = self._memory[BATCH_BYTES : 2 * BATCH_BYTES]
        self._worker: subprocess.Popen[str] | None = None

    def __enter__(self) -> Arithmetic:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._worker is not None:
            self._worker.communicate()
        os.close(self._fd)

    def convert(self, source: str, target: str, count: int, at: int = 0) -> memoryview:
        """`count` numbers of `first`, from its byte `at` on, as `target` ("float32" or "bfloat16").

        They are rounded to nearest, of two equally near to the even one; not-a-number stays not-a-number. What is
        returned is overwritten by the next question.

        Args:
            source: one of CONVERTED.

        Raises:
            CheckpointError: there is no numpy.
        """
        sizes = {"source_bytes": DTYPE_BYTES[source], "target_bytes": DTYPE_BYTES[target]}
        size_bytes = self._ask(do="convert", source=source, target=target, at=at, count=count, out=BATCH_BYTES, **sizes)
        return self._memory[BATCH_BYTES : BATCH_BYTES + size_bytes]

    def compare(self, dtype: str, count: int, at: int = 0) -> Difference:
        """`count` numbers of `first`, from its byte `at` on, against those of `second`. Raises as `convert`."""
        item_bytes = DTYPE_BYTES[dtype]
        offsets = {"at": at, "other": BATCH_BYTES + at}
        parts = self._ask(do="compare", dtype=dtype, item_bytes=item_bytes, count=count, **offsets)
        return sum((Difference(**part) for part in parts), Difference())

    def _ask(self, **request: Any) -> Any:
        if self._worker is None:
            module = "cfe_hpc.checkpoints.tools.arithmetic_worker"
            self._worker = subprocess.Popen(
                [sys.executable, "-m", module, str(self._fd), str(self._size_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=(self._fd,),
            )
        stdin, stdout = self._worker.stdin, self._worker.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            return json.loads(stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            raise CheckpointError(_end_of(self._worker)) from error


def _end_of(worker: subprocess.Popen[str]) -> str:
    said = worker.communicate()[1].strip().splitlines()
    if any("No module named 'numpy'" in line for line in said):
        return "numbers are rounded and compared with numpy, which is not installed; pip install numpy"
    return f"the process that rounds and compares numbers ended: {said[-1] if said else 'without a word'}"
