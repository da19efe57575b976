import os
import signal
import subprocess
import sys

import pytest

from cfe_hpc.ranks import signals


@pytest.fixture
def flag(monkeypatch):
    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    monkeypatch.setattr(signals, "_installed", None)
    yield signals.install()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_sets_its_bit_and_nothing_else(flag):
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert flag.names(flag.bits) == ["SIGTERM", "SIGUSR2"]
    assert flag.first_s is not None


def test_installing_twice_keeps_what_has_come(flag):
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.install() is flag
    assert flag.names(flag.bits) == ["SIGUSR1"]


def test_a_forked_worker_neither_dies_nor_stops(flag):
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0 if flag.bits == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert flag.bits == 0


def test_signals_held_back_over_an_exec_arrive_after_it():
    """What start.py of a run folder does: block, exec; what ranks do: install, unblock."""
    second = (
        "from cfe_hpc.ranks import signals; flag = signals.install(); signals.unblock(); "
        "print(','.join(flag.names(flag.bits)))"
    )
    first = (
        "import os, signal, sys; from cfe_hpc.ranks.signals import STOP_SIGNALS; "
        "signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS); os.kill(os.getpid(), signal.SIGTERM); "
        f"os.execv(sys.executable, [sys.executable, '-c', {second!r}])"
    )
    done = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "SIGTERM"
