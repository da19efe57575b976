"""Values that are not finite are found on the step that gave them, and looked at only when somebody asks."""

from __future__ import annotations

import math

import pytest

from cfe_hpc.ranks.finite import Finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_the_first_bad_step_is_told_with_its_value(name: str, value: float) -> None:
    finite = Finite()
    finite.note(1, {"loss": 1.0, "grad_norm": 2.0})
    finite.note(2, {name: value, "lr": 0.1})
    finite.note(3, {"loss": math.nan})
    assert (finite.first_bad(), finite.what) == (2, f"{name} is {value}")
    finite.note(4, {"loss": math.nan})
    assert finite.first_bad() == 2  # until the run goes back
    finite.forget()
    assert (finite.first_bad(), finite.what) == (None, "")


def test_what_is_not_watched_may_be_anything() -> None:
    finite = Finite()
    finite.note(1, {"val_loss": math.nan, "best": math.inf, "loss": 3, "grad_norm": None})
    assert finite.first_bad() is None


def test_tensors_are_looked_at_without_the_graph_they_came_of() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.ones((), requires_grad=True)
    finite = Finite()
    finite.note(1, {"loss": weight * 2, "grad_norm": torch.tensor([1.0], dtype=torch.bfloat16)})
    assert all(not value.requires_grad for _, _, value in finite._noted)
    assert finite.first_bad() is None
    finite.note(2, {"loss": weight / 0})
    assert (finite.first_bad(), finite.what) == (2, "loss is inf")
