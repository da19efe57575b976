"""What cannot be avoided, without anybody's help: imports, a load, a step and a save of the same training, in seconds.

`python bare.py STEPS`, under srun, in a folder with a `saved.pt` (made when it is missing): rank 0 adds its figures to
`bare.ndjson`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import mean, median

from workload import IMPORTED_S, Workload, process_began_s, set_rank_variables

BYTES = 63_000_000

imports_s = IMPORTED_S - process_began_s()
set_rank_variables()
work, saved = Workload(), Path("saved.pt")
if not saved.exists():
    work.step(0)
    work.save(saved, 0)
import torch.distributed as dist  # noqa: E402

dist.barrier()
began_s = time.monotonic()
work.load(saved)
load_s = time.monotonic() - began_s
steps, saves, writes = [], [], []
for number in range(int(sys.argv[1])):
    began_s = time.monotonic()
    work.step(number)
    steps.append(time.monotonic() - began_s)
half = os.urandom(1 << 20) * (BYTES // dist.get_world_size() >> 20)
for _ in range(3):
    dist.barrier()
    began_s = time.monotonic()
    work.save(Path("bare.pt"), 0, sync=True)
    dist.barrier()
    saves.append(time.monotonic() - began_s)
    began_s = time.monotonic()
    with open(f"bare-{work.rank}.bin", "wb", buffering=0) as out:
        out.write(half)
        os.fsync(out.fileno())
    dist.barrier()
    writes.append(time.monotonic() - began_s)
figures = {"imports_s": imports_s, "load_s": load_s, "steps_s": steps}
# Not the median: many steps take so many times the mean, slow ones included, with anybody's help or nobody's.
figures |= {"step_s": mean(steps), "step_median_s": median(steps), "save_s": median(saves), "write_s": median(writes)}
if work.rank == 0:
    with open("bare.ndjson", "a", encoding="utf-8") as lines:
        lines.write(json.dumps(figures) + "\n")
dist.barrier()
dist.destroy_process_group()
