"""Weights over time, for figures: what snapshots and the last checkpoint of a run hold.

Files are named by rows, or by the layout of a run's folder; nothing in them can run code (weights_only).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sqlalchemy import Engine

from rnnq import checkpoint, db, runs
from rnnq.checkpoint import Owner, Saved
from rnnq.errors import Damaged, is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor


class OfStage:
    """Those of runs of a stage, as their rows name the files."""

    def __init__(self, engine: Engine, rows: Sequence[Mapping[str, Any]]) -> None:
        self._study, _, self._root = db.study(engine)
        self._rows = {row["id"]: row for row in rows}
        self._engine = engine
        self._known: dict[int, dict[int, Saved]] = {}

    def steps(self, run: int) -> list[int]:
        """The steps of which there are weights, in order."""
        return sorted({*self._snapshots(run), *self._last(run)})

    def at(self, run: int, step: int) -> dict[str, Tensor]:
        """Parameters, (1, ...) each, on the CPU. Raises CheckpointError where the file is gone or not what it was."""
        row = self._rows[run]
        owner = Owner(self._study, row["stage"], run, row["fingerprint"])
        saved = self._snapshots(run).get(step)
        if saved is not None:
            return dict(checkpoint.load(self._root, saved, owner)["params"])
        return dict(checkpoint.load(self._root, self._last(run)[step], owner)["members"]["params"])

    def _snapshots(self, run: int) -> dict[int, Saved]:
        if run not in self._known:
            self._known[run] = {row["step"]: Saved(**row) for row in runs.snapshots(self._engine, run)}
        return self._known[run]

    def _last(self, run: int) -> dict[int, Saved]:
        saved = self._rows[run]["checkpoint"]
        return {saved["step"]: Saved(**saved)} if saved else {}


class OfFolder:
    """Those of the one run that `rnnq train` wrote into a folder, whatever its number."""

    def __init__(self, place: Path, last: int) -> None:
        self._place, self._last = place, last
        self._history: list[dict[str, Tensor]] | None = None

    def steps(self, run: int) -> list[int]:
        """The steps of which there are weights, in order."""
        final = {self._last} if (self._place / "checkpoints" / "final_model.pt").is_file() else set()
        return sorted({*self._joined(), *self._apart(), *final})

    def at(self, run: int, step: int) -> dict[str, Tensor]:
        """Parameters, (1, ...) each, on the CPU. Raises Damaged where the file is gone or cannot be read."""
        joined = self._joined()
        if step in joined:
            if self._history is None:
                self._history = self._load("param_history.pt")
            found = self._history[joined.index(step)]
        elif step in self._apart():
            found = self._load(f"snapshots/step_{step}.pt")
        else:
            found = self._load("checkpoints/final_model.pt")
        return {name: tensor[None] for name, tensor in found.items()}

    def _joined(self) -> list[int]:
        path = self._place / "param_history_steps.npy"
        return [int(step) for step in np.load(path)] if path.is_file() else []

    def _apart(self) -> list[int]:
        return [int(path.stem.removeprefix("step_")) for path in (self._place / "snapshots").glob("step_*.pt")]

    def _load(self, name: str) -> Any:
        import torch

        try:
            return torch.load(self._place / name, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever a file can hold that torch cannot read
            if is_out_of_memory(error):
                raise
            raise Damaged(f"{self._place / name} cannot be read: {type(error).__name__}: {error}") from error
