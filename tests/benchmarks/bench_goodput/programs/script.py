"""The training as a hand-written script: periodic saves, and one more at the step boundary after a signal.

`python script.py STEPS EVERY SIGNAL...`, under srun."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

told: list[int] = []
for name in sys.argv[3:]:
    signal.signal(signal.Signals[f"SIG{name}"], lambda number, frame: told.append(number))

from workload import Workload, set_rank_variables  # noqa: E402  # a signal may come while torch is imported

set_rank_variables()
work, saved, steps, every = Workload(), Path("saved.pt"), int(sys.argv[1]), int(sys.argv[2])
for step in range(work.load(saved), steps):
    work.step(step)
    if (step + 1) % every == 0 or told:
        work.save(saved, step + 1)
    if told:
        sys.exit(1)
work.finish()
