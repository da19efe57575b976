"""Steps per second of the shipped training loop inside a Run, beside a plain DeepSpeed loop of the same model.

    python tests/benchmarks/bench_loop.py [--json FILE] [--rounds N] [--steps K] [--set KEY=VALUE]

Both loops live in the same two ranks and take turns, K steps each, so that whatever else the machine does hits both.
Ours loads, shuffles and schedules through cfe_hpc, logs every step (with the loss averaged over ranks, a heartbeat
line and the agreement on stops at each boundary); the plain one takes tensors that lie ready, has DeepSpeed clip and
schedule, and writes nothing. The table shows medians over rounds, the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GOAL = 0.97
MODEL = {
    "d_model": 128, "layers": 4, "heads": 4, "seq_len": 256, "global_batch": 8, "micro_batch": 4, "warmup_steps": 5,
    "rope_variant": "irope",
}  # fmt: skip


def entry(run: Any) -> None:
    """Runs on the ranks: rounds of both loops, in turns. Rank 0 writes bench.json into the run folder."""
    import torch

    from cfe_hpc.train.config import read_params
    from cfe_hpc.train.engine import make_engine
    from cfe_hpc.train.main import _data, train_step
    from cfe_hpc.train.model import Transformer
    from cfe_hpc.train.optim import rate_at

    table = dict(run.params)
    per_round = table.pop("steps_per_round")
    params = read_params(table, file="bench")
    device = torch.device(run.device)
    run.init_distributed()
    loader, _ = _data(run, params)
    torch.manual_seed(0)
    accumulate = params.global_batch // params.micro_batch // run.world_size
    engine = make_engine(
        run.spec.job.engine, params, Transformer(params), device=device, accumulate=accumulate,
        world_size=run.world_size,
    )  # fmt: skip
    plain = plain_loop(run, params, accumulate)
    run.track(**engine.tracked(), data=loader)
    plain_seconds, our_seconds = [], []
    started_s = 0.0
    for step in run.steps(params.steps):
        if step % per_round == 0:
            if step:
                our_seconds.append(time.perf_counter() - started_s)
            run.group.barrier()
            plain_started_s = time.perf_counter()
            plain(per_round)
            plain_seconds.append(time.perf_counter() - plain_started_s)
            run.group.barrier()
            started_s = time.perf_counter()
        rate = rate_at(step, params)
        with run.phase("data"):
            windows = torch.from_numpy(loader.next_batch()).to(device)
        loss, norm = train_step(engine, windows, rate, accumulate=accumulate, mean_loss=True)
        run.log(loss=loss, grad_norm=norm, lr=rate, tokens=params.global_batch * params.seq_len)
    if run.rank == 0:
        measured = {"plain": plain_seconds[: len(our_seconds)], "cfe_hpc": our_seconds}
        (run.folder.path / "bench.json").write_text(json.dumps(measured))


def plain_loop(run: Any, params: Any, accumulate: int) -> Callable[[int], None]:
    """What one writes without cfe_hpc."""
    import deepspeed
    import torch

    from cfe_hpc.train.engine_deepspeed import deepspeed_config
    from cfe_hpc.train.model import Transformer
    from cfe_hpc.train.optim import parameter_groups, rate_at

    torch.manual_seed(0)
    model = Transformer(params)
    optimizer = torch.optim.AdamW(parameter_groups(model, params.weight_decay), lr=1.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, params))
    config = deepspeed_config(run.spec.job.engine, params, accumulate=accumulate)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
    batches = torch.randint(0, 256, (8, accumulate, params.micro_batch, params.seq_len + 1))

    def steps(count: int) -> None:
        for step in range(count):
            for micro in batches[step % len(batches)]:
                engine.backward(engine(micro[:, :-1], micro[:, 1:]).mean())
                engine.step()

    return steps


def measure(rounds: int, per_round: int, settings: Sequence[str]) -> dict[str, list[float]]:
    """Submit the job that runs `entry` to this machine and wait for its figures: seconds of each round."""
    params = {**MODEL, "steps": (rounds + 2) * per_round, "steps_per_round": per_round}
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            'name = "bench-loop"', 'entry = "bench_loop:entry"', "[resources]", "devices_per_node = 2",
            "[checkpoint]", 'every = "1h"', "[engine]", "zero_stage = 1", "[params]",
            *(f"{key} = {json.dumps(value)}" for key, value in params.items()),
        ]  # fmt: skip
        job = Path(folder, "bench.toml")
        job.write_text("\n".join(lines))
        words = [word for setting in settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "cfe_hpc", "submit", str(job), "--site", "local", "--wait", "--json", *words]
        environment = {**os.environ, "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600, check=False
            )
        finally:
            for run in Path(folder).glob("runs/*/*"):
                if not (run / "result.json").exists():
                    subprocess.run([sys.executable, "-m", "cfe_hpc", "cancel", str(run)], timeout=60, check=False)
        if done.returncode != 0:
            logs = [log.read_text()[-2000:] for log in sorted(Path(folder).glob("runs/*/*/logs/*.err"))]
            print(done.stderr, *logs, sep="\n", file=sys.stderr)
            raise SystemExit(f"the benchmark's run failed with exit code {done.returncode}")
        run_dir = json.loads(done.stdout)["run_dir"]
        seconds: dict[str, list[float]] = json.loads(Path(folder, run_dir, "bench.json").read_text())
    return {name: values[1:] for name, values in seconds.items()}  # the first round warms up


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the goal is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="pairs of measurements (60)")
    parser.add_argument("--steps", type=int, default=4, help="steps of each loop in a round (4)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `cfe-hpc submit`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the run is cancelled too
    seconds = measure(args.rounds, args.steps, args.set)
    rates = {name: [args.steps / value for value in values] for name, values in seconds.items()}
    ratios = [ours / plain for ours, plain in zip(rates["cfe_hpc"], rates["plain"], strict=True)]
    ratio = statistics.median(ratios)
    print(f"{'loop':10} {'steps/s':>8} {'fastest':>8} {'slowest':>8}   median of {len(ratios)} rounds of {args.steps}")
    for name, values in rates.items():
        print(f"{name:10} {statistics.median(values):8.2f} {max(values):8.2f} {min(values):8.2f}")
    print(f"ratio {ratio:.3f} (goal {GOAL}), rounds from {min(ratios):.3f} to {max(ratios):.3f}")
    if args.json:
        args.json.write_text(json.dumps({"steps_per_second": rates, "ratios": ratios, "ratio": ratio, "goal": GOAL}))
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
