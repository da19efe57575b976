"""The training under submitit, as its documentation and the programs that use it do: periodic saves, and a
checkpoint() that submits the callable again (https://github.com/facebookincubator/submitit/blob/main/docs/checkpointing.md,
https://github.com/facebookresearch/dino/blob/main/run_with_submitit.py)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import submitit


class Training:
    """What submitit pickles: numbers and a folder."""

    def __init__(self, folder: str, steps: int, every: int) -> None:
        self.folder, self.steps, self.every = folder, steps, every

    def __call__(self) -> None:
        import os

        os.chdir(self.folder)
        sys.path.insert(0, self.folder)
        from workload import Workload, set_rank_variables

        set_rank_variables()
        work, saved = Workload(), Path("saved.pt")
        for step in range(work.load(saved), self.steps):
            work.step(step)
            if (step + 1) % self.every == 0:
                work.save(saved, step + 1)
        work.finish()

    def checkpoint(self) -> Any:
        return submitit.helpers.DelayedSubmission(Training(self.folder, self.steps, self.every))


def submit(steps: int, every: int) -> str:
    """The job's id."""
    executor = submitit.SlurmExecutor(folder="logs", max_num_timeout=100)
    executor.update_parameters(
        partition="spot", nodes=2, ntasks_per_node=1, time=60, cpus_per_task=8, signal_delay_s=60, job_name="plain"
    )
    return str(executor.submit(Training(str(Path.cwd()), steps, every)).job_id)


if __name__ == "__main__":
    print(submit(int(sys.argv[1]), int(sys.argv[2])))
