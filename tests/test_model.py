"""The transformer: positions of `rope` and `irope`, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch

from cfe_hpc.train.config import Params
from cfe_hpc.train.model import Transformer, has_positions, query_scale_T, rotary_tables_TK, rotate_BHTK
from cfe_hpc.train.optim import make_adamw

SMALL = Params(d_model=32, layers=4, heads=2, seq_len=24, steps=100)
CPU = torch.device("cpu")


def small(**changes: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(SMALL.model_copy(update=changes))


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("groups", "without"), [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (2, [1, 3, 5, 7]), (4, [3, 7]), (8, [7]), (9, [])]
)
def test_every_gth_layer_has_no_positions(groups: int, without: list[int]) -> None:
    params = Params(layers=8, rope_variant="irope", irope_groups=groups)
    assert [layer for layer in range(8) if not has_positions(layer, params)] == without
    assert all(has_positions(layer, Params(layers=8, irope_groups=groups)) for layer in range(8))


def test_more_groups_than_layers_is_rope_bit_for_bit() -> None:
    rope, irope = small(), small(rope_variant="irope", irope_groups=5)
    assert torch.equal(rope(tokens()), irope(tokens()))
    assert not torch.equal(rope(tokens()), small(rope_variant="irope", irope_groups=4)(tokens()))


def test_rotation_depends_on_distance_alone() -> None:
    tables = rotary_tables_TK(64, 16, 10_000.0, CPU)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(2)).expand(2, 1, 1, 64, 16)
    scores = rotate_BHTK(q, tables)[0, 0] @ rotate_BHTK(k, tables)[0, 0].T
    for shift in (1, 7, 40):
        torch.testing.assert_close(scores[shift:, shift:], scores[:-shift, :-shift], rtol=1e-4, atol=1e-4)
    assert scores[0].std() > 0.1


def test_rotation_keeps_lengths_and_leaves_position_0() -> None:
    x = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(3))
    turned = rotate_BHTK(x, rotary_tables_TK(8, 16, 10_000.0, CPU))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_without_positions_the_order_of_the_past_does_not_matter() -> None:
    model = small(layers=1, rope_variant="irope", irope_groups=1)
    straight = tokens(batch=1)
    swapped = straight[:, [*range(22, -1, -1), 23]]
    torch.testing.assert_close(model(straight)[:, -1], model(swapped)[:, -1])
    assert not torch.allclose(small(layers=1)(straight)[:, -1], small(layers=1)(swapped)[:, -1])


def test_query_scale_is_the_published_formula() -> None:
    scale = query_scale_T(40_000, CPU)
    assert scale.dtype == torch.float32
    assert torch.equal(scale[:8191], torch.ones(8191))
    for position in (8191, 8192, 16382, 16383, 39_999):
        expected = 1 + 0.1 * math.log(1 + math.floor((position + 1) / 8192))
        assert scale[position].item() == pytest.approx(expected, rel=1e-6)


def test_layers_without_positions_scale_their_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = small(rope_variant="irope", irope_groups=2)(tokens())
    monkeypatch.setattr("cfe_hpc.train.model.query_scale_T", lambda length, device: torch.full((length,), 1.5))
    assert not torch.allclose(small(rope_variant="irope", irope_groups=2)(tokens()), plain)
    assert torch.equal(small()(tokens()), small(rope_variant="irope", irope_groups=5)(tokens()))


def test_no_token_sees_the_future() -> None:
    model, before = small(rope_variant="irope"), tokens()
    after = before.clone()
    after[:, 10:] = (after[:, 10:] + 1) % 256
    torch.testing.assert_close(model(before)[:, :10], model(after)[:, :10])


def test_nothing_needs_complex_numbers_or_float64() -> None:
    seen: set[torch.dtype] = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.update(leaf.dtype for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor))
            return out

    model, batch = small(rope_variant="irope"), tokens(length=25)
    with Watch():
        model(batch[:, :-1], batch[:, 1:]).mean().backward()
    assert seen == {torch.float32, torch.int64}


def test_bf16_keeps_its_angles_in_float32() -> None:
    model = small().bfloat16()
    logits = model(tokens())
    assert logits.dtype == torch.bfloat16
    assert not list(model.buffers())
    assert model(tokens(length=23), tokens(length=23)).dtype == torch.float32


def test_losses_are_per_sequence_and_start_at_chance() -> None:
    batch = tokens(batch=3, length=25)
    loss = small()(batch[:, :-1], batch[:, 1:])
    assert loss.shape == (3,)
    assert loss.mean().item() == pytest.approx(math.log(256), abs=0.2)


@pytest.mark.parametrize("variant", ["rope", "irope"])
def test_it_learns_a_batch_by_heart(variant: str) -> None:
    model, batch = small(rope_variant=variant), tokens(batch=2, length=25)
    optimizer = make_adamw(model, SMALL)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(60):
        optimizer.zero_grad()
        model(batch[:, :-1], batch[:, 1:]).mean().backward()
        optimizer.step()
    assert model(batch[:, :-1], batch[:, 1:]).mean().item() < 0.1
