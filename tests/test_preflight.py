"""What is tested before the model is built: which node is at fault, and that two ranks agree on it."""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_disks import mounted
from launching import events, make_folder, make_spec
from spawned import heard

from cfe_hpc.config.run import RunSpec
from cfe_hpc.devices.resolve import resolve
from cfe_hpc.errors import ImpossibleError, Problem
from cfe_hpc.ranks import preflight
from cfe_hpc.ranks.bootstrap import Place, bootstrap
from cfe_hpc.ranks.control import GlooGroup
from cfe_hpc.ranks.env import RankFacts, read_facts
from cfe_hpc.ranks.preflight import Report, judge, require
from cfe_hpc.ranks.rendezvous import Meeting
from cfe_hpc.ranks.stopping import Ended
from cfe_hpc.recovery.exclusions import excluded
from cfe_hpc.runfolder import RunFolder

GONE = ImpossibleError([Problem(file="n", key="CUDA_VISIBLE_DEVICES", what="0 devices", remedy="look at the node")])


def facts(nodes: int, *, rank: int = 0, attempt: int = 0) -> RankFacts:
    return RankFacts(
        scheduler="slurm",
        rank=rank,
        local_rank=0,
        world_size=nodes,
        local_world_size=1,
        node_rank=rank,
        num_nodes=nodes,
        hosts=tuple(f"n{k + 1}" for k in range(nodes)),
        job_id="7",
        attempt=attempt,
    )


DEVICE = {"device": "no device"}
CLOCKS = {"device": "no device", "run folder": "read-only"}


@pytest.mark.parametrize(
    ("reports", "unfit"),
    [
        ([{}, {}], {}),
        ([{}, {"lacks": DEVICE}], {"n2": "no device"}),
        ([{"lacks": DEVICE}, {"lacks": DEVICE}], {}),  # the job's fault, or the site's
        ([{"lacks": DEVICE}, {"lacks": CLOCKS}], {"n2": "read-only"}),
        ([{"lacks": DEVICE}, {}, {"lacks": DEVICE}], {"n1": "no device", "n3": "no device"}),
        ([{"lacks": DEVICE}], {}),
        ([{"lacks": DEVICE, "proven": True}], {"n1": "no device"}),  # an earlier attempt had one
        ([{"lacks": DEVICE, "proven": True}, {"lacks": DEVICE}], {}),
        ([{}, {"time_s": 3600.0}], {}),  # which of the two is wrong?
        ([{}, {"time_s": 59.0}, {}], {}),
        ([{}, {"time_s": 61.0}, {}], {"n2": "its clock is +61 s from the others'"}),
        ([{"time_s": -3600.0}, {}, {"time_s": 1.0}], {"n1": "its clock is -3600 s from the others'"}),
    ],
)
def test_a_node_is_at_fault_for_what_others_have(reports: list[dict[str, Any]], unfit: dict[str, str]) -> None:
    found = judge([Report(node=node, **report) for node, report in enumerate(reports)], facts(len(reports)))
    assert found.unfit == unfit


def test_any_rank_of_a_node_speaks_for_it() -> None:
    reports = [Report(node=0), Report(node=0), Report(node=1), Report(node=1, lacks=DEVICE, sum_seconds=0.5)]
    found = judge(reports, facts(2))
    assert found.unfit == {"n2": "no device"}
    assert found.bandwidth_bytes_per_s == 2 * 2**20
    assert [node["host"] for node in found.nodes] == ["n1", "n2"]


def test_a_filesystem_that_hangs_is_not_waited_for() -> None:
    held = threading.Event()
    try:
        said = preflight._within(0.05, lambda: "never" if held.wait(60) else None)
    finally:
        held.set()
    assert said == "a filesystem gave no answer within 0.05 s"
    assert preflight._within(60, lambda: None) is None


def test_a_full_disk_is_no_nodes_fault_and_a_missing_one_is(tmp_path: Path) -> None:
    assert preflight._try_write(tmp_path / "x") is None
    assert "No such file" in str(preflight._try_write(tmp_path / "gone" / "x"))
    assert list(tmp_path.iterdir()) == []
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64k", "tmpfs") as disk:
        disk.fill()
        assert preflight._try_write(disk.path / "x") is None
        assert not (disk.path / "x").exists()
        said = preflight._try_local(str(disk.path), "run", None)
        assert said is not None and re.search("No space left|checkpoints need", said)


def test_copies_of_this_run_count_as_room_on_a_nodes_disk(tmp_path: Path) -> None:
    size_bytes = 900 << 10
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        node_local = str(disk.path)
        assert preflight._try_local(node_local, "run", size_bytes) is None
        home = next(disk.path.glob("cfe_hpc-*/run"))
        (home / "shard").write_bytes(bytes(512 << 10))
        assert preflight._try_local(node_local, "run", size_bytes) is None
        assert "checkpoints need 900 KiB" in str(preflight._try_local(node_local, "another", size_bytes))
    assert "NOWHERE is not set" in str(preflight._try_local("$NOWHERE/x", "run", None))


class Miscounts(GlooGroup):
    """A network that alters what it carries, as this rank sees it."""

    wrong = False

    def try_sum(self, size_bytes: int, limit_s: float) -> tuple[bool, float]:
        right, seconds = super().try_sum(size_bytes, limit_s)
        return right and not self.wrong, seconds


def each_case(rank: int, place: Place, group: Miscounts, folders: dict[str, str]) -> dict[str, Any]:
    """What becomes of this rank in each case."""

    def outcome(case: str, place: Place) -> Any:
        folder = RunFolder(Path(folders[case]))
        try:
            found = require(folder, RunSpec.read(folder.run_toml), place)
        except Ended as end:
            return end.code
        except Exception as error:
            return type(error).__name__
        return None if found is None else found.facts()

    broken = replace(place, device_error=GONE)
    said = {"fit": outcome("fit", place), "off": outcome("off", place), "off and broken": outcome("off", broken)}
    said["one device"] = outcome("one device", broken if rank else place)
    local = replace(place, facts=replace(place.facts, scheduler="local"), device_error=GONE if rank else None)
    found = outcome("local", local)
    said["local"] = found["nodes"][1]["host"] if isinstance(found, dict) else found
    said["no device"] = outcome("no device", broken)
    group.wrong = rank == 1
    said["one wrong"] = outcome("one wrong", place)
    group.wrong = True
    said["all wrong"] = outcome("all wrong", place)
    group.wrong = False
    truth = time.time
    preflight.time.time = lambda: truth() + 90 * rank  # type: ignore[attr-defined]
    found = outcome("clock", place)
    said["clock"] = found["nodes"][1]["skew_s"] > 80 if isinstance(found, dict) else found
    preflight.time.time = truth  # type: ignore[attr-defined]
    return said


def rank_main(rank: int, port: int, folders: dict[str, str], answers: Any) -> None:
    meeting = Meeting(address="127.0.0.1", master_port=port, control_port=port)
    group = Miscounts(rank, 2, meeting)
    place = Place(facts=facts(2, rank=rank), meeting=meeting, device=resolve("cpu").device, group=group)
    answers.put((rank, each_case(rank, place, group, folders)))


@pytest.mark.parametrize("asked", [True, False])
def test_a_missing_device_is_told_after_the_ranks_have_met(tmp_path: Path, asked: bool) -> None:
    spec = make_spec(tmp_path, accelerator="hpu", job={"recovery": {"preflight": asked}})
    folder = make_folder(tmp_path, spec)
    environ = {"CFE_RANK": "0", "CFE_LOCAL_RANK": "0", "CFE_WORLD_SIZE": "1", "CFE_LOCAL_WORLD_SIZE": "1"}
    place = bootstrap(read_facts(environ), spec, environ)
    assert environ["MASTER_PORT"] == str(place.meeting.master_port)
    with pytest.raises(ImpossibleError, match="no usable hpu device"):
        require(folder, spec, place)
    assert events(folder, "failed") == []


def test_two_ranks_agree_on_who_is_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("scontrol", "sinfo"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    folders = {}
    for case in ("fit", "off", "local", "one device", "no device", "one wrong", "all wrong", "clock"):
        spec = make_spec(tmp_path, nodes=2, job={"recovery": {"preflight": case != "off"}})
        (tmp_path / case).mkdir()
        folders[case] = make_folder(tmp_path / case, spec)
    paths = {case: str(folder.path) for case, folder in folders.items()}
    said = heard(rank_main, 2, paths)
    fit = said[0].pop("fit")
    assert said[1].pop("fit")["nodes"] == fit["nodes"]
    assert set(fit) == {"seconds", "skew_s", "bandwidth_bytes_per_s", "nodes"}
    assert fit["bandwidth_bytes_per_s"] > 0 and 0 <= fit["skew_s"] < preflight._SKEW_WARN_S
    assert said[0].pop("off and broken") == said[1].pop("off and broken") == "ImpossibleError"
    expected = {"off": None, "one device": 0, "no device": "ImpossibleError", "one wrong": 0, "all wrong": "CfeError"}
    assert said[0] == {**expected, "clock": True, "local": "n2"}
    assert said[1] == {**expected, "clock": True, "local": "ImpossibleError"}
    told = {case: [event["reason"] for event in events(folder, "failed")] for case, folder in folders.items()}
    assert told["one device"] == [f"preflight: n2: {' '.join(str(GONE).split())}"]
    assert told["one wrong"] == ["preflight: n2: a sum over all ranks came out wrong"]
    assert [event["reason"] for event in events(folders["clock"], "degraded")] == ["clock_skew"]
    assert not told["fit"] and not told["no device"] and not told["local"]
    for case in ("one device", "one wrong"):
        assert folders[case].promised("requeued-0") is not None
        assert [event["reason"] for event in events(folders[case], "requeued")] == ["node_unfit"]
        assert [found.node for found in excluded(tmp_path / case, now_s=time.time())] == ["n2"]
    assert all(not list(folder.control.glob(".preflight*")) for folder in folders.values())
    assert os.listdir(tmp_path / "off") == ["job"]
