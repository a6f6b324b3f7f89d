"""The optimiser of a pack: each member is given what it would be given alone, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rnnq.errors import InputError
from rnnq.families.base import SGD, Adam, Group, PerNeuron
from rnnq.optimizer import FusedAdam, FusedSGD, clipped, of

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


# ---------------------------------------------------------------------------- gradient descent, and groups of both

GROUPS = (Group(("0", "3"), 0.25, 0.4), Group(("1", "2"), 4.0), Group(("4",), 1.0, 0.1), Group(("5", "6"), 0.0))


def halving(done: int) -> float:
    return 0.5**done


def theirs(spec: Adam | SGD, params: list[Tensor]) -> torch.optim.Optimizer:
    """Torch's own optimiser of a spec, of parameters that are called by their numbers."""
    groups = spec.groups or (Group(tuple(map(str, range(len(params)))), 1.0, spec.weight_decay),)
    given = [
        {"params": [params[int(n)] for n in g.names], "lr": spec.lr * g.lr, "weight_decay": g.weight_decay}
        for g in groups
    ]
    if isinstance(spec, SGD):
        return torch.optim.SGD(given, momentum=spec.momentum)
    return (torch.optim.AdamW if spec.decoupled else torch.optim.Adam)(given, betas=spec.betas, eps=spec.eps)


SPECS = {
    "sgd": SGD(0.05),
    "momentum": SGD(0.05, momentum=0.9, weight_decay=0.1, schedule=halving, clip=0.7),
    "sgd in groups": SGD(0.05, momentum=0.9, weight_decay=99.0, clip=0.7, groups=GROUPS),
    "adamw in groups": Adam(0.01, (0.5, 0.9), 1e-6, 99.0, schedule=halving, clip=0.7, groups=GROUPS),
    "adam in groups": Adam(0.01, weight_decay=99.0, decoupled=False, schedule=halving, groups=GROUPS),
    "coupled": Adam(0.01, weight_decay=0.1, decoupled=False),
}


@pytest.mark.parametrize("kind", SPECS)
def test_it_is_torchs_optimiser_with_its_groups_its_schedule_and_its_clip(kind: str) -> None:
    """Ten steps of a pack of three: 2e-6, some roundings of a float32."""
    spec, start = SPECS[kind], draw(ODD, 3)
    params = {name: p.clone() for name, p in start.items()}
    mine = of(params, [spec] * 3)
    lone = [p[1].clone().requires_grad_() for p in start.values()]
    other = theirs(spec, lone)
    schedule = torch.optim.lr_scheduler.LambdaLR(other, spec.schedule or (lambda done: 1.0))
    for step in range(10):
        gradients = draw(ODD, 3, seed=step + 1)
        mine.update(list(gradients.values()), done=[step] * 3)
        for p, g in zip(lone, gradients.values(), strict=True):
            p.grad = g[1].clone()
        if spec.clip is not None:
            torch.nn.utils.clip_grad_norm_(lone, spec.clip)
        other.step()
        schedule.step()
    for name, expected in zip(params, lone, strict=True):
        torch.testing.assert_close(params[name][1], expected.detach(), rtol=2e-6, atol=2e-6)
        frozen = bool(spec.groups) and name in GROUPS[-1].names
        assert torch.equal(params[name], start[name]) is frozen, "a rate of 0 leaves alone, any other does not"


@pytest.mark.parametrize("shapes", [EVEN + [(16,)] * 4, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("kind", SPECS)
def test_in_a_pack_a_member_moves_as_alone_and_goes_on_from_its_state_to_the_bit(
    kind: str, shapes: list[tuple[int, ...]]
) -> None:
    """One of three ends after six steps; another is put aside and resumed after seven; a gradient is absent at times.

    The third has another rate, and a momentum of its own or none.
    """
    spec = SPECS[kind]
    specs = [spec, spec, SGD(0.01, 0.5 if spec.momentum == 0 else 0) if isinstance(spec, SGD) else Adam(0.02, clip=0.1)]
    start = draw(shapes, 3)
    params = {name: p.clone() for name, p in start.items()}
    together = of(params, specs)
    lone = [{name: p[k : k + 1].clone() for name, p in start.items()} for k in range(3)]
    alone = [of(lone[k], [specs[k]]) for k in range(3)]
    for step in range(12):
        found: list[Tensor | None] = list(draw(shapes, 3, seed=step + 1).values())
        if step % 3 == 0:
            found[1] = None
        rows = [0, 1, 2] if step < 6 else [0, 2]
        together.update(found, rows, [step] * 3)
        for k in rows:
            alone[k].update([None if g is None else g[k : k + 1].clone() for g in found], done=[step])
        if step == 7:
            state = alone[0].state(0)
            alone[0] = of(lone[0], [spec])
            alone[0].load(0, state)
            assert together.state(0).keys() == state.keys()
    for k in range(3):
        assert all(torch.equal(p[k], lone[k][name][0]) for name, p in params.items())
        mine, own = together.state(k), alone[k].state(0)
        assert all(torch.equal(mine[name], t) or name == "steps" for name, t in own.items())


@pytest.mark.parametrize("kind", SPECS)
def test_those_that_go_on_keep_what_is_theirs(kind: str) -> None:
    params = draw(ODD, 3)
    updates = of(params, [SPECS[kind]] * 3)
    updates.update(list(draw(ODD, 3, seed=1).values()), done=[0] * 3)
    keep = torch.tensor([0, 2])
    kept = {name: p.index_select(0, keep) for name, p in params.items()}
    updates.update(found := list(draw(ODD, 3, seed=2).values()), done=[1] * 3)
    again = of(fewer := {name: p[[0, 2]] for name, p in draw(ODD, 3).items()}, [SPECS[kind]] * 2)
    again.update([g[[0, 2]] for g in draw(ODD, 3, seed=1).values()], done=[0] * 2)
    assert all(torch.equal(fewer[name], p) for name, p in kept.items())
    updates.select({name: p.index_select(0, keep) for name, p in params.items()}, keep)
    again.update([g[[0, 2]] for g in found], done=[1] * 2)
    assert updates.state(1).keys() == again.state(1).keys()
    assert all(torch.equal(t, again.state(1)[name]) for name, t in updates.state(1).items())


def test_without_momentum_nothing_is_kept_and_with_it_the_first_buffer_is_the_gradient() -> None:
    assert of(draw(EVEN, 1), [SGD(0.1)]).state(0) == {}
    params = draw(EVEN, 1)
    updates = of(params, [SGD(0.1, 0.9, weight_decay=0.5)])
    [first, *_] = [p.clone() for p in params.values()]
    gradients = list(draw(EVEN, 1, seed=1).values())
    updates.update(gradients)
    torch.testing.assert_close(updates.state(0)["momentum.0"], gradients[0] + 0.5 * first)


def test_groups_of_one_rate_are_one_call_and_one_group_of_all_is_no_group() -> None:
    spec = Adam(0.01, groups=(Group(("0",), 0.5, 0.1), Group(("1",), 2.0), Group(("2",), 0.5, 0.1)))
    updates = FusedAdam(draw(EVEN, 2), [spec] * 2)
    assert [part.whole for part in updates._parts_of(0, (0, 1, 2))] == [(0, 2), (1,)]
    grouped, plain = draw(ODD, 2), draw(ODD, 2)
    everything = (Group(tuple(grouped), 1.0, 0.1),)
    for step in range(3):
        found = list(draw(ODD, 2, seed=step).values())
        if step == 0:
            one, other = of(grouped, [Adam(0.01, groups=everything)] * 2), of(plain, [Adam(0.01, weight_decay=0.1)] * 2)
        one.update(found)
        other.update(found)
    assert all(torch.equal(p, plain[name]) for name, p in grouped.items())


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_a_parameter_in_no_group_or_in_two_is_refused_before_the_first_step(kind: type[Adam] | type[SGD]) -> None:
    spec = kind(0.1, groups=(Group(("0", "1")), Group(("1", "2x"))))
    with pytest.raises(InputError) as refused:
        of(draw(EVEN, 1), [spec])
    said = refused.value.message.splitlines()
    assert said == [
        "the parameter 2 is in no group",
        "the parameter 1 is in groups 2 times",
        "a group names '2x', and no parameter is called so",
    ]


def test_members_of_any_age_share_a_call_of_descent() -> None:
    updates = FusedSGD(draw(EVEN, 3), [SGD(0.1, 0.9)] * 3)
    updates.update(list(draw(EVEN, 3).values()), [1])
    assert updates._neighbours(range(3), None) == [(0, 3, 0.1)]


# ---------------------------------------------------------------------------------------------- rates by neurons

NEURONS = (("0", 2), ("1", 1))
RATES = (0.1, 0.3)


def scaled(k: int, rest: Adam | None = None, clip: float | None = None) -> PerNeuron:
    return PerNeuron(RATES[k % 2], -1.0 - k % 3, NEURONS, rest, clip)


@pytest.mark.parametrize("rest", [None, Adam(0.01, clip=0.5)], ids=["all owned", "one by Adam"])
@pytest.mark.parametrize("shapes", [[(10, 32), (32, 10), (32, 32)], [(5, 7), (7, 3), (7, 7)]], ids=["even", "odd"])
def test_a_member_that_moves_by_its_neurons_moves_as_it_would_alone(
    shapes: list[tuple[int, ...]], rest: Adam | None
) -> None:
    """With clips that bite and one that does not; a row that has ended stays; some gradients are absent."""
    members, shapes = 5, shapes[: 3 if rest else 2]
    specs = [scaled(k, rest, 0.7 if k % 2 else 1e6) for k in range(members)]
    start = draw(shapes, members)
    params = {name: p.clone() for name, p in start.items()}
    together = of(params, specs)
    lone = [{name: p[k : k + 1].clone() for name, p in start.items()} for k in range(members)]
    alone = [of(lone[k], [specs[k]]) for k in range(members)]
    for step in range(20):
        found: list[Tensor | None] = list(draw(shapes, members, seed=step + 1).values())
        if step % 5 == 2 and rest:
            found[2] = None  # as W_mix has none for sequences of two elements
        rows = list(range(members)) if step < 10 else [0, 2, 3, 4]
        before = {name: p[1].clone() for name, p in params.items()}
        together.update(found, rows)
        for k in rows:
            alone[k].update([None if g is None else g[k : k + 1].clone() for g in found])
        assert len(rows) == members or all(torch.equal(params[name][1], p) for name, p in before.items())
    for k in range(members):
        assert all(torch.allclose(p[k], lone[k][name][0], rtol=1e-5) for name, p in params.items())
        if shapes[0] == (10, 32):
            assert all(torch.equal(p[k], lone[k][name][0]) for name, p in params.items()), "whole vectors: to the bit"
        assert together.state(k).keys() == alone[k].state(0).keys()
    assert bool(together.state(0)) == bool(rest)


def test_a_neuron_moves_by_its_own_norm_and_the_clip_is_of_the_raw_gradient() -> None:
    w_in, w_out = torch.tensor([[[3.0, 0.3]]]), torch.tensor([[[4.0], [0.4]]])  # norms 5 and 0.5
    params = {"0": w_in, "1": w_out}
    gradients = [torch.tensor([[[6.0, 6.0]]]), torch.tensor([[[8.0], [0.0]]])]  # of norm sqrt(136)
    of(params, [PerNeuron(1.0, -2.0, NEURONS, clip=1.0)]).update(gradients)
    share = 1 / (math.sqrt(136) + 1e-6)
    assert w_in.flatten().tolist() == pytest.approx([3 - 6 * share / 25, 0.3 - 6 * share / 0.25], rel=1e-5)
    assert w_out.flatten().tolist() == pytest.approx([4 - 8 * share / 25, 0.4], rel=1e-5)


def test_what_adam_has_of_a_hybrid_goes_on_from_its_state() -> None:
    shapes: list[tuple[int, ...]] = [(10, 32), (32, 10), (32, 32)]
    spec = scaled(0, Adam(0.01))
    steps = [list(draw(shapes, 1, seed=step).values()) for step in range(6)]
    whole = draw(shapes, 1)
    updates = of(whole, [spec])
    for found in steps[:3]:
        updates.update(found)
    half, state = {name: p.clone() for name, p in whole.items()}, updates.state(0)
    resumed = of(half, [spec])
    resumed.load(0, state)
    for found in steps[3:]:
        updates.update(found)
        resumed.update(found)
    assert all(torch.equal(half[name], p) for name, p in whole.items())


def test_members_that_go_on_keep_their_rates() -> None:
    params = draw([(10, 32), (32, 10)], 4)
    updates = of(params, [scaled(k) for k in range(4)])
    keep = torch.tensor([1, 3])
    kept = {name: p.index_select(0, keep) for name, p in params.items()}
    updates.select(kept, keep)
    expected = {name: p.clone() for name, p in kept.items()}
    found = list(draw([(10, 32), (32, 10)], 2, seed=9).values())
    updates.update(found)
    of(expected, [scaled(1), scaled(3)]).update(found)
    assert all(torch.equal(kept[name], p) for name, p in expected.items())


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([Adam(0.1), scaled(0)], "of one kind, not Adam and PerNeuron"),
        ([Adam(0.1), SGD(0.1)], "of one kind, not Adam and SGD"),
        ([PerNeuron(0.1, -1.0, (("0", 2), ("2", 1)))], "no parameter is called 2"),
        ([PerNeuron(0.1, -1.0, (("0", 2),))], "1 is without neurons"),
    ],
)
def test_specs_that_do_not_fit_are_refused(specs: list[Adam | SGD | PerNeuron], message: str) -> None:
    with pytest.raises(InputError, match=message):
        of(draw([(10, 32), (32, 10)], len(specs)), specs)
