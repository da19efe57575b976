"""The estimate of memory against tensors counted in real ranks: each ZeRO stage, precision and number of ranks.

    python tests/benchmarks/bench_memory.py [--ranks 1,2] [--json FILE]

A rank trains two steps of a small model on the CPU and counts the bytes of all tensors that Python can reach: at the
end of a backward pass, when AdamW is about to step, and after it. What only C++ holds (DDP's buckets) is not seen.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import resource
import socket
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from cfe_hpc.config.job import Job
from cfe_hpc.config.site import Site
from cfe_hpc.launch.plan import plan
from cfe_hpc.launch.planner.memory import estimate

PARAMS = {"d_model": 256, "layers": 4, "heads": 4, "seq_len": 8, "micro_batch": 1}
BUCKET = 50_000  # elements: small, so that states stand out
STATES = ("weights", "gradients", "gradients in fp32", "optimizer")

Case = tuple[str, int, str, int]


class Counted(NamedTuple):
    """Bytes held for each parameter, by when they were counted; and the most resident memory of the process."""

    backward: float
    stepping: float
    after: float
    rss_mib: float


def cases(ranks: list[int]) -> list[Case]:
    """(engine, stage, precision, ranks)."""
    engines = [("torch", 0), *(("deepspeed", stage) for stage in range(4))]
    return [
        (kind, stage, precision, count)
        for count, (kind, stage), precision in itertools.product(ranks, engines, ("fp32", "bf16"))
    ]


def job_of(case: Case) -> Job:
    """The job that a case trains."""
    kind, stage, precision, ranks = case
    zero = {"zero_optimization": {"reduce_bucket_size": BUCKET}} if kind == "deepspeed" else {}
    table = {
        "name": "memory",
        "entry": "cfe_hpc.train.main:run",
        "resources": {"devices_per_node": ranks},
        "engine": {"kind": kind, "zero_stage": stage, "precision": precision, "deepspeed": zero},
        "params": {**PARAMS, "global_batch": ranks},
    }
    return Job.model_validate(table)


def estimated(case: Case) -> float:
    """Bytes of a parameter that the estimate gives a rank's states."""
    hardware = {"accelerator": "cpu", "devices_per_node": 8, "cores_per_node": 8, "memory": "8GiB"}
    partitions = {"here": {"hardware": "node"}}
    table = {"name": "s", "scheduler": "local", "default_partition": "here", "partitions": partitions}
    site = Site.model_validate({**table, "hardware": {"node": hardware}})
    job = job_of(case)
    found = estimate(job, plan(job, site))
    assert found is not None  # the shipped training tells its size
    return sum(part.size_bytes for part in found.parts if part.name in STATES) / found.parameters


def _held(parameters: int) -> float:
    """Bytes of all storages that Python can reach, for each parameter."""
    import torch

    seen: dict[int, int] = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor):
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values()) / parameters


def _rank(rank: int, case: Case, port: int, answers: Any) -> None:
    kind, _, _, ranks = case
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    from cfe_hpc.train.config import Params
    from cfe_hpc.train.engine_deepspeed import DeepSpeedEngine
    from cfe_hpc.train.engine_torch import TorchEngine
    from cfe_hpc.train.model import Transformer

    dist.init_process_group("gloo")
    job = job_of(case)
    params = Params(**job.params)
    model = Transformer(params)
    parameters = sum(weight.numel() for weight in model.parameters())
    engine: Any
    if kind == "torch":
        engine = TorchEngine(job.engine, params, model, device=torch.device("cpu"), accumulate=1, world_size=ranks)
    else:
        import deepspeed

        deepspeed.init_distributed("gloo")
        engine = DeepSpeedEngine(job.engine, params, model, accumulate=1, world_size=ranks)
    inner = engine.tracked()["optimizer"] if kind == "torch" else engine._engine.optimizer
    stepping: list[float] = []
    # DeepSpeed wraps torch's optimizer, but for stage 0 in fp32.
    getattr(inner, "optimizer", inner).register_step_pre_hook(lambda *_: stepping.append(_held(parameters)))
    tokens = torch.zeros(1, params.seq_len, dtype=torch.long)
    for _ in range(2):
        engine.forward_backward(tokens, tokens, is_last=True)
        backward = _held(parameters)
        engine.step(1e-3)
        gc.collect()
        after = _held(parameters)
    rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if rank == 0:
        answers.put(Counted(backward=backward, stepping=max(stepping), after=after, rss_mib=rss_mib))
    dist.destroy_process_group()


def counted(case: Case) -> Counted:
    """What rank 0 held."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=_rank, args=(rank, case, port, answers)) for rank in range(case[3])]
    for process in processes:
        process.start()
    try:
        found: Counted = answers.get(timeout=120)
    finally:
        for process in processes:
            process.join(timeout=60)
            process.kill()
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit status 1 when the estimate is below what was counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, with commas")
    parser.add_argument("--json", metavar="FILE", help="write the table there, too")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    low = False
    print("engine     stage  precision  ranks  estimated  counted: backward, stepping, after  ratio")
    for case in cases([int(count) for count in args.ranks.split(",")]):
        found, mine = counted(case), estimated(case)
        most = max(found[:3])
        # Small tensors of the model's edge count as well: norms, tables, tokens.
        low = low or mine < most - 0.6
        kind, stage, precision, ranks = case
        shown = f"{found.backward:>9.2f} {found.stepping:>9.2f} {found.after:>9.2f}"
        print(
            f"{kind:<9}  {stage:>5}  {precision:<9}  {ranks:>5}  {mine:>9.2f}  {shown}  {mine / most:>9.2f}", flush=True
        )
        names = ("engine", "stage", "precision", "ranks")
        rows.append({**dict(zip(names, case, strict=True)), "estimated": mine, **found._asdict()})
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return int(low)


if __name__ == "__main__":
    sys.exit(main())
