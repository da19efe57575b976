"""Each verdict of the planner on a real Slurm: predicted first, then tried, and compared with what squeue says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from slurm.cluster import Cluster
from spine.harness import cfe

from cfe_hpc.config.load import Loaded, load
from cfe_hpc.errors import SchedulerError
from cfe_hpc.launch.plan import plan
from cfe_hpc.launch.planner import survey
from cfe_hpc.launch.planner.obstacles import obstacles
from cfe_hpc.launch.planner.proposals import Proposal, judged
from cfe_hpc.launch.planner.reading import read_facts
from cfe_hpc.launch.provenance import WorkTree
from cfe_hpc.launch.submission import preview, submit
from cfe_hpc.units import epoch_s

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(300)]

NO_SUCH_NODE = "Requested node configuration is not available"

PARTITIONS = {
    "small": "MaxTime=60 MaxNodes=1 State=UP",
    "down": "State=DOWN",
    "drain": "State=DRAIN",
    "vip": "AllowAccounts=vip State=UP",
    "vipq": "AllowQos=short State=UP",
    "memcap": "MaxMemPerNode=2000 State=UP",
    "narrow": "QoS=one-node State=UP",
}
"""Made beside those of the cluster, all on nodes n1 and n2."""

QOS = {
    "short": "MaxWall=10",
    "one-node": "MaxTRESPerJob=node=1",
    "flagged": "MaxWall=10 Flags=DenyOnLimit",
    "two-gpus": "MaxTRESPerUser=gres/gpu=2",
    "group": "GrpTRES=gres/gpu=4",
    "many": "MinTRESPerJob=gres/gpu=2",
    "not-mine": "",
}
ACCOUNTS = {"one-node": "GrpTRES=node=1", "hasty": "MaxWall=5", "gpus": "MaxTRESPerJob=gres/gpu=1", "single": ""}

# The profile allows everything, so that what is found is found in the live cluster.
HARDWARE = {"accelerator": "cpu", "devices_per_node": 8, "cores_per_node": 64, "memory": "64GiB"}
SITE: dict[str, Any] = {
    "name": "tried",
    "scheduler": "slurm",
    "default_partition": "gpu",
    "slurm": {"signal_lead": "20s"},
    "hardware": {
        "h200": {**HARDWARE, "gres": "gpu:h200:{devices}"},
        "gaudi3": {**HARDWARE, "gres": "gpu:gaudi3:{devices}"},
        "a100": {**HARDWARE, "gres": "gpu:a100:{devices}"},
    },
    "partitions": {
        **{name: {"hardware": "h200"} for name in ("gpu", "spot", *PARTITIONS)},
        "gaudi": {"hardware": "gaudi3"},
        "other-gres": {"hardware": "a100", "queue": "gpu"},
        "gone": {"hardware": "h200", "queue": "gone"},
        "kept": {"hardware": "h200", "queue": "gpu", "options": ["--reservation=no-such"]},
    },
}


@dataclass(frozen=True)
class Row:
    """A job, and what is to become of it: which limit, and what squeue or (refused) sbatch says."""

    resources: dict[str, Any]
    limit: str
    reason: str
    refused: bool = False
    launch: dict[str, Any] = field(default_factory=dict)


NEVER = {
    "nodes": Row({"nodes": 5}, "MaxNodes", "PartitionNodeLimit"),
    "nodes-small": Row({"partition": "small", "nodes": 2}, "MaxNodes", "PartitionNodeLimit"),
    "nodes-elastic": Row({"nodes": 6}, "MaxNodes", "PartitionNodeLimit", launch={"nodes_min": 5}),
    "time": Row({"time": "2d"}, "MaxTime", "PartitionTimeLimit"),
    "time-small": Row({"partition": "small", "time": "2h"}, "MaxTime", "PartitionTimeLimit"),
    "partition-down": Row({"partition": "down"}, "partition", "PartitionDown"),
    "partition-drain": Row({"partition": "drain"}, "partition", "Required partition not available", True),
    "partition-gone": Row({"partition": "gone"}, "partition", "Invalid partition name specified", True),
    "account-there": Row({"partition": "vip"}, "account", "Job's account not permitted to use this partition"),
    "account-unknown": Row({"account": "nobodys"}, "account", "Invalid account", True),
    "qos-there": Row({"partition": "vipq"}, "QOS", "Job's QOS not permitted to use this partition"),
    "qos-unknown": Row({"qos": "no-such"}, "QOS", "Invalid qos specification", True),
    "qos-of-others": Row({"qos": "not-mine"}, "QOS", "Invalid qos specification", True),
    "qos-time": Row({"qos": "short", "time": "20m"}, "QOS", "QOSMaxWallDurationPerJobLimit"),
    "qos-time-denied": Row({"qos": "flagged", "time": "20m"}, "QOS", "QOSMaxWallDurationPerJobLimit", True),
    "qos-nodes": Row({"qos": "one-node", "nodes": 2}, "QOS", "QOSMaxNodePerJobLimit"),
    "qos-of-partition": Row({"partition": "narrow", "nodes": 2}, "QOS", "QOSMaxNodePerJobLimit"),
    "qos-user": Row({"qos": "two-gpus", "devices_per_node": 3}, "QOS", "QOSMaxGRESPerUser"),
    "qos-group": Row({"qos": "group", "nodes": 2, "devices_per_node": 4}, "QOS", "QOSGrpGRES"),
    "qos-least": Row({"qos": "many"}, "QOS", "QOSMinGRES"),
    "account-nodes": Row({"account": "one-node", "nodes": 2}, "account", "AssocGrpNodeLimit"),
    "account-time": Row({"account": "hasty"}, "account", "AssocMaxWallDurationPerJobLimit"),
    "account-gpus": Row({"account": "gpus", "devices_per_node": 2}, "account", "AssocMaxGRESPerJob"),
    "memory-partition": Row({"partition": "memcap", "memory": "4000MiB"}, "memory per node", "MaxMemPerLimit"),
    "memory": Row({"memory": "9000MiB"}, "memory per node", NO_SUCH_NODE, True),
    "devices": Row({"devices_per_node": 5}, "GRES", NO_SUCH_NODE, True),
    "devices-other": Row({"partition": "other-gres"}, "GRES", NO_SUCH_NODE, True),
    "cores": Row({"cpus_per_device": 9}, "cores", NO_SUCH_NODE, True),
    "features": Row({"constraint": "infiniband"}, "features", "Invalid feature specification", True),
    "reservation": Row({"partition": "kept"}, "reservation", "Requested reservation is invalid", True),
}
"""Jobs that never start, or are refused."""

NOW: dict[str, dict[str, Any]] = {
    "plain": {"nodes": 1},
    "all-nodes": {"nodes": 4},
    "all-devices": {"nodes": 2, "devices_per_node": 4},
    "gaudi": {"partition": "gaudi", "devices_per_node": 8},
    "small": {"partition": "small", "time": "1h"},
    "qos": {"qos": "short", "time": "10m"},
    "auto": {"partition": "auto"},
}
"""Jobs that start at once."""


@dataclass(frozen=True)
class Place:
    """A folder to submit from, on a cluster of its own."""

    cluster: Cluster
    folder: Path

    def job(self, resources: dict[str, Any], launch: dict[str, Any] | None = None) -> Loaded:
        """A job that ends as soon as it has started."""
        asked = {"partition": "gpu", "nodes": 1, "devices_per_node": 1, "cpus_per_device": 1, "time": "10m"}
        table = {
            "name": "tried",
            "command": ["true"],
            "resources": {**asked, **resources},
            "launch": launch or {},
        }
        path = self.folder / "job.toml"
        path.write_text(tomli_w.dumps(table), encoding="utf-8")
        return load(str(path), str(self.folder / "site.toml"), [], {})

    def predict(self, loaded: Loaded) -> tuple[Loaded, Proposal, str]:
        """(the job with its partition, what the planner says of it, in which words of squeue)."""
        work_tree = WorkTree(self.folder)
        if survey.chooses(loaded):
            loaded, _ = survey.settle(loaded, work_tree)
        found = survey.outlook(loaded, plan(loaded.job, loaded.site), work_tree)
        assert found.unasked == ""
        return loaded, found.own, found.own.reason(found.now_s)

    def send(self, loaded: Loaded) -> str:
        """Submit; the job's id."""
        return submit(loaded, plan(loaded.job, loaded.site), WorkTree(self.folder)).job_id

    def reason(self, job_id: str) -> str:
        """Why squeue says that the job pends; "None" of one that runs."""
        return self.cluster.squeue("-j", job_id, "-o", "%r").strip()

    def settles(self, said: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Wait for Slurm's scheduler to have looked at everything; what is said then is the test's to judge."""
        deadline = time.monotonic() + timeout_s
        while not said() and time.monotonic() < deadline:
            time.sleep(0.2)

    def starts(self, loaded: Loaded) -> None:
        """Send what the job asks for, with nothing to do; fails unless it starts at once, in the partition it names."""
        _, _, script = preview(loaded, plan(loaded.job, loaded.site), WorkTree(self.folder))
        kept = [line for line in script.splitlines() if line.startswith("#") and "--error" not in line]
        path = self.folder / "nothing.sh"
        path.write_text("\n".join([*kept, "#SBATCH --output=/dev/null", "true", ""]), encoding="utf-8")
        job_id = self.cluster.sbatch(str(path))
        self.cluster.wait_for_state(job_id, "RUNNING", "COMPLETED", timeout_s=30)
        assert self.cluster.job(job_id)["Partition"] == loaded.job.resources.partition
        self.cluster.wait_for_end(job_id)

    @contextlib.contextmanager
    def pending(self, loaded: Loaded) -> Iterator[str]:
        """A job that never gets to start; its id."""
        job_id = self.send(loaded)
        try:
            yield job_id
        finally:
            self.cluster.scancel(job_id)

    @contextlib.contextmanager
    def holding(self, *options: str) -> Iterator[str]:
        """Someone else's job, which runs; its id."""
        job_id = self.cluster.sbatch("-o", "/dev/null", *options, "--wrap", "exec sleep 300")
        try:
            self.cluster.wait_for_state(job_id, "RUNNING", timeout_s=30)
            yield job_id
        finally:
            self.cluster.scancel(job_id)
            self.cluster.wait_for_end(job_id)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The cluster: four nodes with four devices, one with eight, limits of accounts and QOS enforced."""
    options = ("--nodes", "4", "--gaudi-nodes", "1", "--conf", "AccountingStorageEnforce=associations,limits,qos")
    cluster = Cluster.start(*options)
    folder = tmp_path_factory.mktemp("planner")
    try:
        for name, options_of in QOS.items():
            cluster.run("sacctmgr", "-i", "add", "qos", name, *options_of.split())
        for name, limits in ACCOUNTS.items():
            cluster.run("sacctmgr", "-i", "add", "account", name, *limits.split())
        cluster.run("sacctmgr", "-i", "add", "user", "root", f"account={','.join(ACCOUNTS)}")
        mine = ",".join(name for name in QOS if name != "not-mine")
        cluster.run("sacctmgr", "-i", "modify", "user", "root", "set", f"qos+={mine}")
        for name, options_of in PARTITIONS.items():
            cluster.scontrol("create", f"PartitionName={name}", "Nodes=n1,n2", *options_of.split())
        (folder / "site.toml").write_text(tomli_w.dumps(SITE), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for name, value in cluster.env.items():
                patch.setitem(os.environ, name, value)
            yield Place(cluster, folder)
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def tried(place: Place) -> dict[str, tuple[Proposal, str, str]]:
    """(verdict, reason predicted, what Slurm said) of each job that never starts. They are all sent before any is
    looked at: none of them is in the way of another."""
    verdicts, said, jobs = dict[str, Proposal](), dict[str, str](), dict[str, str]()
    facts, now_s = read_facts(), time.time()
    for name, row in NEVER.items():
        loaded = place.job(row.resources, row.launch)
        ask, partition = survey.question_of(loaded, WorkTree(place.folder)), loaded.job.resources.partition
        assert partition is not None
        verdicts[name] = judged(loaded, partition, facts=facts, ask=ask, now_s=now_s)
        try:
            jobs[name] = place.send(loaded)
        except SchedulerError as error:
            said[name] = str(error)

    def looked_at() -> bool:
        lines = place.cluster.squeue("-o", "%A|%r").splitlines()
        reasons = dict(line.split("|", 1) for line in lines)
        said.update({name: reasons[job_id] for name, job_id in jobs.items()})
        return all(said[name].startswith(NEVER[name].reason) for name in jobs)

    place.settles(looked_at)
    place.cluster.tidy(set())
    return {name: (verdict, verdict.reason(now_s), said[name]) for name, verdict in verdicts.items()}


@pytest.mark.parametrize("name", NEVER)
def test_what_never_starts_is_told_by_its_limit(tried: dict[str, tuple[Proposal, str, str]], name: str) -> None:
    row, (verdict, predicted, said) = NEVER[name], tried[name]
    assert row.reason in said, (predicted, said)
    assert (verdict.obstacles[0].limit, verdict.obstacles[0].refused) == (row.limit, row.refused)
    assert predicted.startswith(row.reason)
    assert verdict.possible == (name == "partition-down")  # the site may open it again
    assert verdict.obstacles[0].remedy
    assert said.startswith("sbatch: refused") == row.refused


@pytest.mark.parametrize("name", NOW)
def test_what_starts_now_starts_now(place: Place, name: str) -> None:
    loaded, verdict, predicted = place.predict(place.job(NOW[name]))
    assert (verdict.possible, verdict.obstacles, predicted) == (True, (), "None")
    assert verdict.start_s is not None and verdict.start_s < time.time() + 60
    place.starts(loaded)


def test_what_waits_for_nodes_says_until_when_and_where_it_need_not(place: Place) -> None:
    with place.holding("-p", "gpu", "-N4", "--exclusive", "-t", "15") as first:
        ends_s = epoch_s(place.cluster.job(first)["EndTime"])
        loaded, verdict, predicted = place.predict(place.job({}))
        assert (verdict.possible, predicted, verdict.start_s) == (True, "Resources", ends_s)
        with place.pending(loaded) as job_id:
            place.settles(lambda: epoch_s(place.cluster.job(job_id)["StartTime"]) is not None)
            assert place.reason(job_id) == "Resources"
            assert epoch_s(place.cluster.job(job_id)["StartTime"]) == verdict.start_s
        # The best partition is another one then, and Slurm agrees.
        chosen, verdict, predicted = place.predict(place.job({"partition": "auto"}))
        assert (chosen.job.resources.partition, predicted) == ("gaudi", "None")
        words = ("submit", "job.toml", "--site", str(place.folder / "site.toml"), "--partition", "auto", "--json")
        done = cfe(*words, cwd=place.folder, env=place.cluster.env)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("partition gaudi: start now; next best is gpu: start ")
        job_id = json.loads(done.stdout)["job_id"]
        place.cluster.wait_for_state(job_id, "RUNNING", "COMPLETED", timeout_s=30)
        assert place.cluster.job(job_id)["Partition"] == "gaudi"
        place.cluster.wait_for_end(job_id)


def test_a_maintenance_is_waited_for_and_a_shorter_job_is_not(place: Place) -> None:
    about = ("Flags=MAINT,IGNORE_JOBS", "Nodes=n1,n2", "Users=root", "StartTime=now+40minutes", "Duration=60")
    place.cluster.scontrol("create", "reservation", "ReservationName=maint", *about)
    try:
        loaded, verdict, predicted = place.predict(place.job({"nodes": 4, "time": "2h"}))
        [obstacle] = verdict.obstacles
        assert (obstacle.limit, obstacle.for_ever, predicted) == ("reservation", False, "ReqNodeNotAvail")
        assert verdict.start_s == obstacle.until_s
        with place.pending(loaded) as job_id:
            place.settles(lambda: place.reason(job_id).startswith("ReqNodeNotAvail"))
            assert place.reason(job_id).startswith("ReqNodeNotAvail")
        found = survey.survey_all(place.job({"nodes": 4, "time": "2h", "partition": "gpu"}), WorkTree(place.folder))
        shorter = next(each for each in found.proposals if each.partition == "gpu" and each.changes)
        assert shorter.changes == {"time": 2100.0} and shorter.reason(found.now_s) == "None"
        loaded, _, predicted = place.predict(place.job({"nodes": 4, "time": "30m"}))
        assert predicted == "None"
        place.starts(loaded)
    finally:
        place.cluster.scontrol("delete", "ReservationName=maint")


def test_nodes_that_are_away_are_waited_for(place: Place) -> None:
    place.cluster.scontrol("update", "NodeName=n1,n2", "State=DRAIN", "Reason=tried")
    try:
        loaded, verdict, predicted = place.predict(place.job({"nodes": 4}))
        assert (verdict.obstacles[0].limit, verdict.possible, verdict.start_s) == ("nodes", True, None)
        with place.pending(loaded) as job_id:
            place.settles(lambda: place.reason(job_id) == predicted)
            assert place.reason(job_id) == predicted
    finally:
        place.cluster.scontrol("update", "NodeName=n1,n2", "State=RESUME")


def test_what_one_has_in_use_counts(place: Place) -> None:
    place.cluster.run(
        "sacctmgr",
        "-i",
        "modify",
        "user",
        "where",
        "name=root",
        "account=single",
        "set",
        "MaxJobs=1",
        "MaxSubmitJobs=2",
    )
    with place.holding("--account=single", "-t", "10"):
        loaded, verdict, predicted = place.predict(place.job({"account": "single"}))
        assert (predicted, verdict.possible, verdict.start_s) == ("AssocMaxJobsLimit", True, None)
        with place.pending(loaded) as second:
            place.settles(lambda: place.reason(second) == predicted)
            assert place.reason(second) == predicted
            loaded, verdict, predicted = place.predict(loaded)
            assert verdict.obstacles[0].refused and predicted.startswith("Job violates accounting/QOS policy")
            with pytest.raises(SchedulerError, match="Job violates accounting/QOS policy"):
                place.send(loaded)


def test_an_array_beyond_its_greatest_index_is_refused(place: Place) -> None:
    loaded = place.job({})
    planned = plan(loaded.job, loaded.site)
    facts = read_facts()
    assert obstacles(planned, facts, now_s=time.time(), tasks=1001) == []
    [obstacle] = obstacles(planned, facts, now_s=time.time(), tasks=1002)
    assert obstacle.limit == "MaxArraySize"
    with pytest.raises(AssertionError, match=obstacle.reason):
        place.cluster.sbatch("--array=0-1001", "--wrap", "true")


def test_a_site_that_refuses_what_exceeds_its_partitions_is_taken_at_its_word(place: Place) -> None:
    conf = place.cluster.root / "etc" / "slurm.conf"
    conf.write_text(f"{conf.read_text(encoding='utf-8')}EnforcePartLimits=ALL\n", encoding="utf-8")
    place.cluster.scontrol("reconfigure")
    for name in ("vip", "vipq", "memcap"):  # it forgets partitions that are not in the file
        place.cluster.scontrol("create", f"PartitionName={name}", "Nodes=n1,n2", *PARTITIONS[name].split())
    for name in ("nodes", "time", "account-there", "qos-there", "memory-partition"):
        loaded, verdict, predicted = place.predict(place.job(NEVER[name].resources))
        assert (verdict.obstacles[0].limit, verdict.obstacles[0].refused) == (NEVER[name].limit, True)
        with pytest.raises(SchedulerError, match=re.escape(predicted)):
            place.send(loaded)
