"""Which tensors of a checkpoint are a model's parameters and buffers, by the names that the model gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cfe_hpc.checkpoints.protocols import ReadInto
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.errors import CheckpointError

__all__ = ["Source", "holders", "shared", "weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A tensor to be read, and what it is called outside.

    Attributes:
        stored: its name in `reader`.
    """

    name: str
    reader: ReadInto
    stored: str

    def describe(self) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape)."""
        return self.reader.describe(self.stored)


def shared(opened: Opened) -> list[Source]:
    """Every tensor that belongs to the checkpoint as a whole, by the name it is stored under."""
    return [Source(name=name, reader=opened.reader, stored=name) for name in opened.reader.names()]


def holders(opened: Opened) -> list[str]:
    """Names of the tracked objects that hold weights: modules, and engines that keep masters of them."""
    objects = opened.state(0) or {}
    found = [name for name, entry in objects.items() if isinstance(entry, dict) and entry.get("kind") == "module"]
    stored = opened.reader.names()
    sharded = [name for name, entry in objects.items() if isinstance(entry, dict) and entry.get("kind") == "sharded"]
    return sorted(found + [name for name in sharded if any(each.startswith(f"{name}/master/") for each in stored)])


def weights(opened: Opened, holder: str | None = None) -> list[Source]:
    """The parameters and persistent buffers of one tracked object, by their plain names, sorted.

    Of a module they are its state_dict, as rank 0 has it where ranks differ; of a DeepSpeed engine its masters, and
    rank 0's buffers. Tied parameters are there once, under their first name.

    Args:
        holder: one of `holders`; may be left out when there is one.

    Raises:
        CheckpointError: there is no such object, or no single one.
    """
    found = holders(opened)
    if holder is None and len(found) != 1:
        which = f"{len(found)} objects hold weights ({', '.join(found)})" if found else "no object holds weights"
        raise CheckpointError(f"{opened.folder.name}: {which}; name one with --object, or tensors with --only")
    if holder is not None and holder not in found:
        raise CheckpointError(
            f"{opened.folder.name}: {holder} is no tracked object with weights; there are {', '.join(found) or 'none'}"
        )
    name = holder or found[0]
    if opened.state(0)[name]["kind"] == "module":
        return _of_module(opened, f"{name}/")
    return _of_engine(opened, f"{name}/")


def _of_module(opened: Opened, prefix: str) -> list[Source]:
    found = {
        stored[len(prefix) :]: Source(name=stored[len(prefix) :], reader=reader, stored=stored)
        for reader in (opened.own(0), opened.reader)
        for stored in _under(reader, prefix)
    }
    return [found[name] for name in sorted(found)]


def _of_engine(opened: Opened, prefix: str) -> list[Source]:
    masters, buffers = f"{prefix}master/", f"{prefix}buffer/"
    named = {stored[len(masters) :]: stored for stored in _under(opened.reader, masters)}
    named |= {
        stored[len(buffers) : -len("@0")]: stored for stored in _under(opened.reader, buffers) if stored.endswith("@0")
    }
    return [Source(name=name, reader=opened.reader, stored=named[name]) for name in sorted(named)]


def _under(reader: ReadInto, prefix: str) -> Sequence[str]:
    return [name for name in reader.names() if name.startswith(prefix)]
