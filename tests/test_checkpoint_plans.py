"""What is worked out for one save serves the next as long as it holds, and not a moment longer."""

from __future__ import annotations

import copy
import gc
import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_groups import ThreadGroup, all_good, run_ranks
from test_checkpoint_async import saving, wait_for
from test_checkpoint_tracked import Sampler, Training, bits

from cfe_hpc.checkpoints.beside.hand import Hand
from cfe_hpc.checkpoints.protocols import Piece, SoloGroup
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.state.capturing import Capturing, capture
from cfe_hpc.checkpoints.store import Content, newest
from cfe_hpc.checkpoints.tracked import restore
from cfe_hpc.errors import CheckpointError


def told(content: Content) -> Any:
    """All that a content says, bytes included, but for random numbers' state: looking at it changes none."""

    def pieces(every: Sequence[Piece]) -> list[Any]:
        return [(each.name, each.dtype, each.shape, each.start, each.steady, bytes(each.data)) for each in every]

    return pieces(content.pieces), pieces(content.own), content.state, content.layout


def weight(training: Training) -> torch.nn.Parameter:
    return training.model[0].weight


def moments(training: Training) -> dict[str, Any]:
    return training.optimizer.state[weight(training)]


def replace_memory(training: Training) -> None:
    weight(training).data = weight(training).data * 2


def replace_parameter(training: Training) -> None:
    training.model[0].weight = torch.nn.Parameter(weight(training).detach())


def reshape(training: Training) -> None:
    weight(training).data = weight(training).data.view(8, 33)


def transpose(training: Training) -> None:
    moments(training)["exp_avg"] = torch.rand(8, 33).t()


def see_otherwise(training: Training) -> None:
    norm = training.model[1]
    norm.running_mean = norm.running_mean.view(torch.int32)


def add_state(training: Training) -> None:
    moments(training)["max_exp_avg_sq"] = torch.ones(33, 8)


def drop_state(training: Training) -> None:
    del moments(training)["exp_avg_sq"]


def swap_states(training: Training) -> None:
    found = moments(training)
    found["exp_avg"], found["exp_avg_sq"] = found["exp_avg_sq"], found["exp_avg"]


def add_group(training: Training) -> None:
    training.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})


def add_group_of_tracked(training: Training) -> None:
    """Then what was a plain parameter changes in the optimizer's step only."""
    training.optimizer.add_param_group({"params": [training.model[1].weight]})


def load(training: Training) -> None:
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))


def tie(training: Training) -> None:
    training.sampler.weights = training.model[1].running_var


def rename(training: Training) -> None:
    training.model.register_module("last", training.model._modules.pop("3"))


CHANGES: list[Callable[[Training], None]] = [
    replace_memory,
    replace_parameter,
    reshape,
    transpose,
    see_otherwise,
    add_state,
    drop_state,
    swap_states,
    add_group,
    add_group_of_tracked,
    load,
    tie,
    rename,
]


def test_the_plan_holds_while_training_goes_on() -> None:
    training = Training()
    kept = Capturing(training.objects(), group=SoloGroup())
    training.step()
    forms = []
    for _ in range(3):
        content = kept.take()
        assert told(content) == told(capture(training.objects(), group=SoloGroup()))
        forms.append(content.form)
        training.step()
        training.optimizer.param_groups[0]["lr"] *= 0.5
        training.sampler.weights = torch.rand(3)  # an object may make its tensors anew
    assert forms[0] is forms[1] is forms[2]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_plan_is_dropped_when_something_changes(change: Callable[[Training], None]) -> None:
    training = Training()
    training.step()
    kept = Capturing(training.objects(), group=SoloGroup())
    before = kept.take()
    assert kept.take().form is before.form
    change(training)
    after = kept.take()
    if change is not replace_parameter:  # the same memory, under the same name: only what is no tensor tells
        assert after.form is not before.form
    assert told(after) == told(capture(training.objects(), group=SoloGroup()))
    assert kept.take().form is after.form


def test_the_plan_is_dropped_when_another_object_is_tracked_or_one_gives_other_tensors() -> None:
    objects: dict[str, Any] = {"sampler": Sampler(0)}
    kept = Capturing(objects, group=SoloGroup())
    forms = [kept.take().form]
    objects["more"] = Sampler(1)
    forms.append(kept.take().form)
    objects["more"].weights = torch.ones(4)
    forms.append(kept.take().form)
    objects["more"].weights = torch.ones(4, requires_grad=True)
    forms.append(kept.take().form)
    objects["more"] = objects["sampler"]
    forms.append(kept.take().form)
    assert len({id(form) for form in forms}) == len(forms)
    assert told(kept.take()) == told(capture(objects, group=SoloGroup()))


def test_a_content_keeps_its_memory() -> None:
    training = Training()
    training.step()
    kept = Capturing(training.objects(), group=SoloGroup())
    kept.take()
    content = kept.take()
    before = told(content)
    weight(training).data = torch.zeros(33, 8)
    training.optimizer.state.clear()
    gc.collect()
    others = [torch.rand(33, 8) for _ in range(50)]  # these may be put where the old ones were
    assert told(content) == before
    del others


def stepped(rank: int) -> Training:
    """Alike on every rank, but for what is its own; not to be made by two threads at once."""
    random.seed(0)
    np.random.seed(0)
    training = Training(rank)
    training.step()
    return training


def test_ranks_drop_their_plans_together() -> None:
    trainings = [stepped(rank) for rank in range(2)]

    def work(group: ThreadGroup) -> list[bool]:
        training = trainings[group.rank]
        kept = Capturing(training.objects(), group=group)

        def goes_on(content: Content) -> bool:
            found = kept.take()
            group.barrier()
            assert told(found) == told(capture(training.objects(), group=group))
            return found.form is content.form

        before = kept.take()
        found = [goes_on(before)]
        if group.rank == 1:
            add_state(training)
        found.append(goes_on(before))
        between = kept.take()
        found.append(goes_on(between))
        with torch.no_grad():
            weight(training)[0, 0] = group.rank  # alike before
        found.append(goes_on(between))
        return found

    assert all_good(run_ranks(2, work)) == [[True, False, True, False]] * 2


def test_a_state_that_cannot_be_had_fails_on_all_ranks_and_leaves_nothing_behind() -> None:
    class Failing(Sampler):
        broken = False

        def state_dict(self) -> dict:
            if self.broken:
                raise RuntimeError("no state today")
            return super().state_dict()

    def work(group: ThreadGroup) -> list[str]:
        sampler = Failing(group.rank)
        kept = Capturing({"sampler": sampler}, group=group)
        found = []
        for broken in (False, True, False):
            sampler.broken = broken and group.rank == 1
            try:
                found.append(str(told(kept.take())[2]["sampler"]["kind"]))
            except CheckpointError as error:
                found.append(str(error))
        return found

    assert all_good(run_ranks(2, work)) == [["object", "rank 1: RuntimeError: no state today", "object"]] * 2


class Counting:
    """A group that counts the rounds in which its ranks wait for each other."""

    def __init__(self, group: ThreadGroup) -> None:
        self.rank, self.size, self._group, self.rounds = group.rank, group.size, group, 0

    def __getattr__(self, name: str) -> Any:
        self.rounds += 1
        return getattr(self._group, name)


def test_a_save_like_the_last_one_takes_one_round_and_is_of_its_own_step(tmp_path: Path) -> None:
    def work(plain: ThreadGroup) -> tuple[list[int], list[bytes]]:
        group, training, rounds = Counting(plain), Training(plain.rank, width=300), []
        kept = Capturing({"model": training.model, "optimizer": training.optimizer}, group=group)
        with saving(tmp_path, group, overlap=True) as saves:
            saves.start()
            training.optimizer.step(lambda: sum(each.sum() for each in training.model.parameters()).backward())
            saves.reserve(kept.take())
            for step in (1, 2, 3):
                group.rounds = 0
                saves.begin(kept.take(saves.is_ready), step=step)
                rounds.append(group.rounds)
                saved = bits(training.model)
                saves.settle()
                with torch.no_grad():
                    for each in training.model.parameters():
                        each.add_(step)
                assert saves.finish() is not None
            assert saves.writer_pid is not None
            os.kill(saves.writer_pid, signal.SIGKILL)
            form = kept.take().form
            wait_for(lambda: not saves.is_ready(form), "the writer is missed")
            saves.begin(kept.take(saves.is_ready), step=4)
            assert saves.finish() is not None
        other = Training(seed=1, width=300)
        restore(
            Opened.at(tmp_path / "step-000000003"),
            {"model": other.model, "optimizer": other.optimizer},
            group=plain,
        )
        assert bits(other.model) == saved
        return rounds, saved

    (rounds, _), (others, _) = all_good(run_ranks(2, work))
    assert rounds == others == [1, 1, 1]
    opened = newest(tmp_path, run_id="run-1", attempt=1, group=SoloGroup())
    assert opened is not None and opened.step == 4
    tokens = {Opened.at(path).manifest.identity.token for path in tmp_path.glob("step-*")}
    assert len(tokens) == 3


def test_what_raises_in_a_hand_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    hand, made = Hand("test"), list[int]()
    assert hand.do(lambda: made.append(1 // 0)).wait(30)
    wait_for(lambda: raised, "the thread ends")
    assert hand.do(lambda: made.append(2)).wait(30) and made == [2]
    hand.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "test"]
