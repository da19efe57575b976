"""Plain memory: copying it without holding the interpreter, and buffers that a disk can fill."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

__all__ = ["move", "page_buffer"]

_FREE_FROM_BYTES = 1 << 16
"""Below this, letting other threads run costs more than the copy."""

_HUGE_BYTES = 2 << 20


def move(out: memoryview, data: memoryview) -> None:
    """Copy `data` into `out`, both of bytes and equally long; other threads run meanwhile."""
    if len(data) < _FREE_FROM_BYTES or data.readonly:
        out[:] = data
        return
    here, there = ctypes.c_char.from_buffer(out), ctypes.c_char.from_buffer(data)
    ctypes.memmove(ctypes.addressof(here), ctypes.addressof(there), len(data))


def page_buffer(size_bytes: int) -> memoryview:
    """New zeroed memory that begins at a page, as reads and writes around the page cache ask for.

    In huge pages where the kernel has them: a disk fills a few large stretches of memory up to three times as fast
    as thousands of scattered pages.
    """
    mapped = mmap.mmap(-1, size_bytes + _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = memoryview(mapped)
    first = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE_BYTES
    return memory[first : first + size_bytes]
