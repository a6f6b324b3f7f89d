"""Text from a checkpoint of a run: of one that is done, running, or was stopped on its way."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import Engine, text

from rnnq import checkpoint, config, db, definitions, families, runs, stored, train
from rnnq.checkpoint import Owner, Saved
from rnnq.errors import Damaged, DataError, InputError
from rnnq.families.base import Family, Generator, State

LONGEST = 1_000_000  # tokens
LOOKS = 5  # at the row of a run, whose worker replaces its checkpoints while we read

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """What shall be written."""

    prompt: str
    length: int  # tokens: of the family dynamics bytes, or what its config says
    temperature: float = 1.0  # 0 takes the likeliest token each time
    seed: int = 0
    which: str | None = None  # best, last; by default the best where one is kept, else the last


@dataclass(frozen=True)
class Opened:
    """A checkpoint that has been read. `remarks` says what had to be passed over."""

    which: str  # best, last
    step: int
    params: Mapping[str, torch.Tensor]
    carried: Mapping[str, torch.Tensor] | None  # None: kept by an older version, which did not write it
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampled:
    """What was written, without the prompt, and by whom."""

    run: int
    stage: str
    label: str
    checkpoint: str  # best, last
    step: int
    metrics: dict[str, float | None]  # the last value of each that was measured up to that step
    written: bytes | str
    remarks: tuple[str, ...]


def sample(engine: Engine, run: int, request: Request, device: torch.device, defs: Path) -> Sampled:
    """What the net of a run writes after a prompt.

    Raises InputError for what cannot be asked for, Damaged when no checkpoint file of the run can be used.
    """
    _refuse_impossible(request)
    row = runs.show(engine, run)
    family = _family(engine, row, defs)
    run_config = config.parse(family.Config, row["config"])
    if config.fingerprint(row["family"], run_config, config.start_key(row["start_from"])) != row["fingerprint"]:
        raise InputError(
            f"run {run} was made by another version of {row['family']}; here it has version {run_config.version}",
            "the code as it was when the stage was made can read it",
        )
    _check_learnt(engine, row, run_config)
    train.seed_everything(run_config.seed)
    drawn = family.init([run_config])
    opened = _open(engine, row, request.which, bool(drawn.carried))
    state = _state(drawn, opened, row, device)
    return Sampled(
        run=run,
        stage=row["stage"],
        label=row["label"],
        checkpoint=opened.which,
        step=opened.step,
        metrics=_metrics(row, opened.step),
        written=_written(family, state, run_config, request),
        remarks=opened.remarks,
    )


def _refuse_impossible(request: Request) -> None:
    problems = []
    if not 1 <= request.length <= LONGEST:
        problems.append(f"--length {request.length}: it is from 1 to {LONGEST:,}")
    if not (math.isfinite(request.temperature) and request.temperature >= 0):
        problems.append(f"--temperature {request.temperature:g}: it is 0 or more; 0 takes the likeliest each time")
    if not 0 <= request.seed < 2**63:
        problems.append(f"--seed {request.seed}: it is from 0 to 2**63 - 1")
    if problems:
        raise InputError(problems)


def _family(engine: Engine, row: Row, defs: Path) -> Family:
    """The code of the run's family. Raises InputError when it is not here, or not as it was, or cannot write."""
    info = runs.stage_info(engine, row["stage"])
    definition = None
    if info.family_in_source and info.source is not None and info.source_sha256 is not None:
        definition = definitions.load_source(info.source, info.source_sha256, defs)
    family = families.find(row["family"], definition)
    if isinstance(family, Generator):
        raise InputError(
            f"the family {family.name} is a generator: it keeps no checkpoint, so there is no net to write with",
            "make it a class with build and sample; see docs/families.md",
        )
    return family


def _check_learnt(engine: Engine, row: Row, run_config: config.Config) -> None:
    """Raises DataError where tokens that were learnt from a corpus would be learnt from another one here."""
    if not str(getattr(run_config, "tokens", "")).startswith("bpe:"):
        return
    with db.reading(engine) as connection:
        data = connection.execute(text("SELECT data FROM stages WHERE name = :name"), {"name": row["stage"]}).scalar()
    known = json.loads(data or "{}")
    for name, sha256 in run_config.datasets().items():
        if known.get(name, sha256) != sha256:
            raise DataError(
                f"{name} has sha256 {sha256[:12]} here; run {row['id']} was trained with {known[name][:12]}",
                "its tokens were learnt from that text; bring it here",
            )


# --------------------------------------------------------------------------------------------------- checkpoints


def _open(engine: Engine, row: Row, which: str | None, needs_carried: bool) -> Opened:
    """The checkpoint that is asked for; where its file has just been replaced, the one that replaced it."""
    study, _, root = db.study(engine)
    owner = Owner(study, row["stage"], row["id"], row["fingerprint"])
    for _ in range(LOOKS):
        try:
            return _chosen(engine, root, row, owner, which, needs_carried)
        except Damaged:
            before, row = row, runs.show(engine, row["id"])
            if _files(before) == _files(row):
                raise
    raise Damaged(f"the checkpoints of run {row['id']} change faster than they can be read")


def _files(row: Row) -> list[Any]:
    return [row[name] for name in ("checkpoint", "checkpoint_prev", "checkpoint_best")]


def _refuse_collected(engine: Engine, row: Row, which: str | None) -> None:
    """Raises InputError where the checkpoint that is asked for went by `rnnq gc`."""
    with db.reading(engine) as connection:
        rule = stored.let_go(connection).get(row["id"])
    if rule is not None:
        what = "last checkpoint" if which == "last" else "checkpoints"
        hint = (
            "`--checkpoint best` takes the best"
            if row["checkpoint_best"]
            else "what is gone cannot be sampled; `rnnq retry --set` trains another"
        )
        raise InputError(f"`rnnq gc` deleted the {what} of run {row['id']} (its rule: {rule})", hint)


def _chosen(engine: Engine, root: Path, row: Row, owner: Owner, which: str | None, needs_carried: bool) -> Opened:
    if row["state"] == "done" and not (row["checkpoint"] if which == "last" else any(_files(row))):
        _refuse_collected(engine, row, which)
    if not any(_files(row)):
        why = f"run {row['id']} is {row['state']} and has no checkpoint"
        raise InputError(why, "a worker makes one after 30 s, or by its --checkpoint-every, and one at the end")
    if which == "last":
        return _last(root, row, owner)
    best = _best(root, row, owner)
    if best is None:
        if which == "best":
            raise InputError(f"run {row['id']} has no best checkpoint", "`--checkpoint last` takes the newest")
        return _last(root, row, owner)
    if best.carried is None and needs_carried:
        said = f"the best checkpoint of run {row['id']} is without what is carried from step to step: took the last"
        return _last(root, row, owner, said)
    return best


def _best(root: Path, row: Row, owner: Owner) -> Opened | None:
    """The best of a run that is done; of any other, the best so far, which its newest checkpoint holds."""
    if row["checkpoint_best"]:
        state = checkpoint.load(root, Saved(**row["checkpoint_best"]), owner)
        return _kept(state) if "members" not in state else _whole(state, "best")
    _, state, problems = _newest(root, row, owner)
    return _kept(state["best"], *problems) if state["best"] else None


def _last(root: Path, row: Row, owner: Owner, *remarks: str) -> Opened:
    _, state, problems = _newest(root, row, owner)
    return _whole(state, "last", *remarks, *problems)


def _newest(root: Path, row: Row, owner: Owner) -> tuple[Saved, dict[str, Any], list[str]]:
    candidates = [Saved(**row[name]) if row[name] else None for name in ("checkpoint", "checkpoint_prev")]
    saved, state, problems = checkpoint.newest(root, candidates, owner)
    if saved is None or state is None:
        raise Damaged("\n".join(problems) or f"run {row['id']} has no newest checkpoint")
    return saved, state, problems


def _whole(state: Mapping[str, Any], which: str, *remarks: str) -> Opened:
    members = state["members"]
    return Opened(which, state["step"], members["params"], members["carried"], remarks)


def _kept(best: Mapping[str, Any], *remarks: str) -> Opened:
    return Opened("best", best["step"], best["params"], best.get("carried"), remarks)


def _state(drawn: State, opened: Opened, row: Row, device: torch.device) -> State:
    """The state that training had, in the place of the one that `init` has drawn. Raises InputError."""
    carried = drawn.carried if opened.carried is None else opened.carried
    for ours, theirs in ((drawn.params, opened.params), (drawn.carried, carried)):
        if {n: t.shape for n, t in ours.items()} != {n: t.shape for n, t in theirs.items()}:
            raise InputError(
                f"the checkpoint of run {row['id']} holds other tensors than {row['family']} makes now",
                "the code as it was when the run was trained can read it",
            )
    return State(*({name: t.to(device) for name, t in tree.items()} for tree in (opened.params, carried)))


# ------------------------------------------------------------------------------------------------------- writing


@torch.no_grad()
def _written(family: Family, state: State, run_config: config.Config, request: Request) -> bytes | str:
    train.seed_everything(request.seed)  # for a family that draws from the global random numbers
    found = family.sample(state, [run_config], [request.prompt], request.length, request.temperature, [request.seed])
    if len(found) != 1 or not isinstance(found[0], (bytes, str)):
        shown = ", ".join(type(item).__name__ for item in found)
        raise InputError(f"sample() of the family {family.name} gave {shown}", "it gives bytes or str")
    return found[0]


def _metrics(row: Row, step: int) -> dict[str, float | None]:
    """What the curves say of a step: the last value of each metric up to there."""
    upto = {name: [value for at, value in points if at <= step] for name, points in row["curves"].items()}
    return {name: values[-1] for name, values in upto.items() if values}
