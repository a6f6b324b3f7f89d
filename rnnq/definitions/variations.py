"""Lists of experiments made of others: some of their runs, or each with several learning rates or seeds.

The names and what they make are those of hansgundlach/Experimental_Progress. Each returns a new list that shares
nothing with the one that it was made of.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from rnnq.errors import InputError, nearest

Group = dict[str, Any]  # {"name": ..., "subexperiments": [{"label": ..., "overrides": {...}}]}

STANDARD_LR_SWEEP = [10**-4, 10**-3.5, 10**-3, 10**-2.5, 10**-2, 10**-1.5, 10**-1]
NARROW_LR_SWEEP = [10**-3, 10**-2.5, 10**-2, 10**-1.5, 10**-1]
SWEEP_CHARACTERS = 129e6  # of each run of create_multi_lr_experiments


def fmt(lr: float) -> str:
    """A learning rate in a label: 1.0em04, 3.2em03, 0.01, 0.032, 0.1, 2.

    Whole numbers from 1 on, three decimals from 0.01 on, else one decimal and an exponent, "m" its minus. So different
    rates may be called the same: 1.5 and 2 are both "2".
    """
    if lr >= 1:
        return f"{lr:.0f}"
    if lr >= 0.01:
        return f"{lr:.3f}".rstrip("0").rstrip(".")
    return f"{lr:.1e}".replace("-", "m").replace("+", "p")


def subset_experiments(groups: Iterable[Mapping[str, Any]], labels: Collection[str]) -> list[Group]:
    """The runs that have one of the labels, in their order; a group that is left without one is left out.

    Raises InputError for a label that none has.
    """
    found = _copied(groups)
    if isinstance(labels, str) or not isinstance(labels, Collection):
        raise InputError(f"labels are a set or a list, not {labels!r}", f'{{"{labels}"}}')
    known = [run["label"] for group in found for run in group["subexperiments"]]
    missing = [label for label in labels if label not in known]
    if missing:
        said = [f"no run has the label {label!r} ({nearest(str(label), map(str, known))})" for label in missing]
        raise InputError(said)
    for group in found:
        group["subexperiments"] = [run for run in group["subexperiments"] if run["label"] in labels]
    return [group for group in found if group["subexperiments"]]


def generate_lr_sweep_experiment(
    base_label: str, lrs: Sequence[float], overrides: Mapping[str, Any] | None = None, *, key: str = "learning_rate"
) -> Group:
    """One group, base_label_lr_sweep, with a run for each rate; not a list. `key` is what the family calls the rate."""
    runs = [
        {"label": f"{base_label}_lr_{fmt(lr)}", "overrides": {**deepcopy(dict(overrides or {})), key: lr}}
        for lr in _rates(lrs)
    ]
    return {"name": f"{base_label}_lr_sweep", "subexperiments": runs}


def create_multi_lr_experiments(
    groups: Iterable[Mapping[str, Any]],
    lrs: Sequence[float],
    max_characters: float | None = SWEEP_CHARACTERS,
    *,
    key: str = "learning_rate",
) -> list[Group]:
    """Each run with each rate; the group's name gets _lr_sweep behind it, the label _lr_ and the rate.

    max_characters   the text of every run, whatever it had before; None leaves it. A rate that is best on little text
                     need not be on much: the published study swept so, and then trained on 2 to 8 times the text.
    key              what the family calls the rate
    """
    more = {} if max_characters is None else {"max_characters": max_characters}
    rates = _rates(lrs)
    return _multiplied(
        groups, lambda label: [(f"{label}_lr_{fmt(lr)}", {key: lr, **more}) for lr in rates], "_lr_sweep"
    )


def create_multi_seed_experiments(groups: Iterable[Mapping[str, Any]], seeds: Sequence[int]) -> list[Group]:
    """Each run with each seed, which is put behind its label; the groups keep their names."""
    if isinstance(seeds, int):
        raise InputError(f"seeds are a list, not {seeds!r}", f"range({seeds})")
    listed = [_plain(seed) for seed in seeds]
    wrong = [seed for seed in listed if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0]
    twice = [seed for seed, count in Counter(listed).items() if count > 1] if not wrong else []
    problems = [f"{seed!r} is no seed: a whole number, at least 0" for seed in wrong]
    problems += [f"seed {seed} is listed twice" for seed in twice] + ([] if listed else ["there are no seeds"])
    if problems:
        raise InputError(problems)
    return _multiplied(groups, lambda label: [(f"{label}_{seed}", {"seed": seed}) for seed in listed], "")


def _multiplied(
    groups: Iterable[Mapping[str, Any]], each: Callable[[str], Sequence[tuple[str, dict[str, Any]]]], suffix: str
) -> list[Group]:
    """Every run once for each of what `each` makes of its label: another label, and fields to be set."""
    found = _copied(groups)
    for group in found:
        group["name"] += suffix
        group["subexperiments"] = [
            _changed(run, label, fields) for run in group["subexperiments"] for label, fields in each(run["label"])
        ]
    return found


def _changed(run: Mapping[str, Any], label: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    made = deepcopy(dict(run))
    where = "config" if "config" in made and "overrides" not in made else "overrides"
    made[where] = {**made.get(where, {}), **fields}
    return made | {"label": label}


def _copied(groups: Iterable[Mapping[str, Any]]) -> list[Group]:
    """A copy that shares nothing. Raises InputError with all that is no group."""
    if isinstance(groups, (Mapping, str)) or not isinstance(groups, Iterable):
        hint = "put it into a list: [group]" if isinstance(groups, Mapping) else None
        raise InputError(f"a list of groups was expected, not {type(groups).__name__}", hint)
    listed = list(groups)
    problems = [problem for number, group in enumerate(listed, start=1) for problem in _problems(number, group)]
    if problems:
        raise InputError(problems, '[{"name": "widths", "subexperiments": [{"label": "16d", "overrides": {}}]}]')
    return [deepcopy(dict(group)) for group in listed]


def _problems(number: int, group: Any) -> list[str]:
    if not isinstance(group, Mapping) or not isinstance(group.get("name"), str):
        return [f"group {number} is no dict with a name"]
    name, runs = group["name"], group.get("subexperiments")
    if not isinstance(runs, (list, tuple)):
        return [f"group {name} has no list of subexperiments"]
    problems = []
    for place, run in enumerate(runs, start=1):
        if not isinstance(run, Mapping) or not isinstance(run.get("label"), str):
            problems.append(f"group {name}: run {place} is no dict with a label")
        elif any(not isinstance(run.get(where, {}), Mapping) for where in ("overrides", "config")):
            problems.append(f"group {name}, {run['label']}: overrides is no dict")
    return problems


def _plain(number: Any) -> Any:
    """A number of numpy as Python's own."""
    return number.item() if hasattr(number, "item") else number


def _rates(lrs: Sequence[float]) -> list[float]:
    """Learning rates as floats. Raises InputError for what is none, and for rates that labels would not tell apart."""
    if isinstance(lrs, (int, float)):
        raise InputError(f"learning rates are a list, not {lrs!r}", f"[{lrs!r}]")
    listed = [_plain(lr) for lr in lrs]
    problems = [] if listed else ["there are no learning rates"]
    is_rate = [isinstance(lr, (int, float)) and not isinstance(lr, bool) and 0 < lr < math.inf for lr in listed]
    problems += [f"{lr!r} is no learning rate" for lr, fine in zip(listed, is_rate, strict=True) if not fine]
    if not problems:
        called: dict[str, list[float]] = {}
        for lr in listed:
            called.setdefault(fmt(lr), []).append(lr)
        problems = [
            f"learning rates {' and '.join(f'{lr:g}' for lr in same)} are all called {label}"
            for label, same in called.items()
            if len(same) > 1
        ]
    if problems:
        raise InputError(problems)
    return listed
