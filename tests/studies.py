"""Stages whose runs have ended, with numbers that tests know; and a config with sections."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Engine

from rnnq import queue
from rnnq.config import Config
from tests.conftest import claim_one, new_stage

LOSS = {"name": "loss", "unit": "nats/byte", "better": "min", "primary": True}
ACCURACY = {"name": "accuracy", "unit": "", "better": "max", "primary": False}
FIELDS = {"width": "int", "gate": "bool", "seed": "int"}
VALUES = [2.0, 1.5, 3.0, 1.0, 2.5, 1.5]  # of the runs of `study`, by id


def new_run(number: int, group: str | None = None, seed: int = 0, **config: Any) -> queue.NewRun:
    """A run in a group of its own."""
    content = {"width": 16, "gate": True, "seed": seed} | config
    return queue.NewRun(f"label{number}", json.dumps(content), f"f{number}", group or f"g{number}", seed, None, 10)


def add(engine: Engine, made: list[queue.NewRun], name: str = "s", **changes: Any) -> None:
    """Add a stage of such runs."""
    queue.init(engine, [new_stage(name=name, runs=made, **{"fields": FIELDS, "metrics": [LOSS, ACCURACY]} | changes)])


def finish(engine: Engine, loss: float, curve: bool = True, **summary: float) -> None:
    """Claim and finish the next run; its curve falls to its loss."""
    points = [("loss", step, loss + 1 / step) for step in range(1, 11)] if curve else []
    queue.finish(engine, claim_one(engine), 10, {"loss": loss, **summary}, "loss", points)


def add_study(engine: Engine) -> None:
    """Six finished runs of three widths, the gate on and off; accuracy falls from run to run."""
    add(engine, [new_run(i, width=[128, 16, 32][i % 3], gate=i % 2 == 0) for i in range(6)])
    for place, value in enumerate(VALUES):
        finish(engine, value, accuracy=1 - place / 10)


# ------------------------------------------------------------------------------------------ a config with sections


class Part(BaseModel):
    """A section, as strict as a config."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Data(Part):
    """What is learnt."""

    p: int = Field(default=10, ge=2)
    k: int = 3
    seed: int = 5
    vary_template: bool = False
    powers: tuple[float, ...] = ()


class Model(Part):
    """The net."""

    hidden_dim: int = Field(default=36, ge=1)
    init_scale: float = 0.01


class Training(Part):
    """How it is trained."""

    optimizer: Literal["auto", "adam"] = "auto"
    learning_rate: float | None = None


class Nested(Config):
    """A config with sections, as the studies in YAML have them."""

    data: Data = Data()
    model: Model = Model()
    training: Training = Training()
