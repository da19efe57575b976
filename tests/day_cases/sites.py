"""Site profiles on the real Slurm: what `detect` writes is so, runs a job, and `check` names each change to it."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w
from spine.stage import Stage, assert_counted

from cfe_hpc.files import read_toml

NIGHT = (
    *("Nodes=g[1-2]", "MaxNodes=2", "MinNodes=2", "MaxTime=1:00:00", "DefaultTime=10", "OverSubscribe=EXCLUSIVE"),
    *("DefMemPerNode=1000", "MaxMemPerNode=4000", "AllowQos=normal", "TRESBillingWeights=CPU=1.0,Mem=0.25G,GRES/gpu=2"),
)
EDITS: dict[str, Any] = {
    "partitions.gpu.time_limit": "2d",
    "partitions.gpu.nodes_max": 500,
    "partitions.spot.preemption.grace": "1m",
    "partitions.spot.preemption.user_signal": True,
    "partitions.spot-cancel.preemption.mode": "requeue",
    "partitions.spot-cancel.qos": "urgent",
    "partitions.spot-cancel.reservation": "next-week",
    "partitions.gaudi.queue": "gaudi9",
    "partitions.night.nodes_min": 1,
    "partitions.night.exclusive": False,
    "partitions.night.memory_max": "8000MiB",
    "partitions.night.allowed_qos": ["normal", "high"],
    "partitions.night.billing_weights": {"cpu": 2.0, "mem": 0.25, "gres/gpu": 2.0},
    "hardware.h200.gres": "gpu:h100:{devices}",
    "hardware.gaudi3.cores_per_node": 9,
    "hardware.gaudi3.features": ["big", "rack2"],
    "slurm.array_max": 5001,
    "slurm.kill_wait": "1m",
    "slurm.version": "24.05.1",
}
"""Dotted key to what is written there in place of what `detect` wrote."""


@contextlib.contextmanager
def _a_partition_with_every_limit(stage: Stage) -> Iterator[None]:
    stage.cluster.scontrol("create", "PartitionName=night", *NIGHT)
    stage.cluster.scontrol("update", "NodeName=g[1-2]", "AvailableFeatures=big,rack1")
    try:
        yield
    finally:
        stage.cluster.scontrol("delete", "PartitionName=night")
        stage.cluster.scontrol("update", "NodeName=g[1-2]", "AvailableFeatures=", "ActiveFeatures=")


def _detected(stage: Stage) -> Path:
    stage.cfe("sites", "detect", "--output", "found.toml")
    return stage.folder / "found.toml"


def check_names_each_edit_to_what_detect_wrote(stage: Stage) -> None:
    with _a_partition_with_every_limit(stage):
        found = _detected(stage)
        document = json.loads(stage.cfe("sites", "check", "found.toml", "--json").stdout)
        assert (document["differences"], document["unstated"]) == ([], {})
        edited = copy.deepcopy(read_toml(found))
        for key, value in EDITS.items():
            *tables, name = key.split(".")
            table = edited
            for each in tables:
                table = table[each]
            assert table.get(name) != value, key
            table[name] = value
        (stage.folder / "edited.toml").write_text(tomli_w.dumps(edited), encoding="utf-8")
        printed = stage.cfe("sites", "check", "edited.toml", status=1).stdout.splitlines()
    named = [line.partition(": ")[0] for line in printed[:-1]]
    # A partition that the cluster does not have is named as a whole.
    assert sorted(named) == sorted(key.removesuffix(".queue") for key in EDITS), printed


def a_job_runs_with_the_profile_that_detect_wrote(stage: Stage) -> None:
    """Slurm cannot know that the devices of this cluster are pretended, and a home folder is no place for a test."""
    words = ("--set", "site.hardware.h200.accelerator=cpu", "--set", "site.storage.runs_root=runs")
    assert_counted(stage.submit("gpu", site=str(_detected(stage)), words=words), attempts=1)


CASES = [check_names_each_edit_to_what_detect_wrote, a_job_runs_with_the_profile_that_detect_wrote]
