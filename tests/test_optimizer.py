"""The optimiser of a pack: each member is given what it would be given alone, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rnnq.families.base import Adam
from rnnq.optimizer import FusedAdam, clipped

torch.set_num_threads(1)

EVEN = [(256, 32), (1, 32), (64, 32)]
ODD = [(256, 21), (1, 21), (7, 5), (1, 1), (3,), (30,), (16,)]


def draw(shapes: list[tuple[int, ...]], members: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {str(i): torch.randn(members, *shape, generator=generator) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("members", [2, 7, 8, 32])
@pytest.mark.parametrize("shapes", [EVEN, ODD], ids=["even", "odd"])
def test_a_member_moves_as_it_would_alone_whatever_stands_beside_it(
    shapes: list[tuple[int, ...]], members: int
) -> None:
    """Rates and decays that change from row to row, a parameter without gradient now and then, a row left out."""
    specs = [Adam((1e-3, 1e-2)[k // 3 % 2], weight_decay=0.1 * (k % 5 == 4)) for k in range(members)]
    start = draw(shapes, members)
    params = {name: p.clone() for name, p in start.items()}
    together = FusedAdam(params, specs)
    lone = [{name: p[k : k + 1].clone() for name, p in start.items()} for k in range(members)]
    alone = [FusedAdam(lone[k], [specs[k]]) for k in range(members)]
    for step in range(20):
        found: list[Tensor | None] = list(draw(shapes, members, seed=step + 1).values())
        if step % 2:
            found[1] = None
        rows = list(range(members)) if step < 10 else [k for k in range(members) if k != 1]
        together.update(found, rows)
        for k in rows:
            alone[k].update([None if g is None else g[k : k + 1].clone() for g in found])
    for k in range(members):
        for name, p in params.items():
            assert torch.equal(p[k], lone[k][name][0])
            assert torch.equal(together.second[name][k], alone[k].second[name][0])
        assert k == 1 or torch.equal(together.state(k)["steps"], alone[k].state(0)["steps"])


def test_neighbours_of_one_rate_are_one_call() -> None:
    specs = [Adam(lr) for lr in (1e-3, 1e-3, 1e-3, 1e-2, 1e-2, 1e-3)]
    optimizer = FusedAdam(draw(EVEN, 6), specs)
    assert optimizer._neighbours(range(6), None) == [(0, 3, 1e-3), (3, 5, 1e-2), (5, 6, 1e-3)]
    assert optimizer._neighbours([0, 2, 3, 4], None) == [(0, 1, 1e-3), (2, 3, 1e-3), (3, 5, 1e-2)]
    optimizer.load(1, FusedAdam(draw(EVEN, 1), specs[:1]).state(0) | {"steps": torch.tensor([7.0])})
    assert optimizer._neighbours(range(3), None) == [(0, 1, 1e-3), (1, 2, 1e-3), (2, 3, 1e-3)], "others are as old"


def test_a_schedule_is_asked_for_each_member_at_its_own_step() -> None:
    def falling(done: int) -> float:
        return 1 / (1 + done)

    specs = [Adam(0.1, schedule=falling)] * 2
    optimizer = FusedAdam(draw([(16,)], 2), specs)
    assert optimizer._neighbours(range(2), [0, 0]) == [(0, 2, 0.1)]
    assert [lr for *_, lr in optimizer._neighbours(range(2), [0, 4])] == [0.1, 0.1 * falling(4)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [True, False])
def test_it_is_torchs_adam_and_adamw(decay: float, decoupled: bool) -> None:
    """Torch's own loop does the same operations in another order: 1e-6, some roundings of a float32."""
    start = draw(ODD, 2)
    params = {name: p.clone() for name, p in start.items()}
    mine = FusedAdam(params, [Adam(0.01, weight_decay=decay, decoupled=decoupled)] * 2)
    theirs = [p[0].clone().requires_grad_() for p in start.values()]
    kind = torch.optim.AdamW if decay and decoupled else torch.optim.Adam
    other = kind(theirs, lr=0.01, weight_decay=decay)
    for step in range(10):
        gradients = draw(ODD, 2, seed=step + 1)
        mine.update(list(gradients.values()))
        for p, g in zip(theirs, gradients.values(), strict=True):
            p.grad = g[0].clone()
        other.step()
    for p, expected in zip(params.values(), theirs, strict=True):
        torch.testing.assert_close(p[0], expected.detach(), rtol=1e-6, atol=1e-6)


def test_each_member_is_clipped_by_its_own_norm_as_torch_clips() -> None:
    gradients = list(draw(ODD, 3).values())
    found = clipped(gradients, torch.tensor([0.1, math.inf, 1e9]))
    lone = [g[0].clone().requires_grad_() for g in gradients]
    for p, g in zip(lone, gradients, strict=True):
        p.grad = g[0].clone()
    torch.nn.utils.clip_grad_norm_(lone, 0.1)
    for got, g, p in zip(found, gradients, lone, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(got[0], p.grad, rtol=1e-6, atol=0)
        assert torch.equal(got[1:], g[1:]), "what is below its bound is left alone"


def test_a_member_is_clipped_to_the_same_bits_alone_and_beside_others() -> None:
    """With as many parameters as a net of some layers has: their norms are summed up in one order."""
    for seed in range(20):
        gradients = list(draw(EVEN * 4, 4, seed=seed).values())
        together = clipped(gradients, torch.full((4,), 0.1))
        for k in range(4):
            alone = clipped([g[k : k + 1] for g in gradients], torch.full((1,), 0.1))
            assert all(torch.equal(a[0], b[k]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_scales_nothing_and_no_other_member(bad: float) -> None:
    gradients = list(draw(EVEN, 3).values())
    clean = clipped(gradients, torch.full((3,), 0.1))
    gradients[0][1, 0, 0] = bad
    found = clipped(gradients, torch.full((3,), 0.1))
    for got, expected, g in zip(found, clean, gradients, strict=True):
        assert torch.equal(got[[0, 2]], expected[[0, 2]])
        assert torch.equal(got[1].nan_to_num(), g[1].nan_to_num())
