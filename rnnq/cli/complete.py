"""What the shell offers when Tab is pressed. Whatever goes wrong, it offers nothing and says nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rnnq import query

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from rnnq.query import Scope

Offer = str | tuple[str, str]  # a word, or a word and what it is
Callback = Callable[[typer.Context, str], list[Offer]]

MOST = 50  # runs that are offered


def _silent(offer: Callback) -> Callback:
    """An error here would be printed into the line that somebody is typing."""

    @wraps(offer)
    def quietly(ctx: typer.Context, incomplete: str) -> list[Offer]:
        try:
            return [found for found in offer(ctx, incomplete) if _fits(found)]
        except Exception:
            return []

    return quietly


def _fits(offer: Offer) -> bool:
    """Shells take a line for an offer; a name with a line break in it cannot be one."""
    word = offer if isinstance(offer, str) else offer[0]
    return word.isprintable()


def _plain(text: str) -> str:
    """A description without signs that a shell may obey: zsh evaluates what it is told."""
    return re.sub(r"[^\w .,=+/-]", " ", text)


def _engine(ctx: typer.Context) -> Engine:
    """The database that the line names, or that of the environment; opened only when it is there."""
    from rnnq import db

    return db.open(ctx.params.get("db") or "experiments.db")


@_silent
def stages(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """The names of the stages, with their family."""
    from rnnq import runs

    return [(name, _plain(info.family)) for name, info in runs.stage_infos(_engine(ctx)).items()]


@_silent
def run_ids(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """The newest runs, with their stage, label and state."""
    from rnnq import runs

    if incomplete and not re.fullmatch("[0-9]{1,18}", incomplete):
        return []
    found = runs.newest(_engine(ctx), MOST, incomplete)
    given = {str(run) for run in _given(ctx)}
    return [(str(row.id), _plain(f"{row.stage} {row.label}, {row.state}")) for row in found if str(row.id) not in given]


def _given(ctx: typer.Context) -> Iterable[Any]:
    """Run ids that stand on the line already."""
    values = [value for value in ctx.params.values() if isinstance(value, (list, tuple))]
    return [item for value in values for item in value]


@_silent
def metrics(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """The metrics of the stage that the line names, or of all."""
    found = {str(m["name"]): _plain(f"{m['unit']} {m['better']}") for info in _infos(ctx) for m in info.metrics}
    return list(found.items())


def _infos(ctx: typer.Context) -> list[Any]:
    from rnnq import runs

    infos = runs.stage_infos(_engine(ctx))
    stage = ctx.params.get("stage")
    return [infos[stage]] if stage in infos else list(infos.values())


@_silent
def what(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """What a row of an export is."""
    return [("runs", "a row is a run"), ("groups", "a row is a group of seeds"), ("curves", "a row is a point")]


@_silent
def devices(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """auto, cpu, and the GPUs that the system shows."""
    found = sorted(int(path.name[6:]) for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
    return ["auto", "cpu", *(f"cuda:{number}" for number in found)]


# -------------------------------------------------------------------------------------------------------- filters


@_silent
def filters(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """The filter as far as it is written, its last word completed."""
    from rnnq import runs

    scope = runs.scope(_infos(ctx))
    start, word = _last_word(incomplete)
    if start.count('"') % 2 or start.count("'") % 2:
        return []  # inside a quoted value
    found = [name for name in _next_words(start, scope) if name.startswith(word)]
    if len(found) == 1:
        found = _with_operators(found[0], scope)
    return [start + name for name in found]


def _last_word(text: str) -> tuple[str, str]:
    at = len(text) - len(re.search(r"[\w.]*$", text)[0])  # type: ignore[index]
    return text[:at], text[at:]


def _next_words(start: str, scope: Scope) -> list[str]:
    """What may stand after this beginning of a filter."""
    if start.endswith("@"):
        return []  # the step of a point
    compared = re.search(r"([\w.]+)\s*(?:[=<>!~]+|(?:\bnot\s+)?\bin\s*\([^()]*)\s*$", start)
    if compared:
        kind = {**_types(scope), "state": "state"}.get(compared[1])
        return {"state": list(query.STATES), "bool": ["true", "false"]}.get(kind or "", [])
    if re.search(r"(^|\(|\b(and|or|not))\s*$", start):
        return [*_types(scope), "not"]
    whole = re.search(r"([=<>!~]\s*[^\s()=<>!~]+|[)\"'])\s*$", start)
    return ["and", "or"] if whole else ["and", "or", "in", "not in"]


def _with_operators(name: str, scope: Scope) -> list[str]:
    """Several ways to go on after the only name that fits: after a single one a shell would close the quote."""
    kind = _types(scope).get(name)
    if kind is None:
        return [name]
    return [name + operator for operator in {"str": ("=", "~"), "bool": ("", "=")}.get(kind, ("=", "<", ">"))]


def _types(scope: Scope) -> dict[str, str]:
    """Every name that a filter may use, and its type; one that is a field and a metric says which it means."""
    known = {name: scope.fields[of[0]] for name, of in scope.aliases.items()} | dict(scope.fields)
    both = set(known) & scope.metrics
    fields = {(f"config.{name}" if name in both else name): kind for name, kind in known.items()}
    numbers = {(f"summary.{name}" if name in both else name): "float" for name in sorted(scope.metrics)}
    return {**fields, **numbers, **query.COLUMNS, "tag": "str"}
