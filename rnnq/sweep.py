"""Axes become configs, and configs a stage. Pure: no file is read here.

A *sweep* is many configs as plain dicts, in a stated order; a *stage* gives it a name, a family, the fields that
all configs share, and a rule for what `promote` makes of a winner. Definition files are read in rnnq/definitions.
No field is checked here: what a config may hold is the family's to say, and the database is not known.

    grid(lr=[1e-3, 1e-4], n_layers=[1, 2]).where(lambda c: c["n_layers"] == 1 or c["lr"] < 1e-3).seeds(3)
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from rnnq import retention
from rnnq.errors import InputError, nearest, text_of

__all__ = [
    "Best",
    "Runs",
    "Stage",
    "Sweep",
    "best",
    "configs",
    "grid",
    "hours_of",
    "last",
    "refined",
    "runs_of",
    "stage",
    "union",
    "zip",
]

Fields = dict[str, Any]
Predicate = Callable[[Fields], object]
Rule = Callable[[Fields], Iterable[Mapping[str, Any]] | Mapping[str, Any]]

LARGEST = 2_000_000  # configs in one sweep: about 1 GB of dicts; a slip in a grid is refused before it fills the memory
STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
EXAMPLE = 'stage = rnnq.stage("stage1", "dynamics", rnnq.grid(n_layers=[1, 2, 3]), base=dict(steps=10_000))'


# ------------------------------------------------------------------------------------------------- sweeps


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Sweep:
    """Configs in a stated order. It never changes: every method makes another one, and iteration gives copies."""

    _configs: tuple[Fields, ...]

    def __iter__(self) -> Iterator[Fields]:
        return map(dict, self._configs)

    def __len__(self) -> int:
        return len(self._configs)

    def __repr__(self) -> str:
        return f"<Sweep of {len(self):,} configs>"

    def __add__(self, other: Sweep) -> Sweep:
        return union(self, other) if isinstance(other, Sweep) else NotImplemented

    def __mul__(self, other: Sweep) -> Sweep:
        """Every config of the one with every config of the other; the first is the slowest."""
        if not isinstance(other, Sweep):
            return NotImplemented
        shared = sorted(self._field_names() & other._field_names())
        if shared:
            raise InputError(
                f"sweeps that are multiplied must not share a field; both have {', '.join(shared)}",
                "`a + b` puts one after the other; `.override(field=value)` replaces a field",
            )
        _refuse_too_many(len(self) * len(other))
        return Sweep(tuple(first | second for first in self._configs for second in other._configs))

    def where(self, predicate: Predicate) -> Sweep:
        """The configs for which `predicate` is true. It gets a dict of the sweep's fields, without those of `base=`."""
        if not callable(predicate):
            raise InputError(f"where() takes a function of a config, not {predicate!r}")
        return Sweep(tuple(config for config in self._configs if _holds(predicate, config)))

    def override(self, **fields: Any) -> Sweep:
        """Set fields on every config. A list is one value here, not an axis."""
        return Sweep(tuple(config | fields for config in self._configs))

    def seeds(self, seeds: int | Iterable[int]) -> Sweep:
        """Repeat each config with seeds 0..n-1, or with the seeds listed. The seed varies fastest."""
        return self * _seed_axis(seeds)

    def _field_names(self) -> set[str]:
        names: set[str] = set()
        for config in self._configs:
            names.update(config)
        return names


def grid(**axes: Any) -> Sweep:
    """The full product: the first axis is the slowest, values keep their order, a scalar or a string is one value."""
    columns = _columns(axes)
    count = 1
    for values in columns.values():
        count *= len(values)
    _refuse_too_many(count)
    return _rows(columns, itertools.product(*columns.values()))


def zip(**axes: Any) -> Sweep:
    """Axes of one length, walked together: the first config has the first value of each."""
    columns = _columns(axes)
    if not columns:
        raise InputError("zip() needs at least one axis")
    if len({len(values) for values in columns.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(values):,}" for name, values in columns.items())
        raise InputError(
            f"zip() needs axes of one length: {lengths}",
            "grid() makes all combinations; `.override(field=value)` gives every config the same value",
        )
    return _rows(columns, builtins.zip(*columns.values(), strict=True))


def union(*sweeps: Sweep) -> Sweep:
    """One sweep after the other. Nothing is dropped: configs that are equal are all kept."""
    for sweep in sweeps:
        if not isinstance(sweep, Sweep):
            raise InputError(f"union() takes sweeps, not {_type_of(sweep)}", "configs([...]) makes one of plain dicts")
    _refuse_too_many(sum(len(sweep) for sweep in sweeps))
    return Sweep(tuple(itertools.chain.from_iterable(sweep._configs for sweep in sweeps)))


def configs(rows: Iterable[Mapping[str, Any]]) -> Sweep:
    """A sweep of plain dicts, as they are."""
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise InputError(f"configs() takes a list of dicts, not {_type_of(rows)}")
    listed = list(itertools.islice(rows, LARGEST + 1))
    _refuse_too_many(len(listed))
    wrong = [f"config {index} is not a dict of fields: {row!r}" for index, row in enumerate(listed) if not _is_row(row)]
    if wrong:
        raise InputError(wrong)
    return Sweep(tuple(dict(row) for row in listed))


def _rows(columns: Mapping[str, Sequence[Any]], rows: Iterable[tuple[Any, ...]]) -> Sweep:
    names = tuple(columns)
    return Sweep(tuple(dict(builtins.zip(names, row, strict=True)) for row in rows))


def _columns(axes: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of every axis. Raises InputError with all axes that cannot be used."""
    columns: dict[str, list[Any]] = {}
    problems: list[str] = []
    for name, value in axes.items():
        try:
            columns[name] = _values(name, value)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return columns


def _values(name: str, value: Any) -> list[Any]:
    if hasattr(value, "tolist"):
        value = value.tolist()  # numpy's and torch's numbers become Python's own, also for the predicates
    if isinstance(value, (set, frozenset)):
        # sets of strings are walked in another order by each process, and the order of the runs would follow
        raise InputError(f"axis {name} is a set, which has no order; give a list")
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        return [value]
    values = list(itertools.islice(value, LARGEST + 1))  # an endless generator ends here, and is refused
    if not values:
        raise InputError(f"axis {name} is empty")
    _refuse_too_many(len(values))
    return values


def _seed_axis(seeds: int | Iterable[int]) -> Sweep:
    if isinstance(seeds, Iterable):
        values = _values("seed", seeds)
        twice = [str(seed) for seed, count in Counter(values).items() if count > 1]
        if twice:
            raise InputError(f"seeds() lists twice: {', '.join(twice)}")
        return grid(seed=values)
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise InputError(f"seeds({seeds!r}): give a number of seeds, at least 1, or a list of seeds")
    return grid(seed=range(seeds))


def _refuse_too_many(count: int) -> None:
    if count > LARGEST:
        raise InputError(
            f"a sweep has at most {LARGEST:,} configs; this one would have {count:,} or more",
            "leave combinations out before they multiply: grid(...).where(...) * grid(...)",
        )


def _is_row(row: object) -> bool:
    return isinstance(row, Mapping) and all(isinstance(name, str) for name in row)


def _type_of(value: object) -> str:
    return f"a {type(value).__name__}"


# --------------------------------------------------------------------- the user's functions, and how they fail


class _NoField(KeyError):
    """A function asked a config for a field that it does not have."""


class _Asked(dict[str, Any]):
    """The dict that a user's function gets.

    Its own KeyError tells a misspelt field from a KeyError of the function's own tables.
    """

    def __missing__(self, name: object) -> Any:
        raise _NoField(name)


def _holds(predicate: Predicate, config: Fields) -> bool:
    try:
        return bool(predicate(_Asked(config)))
    except _NoField as error:
        raise _no_field(predicate, config, error, " (where() does not see the fields of base=)") from error
    except Exception as error:
        raise _failure(predicate, config, error) from error


def _no_field(function: Any, config: Mapping[str, Any], error: _NoField, more: str = "") -> InputError:
    name = str(error.args[0])
    message = f"{_called(function)} asks for {name}, which is no field of {_listed(config)}"
    return InputError(message, nearest(name, config) + more)


def _failure(function: Any, config: Mapping[str, Any], error: Exception) -> InputError:
    trace = error.__traceback__.tb_next if error.__traceback__ else None  # without our own call
    return InputError(f"{_called(function)} fails on {_listed(config)}: {last_line(error)}", whole_trace(error, trace))


def _called(function: Any) -> str:
    """A function by name and place: grow (defs/stage1.py:30)."""
    name = getattr(function, "__name__", None) or repr(function)
    code = getattr(function, "__code__", None)
    return f"{name} ({_shown(code.co_filename)}:{code.co_firstlineno})" if code else name


def _shown(path: str | Path) -> str:
    """A path as short as it can be said: relative when it lies below the working directory."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(path).absolute().relative_to(Path.cwd()))
    return str(path)


def _listed(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in config.items()) or "a config without fields"


def last_line(error: BaseException) -> str:
    """An error by its kind and the first line of what it says."""
    text = text_of(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def whole_trace(error: BaseException, since: TracebackType | None) -> str:
    """The trace of an error from a frame on, as a hint has it."""
    return "the whole trace:\n" + "".join(traceback.format_exception(type(error), error, since)).rstrip()


# ------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Runs:
    """Runs that others wait for. Made by `runs_of`, or of a name by `stage`."""

    stage: str
    where: str | None = None  # a filter on their configs
    when: str | None = None  # a condition on their measurements, once they have all ended
    same_seed: bool = False  # each run waits only for those of its own seed


@dataclass(frozen=True)
class Best:
    """The run whose weights others start from. Made by `best` and `last`."""

    stage: str
    where: str | None = None
    same_seed: bool = False
    which: str = "best"  # of its checkpoints: best, last

    def shown(self) -> dict[str, Any]:
        """As JSON has it: a part of the identity of the runs that start from it."""
        return {name: value for name, value in vars(self).items() if value not in (None, False)}


def runs_of(stage: str | Stage, where: str | None = None, *, when: str | None = None, same_seed: bool = False) -> Runs:
    """The runs of a stage, or those that a filter on their configs selects, for `after=` of another stage.

    when        a condition over them, such as "mean(val_score) >= 0.95"; decided once they have all ended
    same_seed   a run waits only for those of its own seed
    """
    found = Runs(_name_of(stage), where, when, same_seed)
    problems = _wrong_name(found.stage)
    problems += [f"rnnq.runs_of: {name}= takes a filter, not {v!r}" for name, v in (("where", where), ("when", when))
                 if not (v is None or (isinstance(v, str) and v.strip()))]  # fmt: skip
    if problems:
        raise InputError(problems, 'rnnq.runs_of("stage1", "hidden_dim = 64", when="mean(loss) < 2")')
    return found


def best(stage: str | Stage, where: str | None = None, *, same_seed: bool = False) -> Best:
    """The best checkpoint of the best finished run of a stage, for `start_from=` of another stage.

    where       only of the runs that a filter on their configs selects
    same_seed   each run starts from the best one of its own seed
    """
    return _start(stage, where, same_seed, "best")


def last(stage: str | Stage, where: str | None = None, *, same_seed: bool = False) -> Best:
    """As `best`, but that run's last checkpoint."""
    return _start(stage, where, same_seed, "last")


def _start(stage: str | Stage, where: str | None, same_seed: bool, which: str) -> Best:
    of = runs_of(stage, where, same_seed=same_seed)
    return Best(of.stage, of.where, same_seed, which)


def _name_of(stage: Any) -> Any:
    return stage.name if isinstance(stage, Stage) else stage


@dataclass(frozen=True, eq=False)
class Stage:
    """A named set of runs, and what becomes of its winners. Made by `stage`, which checks it."""

    name: str
    family: Any  # a name, or a family defined in the definition file
    sweep: Sweep | None  # None: the stage only says how a promoted stage is called and refined
    base: Fields  # fields that all configs share; an entry of the sweep wins over them
    refine: Rule | None = None  # one winner in, the next stage's configs out; None keeps the winner as it is
    next: str | Stage | None = None  # what promote makes of this stage; None lets promote choose the name
    keep: str | None = None  # which checkpoints of its finished runs `rnnq gc` keeps; None: the default
    after: tuple[Runs, ...] = ()  # what its runs wait for
    otherwise: str = "skip"  # what becomes of them where the condition does not hold
    on_failed: str = "skip"  # and where one of the runs that they wait for has failed
    start_from: Best | None = None  # whose weights they start from
    priority: int = 0
    phase: str | None = None  # the part of a plan that it belongs to
    hours: float | Callable[[Fields], float] | None = None  # that a run is expected to take where none was measured
    label: str | Callable[[Fields], str] | None = None  # what its runs are called; None: the family says it
    listed: bool = False  # of a list of experiments, which may have keys that the family does not read

    def configs(self) -> Iterator[Fields]:
        """The fields of each run, in the order of the sweep."""
        for config in self.sweep or ():
            yield self.base | config


def stage(
    name: str,
    family: Any = None,
    sweep: Sweep | Iterable[Mapping[str, Any]] | None = None,
    *,
    base: Mapping[str, Any] | None = None,
    refine: Rule | None = None,
    next: str | Stage | None = None,
    keep: str | None = None,
    after: str | Stage | Runs | Iterable[str | Stage | Runs] = (),
    when: str | None = None,
    otherwise: str = "skip",
    on_failed: str = "skip",
    start_from: Best | None = None,
    priority: int = 0,
    phase: str | None = None,
    hours: float | Callable[[Fields], float] | None = None,
    label: str | Callable[[Fields], str] | None = None,
) -> Stage:
    """Declare a stage. `family` and `sweep` may be missing only where the stage is the `next=` of another.

    name    1-64 letters, digits, `_`, `-`, `.`; the first a letter or digit: folders are called after it
    sweep   a sweep, or a list of dicts
    base    fields that all configs share
    refine  config -> dicts of fields (or one dict): what `promote` makes of a winner
    next    what the promoted stage is called, or a stage that also says how it is refined in turn
    keep    which checkpoints of its finished runs `rnnq gc` keeps: "last and best", "best of top 10%"; see retention.py

    after       what its runs wait for: the name of a stage, `rnnq.runs_of(...)`, or a list of these
    when        a condition over the one stage of `after`, such as "mean(val_score) >= 0.95", once its runs have ended
    otherwise   where the condition does not hold: "skip" leaves the runs out; "go" lets them go on all the same
    on_failed   where a run that they wait for did not end well: "skip", or "go" on without it
    start_from  `rnnq.best(...)` or `rnnq.last(...)`: whose weights they start from; they wait for it, too
    priority    higher is claimed first
    phase       the part of a plan that it belongs to; see `rnnq plan`
    hours       that a run is expected to take, or a function of its config that says so: for `rnnq plan --dry-run`,
                where nothing like it was measured
    label       what its runs are called, or a function of a config that says so; by default the family says it
    """
    problems = [*_wrong_name(name), *_wrong_links(name, refine, next), *_wrong_rule(name, keep)]
    waits_for, wrong = _waits_for(after, when)
    wrong += _wrong_gate(name, waits_for, otherwise, on_failed, start_from, priority, phase)
    if not (hours is None or callable(hours) or _are_hours(hours)):
        wrong.append(f"hours= takes a number of hours, at least 0, or a function of a config, not {hours!r}")
    if not (label is None or callable(label) or (isinstance(label, str) and label.strip())):
        wrong.append(f"label= takes words, or a function of a config, not {label!r}")
    problems += [f"stage {name}: {problem}" for problem in wrong]
    if isinstance(family, Sweep):
        problems.append(f"stage {name}: the family is missing before the sweep")
    if base is not None and not _is_row(base):
        problems.append(f"stage {name}: base= takes a dict of fields, not {base!r}")
    made = sweep if isinstance(sweep, Sweep) else None
    if sweep is not None and made is None:
        try:
            made = configs(sweep)
        except InputError as error:
            problems += [f"stage {name}: {problem}" for problem in error.problems]
    if problems:
        raise InputError(problems, f"for example: {EXAMPLE}")
    return Stage(
        name,
        family,
        made,
        dict(base or {}),
        refine,
        next,
        None if keep is None else str(retention.parse(keep)),
        waits_for,
        otherwise,
        on_failed,
        start_from,
        priority,
        phase,
        hours,
        label,
    )


def label_of(stage: Stage, config: Mapping[str, Any]) -> str | None:
    """What the stage calls a run; None when it leaves that to the family.

    Raises InputError, which names the function and the config, when it raises or gives no words.
    """
    found = _said(stage.label, config) if callable(stage.label) else stage.label
    if found is not None and not (isinstance(found, str) and found.strip()):
        raise InputError(f"{_called(stage.label)} gives {found!r} for {_listed(config)}: no words", "label= names runs")
    return found


def _said(function: Callable[[Fields], Any], config: Mapping[str, Any]) -> Any:
    """What a function of a definition says of a config. Raises InputError, which names both, when it raises."""
    try:
        return function(_Asked(config))
    except _NoField as error:
        raise _no_field(function, config, error) from error
    except Exception as error:
        raise _failure(function, config, error) from error


def hours_of(stage: Stage, config: Mapping[str, Any]) -> float | None:
    """What the stage says that a run takes; None when it says nothing.

    Raises InputError, which names the function and the config, when it raises or gives no number of hours.
    """
    if not callable(stage.hours):
        return stage.hours
    found = _said(stage.hours, config)
    if not _are_hours(found):
        hint = "hours= takes a function of a config to a number of hours, at least 0"
        raise InputError(f"{_called(stage.hours)} gives {found!r} for {_listed(config)}: no number of hours", hint)
    return float(found)


def _are_hours(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def _waits_for(after: Any, when: Any) -> tuple[tuple[Runs, ...], list[str]]:
    """What `after=` and `when=` say together, and what is wrong with them."""
    items = [after] if isinstance(after, (str, Stage, Runs)) else after
    if not isinstance(items, Iterable):
        return (), [f"after= takes the names of stages, or rnnq.runs_of(...), not {after!r}"]
    found, problems = [], []
    for item in items:
        if not isinstance(item, (str, Stage, Runs)):
            problems.append(f"after= takes the names of stages, or rnnq.runs_of(...), not {item!r}")
            continue
        try:
            found.append(item if isinstance(item, Runs) else runs_of(item))
        except InputError as error:
            problems += [f"after=: {problem}" for problem in error.problems]
    if when is None or problems:
        return tuple(found), problems
    if not (isinstance(when, str) and when.strip()):
        return (), [f"when= takes a condition, not {when!r}"]
    if len(found) != 1 or found[0].when is not None:
        of = "is about the one stage of after=, which is missing" if not found else "would be said of more than one"
        return (), [f"when= {of}; say which: after=[rnnq.runs_of({_first(found)!r}, when={when!r}), ...]"]
    return (replace(found[0], when=when),), []


def _first(found: Sequence[Runs]) -> str:
    return found[0].stage if found else "stage1"


def _wrong_gate(
    name: object, after: Sequence[Runs], otherwise: Any, on_failed: Any, start_from: Any, priority: Any, phase: Any
) -> list[str]:
    problems = [
        f"{what}= is one of skip, go; not {value!r}"
        for what, value in (("otherwise", otherwise), ("on_failed", on_failed))
        if value not in ("skip", "go")
    ]
    if start_from is not None and not isinstance(start_from, Best):
        problems.append(f"start_from= takes rnnq.best(...) or rnnq.last(...), not {start_from!r}")
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) >= 2**31:
        problems.append(f"priority= takes a whole number, not {priority!r}")
    if phase is not None and not (isinstance(phase, str) and phase.strip()):
        problems.append(f"phase= takes words, not {phase!r}")
    others: list[Runs | Best] = [*after, *([start_from] if isinstance(start_from, Best) else [])]
    if any(other.stage == name for other in others):
        problems.append("waits for itself")
    if not others and (otherwise, on_failed) != ("skip", "skip"):
        problems.append("has otherwise= or on_failed=, and waits for nothing")
    return problems


def _wrong_name(name: object) -> list[str]:
    if isinstance(name, str) and STAGE_NAME.fullmatch(name):
        return []
    rule = "1 to 64 letters, digits, _, - or ., and begins with a letter or a digit"
    return [f"{name!r} cannot be the name of a stage: a name has {rule}"]


def _wrong_links(name: object, refine: object, follows: object) -> list[str]:
    problems: list[str] = []
    if refine is not None and not callable(refine):
        problems.append(f"stage {name}: refine= takes a function of a config, not {refine!r}")
    if follows is not None and not isinstance(follows, (str, Stage)):
        problems.append(f"stage {name}: next= takes a name or a stage, not {follows!r}")
    elif isinstance(follows, str):
        problems += [f"stage {name}: next=: {problem}" for problem in _wrong_name(follows)]
    if name == (follows.name if isinstance(follows, Stage) else follows):
        problems.append(f"stage {name}: next= names the stage itself")
    return problems


def _wrong_rule(name: object, keep: object) -> list[str]:
    if keep is None:
        return []
    if not isinstance(keep, str):
        return [f"stage {name}: keep= takes words, not {keep!r}: {retention.HINT}"]
    try:
        retention.parse(keep)
    except InputError as error:
        return [f"stage {name}: keep=: {error.message} ({error.hint})"]
    return []


def refined(rule: Stage | Rule | None, config: Mapping[str, Any]) -> list[Fields]:
    """What a stage's rule makes of one winner; the winner itself where there is no rule.

    Raises InputError, which names the rule and the config, when the rule raises, makes nothing, or makes
    something that is not a dict.
    """
    refine = rule.refine if isinstance(rule, Stage) else rule
    if refine is None:
        return [dict(config)]
    try:
        # copied as they come: a rule may change one dict and yield it twice
        made = [dict(item) if _is_row(item) else item for item in _items(refine(_Asked(config)))]
    except _NoField as error:
        raise _no_field(refine, config, error) from error
    except Exception as error:
        raise _failure(refine, config, error) from error
    hint = "a rule returns or yields dicts of fields, such as config | {'steps': 50_000}"
    for item in made:
        if not _is_row(item):
            raise InputError(f"{_called(refine)} makes {item!r} of {_listed(config)}: not a dict of fields", hint)
    if not made:
        raise InputError(f"{_called(refine)} makes nothing of {_listed(config)}", hint)
    return made


def _items(made: Any) -> Iterable[Any]:
    if made is None:
        return ()
    return [made] if isinstance(made, (Mapping, str)) or not isinstance(made, Iterable) else made
