"""What a live Slurm says, read, written as a profile, and compared with one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster import Cluster
from spine.harness import cfe
from spine.stage import Stage, assert_counted, reasons

from cfe_hpc.cli.main import main
from cfe_hpc.config.load import load_site
from cfe_hpc.config.site import Preemption, Site
from cfe_hpc.errors import SchedulerError
from cfe_hpc.files import tomllib
from cfe_hpc.sites.compare import differences, unstated
from cfe_hpc.sites.detect import profile_text
from cfe_hpc.sites.live import Kind, LiveCluster, parse_cluster, read_cluster

CAPTURED = Path(__file__).resolve().parent / "captured" / "slurm-22.05.8"
SAID = {name: (CAPTURED / f"{name}.txt").read_text() for name in ("config", "partition", "node", "reservation", "qos")}

BY_QOS = """\
normal||cluster|00:00:00||||||1.000000
high|normal,scavenger|cluster|00:00:00|2-00:00:00|node=2|gres/gpu=8,node=4|3|5|2.000000
scavenger||requeue|00:02:00|08:00:00|||||0.500000
a|b|low|suspend|00:00:00||||||1.000000
"""


def live(**changes: Any) -> LiveCluster:
    """The captured cluster, with words of its answers replaced: name=(old, new) or a new text."""
    said = dict(SAID)
    for name, change in changes.items():
        if isinstance(change, tuple):
            assert change[0] in said[name]
            said[name] = said[name].replace(*change)
        else:
            said[name] = change
    return parse_cluster(said["config"], said["partition"], said["node"], said["reservation"], said["qos"])


def config(key: str, old: str, new: str) -> LiveCluster:
    return live(config=(f"{key:<23} = {old}\n", f"{key:<23} = {new}\n"))


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[[LiveCluster], Site]:
    """The profile of a cluster, as `load_site` reads it from a file."""

    def load(cluster: LiveCluster) -> Site:
        path = tmp_path / "detected.toml"
        path.write_text(profile_text(cluster), encoding="utf-8")
        return load_site(str(path), {})[0]

    return load


def partition_of(cluster: LiveCluster, name: str) -> Any:
    return next(partition for partition in cluster.partitions if partition.name == name)


def test_what_slurm_22_05_says_is_read() -> None:
    cluster = live()
    assert (cluster.name, cluster.version, cluster.proctrack) == ("minislurm", "22.05.8", "linuxproc")
    assert (cluster.preempt_type, cluster.mode, cluster.user_signal) == ("partition_prio", "requeue", False)
    assert (cluster.kill_wait_s, cluster.over_time_limit_s, cluster.array_max) == (5.0, 0.0, 1001)
    assert (cluster.job_requeue, cluster.max_batch_requeue, cluster.signal_children) == (True, None, None)
    spot = partition_of(cluster, "spot")
    assert (spot.mode, spot.grace_s, spot.time_limit_s, spot.default_time_s) == ("requeue", 10.0, 86_400.0, 1800.0)
    assert spot.kinds == ((Kind(gres="gpu:h200", devices=4, cores=8, memory_mib=8000), 2),)
    assert (spot.nodes_max, spot.default, spot.open) == (2, False, True)
    assert partition_of(cluster, "gpu").default


def test_later_versions_say_more() -> None:
    cluster = live(
        config=(
            "\nSlurmctld(primary)",
            "PreemptParameters       = min_exempt_priority=5,send_user_signal\nMaxBatchRequeue         = 3\n\n"
            "Cgroup Support Configuration:\nSignalChildrenProcesses = yes\nClusterName = other\n\nSlurmctld(primary)",
        )
    )
    assert (cluster.user_signal, cluster.max_batch_requeue, cluster.signal_children) == (True, 3, True)
    assert cluster.name == "minislurm"


def test_the_user_signal_of_22_05_is_a_parameter_of_slurmctld() -> None:
    cluster = config("SlurmctldParameters", "(null)", "idle_on_node_suspend,preempt_send_user_signal")
    assert cluster.preemption(partition_of(cluster, "spot")) == Preemption(mode="requeue", grace=10, user_signal=True)


@pytest.mark.parametrize(
    ("shown", "mode"),
    [("GANG,SUSPEND", "suspend"), ("SUSPEND", "suspend"), ("CANCEL", "cancel"), ("GANG", "off"), ("OFF", "off")],
)
def test_modes_may_be_lists(shown: str, mode: str) -> None:
    cluster = live(partition=("PreemptMode=REQUEUE", f"PreemptMode={shown}"))
    assert cluster.preemption(partition_of(cluster, "spot")).mode == mode


def test_without_preemption_no_partition_preempts() -> None:
    cluster = config("PreemptType", "preempt/partition_prio", "preempt/none")
    assert cluster.preemption(partition_of(cluster, "spot")) == Preemption()


@pytest.mark.parametrize(("shown", "seconds"), [("10 min", 600.0), ("UNLIMITED", None)])
def test_over_time_limit_is_in_minutes(shown: str, seconds: float | None) -> None:
    assert config("OverTimeLimit", "0 min", shown).over_time_limit_s == seconds


def by_qos(qos: str = BY_QOS) -> LiveCluster:
    return live(config=("preempt/partition_prio", "preempt/qos"), qos=qos)


def test_where_qos_decide_only_those_that_another_may_preempt_are_preempted(
    loaded: Callable[[LiveCluster], Site],
) -> None:
    cluster = by_qos()
    site = loaded(cluster)
    assert site.qos["scavenger"].preemption == Preemption(mode="requeue", grace=120.0)
    assert site.qos["scavenger"].time_limit == 28_800.0
    assert site.qos["high"].preemption == Preemption()
    # "cluster" is the cluster's own mode; the partition's says nothing.
    assert site.partitions["spot-cancel"].preemption == Preemption(mode="requeue", grace=0.0)
    assert site.qos["a|b"].preemption == Preemption()
    assert differences(site, cluster) == []


def test_a_qos_that_sacctmgr_hides_is_asked_of_people() -> None:
    said = {**SAID, "config": SAID["config"].replace("preempt/partition_prio", "preempt/qos")}
    cluster = parse_cluster(said["config"], said["partition"], said["node"], said["reservation"], None)
    text = profile_text(cluster)
    assert 'preemption = {mode = "requeue", grace = "0s"}  # ? its QOS decides' in text


def test_the_profile_of_a_cluster_does_not_differ_from_it(loaded: Callable[[LiveCluster], Site]) -> None:
    cluster = live()
    site = loaded(cluster)
    assert (differences(site, cluster), unstated(site, cluster)) == ([], {})
    assert site.default_partition == "gpu"
    assert site.partitions["spot-cancel"].preemption == Preemption(mode="cancel", grace=10.0)
    assert {name: table.accelerator for name, table in site.hardware.items()} == {"h200": "cuda", "gaudi3": "hpu"}


def test_names_that_toml_must_quote_and_remarks_that_look_like_keys(loaded: Callable[[LiveCluster], Site]) -> None:
    cluster = live(
        partition=("PartitionName=spot ", "PartitionName=größe.1#x "),
        node=("Partitions=gpu,spot,", "Reason=bad NodeName=x CPUTot=0 [root@1] Partitions=gpu,größe.1#x,"),
    )
    site = loaded(cluster)
    assert site.partitions["größe.1#x"].preemption.mode == "requeue"
    assert site.hardware["h200"].cores_per_node == 8
    assert differences(site, cluster) == []


def test_kinds_of_node_in_one_partition(loaded: Callable[[LiveCluster], Site]) -> None:
    first, *others = SAID["node"].splitlines()
    odd = first.replace("NodeName=g1", "NodeName=g3").replace("gpu:gaudi3:8", "gpu:gaudi3:4(S:0-1),shard:8")
    plain = first.replace("NodeName=g1", "NodeName=g4").replace("Gres=gpu:gaudi3:8", "Gres=(null)")
    cluster = live(node="\n".join([first, *others, odd, plain.replace("=gaudi ", "=cpu ")]))
    kinds = partition_of(cluster, "gaudi").kinds
    assert [(kind.devices, count) for kind, count in kinds] == [(8, 2), (4, 1)]
    assert "# of 2 nodes; 1 others differ" in profile_text(cluster)
    assert loaded(cluster).hardware["gaudi3"].devices_per_node == 8


def test_partitions_where_no_job_starts_are_left_out() -> None:
    cluster = live(partition=("PreemptMode=CANCEL State=UP", "PreemptMode=CANCEL State=INACTIVE"))
    text = profile_text(cluster)
    assert '# left out, for want of nodes or because no user\'s job starts there: ["spot-cancel"]' in text
    assert "[partitions.spot-cancel]" not in text


def test_a_cluster_without_a_partition_is_refused() -> None:
    with pytest.raises(SchedulerError, match="no partition"):
        profile_text(live(partition=("State=UP", "State=DOWN")))


SPOT = 'mode = "requeue", grace = "10s"'


@pytest.mark.parametrize(
    ("old", "new", "key", "profile", "there"),
    [
        (SPOT, 'mode = "requeue", grace = "1m"', "partitions.spot.preemption.grace", '"1m"', '"10s"'),
        (SPOT, 'mode = "cancel", grace = "10s"', "partitions.spot.preemption.mode", '"cancel"', '"requeue"'),
        (SPOT, f"{SPOT}, user_signal = true", "partitions.spot.preemption.user_signal", "true", "false"),
        ('kill_wait = "5s"', 'kill_wait = "30s"', "slurm.kill_wait", '"30s"', '"5s"'),
        ('version = "22.05.8"', 'version = "24.05.1"', "slurm.version", '"24.05.1"', '"22.05.8"'),
        ("array_max = 1001", "array_max = 5001", "slurm.array_max", "5001", "1001"),
        ("[partitions.gaudi]", "[partitions.gaudi2]", "partitions.gaudi2", '"gaudi2"', None),
        ('"gpu:gaudi3:', '"gpu:hl:', "hardware.gaudi3.gres", '"gpu:hl:{devices}"', '"gpu:gaudi3:{devices}"'),
        ("[slurm]", "[qos.fast]\n[slurm]", "qos.fast", '"fast"', None),
    ],
)
def test_what_differs_is_named_with_both_values(
    tmp_path: Path, old: str, new: str, key: str, profile: str, there: str | None
) -> None:
    text = profile_text(live())
    assert old in text
    path = tmp_path / "site.toml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    (difference,) = differences(load_site(str(path), {})[0], live())
    assert (difference.key, difference.profile, difference.cluster) == (key, profile, there)


LIMITED = {
    "DefaultTime=00:30:00 DisableRootJobs=NO ExclusiveUser=NO GraceTime=10": (
        "DefaultTime=00:30:00 DisableRootJobs=NO ExclusiveUser=NO GraceTime=10 TRESBillingWeights=CPU=1.0,Mem=0.25G,"
        "GRES/gpu=16"
    ),
    "AllowAccounts=ALL": "AllowAccounts=proj1,proj2",
    "AllowQos=ALL": "AllowQos=normal",
    "MinNodes=0": "MinNodes=2",
    "OverSubscribe=NO": "OverSubscribe=EXCLUSIVE",
    "DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED": "DefMemPerNode=1000 MaxMemPerNode=4000",
    "ReqResv=NO": "ReqResv=YES",
}


def limited(**changes: Any) -> LiveCluster:
    """The captured cluster, with every limit on the partition spot."""
    gpu, spot, *others = SAID["partition"].splitlines()
    for old, new in LIMITED.items():
        assert old in spot
        spot = spot.replace(old, new)
    return live(partition="\n".join([gpu, spot, *others]), **changes)


def test_limits_of_a_partition_and_access_to_it(loaded: Callable[[LiveCluster], Site]) -> None:
    cluster = limited(node=("AvailableFeatures=(null)", "AvailableFeatures=big,rack1"))
    site = loaded(cluster)
    spot, plain = site.partitions["spot"], site.partitions["gpu"]
    assert (spot.nodes_min, spot.exclusive) == (2, True)
    assert (spot.memory_default, spot.memory_per_core_default, spot.memory_max) == (1000 * 2**20, None, 4000 * 2**20)
    assert (spot.allowed_accounts, spot.allowed_qos) == (["proj1", "proj2"], ["normal"])
    assert spot.billing_weights == {"cpu": 1.0, "mem": 0.25, "gres/gpu": 16.0}
    assert (plain.nodes_min, plain.exclusive, plain.memory_max, plain.billing_weights) == (None, False, None, {})
    assert plain.memory_per_core_default == 500 * 2**20  # the cluster's
    assert site.slurm.billing_max is False
    assert site.hardware["h200"].features == ["big", "rack1"]
    assert "only jobs of a reservation start here" in profile_text(cluster)
    assert (differences(site, cluster), unstated(site, cluster)) == ([], {})


@pytest.mark.parametrize(
    ("shown", "weights"),
    [
        ("CPU=1.0,Mem=0.25G", {"cpu": 1.0, "mem": 0.25}),
        ("Mem=0.001", {"mem": 1.024}),  # for each MiB
        ("mem=2T,GRES/gpu:a100=8.5", {"mem": 2 / 1024, "gres/gpu:a100": 8.5}),
        ("CPU=1e-2,Node=10,license/x=3", {"cpu": 0.01, "node": 10.0, "license/x": 3.0}),
    ],
)
def test_weights_of_memory_are_for_each_gib(shown: str, weights: dict[str, float]) -> None:
    cluster = live(partition=("PartitionName=spot ", f"PartitionName=spot TRESBillingWeights={shown} "))
    assert partition_of(cluster, "spot").billing_weights == weights


def test_the_dearest_resource_alone_is_billed_where_max_tres_is_set() -> None:
    flags = config(
        "PriorityType", "priority/basic", "priority/multifactor\nPriorityFlags           = FAIR_TREE,MAX_TRES"
    )
    assert flags.billing_max is None  # nothing is weighted
    weighted = limited(config=("priority/basic", "priority/multifactor\nPriorityFlags           = FAIR_TREE,MAX_TRES"))
    assert weighted.billing_max is True


def test_whole_nodes_are_given_where_nothing_smaller_can_be_selected() -> None:
    assert partition_of(config("SelectType", "select/cons_tres", "select/linear"), "gpu").exclusive


def test_limits_of_a_qos(loaded: Callable[[LiveCluster], Site]) -> None:
    cluster = live(qos=BY_QOS)
    high = loaded(cluster).qos["high"]
    assert (high.nodes_min, high.nodes_max, high.devices_max) == (2, 4, 8)
    assert (high.jobs_max, high.submit_max, high.cost_factor, high.time_limit) == (3, 5, 2.0, 172_800.0)
    assert differences(loaded(cluster), cluster) == []
    for key, value in {"nodes_min": 1, "nodes_max": 5, "devices_max": 9, "jobs_max": 4, "submit_max": 6}.items():
        table = tomllib.loads(profile_text(cluster))
        table["qos"]["high"][key] = value
        found = differences(Site.model_validate(table), cluster)
        assert [(each.key, each.profile) for each in found] == [(f"qos.high.{key}", str(value))]


@pytest.mark.parametrize(
    ("key", "value", "there"),
    [
        ("partitions.spot.nodes_min", 1, "2"),
        ("partitions.spot.exclusive", False, "true"),
        ("partitions.gpu.exclusive", True, "false"),
        ("partitions.spot.memory_default", "2000MiB", '"1000 MiB"'),
        ("partitions.gpu.memory_default", "2000MiB", None),
        ("partitions.spot.memory_max", "8000MiB", '"3.91 GiB"'),
        ("partitions.spot.allowed_accounts", ["proj1"], '["proj1", "proj2"]'),
        ("partitions.gpu.allowed_qos", ["high"], "[]"),
        ("partitions.spot.billing_weights", {"cpu": 1.0}, '{cpu = 1.0, mem = 0.25, "gres/gpu" = 16.0}'),
        ("partitions.spot.reservation", "week", None),
        ("partitions.spot.qos", "high", None),
        ("partitions.spot.constraint", "big&[rack1|rack9]*2", None),
        ("hardware.h200.features", ["rack9", "big"], None),
        ("slurm.billing_max", True, "false"),
    ],
)
def test_what_is_stated_of_limits_and_access_is_compared(key: str, value: Any, there: str | None) -> None:
    cluster = limited(node=("AvailableFeatures=(null)", "AvailableFeatures=big,rack1"))
    table: dict[str, Any] = tomllib.loads(profile_text(cluster))
    *outer, name = key.split(".")
    inner = table
    for each in outer:
        inner = inner[each]
    inner[name] = value
    (found,) = differences(Site.model_validate(table), cluster)
    assert (found.key, found.cluster) == (key, there)


def test_a_reservation_that_is_there_or_hidden_is_no_difference() -> None:
    table: dict[str, Any] = tomllib.loads(profile_text(live()))
    table["partitions"]["spot"] |= {"reservation": "week", "qos": "normal"}
    site = Site.model_validate(table)
    shown = "ReservationName=week StartTime=2026-11-22T15:30:00 Nodes=n1 Flags=SPEC_NODES\n"
    assert live(reservation=shown).reservations == ("week",)
    assert differences(site, live(reservation=shown)) == []
    assert differences(site, config("PrivateData", "none", "jobs,reservations")) == []
    assert [found.key for found in differences(site, live())] == ["partitions.spot.reservation"]


def test_less_memory_than_the_most_and_other_orders_are_no_difference() -> None:
    cluster = limited()
    table: dict[str, Any] = tomllib.loads(profile_text(cluster))
    table["partitions"]["spot"] |= {"memory_max": "3000MiB", "allowed_accounts": ["proj2", "proj1"]}
    assert differences(Site.model_validate(table), cluster) == []


@pytest.mark.parametrize(("gres", "found"), [("gpu:{devices}", []), ("gp:{devices}", ["hardware.h200.gres"])])
def test_devices_may_be_asked_for_without_their_type(gres: str, found: list[str]) -> None:
    table: dict[str, Any] = tomllib.loads(profile_text(live()))
    table["hardware"]["h200"]["gres"] = gres
    assert [each.key for each in differences(Site.model_validate(table), live())] == found


def test_devices_that_are_asked_for_in_other_words_are_counted() -> None:
    table: dict[str, Any] = tomllib.loads(profile_text(live()))
    table["hardware"]["h200"] |= {"request": ["--gpus-per-node={devices}"], "devices_per_node": 5}
    del table["hardware"]["h200"]["gres"]
    (found,) = differences(Site.model_validate(table), live())
    assert (found.key, found.cluster) == ("hardware.h200.devices_per_node", "4")


def test_a_partition_that_jobs_do_not_name_is_not_compared() -> None:
    table: dict[str, Any] = tomllib.loads(profile_text(live()))
    table["partitions"]["any"] = {"hardware": "h200", "queue": "", "time_limit": "9d"}
    assert differences(Site.model_validate(table), live()) == []


def test_a_partition_for_tests_is_guessed_by_its_name() -> None:
    assert "# debug_partition =" in profile_text(live())
    named = {"partition": ("PartitionName=spot ", "PartitionName=gpu-devel "), "node": ("gpu,spot,", "gpu,gpu-devel,")}
    text = profile_text(live(**named))
    assert 'debug_partition = "gpu-devel"  # ? by its name' in text


@pytest.mark.parametrize(
    ("key", "less", "more", "shown"),
    [
        ("partitions.gpu.time_limit", "12h", "2d", '"2d"'),
        ("partitions.gpu.nodes_max", 1, 3, "3"),
        ("hardware.h200.devices_per_node", 3, 5, "5"),
        ("hardware.h200.cores_per_node", 4, 9, "9"),
        ("hardware.h200.memory", "1GiB", "8GiB", '"8 GiB"'),
    ],
)
def test_limits_differ_only_where_the_profile_allows_more(key: str, less: Any, more: Any, shown: str) -> None:
    def found(value: Any) -> list[tuple[str, str]]:
        table: dict[str, Any] = tomllib.loads(profile_text(live()))
        outer, inner, name = key.split(".")
        table[outer][inner][name] = value
        table["partitions"]["gpu"].pop("default_time")
        return [(each.key, each.profile) for each in differences(Site.model_validate(table), live())]

    assert found(less) == []
    assert found(more) == [(key, shown)]


def test_keys_of_slurm_that_a_profile_leaves_out_are_named(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(profile_text(live()).replace('version = "22.05.8"', ""), encoding="utf-8")
    site, _ = load_site(str(path), {})
    assert differences(site, live()) == []
    assert unstated(site, live()) == {"slurm.version": '"22.05.8"'}


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH with programs that answer as the captured cluster; sacctmgr refuses."""
    for name, text in SAID.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    programs = {
        "scontrol": f'cat "{tmp_path}/$2"',
        "sacctmgr": "echo 'sacctmgr: error: Access/permission denied' >&2; exit 1",
    }
    for name, line in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "bin"


def test_accounting_that_refuses_is_said_so(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "detect", "--name", "mine", "--output", "mine.toml"]) == 0
    assert "nothing is said of QOS" in (said := capsys.readouterr()).err
    assert "mine.toml" in said.out
    assert main(["sites", "check", "mine.toml"]) == 0
    printed = capsys.readouterr().out
    assert "nothing differs from cluster minislurm, Slurm 22.05.8" in printed
    assert "write verified = true and tested_on into it" in printed
    mine = Path("mine.toml")
    mine.write_text(mine.read_text().replace("verified = false", "verified = true"))
    assert main(["sites", "check", "mine.toml"]) == 0
    assert "verified" not in capsys.readouterr().out
    assert main(["sites", "detect", "--output", "mine.toml"]) == 2
    assert "mine.toml: File exists; name another" in capsys.readouterr().err


def test_a_cluster_in_unknown_words_is_told_in_one_line(pretended: Path) -> None:
    (pretended / "scontrol").write_text("#!/bin/sh\necho surprise\n")
    with pytest.raises(SchedulerError, match="words that this version does not know"):
        read_cluster()


def test_check_names_differences_and_exits_with_1(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "detect", "--output", "mine.toml"]) == 0
    mine = Path("mine.toml")
    mine.write_text(
        mine.read_text().replace('kill_wait = "5s"', 'kill_wait = "1m"').replace("job_requeue = true", "# left out")
    )
    capsys.readouterr()
    assert main(["sites", "check", "mine.toml"]) == 1
    printed = capsys.readouterr().out
    assert 'slurm.kill_wait: the profile says "1m", it is "5s"\n' in printed
    assert "slurm.job_requeue: not in the profile; it is true\n" in printed
    assert main(["sites", "check", "mine.toml", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [found["key"] for found in document["differences"]] == ["slurm.kill_wait"]
    assert document["unstated"] == {"slurm.job_requeue": "true"}


def test_without_slurm_the_exit_code_is_3_and_without_a_scheduler_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["sites", "check", "minislurm"]) == 3
    assert main(["sites", "check", "local"]) == 2
    assert "has no scheduler to ask" in capsys.readouterr().err


@pytest.mark.slurm
def test_a_real_cluster_agrees_with_what_was_detected_and_with_the_shipped_profile(
    cluster: Cluster, tmp_path: Path
) -> None:
    done = cfe("sites", "detect", "--output", "found.toml", cwd=tmp_path, env=cluster.env)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("found.toml", "minislurm"):
        done = cfe("sites", "check", name, "--json", cwd=tmp_path, env=cluster.env)
        document = json.loads(done.stdout)
        assert (done.returncode, document["differences"], document["unstated"]) == (0, [], {}), done.stdout
        assert document["qos_refusal"] is None


@pytest.mark.slow  # not `slurm`: CI takes a skip of those for a failure
@pytest.mark.skipif(not os.environ.get("CFE_TEST_FULL"), reason="a cluster of its own: CFE_TEST_FULL=1")
def test_a_run_survives_where_qos_decide_and_jobs_are_not_requeued_unless_they_ask(tmp_path: Path) -> None:
    conf = ("PreemptType=preempt/qos", "JobRequeue=0", "AccountingStorageEnforce=associations,qos")
    cluster = Cluster.start("--nodes", "2", "--gaudi-nodes", "0", *(word for line in conf for word in ("--conf", line)))
    try:
        sacctmgr = ("sacctmgr", "-i")
        cluster.run(*sacctmgr, "add", "qos", "scavenger", "set", "preemptmode=requeue", "gracetime=20")
        cluster.run(*sacctmgr, "add", "qos", "high", "set", "preempt=scavenger,normal")
        cluster.run(*sacctmgr, "modify", "user", "root", "set", "qos+=scavenger,high")
        _survives(Stage(cluster, tmp_path / "grace"), grace_s=20.0, reason="preempted")
        cluster.run(*sacctmgr, "modify", "qos", "scavenger", "set", "gracetime=0")
        # The job is back in the queue while its processes still have KillWait.
        _survives(Stage(cluster, tmp_path / "none"), grace_s=0.0, reason="requeued_already")
    finally:
        cluster.stop()


def _survives(stage: Stage, *, grace_s: float, reason: str) -> None:
    """A run with the profile that `detect` writes loses no step to a preemption by its QOS."""
    cluster, found = stage.cluster, stage.folder / "found.toml"
    stage.cfe("sites", "detect", "--output", "found.toml")
    found.write_text(found.read_text().replace('"cuda"', '"cpu"').replace('"~/cfe_runs"', '"runs"'))
    stage.cfe("sites", "check", "found.toml")
    site, _ = load_site(str(found), {})
    assert site.qos["scavenger"].preemption == Preemption(mode="requeue", grace=grace_s)
    assert site.slurm.job_requeue is False
    resources = {"devices_per_node": 1, "cpus_per_device": 8, "partition": "gpu", "qos": "scavenger"}
    run = stage.submit("gpu", site=str(found), resources=resources)
    run.wait_step(4, attempt=0)
    node = cluster.job(run.job_id)["NodeList"]
    wanted = ("-p", "gpu", "--qos=high", "-w", node, "--exclusive", "--mem=0", "-o", "/dev/null")
    preemptor = cluster.sbatch(*wanted, "--wrap", "sleep 600")
    cluster.wait_for_restart(run.job_id, 1)
    cluster.scancel(preemptor)
    cluster.wait_for_end(preemptor)
    cluster.resume(run.job_id)
    assert_counted(run, attempts=2)
    assert reasons(run) == [reason]
