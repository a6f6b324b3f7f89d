"""One config trained without a queue: the ordinary loop, into a folder of its own, which it can go on from."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rnnq import checkpoint, families, folder, host, plan, train
from rnnq.checkpoint import Owner, Saved
from rnnq.config import Config, check_places, field_types, fingerprint, metric_rows
from rnnq.definitions import sweeps, yaml
from rnnq.errors import InputError, RnnqError, nearest
from rnnq.families.base import Family, Generator
from rnnq.folder import Account
from rnnq.runs import StageInfo
from rnnq.train import Every, Outcome, Point

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not told apart there
    fcntl = None  # type: ignore[assignment]

Progress = Callable[[int, int | None], None]  # steps done, and of how many
RECORDS = ("config.yaml", "metadata.json")


@dataclass(frozen=True)
class Subject:
    """What is trained."""

    family: str
    config: Config

    @property
    def owner(self) -> Owner:
        """Whose state a checkpoint in the folder is."""
        return Owner("", "", 0, fingerprint(self.family, self.config))


@dataclass(frozen=True)
class Training:
    """A training that is about to begin, or to go on."""

    subject: Subject
    folder: Path
    attempt: int
    seconds: float  # that earlier attempts took
    saved: Saved | None = None  # the checkpoint that it goes on from
    state: dict[str, Any] | None = None  # what is in it
    numerics: Mapping[str, Any] | None = None  # under which that state was made


@dataclass(frozen=True)
class Result:
    """How it ended."""

    folder: Path
    finished: bool
    step: int
    seconds: float
    summary: Mapping[str, Any]
    can_go_on: bool  # there is a checkpoint to go on from


# ---------------------------------------------------------------------------------------------- what is trained


def read(path: Path | None, family: str | None = None, changes: Sequence[str] = ()) -> Subject:
    """The config of a YAML file, of its family or of one that is named; `changes` are "key=value".

    Where a config has no `seed` but a `data.seed`, that is the seed of everything, as it was in the studies that these
    files come from. Raises InputError with everything that is wrong, each with its line.
    """
    told, fields = _of_file(path) if path else (None, yaml.Node({}, "the defaults", 1))
    name = family or told
    if name is None:
        raise InputError(f"{path} does not say of which family it is", "family: NAME in it, or --family NAME")
    model = families.find_config(name)
    if model.starts_from is not None:
        hint = "`rnnq init` takes a stage of them, with start_from="
        raise InputError(f"a run of {name} starts from one of {model.starts_from}, and there are none here", hint)
    fields = sweeps.seeded(sweeps.merge(fields, sweeps.nested(plan.parse_changes(changes, model), "--set")))
    config, problems = check_places(model, fields.plain())
    if config is None:
        raise InputError([f"{_place(fields, keys, path)}: {sentence}" for keys, sentence in problems])
    config.datasets()  # raises DataError, before a folder is made
    return Subject(name, config)


def _place(fields: yaml.Node, keys: Sequence[object], path: Path | None) -> str:
    found = fields.at(keys)
    if found is fields:
        return str(path or "the config")
    return found.file if found.file == "--set" else found.place


def _of_file(path: Path) -> tuple[str | None, yaml.Node]:
    if path.suffix not in (".yaml", ".yml"):
        hint = "`rnnq init` takes definitions in Python" if path.suffix == ".py" else None
        raise InputError(f"{path}: a config is a .yaml file", hint)
    try:
        content = yaml.bytes_of(path)
    except FileNotFoundError as error:
        beside = [str(file) for end in ("yaml", "yml") for file in path.parent.glob(f"*.{end}")]
        raise InputError(f"{path} does not exist", nearest(str(path), beside) if beside else None) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return sweeps.config(path, content)


def wished_device(subject: Subject) -> str | None:
    """The device that a config names, if it does."""
    found = getattr(subject.config, "device", None)
    return str(found) if found else None


# --------------------------------------------------------------------------------------------- begin, and go on


def begin(subject: Subject, out: Path) -> Training:
    """A new folder below `out`, called after the time. Raises InputError where none can be made."""
    try:
        made = folder.made_now(out)
        folder.write_config(made, subject.family, subject.config.model_dump(mode="json"))
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}", "--out names a folder that may be written") from error
    return Training(subject, made, 1, 0.0)


def go_on(place: Path) -> Training:
    """What an interrupted training left in its folder. Raises InputError when nothing can be gone on from."""
    missing = [name for name in RECORDS if not (place / name).is_file()]
    if missing:
        raise InputError(f"--resume {place}: there is no {' and no '.join(missing)} there", "the folder of a training")
    with _held(place):
        return _left(place)


def _left(place: Path) -> Training:
    try:
        known = json.loads((place / "metadata.json").read_text(encoding="utf-8"))
        status, saved = known["status"], known["checkpoint"]
        saved = Saved(**saved) if saved else None
        attempt, seconds = int(known["attempt"]), float(known["training_time_seconds"] or 0.0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume {place}: its metadata.json is not of `rnnq train`: {error!r}") from error
    if status == "completed":
        raise InputError(f"--resume {place}: this training is complete, at step {known.get('final_step')}")
    if saved is None:
        raise InputError(
            f"--resume {place}: it left no checkpoint", f"`rnnq train {place / 'config.yaml'}` begins anew"
        )
    subject = read(place / "config.yaml")
    state = checkpoint.load(place, saved, subject.owner)
    return Training(subject, place, attempt + 1, seconds, saved, state, known.get("numerics"))


@contextmanager
def _held(place: Path) -> Iterator[None]:
    """Keep a second process from training in a folder. Raises InputError where another does.

    The lock lies on config.yaml, which nobody replaces, and goes with the process, however that ends. Where a file
    system has no locks there is none.
    """
    with (place / "config.yaml").open("r+b") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{place}: another process trains there", "stop it first: it checkpoints") from error
        except OSError:
            pass
        yield


def _check_still_left(training: Training) -> None:
    """Nobody went on with it since it was read. Raises InputError."""
    if training.attempt == 1:
        return
    now = json.loads((training.folder / "metadata.json").read_text(encoding="utf-8"))["attempt"]
    if now != training.attempt - 1:
        raise InputError(f"--resume {training.folder}: another process went on with it just now, as attempt {now}")


def difference(training: Training, device: torch.device) -> str | None:
    """Why a training that goes on is not what it would have been to the bit; None where it is."""
    now = train.numerics(device)
    before = training.numerics
    if before is None or before == now:
        return None
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return f"goes on under other numerics ({', '.join(names)}): not to the bit"


# ------------------------------------------------------------------------------------------------------ training


class Desk:
    """What the loop needs of whoever owns a run: here it is a folder."""

    def __init__(self, training: Training, device: torch.device, progress: Progress) -> None:
        self.training, self.progress, self.numerics = training, progress, train.numerics(device)
        self.device = str(device)
        state = training.state
        self.points: list[Point] = [tuple(point) for point in state["curve"]] if state else []
        self.step: int = state["step"] if state else 0
        self.saved = training.saved  # until there is a newer one: should we be killed, the next goes on from it
        self.stop = False
        self.began = time.monotonic()
        self.commit = host.git_state(Path.cwd())
        self.budget = training.subject.config.steps_total()

    def record(self, step: int, points: Sequence[Point]) -> None:
        """Keep points."""
        self.points += points

    def save(self, step: int, points: Sequence[Point], state: Mapping[str, Any]) -> None:
        """A checkpoint: first the file, then the record that names it, then the file before it goes."""
        self.points += points
        place, owner = self.training.folder, self.training.subject.owner
        path = f"checkpoints/a{self.training.attempt}-s{step}.pt"
        old = self.saved
        self.saved = checkpoint.publish(place, path, checkpoint.write_aside(place, path, owner, state), step)
        self.note("running", step)
        if old is not None:
            checkpoint.remove(place, [old.path])

    def snapshot(self, step: int, state: Mapping[str, Any]) -> None:
        """Weights at a step that the config names."""
        folder.write_snapshot(self.training.folder, step, state["params"])

    def leave_behind(self, points: Sequence[Point]) -> None:
        """Points of a training that an error ended."""
        self.points += points

    def wish(self) -> bool:
        """Whether to stop; asked once after each step."""
        self.step += 1
        self.progress(self.step, self.budget)
        return self.stop

    # ----------------------------------------------------------------------------------------------- the record

    def seconds(self) -> float:
        """Spent in all attempts."""
        return self.training.seconds + time.monotonic() - self.began

    def account(self, status: str, step: int, summary: Mapping[str, Any], **more: Any) -> Account:
        """What the folder is to tell."""
        subject = self.training.subject
        known = {
            "status": status,
            "family": subject.family,
            "final_step": step,
            "budget": self.budget,
            "attempt": self.training.attempt,
            "seconds": round(self.seconds(), 3),
            "device": self.device,
            "checkpoint": None if self.saved is None else vars(self.saved),
            "numerics": self.numerics,
            "versions": host.versions(),
            "git_commit": self.commit[0],
            "git_dirty": self.commit[1],
            "command_line": host.command_line(),
            "written_at": folder.moment(time.time()),
        }
        config = subject.config.model_dump(mode="json")
        primary = subject.config.primary().name
        return Account(subject.family, primary, config, self.points, summary, known | more, subject.config)

    def note(self, status: str, step: int, **more: Any) -> None:
        """Write metadata.json."""
        folder.write_metadata(self.training.folder, folder.metadata(self.account(status, step, {}, **more)))


def run(training: Training, device: torch.device, every: Every, desk: Desk) -> Result:
    """Train to the end, or until the desk is told to stop; then the folder holds all that there is to tell.

    An error is written down there, too, and raised. Raises InputError where another process trains in the folder.
    """
    with _held(training.folder):
        _check_still_left(training)
        return _run(training, device, every, desk)


def _run(training: Training, device: torch.device, every: Every, desk: Desk) -> Result:
    subject = training.subject
    desk.note("running", desk.step)
    found = families.find(subject.family)
    try:
        outcome = train.train(found, subject.config, desk, device, desk.budget, every, training.state)
        return _close(training, desk, outcome, found)
    except BaseException as error:
        said = error.message if isinstance(error, RnnqError) else f"{type(error).__name__}: {error}"
        cause = error.cause if isinstance(error, RnnqError) else "bug"
        status = "failed" if isinstance(error, Exception) else "interrupted"  # such as by a second Ctrl-C
        folder.write(training.folder, desk.account(status, desk.step, {}, error=said, cause=cause))
        raise


def _close(training: Training, desk: Desk, outcome: Outcome, found: Family | Generator) -> Result:
    if not outcome.finished and outcome.state is not None:
        desk.save(outcome.step, outcome.points, outcome.state)
    else:
        desk.points += outcome.points
    more: dict[str, Any] = {}
    if outcome.finished and outcome.state is not None:
        more = _weights(training.folder, outcome)
        folder.join_snapshots(training.folder)
        desk.saved = None  # the final weights take its place
    status = "completed" if outcome.finished else "interrupted"
    folder.write(training.folder, desk.account(status, outcome.step, outcome.summary, **more))
    if outcome.finished:
        _sweep(training.folder)
    seconds = desk.seconds()
    return Result(training.folder, outcome.finished, outcome.step, seconds, outcome.summary, desk.saved is not None)


def _sweep(place: Path) -> None:
    """Remove what was only for going on; also what attempts left half done, or unnamed, that were killed."""
    pattern = re.compile(r"a\d+-s\d+\.pt|\..+\.(tmp|part)")
    for found in (place, place / "checkpoints"):
        for path in found.iterdir() if found.is_dir() else ():
            if pattern.fullmatch(path.name):
                with suppress(OSError):
                    path.unlink()


def _weights(place: Path, outcome: Outcome) -> dict[str, Any]:
    """Write the last weights, and the best; returns what the metadata says of them."""
    members = (outcome.state or {})["members"]
    folder.write_weights(place, "final_model", members["params"], members["carried"])
    count = sum(tensor[0].numel() for tensor in members["params"].values())
    best = outcome.best
    if best is None:
        return {"parameters": count}
    folder.write_weights(place, "best_model", best["params"], best.get("carried", {}))
    return {"parameters": count, "best_step": best["step"], "best_value": best["value"]}


# ------------------------------------------------------------------------------------------------------- figures


def draw(result: Result, subject: Subject, formats: Sequence[str]) -> list[Path]:
    """The curves, and the family's own figures, into figures/. Raises InputError where they cannot be written."""
    from pandas import DataFrame

    from rnnq import frame, weights
    from rnnq.figures import canvas, curves
    from rnnq.figures.subject import NO_WORDS, Examined

    row, info = _as_row(result, subject), _as_stage(result, subject)
    rows = frame.of_rows([row], info)
    table = _points(result.folder)
    recorded = DataFrame(table, columns=["run", "name", "step", "value"])
    recorded = recorded.astype({"run": "int64", "step": "int64", "value": float})
    module = families.find_figures(subject.family)
    save = canvas.saver(result.folder / "figures", canvas.images(formats))
    written: list[Path] = []
    with canvas.style():
        found = Examined(info, info.metric(info.primary), None, [row], [row], rows)
        words, own = (getattr(module, name, NO_WORDS) for name in ("WORDS", "CURVE_WORDS"))
        written += save(*curves.curves_figure(found, recorded, words, own, canvas.Scale.auto))
        if module is not None:
            wanted = recorded[recorded["name"].isin(module.CURVES)].reset_index(drop=True)
            written += module.draw(rows, wanted, save)
            if hasattr(module, "draw_weights"):
                written += module.draw_weights(rows, weights.OfFolder(result.folder, result.step), save)
    return written


def _points(place: Path) -> list[tuple[int, str, int, float]]:
    import csv

    with (place / "curves.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [(1, name, int(step), float(value or "nan")) for name, step, value in sorted(rows, key=lambda row: row[0])]


def _as_row(result: Result, subject: Subject) -> dict[str, Any]:
    """The run as a study's figures know one."""
    config = subject.config
    return {
        "id": 1,
        "stage": result.folder.name,
        "family": subject.family,
        "label": str(config.label()),
        "state": "done",
        "seed": config.seed,
        "group_key": "",
        "config": config.model_dump(mode="json"),
        "summary": dict(result.summary),
        "loss": folder.number(result.summary.get(config.primary().name)),
        "steps_done": result.step,
    }


def _as_stage(result: Result, subject: Subject) -> StageInfo:
    kind = type(subject.config)
    fields, metrics, seeds = field_types(kind), metric_rows(kind, [subject.config]), list(kind.seed_fields)
    return StageInfo(result.folder.name, subject.family, False, False, None, None, fields, metrics, seeds)
