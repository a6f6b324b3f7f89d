"""A definition becomes checked rows for the queue: family found, every config checked, identity and label derived."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnnq import definitions as sources
from rnnq import families, gates, query, sweep
from rnnq.config import (
    Config,
    as_json,
    check_places,
    field_types,
    fingerprint,
    group_key,
    known_keys,
    metric_rows,
    parse,
    start_key,
    to_json,
)
from rnnq.definitions import Definition
from rnnq.definitions.experiments import EXAMPLE, Listed
from rnnq.errors import DataError, InputError, RnnqError, nearest
from rnnq.queue import NewRun, NewStage, clean_text
from rnnq.sweep import Stage

if TYPE_CHECKING:
    from rnnq.definitions.sweeps import Written

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Origin:
    """Where a stage comes from: its family, and the definition file with its family or its rule."""

    family: str
    config: type[Config]
    family_in_source: bool
    has_rule: bool
    source: str | None
    source_sha256: str | None
    keep: str | None = None  # the stage's rule of what to keep; None: as it is, or the default
    phase: str | None = None
    defined: bool = False  # by its author, whole: what its runs wait for, too


@dataclass(frozen=True)
class Entry:
    """One config of a stage as its author wrote it, and the runs that it descends from.

    With a summary it was trained elsewhere: its run is done from the start, and what it read need not be here.
    """

    values: Mapping[str, Any]
    parents: tuple[tuple[int, str, str], ...] = ()
    summary: Mapping[str, Any] | None = None
    message: str | None = None
    data_here: bool = True  # False: a corpus that cannot be had here is the worker's business
    start_from: Mapping[str, Any] | None = None  # the run whose weights it starts from
    behind: Stage | None = None  # the stage whose gate it waits behind
    priority: int = 0
    written: Written | Listed | None = None  # as YAML or a list of experiments has it: with a name, and places
    label: str | None = None  # what the run is called; None: as its family says


@dataclass
class Problems:
    """Everything that is wrong with a stage. A sentence that many entries share is said once."""

    stage: str
    # place, sentence -> entries: their numbers, from 1, and what they are called where that says more
    found: dict[tuple[str, str], list[tuple[int, str | None]]] = field(default_factory=dict)
    of_base: dict[str, None] = field(default_factory=dict)  # about what a list of experiments shares, in order

    def add(
        self, sentence: str, entry: int, written: Written | Listed | None = None, path: Sequence[object] = ()
    ) -> None:
        """Note what is wrong with an entry; of one that was written with places where the field stands, too."""
        place = f"{written.place_of(path)}: " if written else ""
        if isinstance(written, Listed) and written.is_shared(path):
            self.of_base[f"{place}{sentence}"] = None
        else:
            label = written.label if isinstance(written, Listed) else None
            self.found.setdefault((place, sentence), []).append((entry, label))

    def lines(self, total: int) -> list[str]:
        """One line for each sentence."""
        found = self.found.items()
        of_entries = [f"{place}stage {self.stage}, {self._where(at, total)}: {text}" for (place, text), at in found]
        return [*self.of_base, *of_entries]

    @staticmethod
    def _where(entries: Sequence[tuple[int, str | None]], total: int) -> str:
        number, label = entries[0]
        if len(entries) == 1:
            return f"entry {number}" if label is None else label
        what, first = ("entries", str(number)) if label is None else ("runs", label)
        return f"{'all ' if len(entries) == total else ''}{len(entries)} {what}, the first is {first}"


def from_definitions(definitions: Sequence[Definition], defs: Path, progress: Progress = iter) -> list[NewStage]:
    """The stages of definition files, checked whole. Raises InputError with everything that is wrong in them."""
    made: list[NewStage] = []
    problems: list[str] = []
    for definition in definitions:
        problems += definition.problems
        source = sources.relative_source(definition.path, defs)
        for stage in definition.stages:
            try:
                with _blamed_on(definition, stage):
                    origin = _origin(stage, source, definition.sha256)
                    _refuse_orphans(stage, origin)
                    entries = _entries(definition, stage)
                    ignored = _without_ignored(origin.config, entries) if stage.listed else {}
                    made.append(replace(new_stage(stage.name, origin, entries, progress), ignored=ignored))
            except InputError as error:
                hint = f" ({error.hint})" if error.hint else ""
                problems += [*error.problems[:-1], error.problems[-1] + hint]
    names = [stage.name for definition in definitions for stage in definition.stages]
    problems += [f"stage {name} is defined twice" for name in sorted({n for n in names if names.count(n) > 1})]
    if not problems:
        problems = _misfits([stage for definition in definitions for stage in definition.stages], made)
    if problems:
        example = EXAMPLE if any(definition.problems for definition in definitions) else None
        raise InputError(list(dict.fromkeys(problems)), example)  # what is wrong in CONFIG is so in each of its stages
    return made


def _without_ignored(model: type[Config], entries: list[Entry]) -> dict[str, tuple[int, str]]:
    """Take keys that the family knows of and never reads out of the entries; of each how many had it, and why."""
    found: dict[str, tuple[int, str]] = {}
    for place, entry in enumerate(entries):
        values = known_keys(model, entry.values)
        for key in entry.values.keys() - values.keys():
            found[key] = (found.get(key, (0, ""))[0] + 1, model.ignored[key])
        entries[place] = replace(entry, values=values)
    return dict(sorted(found.items()))


def ignored(stages: Iterable[NewStage]) -> list[str]:
    """A sentence for each key of lists of experiments that nothing reads: how many runs have it, and why."""
    runs: dict[tuple[str, str], int] = {}
    for stage in stages:
        for key, (count, why) in stage.ignored.items():
            runs[key, why] = runs.get((key, why), 0) + count
    of = {count: f"{count:,} run{'s' if count > 1 else ''} of the list" for count in runs.values()}
    return [f"{key}, in {of[count]}, is ignored: {why}" for (key, why), count in runs.items()]


def only(stages: Sequence[NewStage], labels: Sequence[str]) -> list[NewStage]:
    """The runs of these labels alone, or of STAGE/LABEL; stages that are left without one are left out.

    A text that is no label may be several with commas between them. Raises InputError for labels that no run has.
    """
    known = {name for stage in stages for run in stage.runs for name in (run.label, f"{stage.name}/{run.label}")}
    wanted = {label.strip() for text in labels for label in ([text] if text in known else text.split(","))} - {""}
    missing = sorted(wanted - known)
    if missing or not wanted:
        plain = {run.label for stage in stages for run in stage.runs}
        near = [
            f"no run has the label {label!r} ({nearest(label, known - plain if '/' in label else plain)})"
            for label in missing
        ]
        raise InputError(near or ["--only names no label"])
    return [
        replace(stage, runs=runs, partial=len(runs) < len(stage.runs))
        for stage in stages
        if (runs := [run for run in stage.runs if wanted & {run.label, f"{stage.name}/{run.label}"}])
    ]


def _misfits(stages: Sequence[Stage], made: Sequence[NewStage]) -> list[str]:
    """Groups that may start from no run of the stage that they name, where that stands in the same definitions."""
    by_name = {stage.name: stage for stage in made}
    problems = []
    for stage in stages:
        if stage.start_from is None or stage.start_from.stage not in by_name:
            continue
        parent, child = by_name[stage.start_from.stage], by_name[stage.name]
        model = (
            families.find_config(stage.family) if isinstance(stage.family, str) else families.config_of(stage.family)
        )
        known = [json.loads(text) for text in {run.group_key: run.config for run in parent.runs}.values()]
        for run in {run.group_key: run for run in child.runs}.values():
            config = parse(model, json.loads(run.config))
            found = [config.misfits(parent.family, values) for values in known]
            if found and all(found):
                fewest = min(found, key=len)
                problems.append(
                    f"stage {child.name}, {run.label}: it can start from no run of {parent.name}: {', '.join(fewest)}"
                )
    return problems


def _entries(definition: Definition, stage: Stage) -> list[Entry]:
    start = stage.start_from.shown() if stage.start_from is not None else None
    behind = stage if stage.after or start is not None else None
    written: Sequence[Written | Listed | None] = definition.written.get(stage.name) or [None] * len(stage.sweep or ())
    return [
        Entry(
            values,
            start_from=start,
            behind=behind,
            priority=stage.priority,
            written=one,
            label=one.label if one else sweep.label_of(stage, values),
        )
        for values, one in zip(stage.configs(), written, strict=True)
    ]


def _refuse_orphans(stage: Stage, origin: Origin) -> None:
    wanted = origin.config.starts_from
    if wanted is not None and stage.start_from is None:
        hint = f'start_from=rnnq.best("STAGE", same_seed=True), where STAGE has runs of {wanted}'
        raise InputError(f"stage {stage.name}: a run of {origin.family} starts from one of {wanted}", hint)


@contextlib.contextmanager
def _blamed_on(definition: Definition, stage: Stage) -> Iterator[None]:
    """A definition's values and the methods of its config class are somebody's code, and may raise anything."""
    try:
        yield
    except RnnqError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if frame.filename == str(definition.path.resolve())]
        place = (theirs or frames)[-1]
        where = f"{place.name}, {Path(place.filename).name}:{place.lineno}"
        raise InputError(f"{definition.path}: stage {stage.name}: {sweep.last_line(error)} ({where})") from error


def _origin(stage: Stage, source: str, sha256: str) -> Origin:
    in_source = not isinstance(stage.family, str)
    config = families.config_of(stage.family) if in_source else families.find_config(stage.family)
    name = families.name_of(stage.family) if in_source else stage.family
    has_rule = stage.refine is not None or stage.next is not None
    return Origin(name, config, in_source, has_rule, source, sha256, stage.keep, stage.phase, True)


def new_stage(name: str, origin: Origin, entries: Sequence[Entry], progress: Progress = iter) -> NewStage:
    """A stage's rows from its entries. Equal configs become one run with the parents of all.

    Raises InputError with everything that is wrong in the entries.
    """
    problems = Problems(name)
    configs: dict[str, tuple[Config, Entry, list[tuple[int, str, str]]]] = {}
    firsts: dict[int, tuple[Config, Entry]] = {}  # by number: those that no entry before has the same config as
    for number, entry in enumerate(progress(entries), start=1):
        config, found = check_places(origin.config, entry.values)
        for path, sentence in found:
            problems.add(sentence, number, entry.written, path)
        if config is not None:
            key = fingerprint(origin.family, config, start_key(entry.start_from))
            if key not in configs:
                configs[key], firsts[number] = (config, entry, []), (config, entry)
            elif entry.written and (first := configs[key][1].written) and first.label != entry.written.label:
                sentence = f"experiment {entry.written.label!r} has the same config as {first.label!r}"
                problems.add(f"{sentence}: it would be trained once, under one name", number, entry.written)
            parents = configs[key][2]
            parents += [parent for parent in entry.parents if parent not in parents]
    data = _datasets(firsts, problems)
    if wrong := problems.lines(len(entries)):
        raise InputError(wrong)
    runs = [_new_run(origin.family, key, config, entry, tuple(of)) for key, (config, entry, of) in configs.items()]
    return NewStage(
        name=name,
        family=origin.family,
        version=origin.config.version,
        family_in_source=origin.family_in_source,
        has_rule=origin.has_rule,
        source=origin.source,
        source_sha256=origin.source_sha256,
        fields=query.stored(field_types(origin.config), origin.config.aliases),
        metrics=metric_rows(origin.config, [config for config, _, _ in configs.values()]),
        seed_fields=origin.config.seed_fields,
        data=data,
        runs=runs,
        keep=origin.keep,
        phase=origin.phase,
        defined=origin.defined,
    )


def _datasets(configs: Mapping[int, tuple[Config, Entry]], problems: Problems) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, (config, entry) in configs.items():
        if entry.summary is not None:
            continue
        try:
            found |= config.datasets()
        except DataError as error:
            if not entry.data_here:
                continue
            hint = f" (hint: {error.hint})" if error.hint else ""
            for line in error.message.splitlines():
                problems.add(f"{line}{hint}", number, entry.written)
    return found


def _new_run(family: str, key: str, config: Config, entry: Entry, parents: tuple[tuple[int, str, str], ...]) -> NewRun:
    pack_key, budget = config.pack_key(), _budget(config, entry)
    if not (pack_key is None or isinstance(pack_key, str)):
        raise InputError(f"pack_key() of {type(config).__name__} gives {pack_key!r}: neither a text nor None")
    if not (budget is None or (isinstance(budget, int) and 0 <= budget < 2**63)):
        raise InputError(f"steps_total() of {type(config).__name__} gives {budget!r}: no number of steps, nor None")
    return NewRun(
        label=clean_text(entry.label or str(config.label())),
        config=to_json(config),
        fingerprint=key,
        group_key=group_key(family, config, start_key(entry.start_from)),
        seed=config.seed,
        pack_key=pack_key,
        budget=budget,
        parents=parents,
        summary=entry.summary,
        message=entry.message,
        gate=_gate(entry.behind, config.seed) if entry.behind is not None else None,
        start_from=None if entry.start_from is None else as_json(entry.start_from),
        priority=entry.priority,
    )


def _budget(config: Config, entry: Entry) -> int | None:
    """Steps that a run takes; None where only a corpus tells that need not be here: the worker reckons it."""
    try:
        return config.steps_total()
    except DataError:
        if entry.data_here and entry.summary is None:
            raise
        return None


def _gate(stage: Stage, seed: int) -> str:
    """What a run of the stage waits for, as the database holds it."""
    after = [gates.Parents(of.stage, of.where, seed if of.same_seed else None, of.when) for of in stage.after]
    if stage.start_from is not None:
        of = stage.start_from
        after.append(gates.Parents(of.stage, of.where, seed if of.same_seed else None, start=True))
    return gates.Gate(tuple(after), stage.otherwise, stage.on_failed).to_json()


# ---------------------------------------------------------------------------------------- changes to a config


def parse_changes(changes: Sequence[str], model: type[Config]) -> dict[str, Any]:
    """ "steps=50000" as a field and its value: JSON where it is JSON, else a word. Raises InputError."""
    types = field_types(model)
    found: dict[str, Any] = {}
    problems = []
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or not name.strip():
            problems.append(f"--set {change}: not of the form key=value")
            continue
        field = model.aliases.get(name.strip(), name.strip())
        found[field] = text if types.get(field) == "str" else _value(text)
    if problems:
        raise InputError(problems, "--set steps=50000")
    return found


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with some fields set; a name with dots is that of a field inside a section. It is left as it was."""
    found = dict(config)
    for name, value in changes.items():
        *sections, last = name.split(".")
        here = found
        for section in sections:
            inner = here.get(section)
            here[section] = dict(inner) if isinstance(inner, Mapping) else {}
            here = here[section]
        here[last] = value
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
