"""A DeepSpeed engine's state as pieces of named parameters, whichever way ZeRO laid it out.

ZeRO flattens parameters and gives each rank a run of the flat tensor. A run of a flat tensor is a run of some
parameters, so everything large is stored per parameter, by the interval of it that a rank holds:
"master/<name>", "exp_avg/<name>" and what else the optimizer keeps. The low-precision weights are not stored: they
are the masters, rounded. Frozen parameters have no masters: they are stored in the precision that they have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cfe_hpc.checkpoints.agree import all_ranks
from cfe_hpc.checkpoints.protocols import Piece, ReadInto
from cfe_hpc.checkpoints.state.deepspeed_flats import KNOWN, Flat, flats_of, shape_of
from cfe_hpc.checkpoints.state.landing import Landing
from cfe_hpc.checkpoints.state.tensors import dtype_name, tensor_data
from cfe_hpc.checkpoints.state.torch_group import TorchGroup
from cfe_hpc.errors import CheckpointError, CheckpointMismatch

__all__ = ["SCALER_FIELDS", "TREE_VERSION", "DeepSpeedState", "is_deepspeed_engine", "small_value"]

TREE_VERSION = 1
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def is_deepspeed_engine(value: object) -> bool:
    """Whether `value` is a DeepSpeedEngine (or of a class made from it), told without importing deepspeed."""
    classes = ((cls.__module__, cls.__name__) for cls in type(value).__mro__)
    return ("deepspeed.runtime.engine", "DeepSpeedEngine") in classes


class DeepSpeedState:
    """`protocols.Sharded` for a DeepSpeedEngine made by deepspeed.initialize.

    Every method is collective: all ranks of the engine's data-parallel group call it alike, between steps.

    Raises:
        CheckpointError: on making one, for an engine with a feature that this layout does not know; names it.
    """

    def __init__(self, engine: Any) -> None:
        _refuse_unknown(engine)
        self._engine = engine
        self._optimizer = engine.optimizer
        self._inner = getattr(engine.optimizer, "optimizer", engine.optimizer)  # torch's, inside ZeRO's
        self._group = engine.seq_data_parallel_group
        self._ranks = TorchGroup(self._group)
        self._rank, self._world = self._ranks.rank, self._ranks.size

    def checkpoint_layout(self) -> dict[str, Any]:
        """JSON facts that must agree. The world size is not among them: intervals are read in any layout."""
        engine = self._engine
        precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
        return {
            "engine": "deepspeed",
            "zero_stage": int(engine.zero_optimization_stage()),
            "precision": precision,
            "optimizer": type(self._inner).__name__,
        }

    def checkpoint_state(self) -> tuple[Iterable[Piece], Any]:
        """This rank's pieces, aliasing live memory on a CPU and copied from a device one at a time, and the tree."""
        flats = list(self._flats())
        return self._pieces(flats), self._tree(flats)

    def load_checkpoint_state(self, reader: ReadInto, tree: Any) -> None:
        """Take masters, moments, steps, buffers, counters, schedule and loss scale back, and make the weights
        of the forward pass from the masters.

        On a CPU the bytes are read into the masters and moments themselves.

        Raises:
            CheckpointMismatch: of another model or optimizer; nothing was changed.
            CorruptCheckpoint: the bytes are not those that were written; the state may have been changed in part.
        """
        flats = list(self._flats())
        landing = Landing(reader, alike=self._engine.zero_optimization_stage() == 0)

        def check() -> bytes:
            found = list(self.check_checkpoint_state(reader, tree))
            if found:
                raise CheckpointMismatch("; ".join(found))
            return b""

        def read() -> bytes:
            for flat in flats:
                self._load_flat(flat, landing, reader, tree["parameters"])
            for name, buffer in _persistent_buffers(self._engine.module):
                landing.fill(self._buffer_name(name, reader), 0, buffer)
            landing.flush()
            return b""

        # A rank that failed alone would leave the others waiting in the collectives below.
        all_ranks(self._ranks, check)
        with torch.no_grad():
            all_ranks(self._ranks, read)
        self._load_counters(tree)
        self._spread_masters()

    def consolidated(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole parameter in fp32, on the CPU), sorted by name, made one at a time.

        Every rank must iterate to the end. The tensors are whole on every rank.
        """
        flats = list(self._flats())
        runs = {run.name: (flat, run) for flat in flats for run in flat.written}  # no two ranks' overlap
        replicated = {flat.names[0]: flat.master for flat in flats if self._engine.zero_optimization_stage() == 0}
        for name, shape in sorted(self._shapes().items()):
            if name in replicated:
                yield name, replicated[name].detach().float().cpu().view(shape)
                continue
            whole = torch.zeros(shape, dtype=torch.float32, device=self._engine.device)
            if name in runs:
                flat, run = runs[name]
                held = flat.master.detach()[run.offset : run.offset + run.count]
                whole.view(-1)[run.start : run.start + run.count].copy_(held)
            # One rank's bits and zeros from the others: adding as integers keeps even the sign of -0.0.
            torch.distributed.all_reduce(whole.view(torch.int32), group=self._group)
            yield name, whole.cpu()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape_of(parameter) for name, parameter in self._engine.module.named_parameters()}

    def _flats(self) -> Iterator[Flat]:
        return flats_of(self._engine, rank=self._rank, world=self._world)

    def _pieces(self, flats: Sequence[Flat]) -> Iterator[Piece]:
        for flat in flats:
            tensors = {"master": flat.master, **self._moments(flat)}
            for kind, tensor in tensors.items():
                for run in flat.written:
                    data = tensor.detach()[run.offset : run.offset + run.count]
                    yield _piece(f"{kind}/{run.name}", data, run.shape, run.start, steady=True)
        for name, buffer in _persistent_buffers(self._engine.module):
            yield _piece(f"buffer/{name}@{self._rank}", buffer.detach().reshape(-1), tuple(buffer.shape), 0)

    def _moments(self, flat: Flat) -> dict[str, Tensor]:
        """Optimizer state with one element for each of the master, one-dimensional."""
        state = self._inner.state.get(flat.key, {})
        shape = flat.key.shape
        return {
            key: value.view(-1)
            for key, value in state.items()
            if isinstance(value, Tensor) and value.shape == shape and key != "step"
        }

    def _tree(self, flats: Sequence[Flat]) -> dict[str, Any]:
        engine = self._engine
        parameters = {}
        for flat in flats:
            moments = self._moments(flat)
            state = self._inner.state.get(flat.key, {})
            small = {key: small_value(value) for key, value in state.items() if key not in moments}
            parameters.update({name: {"moments": sorted(moments), "small": small} for name in flat.names})
        scaler = getattr(self._optimizer, "loss_scale_config", getattr(self._optimizer, "loss_scaler", None))
        scheduler = getattr(engine.lr_scheduler, "state_dict", None)
        return {
            "version": TREE_VERSION,
            "parameters": parameters,
            "groups": [
                {key: small_value(value) for key, value in group.items() if key != "params"}
                for group in self._inner.param_groups
            ],
            "global_steps": engine.global_steps,
            "global_samples": engine.global_samples,
            "skipped_steps": engine.skipped_steps,
            "scaler": {key: getattr(scaler, key) for key in SCALER_FIELDS if hasattr(scaler, key)},
            "scheduler": scheduler() if scheduler else None,
        }

    def check_checkpoint_state(self, reader: ReadInto, tree: Any) -> Iterator[str]:
        """Every mismatch between a checkpoint and the engine, as a phrase; no bytes are read."""
        if not isinstance(tree, dict) or tree.get("version") != TREE_VERSION:
            yield "the checkpoint's state is not of this version of the DeepSpeed adapter"
            return
        flats, shapes = list(self._flats()), self._shapes()
        ours, theirs = {name for flat in flats for name in flat.names}, set(tree["parameters"])
        yield from (f"parameter {name} is not in the checkpoint" for name in sorted(ours - theirs))
        yield from (f"parameter {name} is in the checkpoint, and not in the job's" for name in sorted(theirs - ours))
        if len(tree["groups"]) != len(self._inner.param_groups):
            here, there = len(self._inner.param_groups), len(tree["groups"])
            yield f"the optimizer has {here} parameter groups, the checkpoint's had {there}"
        for name in sorted(shapes.keys() & theirs):
            _, saved = reader.describe(f"master/{name}")
            if tuple(saved) != shapes[name]:
                yield f"parameter {name} is {list(shapes[name])}, in the checkpoint {list(saved)}"
        for flat in flats:
            if theirs.issuperset(flat.names):
                yield from self._flat_mismatches(flat, reader, tree["parameters"])

    def _flat_mismatches(self, flat: Flat, reader: ReadInto, parameters: dict[str, Any]) -> Iterator[str]:
        kinds = parameters[flat.names[0]]["moments"]
        if any(parameters[name]["moments"] != kinds for name in flat.names):
            yield "parameters that share a flat tensor here were not all trained in the checkpoint"
            return
        present = {"master": flat.master, **self._moments(flat)}
        for kind, tensor in present.items():
            for name in flat.names if kind == "master" or kind in kinds else ():
                dtype, _ = reader.describe(f"{kind}/{name}")
                if dtype != dtype_name(tensor.dtype):
                    yield f"{kind}/{name} is {dtype} in the checkpoint and {dtype_name(tensor.dtype)} here"

    def _load_flat(self, flat: Flat, landing: Landing, reader: ReadInto, parameters: dict[str, Any]) -> None:
        saved = parameters[flat.names[0]]
        for run in flat.runs:
            landing.fill(f"master/{run.name}", run.start, flat.master[run.offset : run.offset + run.count])
        if not (saved["moments"] or saved["small"]):
            return
        state = self._inner.state[flat.key]
        for kind in saved["moments"]:
            dtype, _ = reader.describe(f"{kind}/{flat.names[0]}")
            if kind not in state:
                state[kind] = torch.zeros_like(flat.key, dtype=getattr(torch, dtype))
            for run in flat.runs:
                target = state[kind].view(-1)[run.offset : run.offset + run.count]
                landing.fill(f"{kind}/{run.name}", run.start, target)
        group = self._inner.param_groups[flat.group]
        home = flat.master.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
        for key, value in saved["small"].items():
            state[key] = _restored(value, home)

    def _load_counters(self, tree: dict[str, Any]) -> None:
        engine = self._engine
        for group, saved in zip(self._inner.param_groups, tree["groups"], strict=True):
            for key, value in saved.items():
                now = group.get(key)
                home = now.device if isinstance(now, Tensor) else torch.device("cpu")
                group[key] = tuple(value) if isinstance(now, tuple) else _restored(value, home)
        engine.global_steps, engine.global_samples = tree["global_steps"], tree["global_samples"]
        engine.skipped_steps = tree["skipped_steps"]
        scaler = getattr(self._optimizer, "loss_scale_config", getattr(self._optimizer, "loss_scaler", None))
        for key, value in tree["scaler"].items():
            setattr(scaler, key, value)
        if tree["scheduler"] is not None and engine.lr_scheduler is not None:
            engine.lr_scheduler.load_state_dict(tree["scheduler"])

    def _spread_masters(self) -> None:
        """Make the forward pass's weights from the masters, on all ranks."""
        kind = type(self._optimizer).__name__
        if kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
            self._optimizer.update_lp_params()
        elif kind == "DeepSpeedZeroOptimizer_Stage3":
            self._optimizer.checkpoint_event_prologue()
            for index in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(index)
            self._optimizer.checkpoint_event_epilogue()
        elif kind == "FP16_UnfusedOptimizer":
            for masters, weights in zip(self._optimizer.fp32_groups, self._optimizer.fp16_groups, strict=True):
                for master, weight in zip(masters, weights, strict=True):
                    weight.data.copy_(master.data)

    def _buffer_name(self, name: str, reader: ReadInto) -> str:
        own = f"buffer/{name}@{self._rank}"
        return own if own in reader.names() else f"buffer/{name}@0"


def _refuse_unknown(engine: Any) -> None:
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    module = engine.module
    offloads = (engine.zero_offload_optimizer(), engine.zero_offload_param())
    reasons = {
        "a pipeline": hasattr(module, "stage_id"),
        "experts (MoE)": bool(engine.has_moe_layers),
        "tensor or sequence parallelism": engine.mp_world_size > 1 or engine.sequence_parallel_size > 1,
        "offloading": any(str(getattr(one.device, "value", one.device)) != "none" for one in offloads if one),
        "zero_optimization.round_robin_gradients": bool(getattr(optimizer, "round_robin_gradients", False)),
        "zero_optimization.parameter_alignment": bool(getattr(optimizer, "parameter_alignment", False)),
        "zero_optimization.zero_hpz_partition_size": getattr(optimizer, "zero_hpz_partition_size", 1) > 1,
        f"the optimizer {kind}": not (isinstance(optimizer, torch.optim.Optimizer) or kind in KNOWN),
    }
    found = [reason for reason, there in reasons.items() if there]
    if found:
        raise CheckpointError(
            f"DeepSpeed with {', '.join(found)}: cfe_hpc cannot lay its state out in checkpoints; "
            "train without, or save with the engine's own save_checkpoint"
        )


def _persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = module.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in module.named_buffers() if name in saved)


def small_value(value: Any) -> Any:
    """A value for the tree: numbers kept as 0-d tensors by type and value, other tensors copied, tuples as lists."""
    if isinstance(value, Tensor) and value.dim() == 0:
        return {"scalar": dtype_name(value.dtype), "value": value.item()}
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    return list(value) if isinstance(value, tuple) else value


def _restored(value: Any, home: torch.device) -> Any:
    """What `small_value` was given; a tensor of its own at every call: torch's AdamW counts `step` up in place."""
    if isinstance(value, dict) and "scalar" in value:
        return torch.tensor(value["value"], dtype=getattr(torch, value["scalar"]), device=home)
    return value.clone().to(home) if isinstance(value, Tensor) else value


def _piece(name: str, data: Tensor, shape: tuple[int, ...], start: int, *, steady: bool = False) -> Piece:
    dtype = dtype_name(data.dtype)
    return Piece(name=name, dtype=dtype, shape=shape, start=start, data=tensor_data(data), steady=steady)
