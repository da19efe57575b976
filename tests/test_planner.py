"""The planner without a Slurm: what it reads of one, how it judges, ranks and asks, and what the verbs say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from cfe_hpc.cli.main import main
from cfe_hpc.cli.planning import table
from cfe_hpc.config.load import Loaded, load
from cfe_hpc.config.run import Plan
from cfe_hpc.errors import ImpossibleError, SchedulerError
from cfe_hpc.launch.plan import plan
from cfe_hpc.launch.planner.asking import Answer, ask
from cfe_hpc.launch.planner.cost import billing_hours, billing_units, cost_of_attempt, demands
from cfe_hpc.launch.planner.facts import Facts, Use
from cfe_hpc.launch.planner.obstacles import obstacles
from cfe_hpc.launch.planner.proposals import QUESTIONS_MAX, proposals
from cfe_hpc.launch.planner.reading import parse_facts, read_facts
from cfe_hpc.launch.planner.survey import Survey, best
from cfe_hpc.units import epoch_s

CAPTURED = Path(__file__).resolve().parent / "captured" / "slurm-22.05.8" / "planner"
NOW_S = 1_800_000_000.0

NODE = {"accelerator": "cuda", "devices_per_node": 4, "cores_per_node": 32, "memory": "256GiB"}
SITE: dict[str, Any] = {
    "name": "s",
    "scheduler": "slurm",
    "default_partition": "gpu",
    "hardware": {
        "gpu": {**NODE, "gres": "gpu:h200:{devices}"},
        "fat": {**NODE, "devices_per_node": 8, "gres": "gpu:h200:{devices}"},
        "cpu": {**NODE, "accelerator": "cpu"},
    },
    "partitions": {
        "cpu": {"hardware": "cpu"},
        "gpu": {"hardware": "gpu", "time_limit": "1d"},
        "fat": {"hardware": "fat", "time_limit": "4h"},
        "spot": {"hardware": "gpu", "preemption": {"mode": "requeue", "grace": "30s"}},
        "test": {"hardware": "gpu", "time_limit": "1h"},
    },
    "debug_partition": "test",
}


@pytest.fixture
def facts() -> Facts:
    """Of a mini Slurm with limits of all kinds, while two jobs ran."""
    return parse_facts({path.stem: path.read_text(encoding="utf-8") for path in CAPTURED.iterdir()})


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Loaded]:
    """Writes and reads a job of these resources for the site, with changed top-level tables."""
    monkeypatch.chdir(tmp_path)

    def loaded(*, site: dict[str, Any] | None = None, **resources: Any) -> Loaded:
        asked = {"nodes": 2, "devices_per_node": 4, "time": "2h", **resources}
        table = {"name": "j", "command": ["true"], "resources": asked}
        Path("job.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
        Path("site.toml").write_text(tomli_w.dumps({**SITE, **(site or {})}), encoding="utf-8")
        return load("job.toml", str(tmp_path / "site.toml"), [], {})

    return loaded


def _planned(loaded: Loaded) -> Plan:
    return plan(loaded.job, loaded.site)


# What is read


def test_limits_are_read_as_slurm_prints_them(facts: Facts) -> None:
    assert (facts.array_max, facts.enforced, facts.part_limits_refuse) == (1001, True, False)
    small = facts.partitions["small"]
    assert (small.nodes, small.nodes_max, small.time_limit_s) == (frozenset({"n1", "n2"}), 1, 3600)
    assert small.weights == {"cpu": 1.0, "mem": 0.25, "gres/gpu": 16.0}
    assert facts.partitions["vip"].accounts_allowed == {"vip"}
    assert facts.partitions["memcap"].memory_max_mib == 2000
    [shape] = facts.partitions["gaudi"].shapes
    assert (shape.nodes, shape.cores, shape.memory_mib, shape.devices["gpu:gaudi3"]) == (1, 8, 8000, 8)
    [reservation] = facts.reservations
    assert (reservation.nodes, reservation.end_s - reservation.start_s) == (frozenset({"n1", "n2"}), 7200)


def test_limits_of_qos_and_accounts_come_with_what_is_used(facts: Facts) -> None:
    peruser = facts.qos["peruser"]
    assert peruser.user_max == {"gres/gpu": Use(limit=2, used=2), "mem": Use(limit=4096, used=1000)}
    assert peruser.group_max == {"gres/gpu": Use(limit=4, used=2)}
    assert (peruser.jobs_max, peruser.submit_max) == (Use(limit=3, used=1), Use(limit=9, used=1))
    assert facts.qos["flagged"].refuses
    assert (facts.qos["short"].wall_s, facts.qos["normal"].wall_s) == (600, math.inf)
    own, account, root = facts.accounts["tiny"]
    assert (own.job_max, account.group_max["node"], root.group_max) == ({"gres/gpu": 3}, Use(limit=1, used=1), {})
    assert (facts.default_account, facts.default_qos) == ("root", {"research": "short"})
    assert "flagged" in facts.allowed_qos["research"]


def test_a_cluster_without_accounting_limits_nothing_by_it(facts: Facts, job: Callable[..., Loaded]) -> None:
    texts = {name: (CAPTURED / f"{name}.txt").read_text() for name in ("config", "partitions", "shapes")}
    texts["config"] = texts["config"].replace("associations,limits,qos", "none")
    open_facts = parse_facts({**texts, "reservations": "No reservations in the system\n"})
    planned = _planned(job(account="anyones", qos="any", cpus_per_device=1))
    assert not open_facts.enforced
    assert obstacles(planned, open_facts, now_s=NOW_S) == []
    assert obstacles(planned, facts, now_s=NOW_S)[0].limit == "account"


def _program(folder: Path, name: str, *lines: str) -> None:
    path = folder / name
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that alone is on PATH, for programs that stand for Slurm's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_a_database_that_is_away_costs_its_facts_alone(fakes: Path) -> None:
    for name in ("scontrol", "sinfo"):
        words = {"config": "config", "partition": "partitions", "reservation": "reservations", "assoc_mgr": "usage"}
        cases = [f'*"show {word}"*) /bin/cat "{CAPTURED}/{stem}.txt";;' for word, stem in words.items()]
        _program(fakes, name, f'case "$0 $*" in {" ".join(cases)} *) /bin/cat "{CAPTURED}/shapes.txt";; esac')
    _program(fakes, "sacctmgr", "echo 'sacctmgr: error: slurm_persist_conn_open: failed' >&2", "exit 1")
    found = read_facts()
    assert (found.qos, found.allowed_qos, found.default_account) == ({}, {}, "root")
    assert found.accounts["tiny"][1].group_max["node"].limit == 1


def test_a_site_that_hides_what_others_use_hides_ones_default_account(facts: Facts, job: Callable[..., Loaded]) -> None:
    hidden = replace(facts, accounts={}, default_account=None)
    limits = [each.limit for each in obstacles(_planned(job(cpus_per_device=1)), hidden, now_s=NOW_S)]
    assert "account" not in limits
    known = replace(facts, default_account=None)
    [first, *_] = obstacles(_planned(job(cpus_per_device=1)), known, now_s=NOW_S)
    assert first.what == "you have no default account"


def test_words_of_another_slurm_are_an_error_that_says_so(fakes: Path) -> None:
    _program(fakes, "scontrol", "echo 'State=UP'")
    _program(fakes, "sinfo", ":")
    with pytest.raises(SchedulerError, match="words that this version does not know"):
        read_facts()


@pytest.mark.parametrize(
    ("lines", "answer"),
    [
        (
            ["echo 'sbatch: Job 5 to start at 2026-11-22T14:51:43 using 8 processors on nodes n[1-2] in partition g'"],
            Answer(start_s=epoch_s("2026-11-22T14:51:43")),
        ),
        (
            ["echo 'sbatch: error: QOSMaxWallDurationPerJobLimit'", "echo 'allocation failure: Job violates policy'"],
            Answer(start_s=None, refusal="QOSMaxWallDurationPerJobLimit; Job violates policy"),
        ),
    ],
)
def test_answers_of_sbatch_are_read(fakes: Path, lines: list[str], answer: Answer) -> None:
    status = "0" if answer.start_s else "1"
    _program(fakes, "sbatch", "/bin/cat >/dev/null", *(f"{line} >&2" for line in lines), f"exit {status}")
    assert ask("#!/bin/sh\n") == answer


def test_a_scheduler_that_is_away_is_no_refusal(fakes: Path) -> None:
    _program(fakes, "sbatch", "echo 'sbatch: error: Unable to contact slurm controller' >&2", "exit 1")
    with pytest.raises(SchedulerError, match="Unable to contact"):
        ask("#!/bin/sh\n")


# What things cost


def test_the_price_of_a_node_counts_before_billing(job: Callable[..., Loaded]) -> None:
    hardware = {**SITE["hardware"], "gpu": {**SITE["hardware"]["gpu"], "cost_per_node_hour": 20.0}}
    cost = {"currency": "EUR", "billing_unit_hour": 0.5}
    weighted = {"hardware": "gpu", "billing_weights": {"cpu": 1.0, "mem": 0.25, "gres/gpu": 16.0}}
    partitions = {**SITE["partitions"], "gpu": weighted, "spot": {**weighted, "cost_per_node_hour": 5.0}}
    site = {"hardware": hardware, "partitions": partitions, "cost": cost, "qos": {"half": {"cost_factor": 0.5}}}
    loaded = job(site=site)
    assert cost_of_attempt(loaded, _planned(loaded)) == 2 * 20.0 * 2
    loaded = job(site=site, partition="spot", qos="half")
    assert cost_of_attempt(loaded, _planned(loaded)) == 2 * 5.0 * 2 / 2
    loaded = job(site={**site, "hardware": SITE["hardware"]}, memory="64GiB")
    # 32 cores, 64 GiB and 4 devices of each of two nodes, two hours.
    assert billing_hours(loaded, _planned(loaded)) == 2 * (32 + 16 + 64) * 2
    assert cost_of_attempt(loaded, _planned(loaded)) == 2 * (32 + 16 + 64) * 2 * 0.5


def test_whole_nodes_are_billed_whole_and_the_dearest_resource_alone_where_it_is_so(
    job: Callable[..., Loaded],
) -> None:
    weighted = {"hardware": "gpu", "exclusive": True, "billing_weights": {"cpu": 1.0, "gres/gpu": 16.0}}
    site = {"partitions": {**SITE["partitions"], "gpu": weighted}, "slurm": {"billing_max": True}}
    loaded = job(site=site, nodes=1, devices_per_node=1, time="1h")
    assert billing_hours(loaded, _planned(loaded)) == 64
    assert billing_units({"cpu": 1.0, "gres/gpu": 16.0}, {"cpu": 8, "gres/gpu": 4}, dearest=False) == 72


def test_without_prices_nothing_is_known_but_what_slurm_bills(job: Callable[..., Loaded]) -> None:
    loaded = job()
    assert cost_of_attempt(loaded, _planned(loaded)) is None
    assert billing_hours(loaded, _planned(loaded)) is None
    assert billing_hours(loaded, _planned(loaded), live_weights={"node": 1.5}) == 6.0
    assert demands(_planned(loaded), memory_mib=None) == {"node": 2, "cpu": 64, "gres/gpu": 8, "gres/gpu:h200": 8}


# What is proposed


def _asked(starts: Mapping[str, float]) -> Callable[[Plan], Answer]:
    """Answers with the seconds from now at which a partition starts a job; others refuse it."""

    def answer(planned: Plan) -> Answer:
        if planned.partition not in starts:
            return Answer(start_s=None, refusal="Requested node configuration is not available")
        return Answer(start_s=NOW_S + starts[planned.partition])

    return answer


def _names(loaded: Loaded, starts: Mapping[str, float]) -> list[str]:
    found = proposals(loaded, facts=None, ask=_asked(starts), now_s=NOW_S)
    return [each.partition for each in found if each.possible and not each.changes]


def test_the_earliest_start_is_best(job: Callable[..., Loaded]) -> None:
    assert _names(job(), {"gpu": 7200, "fat": 3600, "spot": 0}) == ["spot", "fat", "gpu"]


def test_of_starts_alike_the_cheaper_is_best_then_the_one_that_is_not_preempted(job: Callable[..., Loaded]) -> None:
    soon = {"gpu": 0, "fat": 200, "spot": 0}
    assert _names(job(), soon) == ["gpu", "fat", "spot"]
    prices = {"gpu": 20.0, "fat": 30.0, "spot": 4.0}
    partitions = {name: {**SITE["partitions"][name], "cost_per_node_hour": price} for name, price in prices.items()}
    assert _names(job(site={"partitions": {**SITE["partitions"], **partitions}}), soon) == ["spot", "gpu", "fat"]


def test_only_partitions_with_its_kind_of_device_are_asked_and_none_for_debugging(job: Callable[..., Loaded]) -> None:
    asked: list[str] = []

    def answer(planned: Plan) -> Answer:
        asked.append(planned.partition)
        return Answer(start_s=NOW_S)

    proposals(job(time="30m"), facts=None, ask=answer, now_s=NOW_S)
    assert sorted(asked) == ["fat", "gpu", "spot"]
    asked.clear()
    proposals(job(accelerator="cpu", devices_per_node=1), facts=None, ask=answer, now_s=NOW_S)
    assert asked == ["cpu"]


def test_slurm_is_asked_a_bounded_number_of_questions(job: Callable[..., Loaded]) -> None:
    many = {f"p{number:02d}": {"hardware": "gpu"} for number in range(40)}
    asked = 0

    def late(planned: Plan) -> Answer:
        nonlocal asked
        asked += 1
        return Answer(start_s=NOW_S + 86_400)

    loaded = job(site={"partitions": {**many, **SITE["partitions"]}})
    found = proposals(loaded, facts=None, ask=late, now_s=NOW_S)
    assert asked == QUESTIONS_MAX
    assert len(found) > 40


def test_a_shorter_time_is_proposed_where_it_starts_earlier(job: Callable[..., Loaded]) -> None:
    def backfill(planned: Plan) -> Answer:
        assert planned.time_s is not None
        return Answer(start_s=NOW_S + (0 if planned.time_s <= 3600 else 40_000))

    found = proposals(job(time="4h", partition="gpu"), facts=None, ask=backfill, now_s=NOW_S)
    first = found[0]
    assert (first.changes, first.start_s) == ({"time": 3600.0}, NOW_S)
    # It is told, and never taken: best() chooses among partitions alone.
    assert best(Survey(proposals=tuple(found), unasked="", now_s=NOW_S), job()).changes == {}


def test_a_time_that_is_too_long_gets_the_longest_there_is(job: Callable[..., Loaded]) -> None:
    found = proposals(job(time="6h"), facts=None, ask=_asked({"gpu": 0, "spot": 0, "fat": 0}), now_s=NOW_S)
    changed = [each for each in found if each.changes]
    assert [(each.partition, each.changes) for each in changed] == [("fat", {"time": 14_400.0})]
    [too_long] = [each for each in found if not each.possible]
    assert (too_long.partition, too_long.reason(NOW_S)) == ("fat", "PartitionTimeLimit")


def test_another_shape_is_proposed_with_as_many_devices(job: Callable[..., Loaded]) -> None:
    def only_one_node(planned: Plan) -> Answer:
        if planned.nodes == 1:
            return Answer(start_s=NOW_S)
        return Answer(start_s=NOW_S + 40_000)

    found = proposals(job(time="5m"), facts=None, ask=only_one_node, now_s=NOW_S)
    shaped = [(each.partition, dict(each.changes)) for each in found if each.changes]
    assert shaped == [("fat", {"nodes": 1, "devices_per_node": 8})]


def test_a_model_that_does_not_fit_its_devices_is_sent_elsewhere(job: Callable[..., Loaded]) -> None:
    hardware = {
        **SITE["hardware"],
        "gpu": {**SITE["hardware"]["gpu"], "device_memory": "40GB"},
        "fat": {**SITE["hardware"]["fat"], "device_memory": "141GB"},
    }
    loaded = job(site={"hardware": hardware}, model_parameters="6B")
    found = proposals(loaded, facts=None, ask=_asked({"gpu": 0, "fat": 0, "spot": 0}), now_s=NOW_S)
    assert [each.partition for each in found if each.possible] == ["fat"]
    small = next(each for each in found if each.partition == "gpu")
    assert small.obstacles[0].limit == "device memory"


def test_what_slurm_refuses_for_reasons_of_its_own_is_told_in_its_words(job: Callable[..., Loaded]) -> None:
    loaded = job()
    found = proposals(loaded, facts=None, ask=_asked({}), now_s=NOW_S)
    assert {each.reason(NOW_S) for each in found} == {"Requested node configuration is not available"}
    with pytest.raises(ImpossibleError) as raised:
        best(Survey(proposals=tuple(found), unasked="", now_s=NOW_S), loaded)
    assert len(raised.value.problems) == 1  # once, since it is the same everywhere


def test_what_only_ones_own_jobs_hold_up_has_no_start(facts: Facts, job: Callable[..., Loaded]) -> None:
    partitions = {"gpu": {"hardware": "gpu"}}
    loaded = job(site={"partitions": partitions, "debug_partition": "gpu"}, devices_per_node=1, nodes=1, account="tiny")
    [found] = proposals(loaded, facts=facts, ask=_asked({"gpu": 0}), now_s=NOW_S)[:1]
    assert (found.possible, found.start_s, found.reason(NOW_S)) == (True, None, "AssocGrpNodeLimit")


# What the verbs say


@pytest.fixture
def no_slurm(fakes: Path) -> Iterator[None]:
    """A machine without Slurm's commands."""
    yield


def test_check_says_why_slurm_was_not_asked(
    job: Callable[..., Loaded], no_slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    job(model_parameters="1B")
    assert main(["check", "job.toml", "--site", "site.toml", "--ignore", "program-missing"]) == 0
    shown = capsys.readouterr().out
    assert "Slurm was not asked: scontrol: command not found" in shown
    assert "1B parameters, without activations" in shown


def test_check_as_json_has_memory_start_and_proposals(
    job: Callable[..., Loaded], no_slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    job(model_parameters="1B")
    assert main(["check", "job.toml", "--site", "site.toml", "--partition", "auto", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["memory"]["checkpoint_bytes"] == 12_000_000_000
    assert document["start"]["partition"] == document["plan"]["partition"] == "gpu"
    assert "command not found" in document["unasked"]
    assert [each["partition"] for each in document["proposals"]] == ["gpu", "fat", "spot"]


def test_the_table_shows_prices_changes_and_reasons(job: Callable[..., Loaded]) -> None:
    def backfill(planned: Plan) -> Answer:
        late = planned.time_s is None or planned.time_s > 3600
        return Answer(start_s=NOW_S + (40_000 if late else 0))

    priced = {**SITE["partitions"]["gpu"], "cost_per_node_hour": 10.0}
    partitions = {"gpu": priced, "fat": SITE["partitions"]["fat"], "test": SITE["partitions"]["test"]}
    loaded = job(site={"partitions": partitions, "cost": {"currency": "EUR"}}, time="8h", devices_per_node=3)
    found = proposals(loaded, facts=None, ask=backfill, now_s=NOW_S)
    lines = table(Survey(proposals=tuple(found), unasked="", now_s=NOW_S), loaded)
    assert lines[0].split() == ["partition", "nodes", "x", "devices", "time", "cost", "start"]
    assert lines[1] == "gpu        2 x 3            1h    20.00 EUR   now, with --set resources.time=1h"
    assert lines[2].startswith("gpu        2 x 3            8h    160.00 EUR  20")
    assert lines[2].endswith(", in 11h7m (Resources)")
    assert lines[3].endswith(", in 11h7m (Resources), with --set resources.time=4h")
    assert lines[4].split() == ["fat", "never", "(PartitionTimeLimit)"]
    assert lines[5].startswith("    MaxTime: longer than the 4h of partition fat (8h); ask for less")


def test_submit_takes_the_best_by_the_profile_where_there_is_no_slurm_to_ask(
    job: Callable[..., Loaded], no_slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    job(partition="auto", devices_per_node=8)
    assert main(["submit", "job.toml", "--site", "site.toml", "--dry-run", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["partition"] == "fat"
    assert shown.err.startswith("partition fat: start not known (Slurm was not asked: scontrol: command not found")


def test_submit_says_of_each_partition_why_it_cannot(
    job: Callable[..., Loaded], no_slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    job(devices_per_node=16)
    assert main(["submit", "job.toml", "--site", "site.toml", "--partition", "auto"]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # two kinds of hardware
    assert lines[0].startswith("error: job.toml: resources.devices_per_node: would never start in partition gpu")
    assert not Path("runs").exists()


def test_a_partition_of_that_name_is_that_partition(job: Callable[..., Loaded]) -> None:
    site = {"partitions": {**SITE["partitions"], "auto": {"hardware": "fat"}}}
    assert _planned(job(site=site, partition="auto")).partition == "auto"
    assert _planned(job(partition="auto")).partition == "gpu"
