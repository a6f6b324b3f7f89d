"""A run's folder, in the layout of the sequential-composition studies: config, histories, metadata, final weights.

config.yaml                 the whole config, every default and resolved value in it, under `family:`
curves.csv                  name, step, value of every point
train_loss_history.npy      the values of the primary metric's curve; NaN where it was not finite
train_loss_steps.npy        the steps that they were measured at
val_loss_history.npy, ...   the same of every other curve
samples_seen.npy, fraction_of_space_seen.npy   at train_loss_steps, where the family reckons samples
metadata.json               final losses, seconds, parameters, device, seed, step, versions, commit
checkpoints/final_model.pt  name -> tensor, where the weights are written, too
param_history.pt            where the config names snapshots: a list of the same, with param_history_steps.npy;
                            where that would be too large, snapshots/step_<step>.pt instead
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rnnq.config import Config
from rnnq.definitions import yaml

if TYPE_CHECKING:
    from torch import Tensor

Point = tuple[str, int, float | None]  # name, step, value: None where it was not finite
JOINED = 1_000_000_000  # bytes of snapshots up to which they become one file


@dataclass(frozen=True)
class Account:
    """What there is to tell of a run."""

    family: str
    primary: str  # the metric whose curve is the training loss
    config: Mapping[str, Any]
    points: Sequence[Point]
    summary: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)  # for the metadata: device, seconds, versions, ...
    model: Config | None = None  # the config as its family has it, where that is here: it reckons samples


def write(folder: Path, run: Account) -> None:
    """Write all but the weights into a folder, which is made. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, run.family, run.config)
    curves: dict[str, list[tuple[int, float | None]]] = {}
    for name, step, value in run.points:
        curves.setdefault(name, []).append((step, value))
    with (folder / "curves.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("name", "step", "value"))
        writer.writerows((name, step, value) for name, points in curves.items() for step, value in points)
    for name, points in curves.items():
        own = safe_name("train_loss" if name == run.primary else name)
        values = [math.nan if value is None else value for _, value in points]
        np.save(folder / f"{own}_history.npy", np.array(values, dtype=np.float64))
        np.save(folder / f"{own}_steps.npy", np.array([step for step, _ in points], dtype=np.int64))
    _write_samples(folder, run.model, [step for step, _ in curves.get(run.primary, [])])
    write_metadata(folder, metadata(run))


def _write_samples(folder: Path, model: Config | None, steps: Sequence[int]) -> None:
    """The training loss against samples, and against the share of all that there are, where the family knows them."""
    found = [] if model is None else [model.samples_seen(step) for step in steps]
    seen = [n for n in found if n is not None]
    if model is None or not seen or len(seen) < len(found):
        return
    np.save(folder / "samples_seen.npy", np.array(seen, dtype=np.float64))
    space = model.sample_space()
    if space:  # divided as whole numbers, however large: n to the power of k is beyond the largest float
        np.save(folder / "fraction_of_space_seen.npy", np.array([n / space for n in seen]))


def write_config(folder: Path, family: str, config: Mapping[str, Any]) -> None:
    """The config as `rnnq train` takes it again. Raises OSError."""
    (folder / "config.yaml").write_text(yaml.dump({"family": family, **config}), encoding="utf-8")


def metadata(run: Account) -> dict[str, Any]:
    """What metadata.json holds; null is what is not known, or was not finite."""
    return {
        "final_train_loss": final_loss(run.summary, run.primary),
        "final_val_loss": number(run.summary.get("val_loss")),
        "training_time_seconds": run.more.get("seconds"),
        "num_parameters": run.summary.get("parameters", run.more.get("parameters")),
        "device": run.more.get("device"),
        "description": run.config.get("description"),
        "seed": run.config.get("seed"),
        **{name: value for name, value in run.more.items() if name not in ("seconds", "parameters", "device")},
        "summary": dict(run.summary),
    }


def final_loss(summary: Mapping[str, Any], primary: str) -> float | None:
    """What a finished run is known by: its primary metric."""
    return number(summary.get(primary))


def number(value: Any) -> float | None:
    """A finite number, else nothing."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def write_metadata(folder: Path, content: Mapping[str, Any]) -> None:
    """metadata.json, aside and then renamed: whoever reads it reads a whole one. Raises OSError."""
    aside = folder / f".metadata.json.{os.getpid()}.part"
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(folder / "metadata.json")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_weights(folder: Path, name: str, params: Mapping[str, Tensor], carried: Mapping[str, Tensor]) -> None:
    """One member's weights as a state dict, without the axis of members: checkpoints/<name>.pt. Raises OSError."""
    import torch

    from rnnq.families.single import HELD

    path = folder / "checkpoints" / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    tensors = {**params, **{name.removeprefix(HELD): tensor for name, tensor in carried.items()}}
    torch.save({name: tensor[0].clone() for name, tensor in tensors.items()}, aside)
    aside.replace(path)


def write_snapshot(folder: Path, step: int, params: Mapping[str, Tensor]) -> None:
    """Weights at a step: snapshots/step_<step>.pt. Raises OSError."""
    import torch

    path = folder / "snapshots" / f"step_{step}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    torch.save({name: tensor[0].clone() for name, tensor in params.items()}, aside)
    aside.replace(path)


def join_snapshots(folder: Path) -> None:
    """One file of all snapshots, in the order of their steps, where they are not too much for one. Raises OSError."""
    place = folder / "snapshots"
    if not place.is_dir():
        return
    files = {int(path.stem.removeprefix("step_")): path for path in place.glob("step_*.pt")}
    if sum(path.stat().st_size for path in files.values()) > JOINED:
        return
    import torch

    steps = sorted(files)
    torch.save([torch.load(files[step], weights_only=True) for step in steps], folder / "param_history.pt")
    np.save(folder / "param_history_steps.npy", np.array(steps, dtype=np.int64))
    shutil.rmtree(place)


def made_now(parent: Path, name: str = "") -> Path:
    """A new folder that is called after the time: 20260131_142530, or name_20260131_142530. Raises OSError."""
    stamp = time.strftime("%Y%m%d_%H%M%S")
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        path = parent / f"{name}{'_' if name else ''}{stamp}{f'_{number}' if number > 1 else ''}"
        try:
            path.mkdir()  # two that begin in the same second do not share one
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"{parent} has 9,999 folders of {stamp}")


def safe_name(text: str) -> str:
    """A text as the name of a file or a folder: what some file system takes amiss becomes an underscore."""
    kept = "".join(sign if sign.isalnum() or sign in "._-+=,@" else "_" for sign in text).strip("._")
    return kept.encode()[:120].decode(errors="ignore") or "_"


def moment(seconds: float | None) -> str | None:
    """A time of the database, in seconds since 1970, as ISO 8601 with its offset."""
    return None if seconds is None else datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
