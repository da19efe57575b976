"""Devices: golden environments, the choice and its reason, and the Gaudi bridge's contract on a fake of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cfe_hpc.devices.base import Device, Memory
from cfe_hpc.devices.cpu import Cpu
from cfe_hpc.devices.cuda import Cuda
from cfe_hpc.devices.gaudi import Gaudi, device_indices, parse_modules, read_modules
from cfe_hpc.devices.probe import Finding
from cfe_hpc.devices.resolve import DEVICES, resolve
from cfe_hpc.errors import ImpossibleError

FAKES = Path(__file__).parent / "fakes"

# What hl-smi prints on an HLS-type node whose two orders differ.
HL_SMI = "index, module_id\n3, 6\n1, 4\n2, 7\n0, 5\n4, 2\n6, 0\n7, 3\n5, 1\n"
PERMUTED = {0: 5, 1: 4, 2: 7, 3: 6, 4: 2, 5: 1, 6: 0, 7: 3}


@dataclass(frozen=True)
class Place:
    rank: int = 0
    local_rank: int = 0
    world_size: int = 2
    local_world_size: int = 2


BASE = {"DS_ACCELERATOR": "hpu", "PT_HPU_LAZY_MODE": "0"}

GAUDI_TABLE: dict[str, tuple[dict[str, str], int, dict[int, int], dict[str, str]]] = {
    "whole node, nothing confined": ({}, 8, PERMUTED, BASE),
    "whole node, all listed": (
        {"SLURM_STEP_GPUS": "0,1,2,3,4,5,6,7"},
        8,
        PERMUTED,
        {**BASE, "HABANA_VISIBLE_MODULES": "0,1,2,3,4,5,6,7"},
    ),
    "half a node, orders agree": (
        {"SLURM_STEP_GPUS": "4,5,6,7"},
        4,
        {index: index for index in range(8)},
        {**BASE, "HABANA_VISIBLE_MODULES": "4,5,6,7"},
    ),
    "half a node, orders differ": (
        {"SLURM_STEP_GPUS": "0,1,2,3"},
        4,
        PERMUTED,
        {**BASE, "HABANA_VISIBLE_MODULES": "4,5,6,7"},
    ),
    "scattered devices": (
        {"SLURM_STEP_GPUS": "1,4", "SLURM_CPUS_PER_TASK": "19"},
        2,
        PERMUTED,
        {**BASE, "HABANA_VISIBLE_MODULES": "2,4", "OMP_NUM_THREADS": "19"},
    ),
    "a range of the job's devices": (
        {"SLURM_JOB_GPUS": "4-5,7"},
        3,
        PERMUTED,
        {**BASE, "HABANA_VISIBLE_MODULES": "1,2,3"},
    ),
    "the step's list before the job's, and before a renumbered one": (
        {"SLURM_STEP_GPUS": "6", "SLURM_JOB_GPUS": "5,6", "CUDA_VISIBLE_DEVICES": "0"},
        1,
        PERMUTED,
        {**BASE, "HABANA_VISIBLE_MODULES": "0"},
    ),
    "only CUDA_VISIBLE_DEVICES": (
        {"CUDA_VISIBLE_DEVICES": "2,3"},
        2,
        PERMUTED,
        {**BASE, "HABANA_VISIBLE_MODULES": "6,7"},
    ),
    "the site has spoken": (
        {
            "SLURM_STEP_GPUS": "0,1",
            "HABANA_VISIBLE_MODULES": "7,6",
            "PT_HPU_LAZY_MODE": "1",
            "OMP_NUM_THREADS": "3",
            "SLURM_CPUS_PER_TASK": "19",
        },
        2,
        PERMUTED,
        {"DS_ACCELERATOR": "hpu", "PT_HPU_LAZY_MODE": "1"},
    ),
}


@pytest.mark.parametrize("case", GAUDI_TABLE)
def test_gaudi_environment(case: str) -> None:
    environ, ranks, modules, expected = GAUDI_TABLE[case]
    place = Place(world_size=ranks, local_world_size=ranks)
    assert Gaudi(lambda: modules).environment(place, environ) == expected


def test_gaudi_devices_that_cannot_be_placed() -> None:
    with pytest.raises(ImpossibleError, match=r"module ids of devices 2,3 are not known.* \(0,1,2,3\)"):
        Gaudi(lambda: {0: 1, 1: 0}).environment(Place(), {"SLURM_STEP_GPUS": "0-3"})
    with pytest.raises(ImpossibleError, match="1 devices for 2 ranks on this node"):
        Gaudi(lambda: PERMUTED).environment(Place(), {"SLURM_STEP_GPUS": "3"})


def test_device_lists() -> None:
    assert device_indices({"SLURM_STEP_GPUS": "0-2, 5"}) == [0, 1, 2, 5]
    assert device_indices({"SLURM_STEP_GPUS": "", "SLURM_JOB_GPUS": "3"}) == [3]
    assert device_indices({"CUDA_VISIBLE_DEVICES": "GPU-8f2c"}) is None
    assert device_indices({}) is None


def test_hl_smi_is_read_in_any_order_with_or_without_a_heading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_modules(HL_SMI) == PERMUTED
    assert parse_modules("0, 0\r\n1, 1\r\n") == {0: 0, 1: 1}
    assert parse_modules("hl-smi: driver not loaded\n") == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_modules() == {}
    (tmp_path / "csv").write_text(HL_SMI)
    answer = f'while read -r row; do echo "$row"; done <"{tmp_path}/csv"'
    script = f'#!/bin/sh\n[ "$*" = "-Q index,module_id -f csv" ] && {answer}\n'
    (tmp_path / "hl-smi").write_text(script)
    (tmp_path / "hl-smi").chmod(0o755)
    assert read_modules() == PERMUTED


@pytest.mark.parametrize(("device", "word"), [(Cpu(), "cpu"), (Cuda(), "cuda")])
def test_environment_of_the_others(device: Device, word: str) -> None:
    assert device.environment(Place(), {}) == {"DS_ACCELERATOR": word}
    environ = {"SLURM_CPUS_PER_TASK": "7"}
    assert device.environment(Place(), environ) == {"DS_ACCELERATOR": word, "OMP_NUM_THREADS": "7"}
    environ["OMP_NUM_THREADS"] = "2"
    assert device.environment(Place(), environ) == {"DS_ACCELERATOR": word}


def findings(*present: str) -> dict[Any, Finding]:
    return {name: Finding(present=name in present, evidence=f"{name} was looked for") for name in DEVICES}


def test_the_choice_states_its_reason() -> None:
    choice = resolve("hpu", findings("hpu", "cpu"))
    assert (choice.device.name, choice.device.backend) == ("hpu", "hccl")
    assert choice.reason == "asked for by the job's plan (hpu was looked for)"
    choice = resolve(None, findings("cuda", "cpu"))
    assert (choice.device.name, choice.device.backend) == ("cuda", "nccl")
    assert choice.reason == "the best of this node (cuda was looked for); hpu: hpu was looked for"
    assert resolve(None, findings("cpu")).device.name == "cpu"
    assert resolve("cpu", findings("cuda", "cpu")).device.name == "cpu"


def test_asking_for_what_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(ImpossibleError) as caught:
        resolve("cuda", findings("cpu"))
    (problem,) = caught.value.problems
    assert problem.key == "resources.accelerator"
    assert "this node has no usable cuda device: cuda was looked for (cuda); choose a partition" in str(problem)
    assert str(problem).endswith("or another accelerator (here: cpu)")


def test_this_node_has_cores_and_says_so() -> None:
    assert "every node has cores" in resolve("cpu").reason


def test_cpu_device() -> None:
    device = Cpu()
    device.activate(3)
    device.synchronize()
    device.mark_step()
    device.set_rng_state(device.rng_state())
    assert (device.torch_device(3), device.rng_state()) == ("cpu", None)
    assert device.memory() == Memory(used_bytes=0, peak_bytes=0, limit_bytes=0)


def test_choosing_a_device_loads_no_torch() -> None:
    code = "import sys; from cfe_hpc.devices.resolve import resolve; resolve(None); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


GAUDI_RANK = """
import json, os, sys
from types import SimpleNamespace
from cfe_hpc.devices.gaudi import Gaudi

rank = int(sys.argv[1])
place = SimpleNamespace(rank=rank, local_rank=rank, world_size=2, local_world_size=2)
device = Gaudi(lambda: {0: 5, 1: 4, 2: 7, 3: 6})
os.environ.update(device.environment(place))
assert "torch" not in sys.modules
device.activate(rank)
device.init_process_group(place)

import torch, torch.distributed as dist
from habana_frameworks.torch import core, hpu

total = torch.tensor([float(rank + 1)])
dist.all_reduce(total)
state = device.rng_state()
first = hpu.random.draw()
device.set_rng_state(state)
device.mark_step()
device.synchronize()
memory = device.memory()
print(json.dumps({
    "backend": dist.get_backend(), "sum": total.item(), "module": os.environ["HLS_MODULE_ID"],
    "same draw": hpu.random.draw() == first, "marked": core.marked_steps, "synchronized": hpu.synchronized,
    "device": device.torch_device(rank), "copies": device.copies(),
    "memory": [memory.used_bytes >> 30, memory.peak_bytes >> 30, memory.limit_bytes >> 30],
}))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("lazy", ["0", "1"])
def test_two_ranks_over_hccl_each_on_its_own_module(tmp_path: Path, lazy: str) -> None:
    environ = {
        **os.environ,
        "PYTHONPATH": str(FAKES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "SLURM_STEP_GPUS": "1,3",
        "PT_HPU_LAZY_MODE": lazy,
        "OMP_NUM_THREADS": "1",
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environ["MASTER_PORT"] = str(probe.getsockname()[1])
    argv = [sys.executable, "-c", GAUDI_RANK]
    ranks = [
        subprocess.Popen([*argv, str(rank)], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        printed = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0], printed
    for (out, _), module in zip(printed, ("4", "6"), strict=True):
        assert json.loads(out) == {
            "backend": "hccl",
            "sum": 3.0,
            "module": module,
            "same draw": True,
            "marked": int(lazy),
            "synchronized": 1,
            "device": "hpu",
            "copies": None,
            "memory": [3, 5, 96],
        }


def test_deepspeed_takes_the_device_it_is_told() -> None:
    code = (
        "from cfe_hpc.devices.gaudi import Gaudi; import os, types;"
        "os.environ.update(Gaudi().environment(types.SimpleNamespace(local_world_size=1), {}));"
        "from deepspeed.accelerator import get_accelerator; a = get_accelerator();"
        "print(a.device_name(), a.communication_backend_name())"
    )
    environ = {**os.environ, "PYTHONPATH": str(FAKES)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "hpu hccl"
