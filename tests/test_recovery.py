"""Attempts and budgets, from events as ranks write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_events import Events, attempt, stamp, write_run

from cfe_hpc.config.job import Recovery
from cfe_hpc.recovery.attempts import Leg, attempts_of, read_attempts
from cfe_hpc.recovery.budgets import FRUITLESS_LIMIT, INTERRUPTED_LIMIT, decide
from cfe_hpc.recovery.causes import CAUSES, Cause
from cfe_hpc.recovery.effects import Adjustments, adjustments, carry_out
from cfe_hpc.recovery.exclusions import excluded
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import epoch_s


def advancing(count: int, reason: str, start: int = 0) -> Events:
    return [
        event
        for index in range(start, start + count)
        for event in attempt(index, resumed=10 * index or None, saved=10 * (index + 1), reason=reason)
    ]


@pytest.mark.parametrize("cause", ["preempted", "time_limit"])
def test_stops_are_free_while_steps_advance(cause: Any) -> None:
    events = advancing(500, cause) + attempt(500, resumed=5000, saved=5001, reason=None)
    decision = decide(Recovery(), events, cause=cause)
    assert decision.action == "requeue"
    assert "number 501, without limit while steps advance" in decision.why


@pytest.mark.parametrize(
    ("cause", "key"), [("preempted", "preemptions"), ("time_limit", "timeouts"), ("node_failure", "node_failures")]
)
def test_a_spent_budget_holds_the_run(cause: Any, key: str) -> None:
    recovery = Recovery.model_validate({key: 2})
    for earlier, action in ((0, "requeue"), (1, "requeue"), (2, "hold")):
        events = advancing(earlier, cause) + attempt(earlier, resumed=10 * earlier, saved=10_000, reason=None)
        decision = decide(recovery, events, cause=cause)
        assert decision.action == action, earlier
    assert decision.why.endswith(f"number 3; the job allows 2 (recovery.{key})")


def test_budgets_are_separate() -> None:
    recovery = Recovery(preemptions=1, timeouts=1, failures=1)
    events = advancing(1, "preempted") + attempt(1, resumed=10, saved=20, reason="time_limit")
    events += attempt(2, resumed=20, saved=30, reason=None, error="RuntimeError: a")
    assert decide(recovery, events, cause="failed").action == "requeue"
    assert decide(recovery, events, cause="preempted").action == "hold"
    assert decide(recovery, events, cause="time_limit").action == "hold"


def test_three_interrupted_start_ups_hold_and_two_do_not() -> None:
    stuck = advancing(2, "preempted")
    for number in (2, 3):
        stuck += attempt(number, resumed=20, saved=20, reason="preempted")
    two = [*stuck[:-1]]
    assert decide(Recovery(), two, cause="preempted").action == "requeue"
    three = stuck + attempt(4, resumed=20, saved=20, reason=None)
    decision = decide(Recovery(), three, cause="time_limit")
    assert decision.action == "hold"
    assert decision.why == "3 attempts in a row ended without a step gained, at step 20 (the last one by time limit)"
    assert (FRUITLESS_LIMIT, INTERRUPTED_LIMIT) == (2, 3)


def test_start_ups_that_never_came_to_a_step_count_as_fruitless() -> None:
    events = attempt(0, resumed=None, saved=None, reason="preempted")
    events += attempt(1, resumed=None, saved=None, reason="preempted")
    events += attempt(2, resumed=None, saved=None, reason=None)
    assert decide(Recovery(), events, cause="preempted").action == "hold"


def test_a_step_gained_in_between_starts_the_count_anew() -> None:
    events = attempt(0, resumed=None, saved=None, reason="preempted")
    events += attempt(1, resumed=None, saved=None, reason="preempted")
    events += attempt(2, resumed=None, saved=3, reason="preempted")
    events += attempt(3, resumed=3, saved=3, reason="preempted")
    events += attempt(4, resumed=3, saved=3, reason=None)
    assert decide(Recovery(), events, cause="preempted").action == "requeue"


def test_attempts_that_their_user_sent_back_do_not_count() -> None:
    events: Events = []
    for number in range(6):
        events += attempt(number, resumed=None, saved=None, reason="requeue_requested")
    events += attempt(6, resumed=None, saved=None, reason=None)
    assert decide(Recovery(preemptions=0), events, cause="requeue_requested").action == "requeue"
    assert decide(Recovery(), events, cause="preempted").action == "requeue"


def test_a_command_that_says_nothing_of_steps_is_not_held_for_want_of_them() -> None:
    events: Events = []
    for number in range(9):
        events += [{"event": "started", "attempt": number, "detail": {"job_id": "7"}}]
        events += [{"event": "requeued", "attempt": number, "reason": "preempted"}]
    events += [{"event": "started", "attempt": 9, "detail": {"job_id": "7"}}]
    assert decide(Recovery(), events, cause="preempted").action == "requeue"


def test_failures_end_the_run_when_their_budget_is_spent() -> None:
    first = attempt(0, resumed=None, saved=5, reason=None, error="ValueError: bad batch")
    decision = decide(Recovery(), first, cause="failed")
    assert decision.action == "fail"
    assert decision.why == "failure number 1; the job allows 0 (recovery.failures): ValueError: bad batch"
    assert decide(Recovery(failures=1), first, cause="failed").action == "requeue"


def test_the_same_first_error_twice_holds_within_the_budget() -> None:
    events = attempt(0, resumed=None, saved=5, reason="failed", error="RuntimeError: at 0x7f00aa")
    events += attempt(1, resumed=5, saved=9, reason=None, error="RuntimeError: at 0x7fbb11")
    decision = decide(Recovery(failures=5), events, cause="failed")
    assert decision.action == "hold"
    assert decision.why == "the same first error twice: RuntimeError: at 0x7fbb11"
    events[-1]["reason"] = "OSError: disk full"
    assert decide(Recovery(failures=5), events, cause="failed").action == "requeue"


def test_the_first_of_several_ranks_errors_is_the_one_compared() -> None:
    events = attempt(0, resumed=None, saved=5, reason=None, error="ValueError: the cause")
    events += [{"event": "failed", "attempt": 0, "reason": "RuntimeError: connection closed by peer"}]
    events += [{"event": "requeued", "attempt": 0, "reason": "failed"}]
    events += attempt(1, resumed=5, saved=9, reason=None, error="KeyError: another cause")
    events += [{"event": "failed", "attempt": 1, "reason": "RuntimeError: connection closed by peer"}]
    assert decide(Recovery(failures=5), events, cause="failed").action == "requeue"


def test_leaving_a_hold_gives_fresh_budgets() -> None:
    events = [*advancing(3, "preempted"), {"event": "held", "attempt": 3, "reason": "spent"}]
    events += attempt(4, resumed=30, saved=40, reason=None)
    assert decide(Recovery(preemptions=1), events, cause="preempted").action == "requeue"


def test_cancelled_is_never_requeued() -> None:
    assert decide(Recovery(), advancing(1, "preempted"), cause="cancelled").action == "fail"


def test_attempts_that_end_without_a_word() -> None:
    events = attempt(0, resumed=None, saved=5, reason=None) + attempt(1, resumed=5, saved=6, reason=None)
    events += [{"event": "signal", "attempt": 1, "reason": "SIGTERM", "step": 6}]
    events += attempt(2, resumed=6, saved=7, reason=None)
    assert [one.ended_by for one in read_attempts(events)] == ["node_failure", "preempted", None]
    assert decide(Recovery(node_failures=1), events, cause="node_failure").action == "hold"


def failing(
    number: int, cause: Cause, *, resumed: int | None = None, saved: int | None = None, **fields: Any
) -> Events:
    """An attempt that failed of a cause and was requeued for it; the last word is that it was."""
    failed = {"event": "failed", "attempt": number, "cause": cause, "reason": f"{cause} {number}", **fields}
    return [
        *attempt(number, resumed=resumed, saved=saved, reason=None),
        failed,
        {"event": "requeued", "attempt": number, "reason": cause},
    ]


@pytest.mark.parametrize("row", [row for row in CAUSES if row.budget is not None], ids=lambda row: row.cause)
def test_every_cause_with_a_budget_is_followed_by_as_many_attempts(row: Any) -> None:
    recovery = Recovery.model_validate({row.budget: 2})
    events: Events = []
    for number in range(3):
        saved = 10 * number + 10
        events += failing(number, row.cause, resumed=10 * number or None, saved=saved)
        decision = decide(recovery, events[:-1], cause=row.cause)
        assert decision.action == ("requeue" if number < 2 else row.spent), decision.why
    assert f"{row.word} number 3; the job allows 2 (recovery.{row.budget})" in decision.why


def test_causes_that_share_a_budget_are_counted_together() -> None:
    events = failing(0, "data", saved=10) + failing(1, "failed", resumed=10, saved=20)[:-1]
    assert decide(Recovery(failures=2), events, cause="failed").action == "requeue"
    assert decide(Recovery(failures=1), events, cause="failed").action == "fail"


def test_an_error_of_configuration_is_never_tried_again() -> None:
    events = failing(0, "configuration", saved=10)[:-1]
    decision = decide(Recovery(failures=9), events, cause="configuration")
    assert (decision.action, decision.why) == (
        "fail",
        "configuration error, which no other attempt mends: configuration 0",
    )


def test_two_attempts_of_their_own_without_a_step_hold() -> None:
    events = failing(0, "hang", saved=10) + failing(1, "hang", resumed=10)
    assert decide(Recovery(hangs=9), events[:-1], cause="hang").action == "requeue"
    events += failing(2, "communication", resumed=10)[:-1]
    decision = decide(Recovery(hangs=9), events, cause="communication")
    assert decision.action == "hold"
    assert decision.why == (
        "2 attempts in a row ended without a step gained, at step 10 (the last one by communication error): "
        "communication 2"
    )


def test_an_interrupted_start_up_and_one_failure_are_not_yet_a_pattern() -> None:
    events = attempt(0, resumed=None, saved=None, reason="preempted") + failing(1, "hang")
    assert decide(Recovery(), events[:-1], cause="hang").action == "requeue"
    # It had done steps, and could not save them.
    late = [*attempt(0, resumed=None, saved=None, reason="preempted")]
    late.insert(-1, {"event": "signal", "attempt": 0, "step": 7})
    assert decide(Recovery(), late + failing(1, "hang")[:-1], cause="hang").action == "hold"


def test_a_halved_micro_batch_is_a_change_worth_another_attempt() -> None:
    events: Events = []
    for number in range(4):
        events += failing(number, "oom_device")
        decision = decide(Recovery(), events[:-1], cause="oom_device")
        assert decision.action == "requeue", decision.why
        (effect,) = decision.effects
        events.append({"event": "degraded", "attempt": number, "reason": effect.reason, "detail": dict(effect.detail)})
        assert adjustments(events).micro_batch_divisor == 2 ** (number + 1)
    events += failing(4, "oom_device")
    decision = decide(Recovery(), events[:-1], cause="oom_device")
    assert (decision.action, decision.effects) == ("hold", ())
    assert decide(Recovery(), events + attempt(5, resumed=None, saved=None, reason=None), cause="preempted").action == (
        "requeue"
    )


def rolled_back(number: int, step: int, **detail: Any) -> dict[str, Any]:
    return {"event": "rolled_back", "attempt": number, "step": step, "reason": "nan", "detail": detail}


def test_each_roll_back_is_paid_for_once() -> None:
    events = attempt(0, resumed=None, saved=10, reason=None)
    for count in range(1, 4):
        decision = decide(Recovery(), events, cause="nan")
        assert (decision.action, decision.why) == ("requeue", f"value that is not finite number {count}, of 3 allowed")
        events.append(rolled_back(0, 10))
    assert decide(Recovery(), events, cause="nan").action == "hold"


def test_a_roll_back_to_the_very_start_is_paid_for_once() -> None:
    """Without a checkpoint the attempt rolls back, which is counted, and then ends."""
    events = [*attempt(0, resumed=None, saved=None, reason=None), rolled_back(0, 0)]
    events.append({"event": "failed", "attempt": 0, "cause": "nan", "reason": "NonFinite: loss is nan"})
    assert decide(Recovery(nans=1), events, cause="nan").action == "requeue"
    events.append({"event": "requeued", "attempt": 0, "reason": "nan"})
    events += attempt(1, resumed=None, saved=None, reason=None)
    assert decide(Recovery(nans=1), events, cause="nan").action == "hold"
    # A script that raises by itself has rolled nothing back.
    assert decide(Recovery(nans=1), failing(0, "nan")[:-1], cause="nan").action == "requeue"
    assert decide(Recovery(nans=1), failing(0, "nan") + failing(1, "nan")[:-1], cause="nan").action == "hold"


def test_what_roll_backs_and_halvings_ask_for() -> None:
    events: Events = [
        rolled_back(0, 4, samples=[8, 16], lr_scale=0.5),
        {"event": "held", "attempt": 0},
        {"event": "degraded", "reason": "micro_batch_halved", "detail": {"divisor": 2}},
        {"event": "degraded", "reason": "fewer_nodes", "detail": {"divisor": 7}},
        rolled_back(1, 4, samples=[24, 32], lr_scale=0.25),
        rolled_back(1, 4, samples=None),
    ]
    assert adjustments(events) == Adjustments(micro_batch_divisor=2, lr_scale=0.25, skipped=((8, 16), (24, 32)))
    assert adjustments([]) == Adjustments()


def test_nodes_that_failed_are_avoided_for_a_while(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "job" / "run")
    folder.path.mkdir(parents=True)
    events = failing(0, "node_failure", saved=10, host="n3") + failing(1, "node_unfit", resumed=10, saved=20, host="n4")
    assert decide(Recovery(exclude_nodes_for=0.0), events[:-1], cause="node_unfit").effects == ()
    decision = decide(Recovery(node_failures=1, exclude_nodes_for=60.0), events[:-1], cause="node_unfit")
    assert decision.action == "hold"
    carry_out(folder, decision.effects, attempt=1)
    (event,) = folder.events()
    until_s = epoch_s(event["detail"]["until"])
    assert (event["reason"], event["detail"]["node"]) == ("node_excluded", "n4")
    assert until_s is not None
    (exclusion,) = excluded(tmp_path / "runs", now_s=until_s - 1)
    assert (exclusion.node, exclusion.cause, exclusion.why) == ("n4", "node_unfit", "node_unfit 1")


def test_a_restart_inside_the_allocation_is_a_failure_of_its_own() -> None:
    events = attempt(0, resumed=None, saved=10, reason=None, error="RuntimeError: a")
    events.append({"event": "started", "attempt": 0, "detail": {"restart": 1, "job_id": "7", "hosts": ["n1", "n2"]}})
    events += [{"event": "resumed", "attempt": 0, "step": 10}, {"event": "checkpoint_saved", "attempt": 0, "step": 20}]
    events.append({"event": "failed", "attempt": 0, "reason": "RuntimeError: a", "rank": 0})
    first, second = read_attempts(events)
    assert (first.number, first.restart, first.ended_by, first.saved_step) == (0, 0, "failed", 10)
    assert (second.number, second.restart, second.resumed_from, second.hosts) == (0, 1, 10, ("n1", "n2"))
    decision = decide(Recovery(failures=5), events, cause="failed")
    assert (decision.action, decision.why) == ("hold", "the same first error twice: RuntimeError: a")


def test_a_roll_back_begins_a_leg_and_takes_what_was_saved_after_it(tmp_path: Path) -> None:
    events = [
        {"event": "started", "attempt": 0, "time": stamp(10), "detail": {"startup_seconds": 4.0, "allocated_s": 5.5}},
        {"event": "resumed", "attempt": 0, "step": 5, "time": stamp(11)},
        {"event": "checkpoint_saved", "attempt": 0, "step": 20, "time": stamp(20)},
        {**rolled_back(0, 10), "time": stamp(30)},
    ]
    folder = write_run(tmp_path, events, [])
    folder.promise("ended-0", status=0)
    (only,) = attempts_of(folder)
    assert only.legs == [Leg(step=5, began_s=epoch_s(stamp(11))), Leg(step=10, began_s=epoch_s(stamp(30)))]
    assert (only.saved_step, only.undone, only.allocated_s) == (10, 1, 5.5)
    assert only.started_s == epoch_s(stamp(6))
    assert only.ended_s is not None and only.ended_s > only.started_s


def test_what_an_exit_status_stands_for_is_compared_once_somebody_has_looked() -> None:
    def ended(number: int, told: str) -> Events:
        events = failing(number, "failed", resumed=10 * number or None, saved=10 * number + 10)
        said = {"event": "failed", "attempt": number, "rank": 0, "reason": "exit status 1"}
        echo = {"event": "failed", "attempt": number, "cause": "communication", "reason": "Connection closed"}
        looked = {"event": "failed", "attempt": number, "rank": 0, "cause": "failed", "reason": told}
        return [*events[:-2], said, echo, looked, events[-1]]

    twice = ended(0, "exit status 1: KeyError: 1") + ended(1, "exit status 1: KeyError: 2")
    assert decide(Recovery(failures=5), twice[:-1], cause="failed").action == "requeue"
    twice = ended(0, "exit status 1: KeyError: 1") + ended(1, "exit status 1: KeyError: 1")
    assert decide(Recovery(failures=5), twice[:-1], cause="failed").action == "hold"
    assert [each.cause for each in read_attempts(twice)] == ["failed", "failed"]


def test_an_end_that_the_next_attempt_looked_into_is_no_guess() -> None:
    events = attempt(0, resumed=None, saved=5, reason=None, error="RuntimeError: Connection closed by peer")
    events.append({"event": "signal", "attempt": 0, "reason": "SIGTERM"})
    events.append({"event": "failed", "attempt": 0, "host": "n3", "cause": "node_failure", "reason": "node n3 failed"})
    first, _ = read_attempts(events + attempt(1, resumed=5, saved=6, reason=None))
    assert (first.ended_by, first.cause, first.bad_hosts) == ("node_failure", "node_failure", ("n3",))


WORDS = st.sampled_from(["started", "failed", "requeued", "held", "x"])
KEYS = st.sampled_from(["event", "attempt", "step", "time", "detail", "reason"])


@given(st.lists(st.dictionaries(KEYS, st.none() | st.integers(-3, 9) | WORDS)))
def test_no_event_whatever_breaks_the_reader(events: Events) -> None:
    assert decide(Recovery(), events, cause="preempted").action in ("requeue", "hold")


def test_kills_from_outside_are_no_error_of_the_jobs_own() -> None:
    def killed(number: int) -> Events:
        events = attempt(number, resumed=10 * number or None, saved=10 * number + 10, reason="failed")
        said = {"event": "failed", "attempt": number, "reason": "rank 0 was killed by SIGKILL", "detail": "killed"}
        return [*events[:-1], said, events[-1]]

    decision = decide(Recovery(failures=5), killed(0) + killed(1)[:-1], cause="failed")
    assert decision.action == "requeue", decision.why


def test_errors_of_ranks_whose_node_died_spend_no_failure() -> None:
    lost = attempt(0, resumed=None, saved=10, reason=None, error="RuntimeError: Connection closed by peer")
    crashed = attempt(1, resumed=10, saved=20, reason=None, error="RuntimeError: Connection closed by peer")
    assert [each.ended_by for each in read_attempts(lost + crashed)] == ["node_failure", "communication"]
    decision = decide(Recovery(failures=1), lost + crashed, cause="failed")
    assert "failure number 1" in decision.why
