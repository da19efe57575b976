"""`python -m bench_checkpoint.rank SETTINGS`: one rank; does what lines of JSON on its stdin ask, and answers each."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench_checkpoint import files
from bench_checkpoint.beside import Training, save_beside
from bench_checkpoint.flat import Saves
from bench_checkpoint.limits import Limits
from bench_checkpoint.ours import OURS
from bench_checkpoint.peers import PEERS
from bench_checkpoint.state import ShardedState
from bench_checkpoint.ways import Place, Way
from cfe_hpc.checkpoints.protocols import SoloGroup
from cfe_hpc.ranks.control import GlooGroup
from cfe_hpc.ranks.rendezvous import Meeting

_PR_SET_PDEATHSIG = 1


class Rank:
    """The state of this rank and the ways that save it. Public methods are what the parent may ask for."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._training = Training(place.group)
        self._state: Any = None
        self._limits: Limits | None = None
        self._ways: dict[str, Way] = {}
        self._small: Saves | None = None
        self._mesh: Any = None

    def calibrate(self, step_s: float) -> dict[str, float]:
        """Fix the work of a step."""
        return {"step_s": self._training.calibrate(step_s)}

    def make(self, state_bytes: int, limits: bool = True) -> dict[str, int]:
        """Make the state that is saved, and memory for bare copies of it."""
        if self._mesh is None:
            self._mesh = dist.device_mesh.init_device_mesh("cpu", (self._place.size,))
        self._state = ShardedState(state_bytes, self._place.rank, self._place.size, self._mesh)
        if limits:
            self._limits = Limits(list(self._state.locals.values()), self._place.group)
        return {"state_bytes": self._state.size_bytes}

    def make_zero(self, state_bytes: int, stage: int, decoupled: bool = False) -> dict[str, int]:
        """The same with a DeepSpeed engine."""
        from bench_checkpoint.zero import Zero

        self._state = Zero(state_bytes, stage, self._place, decoupled=decoupled)
        self._limits = Limits(self._state.tensors, self._place.group)
        return {"state_bytes": self._state.size_bytes}

    def drop(self) -> dict[str, int]:
        """Forget the state and all that saves it."""
        for way in self._ways.values():
            way.close()
        self._ways, self._state, self._limits = {}, None, None
        gc.collect()
        return {}

    def copy(self, threads: int) -> dict[str, float]:
        """One copy of the state."""
        assert self._limits is not None
        return {"copy_s": self._limits.copy(threads)}

    def bare(self, folder: str, direct: bool) -> dict[str, float]:
        """A bare durable write, and a cold read of what it wrote."""
        assert self._limits is not None
        written_s = self._limits.write(Path(folder), direct=direct)
        return {"write_s": written_s, "read_s": self._limits.read(Path(folder), direct=direct)}

    def bare_beside(self, folder: str, forward_backward_s: float) -> dict[str, Any]:
        """A bare durable write while training goes on."""
        assert self._limits is not None
        figures = self._limits.write_beside(Path(folder), self._training, forward_backward_s)
        if self._place.rank:
            figures.pop("steps_before"), figures.pop("steps_during")
        return figures

    def save(self, way: str, folder: str, first: bool, keep: bool, forward_backward_s: float) -> dict[str, Any]:
        """One save, and its figures: for a first one also the memory it took beyond the state."""
        saver = self._way(way)
        resident_bytes, children_bytes = files.resident_bytes(), files.children_bytes()
        files.start_peak()
        saver.start() if first else saver.warm()
        most_children = files.children_bytes()

        def look() -> None:
            nonlocal most_children
            if first:
                most_children = max(most_children, files.children_bytes())

        os.sync()
        self._place.group.barrier()
        if saver.asynchronous:
            figures = save_beside(
                self._training,
                saver,  # type: ignore[arg-type]
                Path(folder),
                self._place.group,
                forward_backward_s=forward_backward_s,
                each_step=look,
            )
        else:
            figures = self._save_waiting(saver, Path(folder))
        if first:
            look()
            figures["extra_bytes"] = files.peak_bytes() - resident_bytes + most_children - children_bytes
        if self._place.rank:
            figures.pop("steps_before", None), figures.pop("steps_during", None)
        if not keep:
            saver.release()
        return figures

    def _save_waiting(self, saver: Way, folder: Path) -> dict[str, float]:
        saver.returned_s = None
        began = time.monotonic()
        saver.save(folder)
        seconds = time.monotonic() - began
        returned_s = (saver.returned_s or began + seconds) - began
        return {"blocked_s": seconds, "returned_s": returned_s, "durable_s": seconds, "lost_s": seconds}

    def load(self, way: str, folder: str) -> dict[str, float]:
        """A cold load into the state, and whether it is all there."""
        loader = self._way(way)
        self._state.clear()
        if self._place.rank == 0:
            files.forget(Path(folder))
            os.sync()  # as before the bare read: what was deleted before is done with
        self._place.group.barrier()
        began = time.monotonic()
        loader.load(Path(folder))
        seconds = time.monotonic() - began
        self._state.check()
        return {"load_s": seconds}

    def decoupled(self, folder: str) -> dict[str, float]:
        """One save of DeepSpeed's decoupled writer."""
        from bench_checkpoint.zero import save_decoupled

        return save_decoupled(self._state, Path(folder))

    def start_small(self, keep: int) -> dict[str, Any]:
        """Begin a series of small asynchronous saves, of which `keep` stay."""
        if self._small is not None:
            self._small.close()
        self._small = Saves(self._state, self._place.group, keep)
        return {}

    def save_small(self, folder: str, saves: int, steps_between: int) -> dict[str, Any]:
        """Go on with the series."""
        assert self._small is not None
        return self._small.run(Path(folder), saves, steps_between)

    def _way(self, name: str) -> Way:
        if name not in self._ways:
            self._ways[name] = _table(name)[name](self._state, self._place)
        return self._ways[name]


def _table(name: str) -> dict[str, Any]:
    if "deepspeed" in name:
        from bench_checkpoint.zero import ZERO_WAYS

        return ZERO_WAYS
    return {**PEERS, **OURS}


def _join(settings: dict[str, Any]) -> Place:
    rank, size = settings["rank"], settings["size"]
    dist.init_process_group("gloo", init_method=f"file://{settings['rendezvous']}", rank=rank, world_size=size)
    group: Any = SoloGroup()
    if size > 1:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            ports = [probe.getsockname()[1]]
        dist.broadcast_object_list(ports)
        group = GlooGroup(rank, size, Meeting(address="127.0.0.1", master_port=0, control_port=ports[0]))
    return Place(rank=rank, size=size, threads=settings["threads"], group=group)


def main(settings: dict[str, Any]) -> None:
    """Answer until stdin ends. A failure is answered as such; the parent then ends all ranks."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    torch.set_num_threads(settings["threads"])
    rank = None
    with open(settings["answers"], "w", buffering=1) as answers:
        try:
            rank = Rank(_join(settings))
            answers.write("{}\n")
            for line in sys.stdin:
                asked = json.loads(line)
                answers.write(json.dumps(getattr(rank, asked.pop("do"))(**asked)) + "\n")
        except BaseException as error:  # DCP's own errors are no Exceptions
            traceback.print_exc()
            answers.write(json.dumps({"failed": f"{type(error).__name__}: {error}"}) + "\n")
    sys.stderr.flush()
    # Not through destructors: DeepSpeed's decoupled engine waits there for minutes.
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
