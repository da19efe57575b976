"""A user's own PyTorch training in its own loop, joined to the run; `python entries_plain.py` with a job's params."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import cfe_hpc


def main() -> None:
    run = cfe_hpc.join()
    run.init_distributed()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=run.params["steps"])
    parallel = DistributedDataParallel(model)
    run.track(model=model, optimizer=optimizer, schedule=schedule)
    for _ in run.steps(run.params["steps"]):
        rows = torch.randn(16, 32)  # from torch's own generator, which a checkpoint holds
        loss = (parallel(rows).squeeze(1) - rows.sum(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.log(loss=loss)
        _pause(run.folder.path / "pace")


def _pause(pace: Path) -> None:
    """As long as the test says."""
    try:
        time.sleep(float(pace.read_text()))
    except (FileNotFoundError, ValueError):
        return


if __name__ == "__main__":
    main()
