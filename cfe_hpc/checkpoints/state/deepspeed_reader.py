"""What deepspeed's save_checkpoint wrote, read as `DeepSpeedState` reads ours: by parameter, in any layout.

    mp_rank_00_model_states.pt                            ZeRO 1, 2: weights, buffers, counters, the order of parameters
    zero_pp_rank_R_mp_rank_00_model_states.pt             ZeRO 3: the same, with rank R's part of frozen weights
    [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt      rank R's flat masters and moments

Files are mapped into memory: only what is asked for is read. They carry no checksums, so that altered bytes are not
found; a file of another step is.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfe_hpc.checkpoints.state.deepspeed import SCALER_FIELDS, TREE_VERSION, small_value
from cfe_hpc.checkpoints.state.tensors import dtype_name
from cfe_hpc.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint

__all__ = ["DeepSpeedReader"]

OPTIM_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
OWN_KEYS = {
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "shared_params",
    "frozen_param_fragments",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "ds_config",
    "ds_version",
    "checkpoint_parallel_dimensions",
}
"""DeepSpeed's own keys of a model file; what else is there is the client state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a parameter's elements lie in flat tensor number `flat` of each rank.

    Attributes:
        begin: ZeRO 1, 2: of its first element in the ranks' parts, laid end to end. ZeRO 3: of its part in each rank's.
        part: ZeRO 1, 2: elements of a rank's whole part. ZeRO 3: of the rank's part of this parameter.
        by_parameter: whether each parameter is divided, as in ZeRO 3.
    """

    flat: int
    begin: int
    part: int
    shape: tuple[int, ...]
    by_parameter: bool

    def locate(self, index: int) -> tuple[int, int, int]:
        """(rank, offset in its flat tensor, how many elements from there on lie together) of element `index`."""
        rank, offset = divmod(index if self.by_parameter else self.begin + index, self.part)
        return rank, offset + (self.begin if self.by_parameter else 0), self.part - offset


class DeepSpeedReader:
    """A ReadInto over one folder of a DeepSpeed checkpoint, ZeRO 1, 2 or 3, of any world size.

    Attributes:
        tree: what `DeepSpeedState.load_checkpoint_state` wants beside it.
        client_state: what the saver gave `save_checkpoint` to keep.
        world_size: ranks that saved it.
    """

    def __init__(self, folder: Path, safe_globals: Iterable[Any] = ()) -> None:
        """Read the model file and rank 0's optimizer file.

        Args:
            safe_globals: classes and functions that may be unpickled beside plain data and DeepSpeed's own.

        Raises:
            CheckpointError: it is no such checkpoint, of a kind that is not known, or holds what is not safe to load.
            CorruptCheckpoint: a file is missing, torn, or of another step.
        """
        self._safe = [*_deepspeed_globals(), *safe_globals]
        self._optim_files = _optim_files(folder)
        self.world_size = len(self._optim_files)
        self._opened: dict[Path, Any] = {}
        self._model_file = folder / "mp_rank_00_model_states.pt"
        self._by_parameter = not self._model_file.exists()
        model, first = self._model(0), self._optim(0)
        _refuse_unknown(folder, first)
        self._buffers = set(model["buffer_names"])
        self._places = dict(self._laid_out(model["param_shapes"], first))
        self._frozen = {name: tuple(shape) for name, shape in self._frozen_shapes(model)}
        self.tree = self._tree(model, first)
        self.client_state = {key: value for key, value in model.items() if key not in OWN_KEYS}

    def names(self) -> Sequence[str]:
        """Tensor names, sorted."""
        kinds = {name: ["master", *self.tree["parameters"][name]["moments"]] for name in (*self._places, *self._frozen)}
        held = [f"{kind}/{name}" for name, held in kinds.items() for kind in held]
        owners = range(self.world_size) if self._by_parameter else (0,)
        return sorted(held + [f"buffer/{name}@{rank}" for name in self._buffers for rank in owners])

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape). Raises CheckpointMismatch when there is no such tensor."""
        kind, _, parameter = name.partition("/")
        if kind == "buffer":
            buffer = self._buffer(parameter)
            return dtype_name(buffer.dtype), tuple(buffer.shape)
        if parameter in self._places:
            place = self._places[parameter]
            return dtype_name(self._flat(0, place.flat, kind).dtype), place.shape
        if parameter in self._frozen and kind == "master":
            return dtype_name(self._frozen_part(parameter, 0).dtype), self._frozen[parameter]
        raise CheckpointMismatch(f"the checkpoint has no tensor {name}")

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with elements from `start` on. Raises CheckpointMismatch, CorruptCheckpoint."""
        dtype, shape = self.describe(name)
        target = torch.frombuffer(out, dtype=getattr(torch, dtype))
        if start < 0 or start + target.numel() > prod(shape):
            raise CheckpointMismatch(f"tensor {name} has {prod(shape)} elements; more were asked for")
        kind, _, parameter = name.partition("/")
        while target.numel():
            source, run = self._source(kind, parameter, start)
            count = min(run, target.numel())
            if source.numel() < count:
                raise CorruptCheckpoint(f"{name}: no file holds element {start + source.numel()}")
            target[:count].copy_(source[:count])
            target, start = target[count:], start + count

    def enqueue(self, name: str, start: int, out: memoryview) -> None:
        """`read_into`, at once: the files are mapped."""
        self.read_into(name, start, out)

    def flush(self, *, alike: bool = False) -> None:
        """Nothing is left to do."""

    def _source(self, kind: str, parameter: str, start: int) -> tuple[Tensor, int]:
        """Elements from `start` on, as far as one rank has them, and how many those should be."""
        if kind == "buffer":
            rest = self._buffer(parameter).reshape(-1)[start:]
            return rest, rest.numel()
        if parameter in self._places:
            place = self._places[parameter]
            rank, offset, run = place.locate(start)
            return self._flat(rank, place.flat, kind)[offset:], run
        rank, offset = divmod(start, self._frozen_part(parameter, 0).numel())
        rest = self._frozen_part(parameter, rank).reshape(-1)[offset:]
        return rest, rest.numel()

    def _flat(self, rank: int, index: int, kind: str) -> Tensor:
        optim = self._optim(rank)
        found = _masters(optim)[index] if kind == "master" else _inner(optim)["state"].get(index, {}).get(kind)
        if not isinstance(found, Tensor):
            raise CheckpointMismatch(f"{self._optim_files[rank].name} has no {kind} for its flat tensor {index}")
        return found.detach().view(-1)

    def _frozen_part(self, name: str, rank: int) -> Tensor:
        model = self._model(rank if self._by_parameter else 0)
        part: Tensor = (model["frozen_param_fragments"] if self._by_parameter else model["module"])[name]
        return part

    def _buffer(self, name_and_rank: str) -> Tensor:
        name, _, rank = name_and_rank.rpartition("@")
        if name not in self._buffers:
            raise CheckpointMismatch(f"the checkpoint has no buffer {name}")
        buffer: Tensor = self._model(int(rank) if self._by_parameter else 0)["module"][name]
        return buffer

    def _laid_out(self, groups: Sequence[dict[str, Any]], first: Any) -> Iterable[tuple[str, _Place]]:
        masters = _masters(first)
        paddings = first["group_paddings"] if "zero_stage" in first and not self._by_parameter else [0] * len(masters)
        for index, (shapes, master, padding) in enumerate(zip(groups, masters, paddings, strict=True)):
            begin = 0
            for name, shape in shapes.items():
                part = -(-prod(shape) // self.world_size) if self._by_parameter else master.numel() + padding
                yield (
                    name,
                    _Place(flat=index, begin=begin, part=part, shape=tuple(shape), by_parameter=self._by_parameter),
                )
                begin += part if self._by_parameter else prod(shape)
            held = master.numel() if self._by_parameter else (master.numel() + padding) * self.world_size
            if begin > held or (self._by_parameter and begin != held):
                raise CheckpointError(
                    f"flat tensor {index} has {held} elements, its parameters {begin}: laid out unknown"
                )

    def _frozen_shapes(self, model: Any) -> Iterable[tuple[str, Sequence[int]]]:
        if self._by_parameter:
            yield from (model["frozen_param_shapes"] or {}).items()
            return
        other = self._places.keys() | self._buffers | model["shared_params"].keys()
        yield from ((name, value.shape) for name, value in model["module"].items() if name not in other)

    def _tree(self, model: Any, first: Any) -> dict[str, Any]:
        parameters: dict[str, Any] = {name: {"moments": [], "small": {}} for name in self._frozen}
        for name, place in self._places.items():
            state = _inner(first)["state"].get(place.flat, {})
            moments = sorted(key for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0)
            small = {key: small_value(value) for key, value in state.items() if key not in moments}
            parameters[name] = {"moments": moments, "small": small}
        scaler = first.get("loss_scaler")
        return {
            "version": TREE_VERSION,
            "parameters": parameters,
            "groups": _groups(first),
            "global_steps": model["global_steps"],
            "global_samples": model["global_samples"],
            "skipped_steps": model["skipped_steps"],
            "scaler": {key: getattr(scaler, key) for key in SCALER_FIELDS if hasattr(scaler, key)},
            "scheduler": model["lr_scheduler"],
        }

    def _model(self, rank: int) -> Any:
        path = self._model_file
        return self._open(path.with_name(f"zero_pp_rank_{rank}_{path.name}") if self._by_parameter else path)

    def _optim(self, rank: int) -> Any:
        path = self._optim_files[rank]
        opened = path in self._opened
        optim = self._open(path)["optimizer_state_dict"]
        if not opened and rank and _steps(optim) != _steps(self._optim(0)):
            raise CorruptCheckpoint(f"{path.name} and {self._optim_files[0].name} are not of the same step")
        return optim

    def _open(self, path: Path) -> Any:
        if path not in self._opened:
            self._opened[path] = _load(path, self._safe)
        return self._opened[path]


def _optim_files(folder: Path) -> list[Path]:
    """The ranks' optimizer files, by rank."""
    found = {path: OPTIM_FILE.fullmatch(path.name) for path in sorted(folder.glob("*_optim_states.pt"))}
    by_rank = {int(match[1]): path for path, match in found.items() if match and int(match[2]) == 0}
    if not by_rank:
        raise CheckpointError(f"{folder} holds no DeepSpeed checkpoint of ZeRO 1, 2 or 3")
    if len(by_rank) < len(found):
        raise CheckpointError(
            f"{folder}: checkpoints of model-parallel training, and of two precisions together, cannot be imported"
        )
    missing = [str(rank) for rank in range(max(by_rank) + 1) if rank not in by_rank]
    if missing:
        raise CorruptCheckpoint(f"{folder}: the optimizer file of rank {', '.join(missing[:5])} is missing")
    return [path for _, path in sorted(by_rank.items())]


def _deepspeed_globals() -> list[Any]:
    """What DeepSpeed's own files hold beside plain data: values without behaviour."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _load(path: Path, safe: list[Any]) -> Any:
    try:
        with torch.serialization.safe_globals(safe):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{path.name} is missing") from error
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if unsafe is None:
            raise CorruptCheckpoint(f"{path.name} cannot be read: {str(error).splitlines()[0]}") from error
        raise CheckpointError(
            f"{path.name} holds {unsafe[1]}, and unpickling that could run anything; "
            "if you trust whoever wrote the file, name it in safe_globals"
        ) from error
    except (OSError, EOFError, RuntimeError) as error:
        raise CorruptCheckpoint(f"{path.name} cannot be read: {str(error).splitlines()[0]}") from error


def _refuse_unknown(folder: Path, first: Any) -> None:
    if not isinstance(_inner(first), dict):
        raise CheckpointError(f"{folder} was saved with elastic_checkpoint, whose layout cannot be imported")
    if any(any(paddings) for paddings in first.get("param_alignment_paddings", ())):
        raise CheckpointError(f"{folder} was saved with parameter_alignment, whose layout cannot be imported")


def _masters(optim: Any) -> Sequence[Tensor]:
    found: Sequence[Tensor] = optim.get("fp32_flat_groups") or optim["single_partition_of_fp32_groups"]
    return found


def _inner(optim: Any) -> Any:
    """The torch optimizer's own state dict."""
    return optim["base_optimizer_state"] if "base_optimizer_state" in optim else optim["optimizer_state_dict"]


def _groups(optim: Any) -> list[dict[str, Any]]:
    groups = _inner(optim)["param_groups"]
    return [{key: small_value(value) for key, value in group.items() if key != "params"} for group in groups]


def _steps(optim: Any) -> list[float]:
    return [float(state["step"]) for state in _inner(optim)["state"].values() if "step" in state]
