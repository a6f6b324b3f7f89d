"""Learning rates over a run, against torch's own schedules and the published study's formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rnnq.families.scaling import text
from rnnq.families.scaling.config import ScalingConfig
from rnnq.families.scaling.schedules import factor


def made(schedule: str, **fields: Any) -> Callable[[int], float]:
    base = {"tokens": "bytes", "lr_schedule": schedule, "learning_rate": 0.1, "steps": 50, "warmup_frac": 0.2}
    return factor(ScalingConfig(**base | fields))


def test_a_constant_rate_is_constant() -> None:
    assert {made("constant")(t) for t in (0, 1, 49)} == {1.0}


@pytest.mark.parametrize("floor", [{}, {"min_lr": 0.02}, {"min_lr_multiplier": 0.3}])
def test_cosine_is_that_of_torch_at_every_step(floor: dict[str, float]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    least = 0.1 * floor.get("min_lr_multiplier", floor.get("min_lr", 0) / 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, least)
    mine = made("cosine", **floor)
    for t in range(51):
        assert 0.1 * mine(t) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_a_multiplier_wins_over_a_floor_and_a_floor_above_the_rate_is_refused() -> None:
    assert made("cosine", min_lr=0.01, min_lr_multiplier=0.5)(50) == pytest.approx(0.5)
    with pytest.raises(ValidationError, match=r"min_lr=0\.2 is above learning_rate=0\.1"):
        made("cosine", min_lr=0.2)


def test_cosine_with_warm_up_is_the_published_formula() -> None:
    mine = made("cosine_warmup", min_lr_multiplier=0.1)
    assert [mine(t) for t in (0, 1, 2, 9)] == [0.1, 0.1, 0.2, 0.9], "no step is wasted at a rate of 0"
    for t in range(10, 51):
        assert mine(t) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - 10) / 40)))
    assert (mine(10), mine(50), mine(60)) == (1.0, pytest.approx(0.1), pytest.approx(0.1))


def test_linear_warm_up_falls_to_zero_and_does_no_step_at_zero() -> None:
    mine = made("linear_warmup")
    assert [mine(t) for t in (0, 1, 5, 10, 30, 50, 99)] == [0.1, 0.1, 0.5, 1.0, 0.5, 0.0, 0.0]
    assert mine(49) > 0
    assert made("linear_warmup", warmup_frac=0.0)(25) == 0.5


def test_inverse_root_warms_up_and_falls_as_the_root_of_steps() -> None:
    mine = made("inverse_sqrt")
    assert [mine(t) for t in (0, 5, 10, 40)] == [0.1, 0.5, 1.0, 0.5]
    assert {made("inverse_sqrt", warmup_frac=0.0)(t) for t in (0, 1, 40)} == {1.0}


def test_steps_count_epochs_of_the_text(tmp_path: Path) -> None:
    """100 windows are an epoch; at 20 micro-batches a step, 5 steps."""
    corpus = tmp_path / "text"
    corpus.write_bytes(bytes(range(32, 96)) * 100)
    fields: dict[str, Any] = {"data_path": str(corpus), "batch_size": 8, "sequence_length": 6, "num_epochs": 9}
    fields |= {"gradient_accumulation_steps": 20, "step_size": 2, "gamma": 0.5, "steps": None}
    mine = made("step", **fields)
    windows = text.windows(ScalingConfig(tokens="bytes", **fields))
    assert windows == (5120 // 8 - 1) // 6 == 106
    for t in range(60):
        assert mine(t) == 0.5 ** (t * 20 // windows // 2)
    assert [mine(t) for t in (0, 10, 11, 21, 22)] == [1, 1, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("schedule", ["cosine", "cosine_warmup", "linear_warmup", "inverse_sqrt"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_the_shortest_runs_have_a_rate_at_every_step(schedule: str, steps: int, part: float) -> None:
    mine = made(schedule, steps=steps, warmup_frac=part)
    assert all(0 < mine(t) <= 1 for t in range(steps))


def test_making_one_loads_no_text_and_two_of_one_config_are_equal() -> None:
    fields: dict[str, Any] = {"steps": None, "data_path": "/nowhere/at/all"}
    for schedule in ("cosine", "step"):
        assert made(schedule, **fields) == made(schedule, **fields)
    assert made("cosine", **fields) != made("cosine", **fields, min_lr=0.01)
    assert made("constant", **fields)(3) == 1.0
