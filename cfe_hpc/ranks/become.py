"""The end of start.py in a run folder, after verify: it needs the standard library alone."""

import os
import runpy
import signal
import sys


def become(module: str, run_dir: str, start: str) -> None:
    """Be `python -m module run_dir` from here on, in the folder `start`: to start Python anew would cost a tenth of a
    second of every attempt.

    Stop signals, which whoever started this has had ignored, are held back: the rank, or a launcher's agent, lets them
    in once it can hear them.
    """
    stop_signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    for number in stop_signals:
        signal.signal(number, signal.SIG_DFL)
    here = os.path.dirname(os.path.abspath(sys.argv[0]))
    sys.path[:] = [start, *(folder for folder in sys.path if folder not in (here, start))]
    os.chdir(start)
    sys.argv = [module, run_dir]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
