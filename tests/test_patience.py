"""Slurm is asked again while its controller gives no answer, and never when it has given one."""

from __future__ import annotations

import pytest

from cfe_hpc.process import CommandError
from cfe_hpc.ranks import patience
from cfe_hpc.ranks.patience import insist


class Controller:
    """One that says these things in turn, and then that all is well."""

    def __init__(self, *errors: str) -> None:
        self._errors, self.asked = list(errors), 0

    def __call__(self) -> str:
        self.asked += 1
        if self._errors:
            raise CommandError(self._errors.pop(0))
        return "well"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_RETRY_S", 0.0)


@pytest.mark.parametrize(
    "silence",
    [
        "`scontrol show job -o …` gave no answer within 15 s",
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "slurm_load_node error: Socket timed out on send/recv operation",
    ],
)
def test_silence_is_waited_out(silence: str) -> None:
    controller = Controller(silence, silence)
    assert insist(controller) == "well"
    assert controller.asked == 3


@pytest.mark.parametrize(
    "refusal", ["Job is pending execution for job 7", "Invalid job id specified", "scontrol: command not found"]
)
def test_a_refusal_is_an_answer(refusal: str) -> None:
    controller = Controller(refusal)
    with pytest.raises(CommandError, match=refusal):
        insist(controller)
    assert controller.asked == 1


def test_patience_ends() -> None:
    with pytest.raises(CommandError, match="no answer"):
        insist(Controller(*["gave no answer"] * 5), patience_s=0.0)
