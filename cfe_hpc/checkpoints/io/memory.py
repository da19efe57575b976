"""Plain memory: copying it without holding the interpreter, and pages that a disk can fill fast."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import time
import weakref

__all__ = ["HUGE_BYTES", "address_of", "allocate", "collapse", "move", "page_buffer", "shared_pages"]

_FREE_FROM_BYTES = 1 << 16
"""Below this, letting other threads run costs more than the copy."""

HUGE_BYTES = 2 << 20
"""A huge page. A disk fills a few large stretches of memory up to three times as fast as thousands of scattered pages,
and with a fifth of the work."""

_MAP_FIXED = 0x10
_PROT_NONE = 0
_MAP_FAILED = ctypes.c_void_p(-1).value
_MADV_COLLAPSE = 25  # Linux 6.1

_STRETCH_BYTES = 64 << 20
_SMALL_S_PER_BYTE = 0.65e-9
_PATIENCE_S = 0.2
"""A kernel that has to move other pages out of the way takes longer than small ones do: it is left to do that later."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def address_of(memory: memoryview) -> int:
    """Where writable memory begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def move(out: memoryview, data: memoryview) -> None:
    """Copy `data` into `out`, both of bytes and equally long; other threads run meanwhile."""
    if len(data) < _FREE_FROM_BYTES or data.readonly:
        out[:] = data
        return
    ctypes.memmove(address_of(out), address_of(data), len(data))


def page_buffer(size_bytes: int) -> memoryview:
    """New zeroed memory that begins at a page, as reads and writes around the page cache ask for.

    In huge pages where the kernel has them; what is never touched takes no memory.
    """
    mapped = mmap.mmap(-1, size_bytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = memoryview(mapped)
    first = -address_of(memory) % HUGE_BYTES
    return memory[first : first + size_bytes]


def shared_pages(fd: int, size_bytes: int, *, populate: bool = True) -> memoryview:
    """The first bytes of a memory file, every page mapped, at an address where they can become huge pages.

    They stay mapped for as long as anything looks at them.

    Args:
        populate: False to have each page when it is first touched.

    Raises:
        OSError: there is no room for them.
    """
    # Python's mmap takes no address: room for an aligned one is set aside first, and what is too much given back.
    spare = _map(None, size_bytes + HUGE_BYTES, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    begin = spare + -spare % HUGE_BYTES
    end = begin + -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        flags = mmap.MAP_SHARED | _MAP_FIXED | (mmap.MAP_POPULATE if populate else 0)
        _map(begin, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd)
    except OSError:
        _libc.munmap(spare, size_bytes + HUGE_BYTES)
        raise
    _give_back(spare, begin)
    _give_back(end, -(-(spare + size_bytes + HUGE_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE)
    array = (ctypes.c_ubyte * size_bytes).from_address(begin)
    weakref.finalize(array, _libc.munmap, begin, size_bytes).atexit = False
    return memoryview(array).cast("B")


def allocate(fd: int, begin: int, end: int) -> bool:
    """Have all pages of a memory file from `begin` to `end`, multiples of a huge page: huge ones while the kernel has
    some at hand, then small ones. What is there stays.

    A place that holds nothing but a small page becomes a huge one without a copy: for each GB that takes 0.07 s, small
    pages 0.65 s, and to gather those into huge ones later 2 s.

    Returns:
        Whether all are huge.

    Raises:
        OSError: there is no memory for them; those that there are stay.
    """
    os.ftruncate(fd, end)
    memory = shared_pages(fd, end, populate=False)
    began_s, all_huge = time.monotonic(), True
    for at in range(begin, end, _STRETCH_BYTES):
        stretch = memory[at : min(at + _STRETCH_BYTES, end)]
        for place in range(at, at + len(stretch), HUGE_BYTES):
            os.pwrite(fd, b"\0", place)  # a write to the mapping would be killed where there is no memory
        late = time.monotonic() - began_s > _PATIENCE_S + (at - begin) * _SMALL_S_PER_BYTE
        if late or _libc.madvise(address_of(stretch), len(stretch), _MADV_COLLAPSE) != 0:
            all_huge = False
            break
    os.posix_fallocate(fd, 0, end)
    return all_huge


def _map(address: int | None, size_bytes: int, protection: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, size_bytes, protection, flags, fd, 0)
    if found is None or found == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(found)


def _give_back(begin: int, end: int) -> None:
    if end > begin:
        _libc.munmap(begin, end - begin)


def collapse(memory: memoryview) -> bool:
    """Put memory that begins at a huge page's place into huge pages, as far as the kernel has any; its bytes stay.

    It takes about 5 ms for each: the bytes are copied, and whoever touches them meanwhile waits.

    Returns:
        Whether it makes sense to ask for more.
    """
    if _libc.madvise(address_of(memory), len(memory), _MADV_COLLAPSE) == 0:
        return True
    return ctypes.get_errno() in (errno.EAGAIN, errno.EBUSY)
