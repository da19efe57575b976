"""One number for the weights a run ended with, so that two runs can be compared bit for bit."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.checkpoints.state.dtensors import is_dtensor

__all__ = ["weights_sha256"]


def weights_sha256(objects: Mapping[str, Any], group: Group) -> str | None:
    """SHA-256 over the consolidated fp32 parameters of what a run tracks. Collective.

    For each parameter, sorted by name: the name in UTF-8, its shape as JSON ("[2, 3]" without the space), and its
    elements as little-endian fp32. Parameters of several tracked models carry the model's name before their own.

    Args:
        objects: what is tracked. Those with `consolidated()` give their parameters by it, torch modules by
            `named_parameters()` of rank 0, FSDP2's shards put together; others hold no weights.

    Returns:
        The digest in hexadecimal on rank 0, None on other ranks and where nothing holds weights.
    """
    sources = {name: found for name, thing in objects.items() if (found := _parameters(thing)) is not None}
    if not sources:
        return None
    digest = hashlib.sha256()
    for source in sorted(sources):
        prefix = f"{source}." if len(sources) > 1 else ""
        for name, tensor in sources[source]:
            if group.rank == 0:
                _add(digest, prefix + name, tensor)
    return digest.hexdigest() if group.rank == 0 else None


def _parameters(thing: Any) -> Iterator[tuple[str, Any]] | None:
    if callable(getattr(thing, "consolidated", None)):
        consolidated: Iterator[tuple[str, Any]] = thing.consolidated()
        return consolidated
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(thing, torch.nn.Module):
        return None
    while isinstance(thing, torch.nn.parallel.DistributedDataParallel):
        thing = thing.module
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in thing.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()  # an evaluation leaves whole parameters in their place, in low precision maybe
    return ((name, _whole(parameter)) for name, parameter in sorted(thing.named_parameters()))


def _whole(parameter: Any) -> Any:
    """A parameter, or of a DTensor all that its ranks hold. Collective for DTensors."""
    return parameter.detach().full_tensor() if is_dtensor(parameter) else parameter


def _add(digest: Any, name: str, tensor: Any) -> None:
    import torch

    digest.update(name.encode())
    digest.update(json.dumps(list(tensor.shape), separators=(",", ":")).encode())
    flat = tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1)
    digest.update(memoryview(flat.numpy().astype("<f4", copy=False)).cast("B") if flat.numel() else b"")
