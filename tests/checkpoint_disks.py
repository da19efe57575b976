"""Real filesystems that a test can fill, slow down, stop, make read-only and take away; root only."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_EXT4_IOC_SHUTDOWN = 0x8004587D
_THROTTLE = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")


@dataclass(frozen=True, slots=True)
class Disk:
    """A mounted filesystem of its own."""

    path: Path

    @property
    def free_bytes(self) -> int:
        space = os.statvfs(self.path)
        return space.f_bavail * space.f_frsize

    def fill(self, leaving_bytes: int = 0) -> Path:
        """Take all space but so much; delete the file that is returned to have it back."""
        ballast = self.path / "ballast"
        with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        if leaving_bytes:
            os.truncate(ballast, max(0, ballast.stat().st_size - leaving_bytes))
        return ballast

    def remount(self, options: str) -> None:
        _call("mount", "-o", f"remount,{options}", str(self.path))

    def fail(self) -> None:
        """Have ext4 meet an error, upon which it makes itself read-only, whatever is open for writing."""
        device = Path(os.path.realpath(f"/sys/dev/block/{self._number()}")).name
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("a test")

    def die(self) -> None:
        """Let every read and write of ext4 fail from now on, as when the device has gone."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, ctypes.c_uint32(2))
        finally:
            os.close(fd)

    def detach(self) -> None:
        """Take it out of the tree of files, while files on it may be open."""
        _call("umount", "--lazy", str(self.path))

    def move(self, path: Path) -> None:
        """Take it from where it is to another folder, while files on it may be open."""
        _call("mount", "--move", str(self.path), str(path))

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Let every write wait, without end, until this is left."""
        _call("fsfreeze", "--freeze", str(self.path))
        try:
            yield
        finally:
            _call("fsfreeze", "--unfreeze", str(self.path))

    @contextlib.contextmanager
    def throttled(self, bytes_per_s: int) -> Iterator[None]:
        """Let the device take no more than so much, from all processes together."""
        if not _THROTTLE.exists():
            pytest.skip("only cgroup version 1 can slow a device down for all processes")
        number = self._number()
        _THROTTLE.write_text(f"{number} {bytes_per_s}")
        try:
            yield
        finally:
            _THROTTLE.write_text(f"{number} 0")

    def _number(self) -> str:
        device = os.stat(self.path).st_dev
        return f"{os.major(device)}:{os.minor(device)}"


@contextlib.contextmanager
def mounted(path: Path, *words: str) -> Iterator[Disk]:
    """`mount WORDS path`, until this is left."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a filesystem")
    path.mkdir(exist_ok=True)
    _call("mount", *words, str(path))
    try:
        yield Disk(path)
    finally:
        if os.path.ismount(path):
            _call("umount", "--lazy", str(path))


@contextlib.contextmanager
def ext4(path: Path, size_bytes: int, *, options: str = "errors=remount-ro", sector_bytes: int = 512) -> Iterator[Disk]:
    """A new ext4 of so many bytes on a loop device."""
    image = path.with_name(f"{path.name}.img")
    with open(image, "wb") as stream:
        stream.truncate(size_bytes)
    if os.geteuid() != 0:
        pytest.skip("only root can mount a filesystem")
    _call("mkfs.ext4", "-q", "-b", "4096", "-m", "0", str(image))
    device = _call("losetup", "--find", "--show", "--sector-size", str(sector_bytes), str(image))
    try:
        with mounted(path, "-t", "ext4", "-o", options, device) as disk:
            yield disk
    finally:
        _call("losetup", "--detach", device)
        image.unlink()


def _call(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout.strip()
