"""The filter language: text -> tree -> bound SQL.

    loss<1.9 and n_layers>=2 and not use_output_gate
    label ~ "lstm_5s5a*" and state in (done, failed)
    mean(loss) < 1.7 and n(loss) >= 3 and all(done)
    val_loss@5000 < 2

A name is a run column, else a config field, or one that its family also calls so, else a summary metric; `config.x` and
`summary.x` say which. `tag = good`
holds for a run that has that tag among others; `val_loss@5000` is that point of its curve. Words are bare or in quotes
of either kind, without escapes. `~` matches a glob pattern. `<` compares numbers only, with a number or with another
name (`steps_done < budget`). mean, median, std, min, max and n are over the runs of the same stage and group, and so is
all: `all(done)`, `all(val_loss < 2)`; in a gate, which is about many runs, they are over these. A comparison with null
is neither true nor false, and `not` leaves it so: such a run is not found.

Nothing of the text reaches the SQL but names that are known; values are bound parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rnnq.databases.words import OF, Words
from rnnq.errors import InputError, nearest

LONGEST = 10_000  # characters of a filter
CONDITIONS = 500  # in one filter; SQLite refuses an expression 1000 deep, and a chain of ANDs is one deep for each
NESTING = 8  # parentheses and nots; SQLite's parser stack holds 100 in older versions, and a level takes up to 6

# run columns that a filter may name, and their types
COLUMNS = {
    "id": "int",
    "stage": "str",
    "family": "str",
    "label": "str",
    "fingerprint": "str",
    "group_key": "str",
    "seed": "int",
    "state": "str",
    "wish": "str",
    "wake_at": "float",
    "priority": "int",
    "pack_key": "str",
    "attempt": "int",
    "failures": "int",
    "worker": "str",
    "lease_until": "float",
    "budget": "int",
    "steps_done": "int",
    "loss": "float",
    "cause": "str",
    "message": "str",
    "note": "str",
    "created_at": "float",
    "started_at": "float",
    "ended_at": "float",
}
# the same as tables.STATES, which would load SQLAlchemy
STATES = ("waiting", "pending", "running", "done", "failed", "cancelled", "skipped")
OPEN = STATES[:3]  # neither ended nor left out

_FUNCTIONS = ("mean", "median", "std", "min", "max", "n")
_KEYWORDS = ("and", "or", "not", "in")
_COMPARISONS = ("=", "==", "!=", "<", "<=", ">", ">=")
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_INSTEAD = {"&": "and", "&&": "and", "|": "or", "||": "or", "!": "not", "<>": "!=", "=<": "<=", "=>": ">=", "=~": "~"}
TAG = "tag"  # a run has any number of them
_NUMBERS = ("int", "float")
_NEEDS = {"bool": "true or false", "int": "a number", "float": "a number"}  # anything else is text
_NOTHING = "NULL"  # stands where a problem was noted, so that the rest is still checked


def stored(fields: Mapping[str, str], aliases: Mapping[str, str]) -> dict[str, str]:
    """Names as a stage stores them: each field's type; for an alias, which a field of that name is not, "=" and its
    field.
    """
    return {name: f"={of}" for name, of in aliases.items() if of in fields} | dict(fields)


def parted(names: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Stored names as fields with their types, and aliases with their fields."""
    aliases = {name: of.removeprefix("=") for name, of in names.items() if of.startswith("=")}
    return {name: kind for name, kind in names.items() if name not in aliases}, aliases


@dataclass(frozen=True)
class Scope:
    """What names mean: config fields with their types, summary metrics."""

    fields: Mapping[str, str]  # config field (dots for nested) -> "bool" | "int" | "float" | "str"
    metrics: frozenset[str]  # summary metrics, all numbers
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # other names -> the fields that they are

    def meant(self, name: str) -> tuple[str, ...]:
        """The config fields that a name means: that of this name, then those whose families call them so, too."""
        return (*([name] if name in self.fields else []), *self.aliases.get(name, ()))


@dataclass(frozen=True)
class Condition:
    """A condition for WHERE."""

    sql: str  # over the alias `runs`; parameters as :q0, :q1, ...
    params: Mapping[str, Any]


def compile(text: str, scope: Scope, words: Words = OF["sqlite"]) -> Condition:
    """The SQL that a filter means, in the words of a database. Raises InputError with a caret under each wrong name,
    type or sign.

    On SQLite the connection must know the aggregates std and median.
    """
    tree = _Parser(text).tree()
    compiler = _Compiler(scope, words)
    sql = compiler.sql(tree)
    if compiler.problems:
        raise _error(text, compiler.problems)
    return Condition(sql, compiler.params)


@dataclass(frozen=True)
class Verdict:
    """A condition on many runs together, as one value, and the numbers that it is about."""

    sql: str
    values: Mapping[str, str]  # such as mean(loss) -> SQL
    params: Mapping[str, Any]


def over(text: str, scope: Scope, words: Words, members: str) -> Verdict:
    """What a condition such as `mean(val_score) >= 0.95` says of many runs: those of which `members`, SQL over the
    alias `g`, holds. Numbers are of those among them that are done. Raises InputError.
    """
    tree = _Parser(text).tree()
    compiler = _Compiler(scope, words, members)
    sql = compiler.sql(tree)
    if compiler.problems:
        raise _error(text, compiler.problems)
    return Verdict(sql, compiler.values, compiler.params)


def mentions(text: str, name: str) -> bool:
    """Whether a filter asks about a name. Raises InputError for one that is not a filter."""
    return name in set(_names(_Parser(text).tree()))


def _names(node: Any) -> Iterator[str]:
    """The words of a tree that stand where a name stands."""
    match node:
        case _Junction(_, items):
            for item in items:
                yield from _names(item)
        case _Not(item):
            yield from _names(item)
        case _Compare(left, _, right):
            yield from (*_names(left), *_names(right))
        case _Flag(operand) | _Match(operand) | _Among(operand):
            yield from _names(operand)
        case _Aggregate(_, token) | _Point(token):
            yield from _names(token)
        case _All(_, item):
            yield from _names(item)
        case _Token("word", word):
            yield word


# ------------------------------------------------------------------------------------------------ errors


@dataclass(frozen=True)
class _Problem:
    at: int  # characters from the start of the filter
    message: str
    hint: str | None = None
    word: str = ""  # what the hint is about


def _error(text: str, problems: Iterable[_Problem]) -> InputError:
    found = sorted(problems, key=lambda problem: problem.at)
    hints = {problem.hint: problem.word for problem in found if problem.hint}
    if len(hints) > 1:
        hint = "; ".join(f"{word}: {advice}" for advice, word in hints.items())
    else:
        hint = next(iter(hints), "")
    return InputError([_pointed(text, problem) for problem in found], hint or None)


def _pointed(text: str, problem: _Problem, width: int = 200) -> str:
    """The filter with a caret under the problem; of a long filter only what is near."""
    start = max(0, problem.at - width // 2) if len(text) > width else 0
    before = "..." if start else ""
    after = "..." if start + width < len(text) else ""
    # one column each, so that a newline or an escape code does not move the caret
    near = "".join(c if c.isprintable() else " " for c in text[start : start + width])
    line = f"filter: {before}{near}{after}"
    caret = " " * (len("filter: ") + len(before) + problem.at - start) + "^"
    return f"{line}\n{caret} {problem.message}"


# ------------------------------------------------------------------------------------------------- words

_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<quoted>"[^"]*"|'[^']*')
      | (?P<word>[\w.*?\[\]/:+%-]+)
      | (?P<operator>[<>=!~&|]+)
      | (?P<mark>[(),@])""",
    re.VERBOSE,
)
_NUMBER = re.compile(r"[+-]?([0-9][0-9_]*(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_UNREADABLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # control codes, and what UTF-8 cannot say


@dataclass(frozen=True)
class _Token:
    kind: str  # word, number, quoted, end; a keyword, operator or mark is its own kind
    text: str  # as meant: without quotes
    at: int

    @property
    def shown(self) -> str:
        return f'"{self.text}"' if self.kind == "quoted" else self.text


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise _error(text, [_stray(text, at)])
        if found.lastgroup != "space":
            yield _token(text, str(found.lastgroup), found[0], at)
        at = found.end()
    yield _Token("end", "the end", len(text.rstrip()))


def _stray(text: str, at: int) -> _Problem:
    if text[at] in "'\"":
        return _Problem(at, "this quote is never closed")
    return _Problem(at, f"unexpected {text[at]}", "a word with such signs goes in quotes")


def _token(text: str, group: str, part: str, at: int) -> _Token:
    match group:
        case "quoted":
            return _Token("quoted", part[1:-1], at)
        case "word" if part.lower() in _KEYWORDS:
            return _Token(part.lower(), part, at)
        case "word" if _NUMBER.fullmatch(part):
            if math.isinf(_number(part)):
                raise _error(text, [_Problem(at, f"{part} is too large")])
            return _Token("number", part, at)
        case "word":
            return _Token("word", part, at)
        case "operator" if part not in (*_COMPARISONS, "~", "!~"):
            instead = f"write {_INSTEAD[part]}" if part in _INSTEAD else None
            raise _error(text, [_Problem(at, f"no such operator: {part}", instead, part)])
    return _Token(part, part, at)


def _number(text: str) -> int | float:
    plain = text.replace("_", "")
    # a whole number of more than 64 bits cannot be bound, but can be compared as a float
    if re.fullmatch("[+-]?[0-9]{1,19}", plain) and -(2**63) <= int(plain) < 2**63:
        return int(plain)
    return float(plain)


# -------------------------------------------------------------------------------------------------- tree


@dataclass(frozen=True)
class _Aggregate:
    function: _Token
    name: _Token

    @property
    def at(self) -> int:
        return self.function.at


@dataclass(frozen=True)
class _Point:  # val_loss@5000
    name: _Token
    step: _Token

    @property
    def at(self) -> int:
        return self.name.at


_Operand = _Token | _Aggregate | _Point


@dataclass(frozen=True)
class _Flag:  # use_gate
    operand: _Operand


@dataclass(frozen=True)
class _Compare:  # loss < 2
    left: _Operand
    operator: _Token
    right: _Operand


@dataclass(frozen=True)
class _Match:  # label ~ a*
    left: _Operand
    operator: _Token
    pattern: _Token


@dataclass(frozen=True)
class _Among:  # state in (done, failed)
    left: _Operand
    negated: bool
    values: tuple[_Token, ...]


@dataclass(frozen=True)
class _Not:
    item: _Node


@dataclass(frozen=True)
class _Junction:
    word: str  # AND, OR
    items: tuple[_Node, ...]


@dataclass(frozen=True)
class _All:  # all(loss < 2)
    function: _Token
    item: _Node


_Node = _Flag | _Compare | _Match | _Among | _Not | _Junction | _All


class _Parser:
    """Recursive descent: `or` binds least, then `and`, then `not`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._check_text()
        self.tokens = list(_tokens(text))
        self.here = 0
        self.depth = 0
        self.conditions = 0

    def _check_text(self) -> None:
        if len(self.text) > LONGEST:
            raise _error(self.text, [_Problem(LONGEST, f"the filter is longer than {LONGEST:,} characters")])
        if found := _UNREADABLE.search(self.text):
            raise _error(self.text, [_Problem(found.start(), f"unexpected character {found[0]!r}")])

    def tree(self) -> _Node:
        if self.token.kind == "end":
            raise self._wrong(self.token, "the filter is empty", "for example: loss<1.9 and state=done")
        tree = self._disjunction()
        if self.token.kind == ")":
            raise self._wrong(self.token, "no ( for this )")
        if self.token.kind != "end":
            raise self._expected("an operator, `and` or `or`")
        return tree

    # the tools of the rules below

    @property
    def token(self) -> _Token:
        return self.tokens[self.here]

    def _accept(self, *kinds: str) -> _Token | None:
        """The next token, taken, if it is of these kinds."""
        token = self.token
        if token.kind not in kinds:
            return None
        self.here += 1
        return token

    def _need(self, what: str, *kinds: str) -> _Token:
        token = self._accept(*kinds)
        if token is None:
            raise self._expected(what)
        return token

    def _close(self, opening: _Token) -> None:
        if self.token.kind == "end":
            raise self._wrong(opening, "this ( is never closed")
        self._need("`)`", ")")

    def _expected(self, what: str) -> InputError:
        return self._wrong(self.token, f"{what} was expected here, not {self.token.shown}")

    def _wrong(self, token: _Token, message: str, hint: str | None = None) -> InputError:
        return _error(self.text, [_Problem(token.at, message, hint, token.shown)])

    def _count(self, token: _Token) -> None:
        self.conditions += 1
        if self.conditions > CONDITIONS:
            raise self._wrong(token, f"more than {CONDITIONS} conditions", "`x in (a, b, ...)` is one condition")

    # one rule of the grammar each

    def _disjunction(self) -> _Node:
        items = [self._conjunction()]
        while self._accept("or"):
            items.append(self._conjunction())
        return items[0] if len(items) == 1 else _Junction("OR", tuple(items))

    def _conjunction(self) -> _Node:
        items = [self._negation()]
        while self._accept("and"):
            items.append(self._negation())
        return items[0] if len(items) == 1 else _Junction("AND", tuple(items))

    def _negation(self) -> _Node:
        opening = self._accept("not", "(")
        if opening is None:
            return self._comparison()
        self.depth += 1
        if self.depth > NESTING:
            raise self._wrong(opening, f"nested deeper than {NESTING} levels")
        if opening.kind == "not":
            node: _Node = _Not(self._negation())
        else:
            node = self._disjunction()
            self._close(opening)
        self.depth -= 1
        return node

    def _comparison(self) -> _Node:
        self._count(self.token)
        if self.token.text.lower() == "all" and self.tokens[self.here + 1].kind == "(":
            return self._all()
        left = self._operand("a name")
        if operator := self._accept("~", "!~"):
            return _Match(left, operator, self._value("a pattern"))
        if self.token.kind in ("in", "not"):
            negated = self._accept("not") is not None
            self._need("`in`", "in")
            return _Among(left, negated, self._values())
        return self._chain(left)

    def _chain(self, left: _Operand) -> _Node:
        """`1 < loss < 2` means `1 < loss and loss < 2`."""
        pairs: list[_Node] = []
        first = left
        while operator := self._accept(*_COMPARISONS):
            if pairs:
                self._count(operator)
            right = self._operand("a value")
            pairs.append(_Compare(left, operator, right))
            left = right
        if not pairs:
            return _Flag(first)
        return pairs[0] if len(pairs) == 1 else _Junction("AND", tuple(pairs))

    def _operand(self, what: str) -> _Operand:
        if self.token.kind == "word" and self.tokens[self.here + 1].kind == "(":
            return self._aggregate()
        value = self._need(what, "word", "number", "quoted")
        if self.token.kind != "@":
            return value
        self._need("`@`", "@")
        step = self._need("a step", "number")
        if value.kind == "number" or not re.fullmatch("[0-9_]{1,18}", step.text):
            message = "a point of a curve is a metric and a step, as in val_loss@5000"
            raise self._wrong(value, message, "a word that has @ in it goes in quotes")
        return _Point(value, step)

    def _value(self, what: str) -> _Token:
        value = self._need(what, "word", "number", "quoted")
        if self.token.kind == "@":
            raise self._wrong(
                self.token, "a point of a curve cannot stand here", "a word that has @ in it goes in quotes"
            )
        return value

    def _values(self) -> tuple[_Token, ...]:
        opening = self._need("`(`", "(")
        values = [self._value("a value")]
        while self._accept(","):
            values.append(self._value("a value"))
        self._close(opening)
        return tuple(values)

    def _all(self) -> _All:
        function = self._need("a function", "word")
        opening = self._need("`(`", "(")
        self.depth += 1
        if self.depth > NESTING:
            raise self._wrong(opening, f"nested deeper than {NESTING} levels")
        item = self._disjunction()
        self._close(opening)
        self.depth -= 1
        return _All(function, item)

    def _aggregate(self) -> _Aggregate:
        function = self._need("a function", "word")
        word = function.text.lower()
        if word not in _FUNCTIONS:
            raise self._wrong(function, f"no such function: {function.text}", nearest(word, _FUNCTIONS))
        opening = self._need("`(`", "(")
        name = self._value("a name")
        self._close(opening)
        return _Aggregate(function, name)


# --------------------------------------------------------------------------------------------------- SQL


@dataclass(frozen=True)
class _Term:
    """Something that has a value in each run."""

    name: str
    sql: str
    type: str  # as in COLUMNS, or "state"

    @property
    def is_number(self) -> bool:
        return self.type in _NUMBERS

    @property
    def need(self) -> str:
        return f"{self.name} is {_NEEDS.get(self.type, 'text')}"


class _Compiler:
    """Tree -> SQL. Notes every problem instead of stopping at the first."""

    def __init__(self, scope: Scope, words: Words, members: str | None = None) -> None:
        self.scope = scope
        self.words = words
        self.table = "runs"  # whose names are meant
        self.members = members  # of a condition on many runs: which; None: it is on one run, and its group
        self.values: dict[str, str] = {}  # the numbers over many runs that it is about
        self.params: dict[str, Any] = {}
        self.problems: dict[_Problem, None] = {}  # a set that keeps its order; in a chain a name is looked up twice

    def sql(self, node: _Node) -> str:
        match node:
            case _Junction(word, items):
                return "(" + f" {word} ".join(self.sql(item) for item in items) + ")"
            case _Not(item):
                return f"NOT ({self.sql(item)})"
            case _Flag():
                return self._flag(node)
            case _Compare():
                return self._compare(node)
            case _Match():
                return self._match(node)
            case _Among():
                return self._among(node)
            case _All():
                return self._all(node)

    # one kind of condition each

    def _all(self, node: _All) -> str:
        if self.table != "runs":
            return self._note(node.function, "all(...) cannot stand inside of all(...)")
        group = self._group()
        self.table = "g"
        condition = self.sql(node.item)
        self.table = "runs"
        # of a run where it is null, as one without that metric, it does not hold
        return f"NOT EXISTS (SELECT 1 FROM runs AS g WHERE {group} AND NOT coalesce({condition}, false))"

    def _group(self) -> str:
        """Which runs, by the alias g, are those that mean(...) and all(...) are over."""
        return self.members or "g.stage = runs.stage AND g.group_key = runs.group_key"

    def _flag(self, node: _Flag) -> str:
        if self.table == "g" and isinstance(node.operand, _Token) and self._is_state(node.operand):
            return f"g.state = {self._bind(node.operand.text)}"
        term = self._term(node.operand)
        if term is None:
            return _NOTHING
        if term.type != "bool":
            return self._note(node.operand, f"{term.need}: compare it with something")
        return f"{term.sql} = {self._bind(True)}"

    def _compare(self, node: _Compare) -> str:
        left, operator, right = node.left, node.operator.kind, node.right
        if _is_literal(left) and not _is_literal(right):
            left, operator, right = right, _FLIPPED.get(operator, operator), left
        term = self._term(left)
        if term is None:
            if not isinstance(right, _Token):
                self._term(right)  # for its problems
            return _NOTHING
        if operator in _FLIPPED and not term.is_number:
            return self._note(node.operator, f"{node.operator.text} compares numbers; {term.need}")
        if term.type == TAG:
            has = self._tagged(f"tags.tag = {self._other(term, right)}")
            return f"NOT {has}" if operator == "!=" else has
        return f"{term.sql} {'=' if operator == '==' else operator} {self._other(term, right)}"

    def _is_state(self, token: _Token) -> bool:
        return token.text in STATES and not self._places(token.text)

    def _match(self, node: _Match) -> str:
        term = self._term(node.left)
        if term is None:
            return _NOTHING
        if term.type not in ("str", "state", TAG):
            return self._note(node.operator, f"{node.operator.text} compares text; {term.need}")
        if node.pattern.kind == "number":
            return self._literal(_Term(term.name, term.sql, "str"), node.pattern)  # for its problem
        tagged = term.type == TAG
        glob = self.words.matches("tags.tag" if tagged else term.sql, node.pattern.text, self._bind)
        glob = self._tagged(glob) if tagged else glob
        return f"NOT ({glob})" if node.operator.kind == "!~" else glob

    def _among(self, node: _Among) -> str:
        term = self._term(node.left)
        if term is None:
            return _NOTHING
        values = ", ".join(self._literal(term, value) for value in node.values)
        if term.type == TAG:
            has = self._tagged(f"tags.tag IN ({values})")
            return f"NOT {has}" if node.negated else has
        return f"{term.sql} {'NOT IN' if node.negated else 'IN'} ({values})"

    def _tagged(self, condition: str) -> str:
        return f"EXISTS (SELECT 1 FROM tags WHERE tags.run_id = {self.table}.id AND {condition})"

    # both sides of a condition

    def _other(self, term: _Term, operand: _Operand) -> str:
        """What a term is compared with. A bare word is a name beside a number, else a value."""
        if not isinstance(operand, _Token):
            other = self._term(operand)
        elif term.is_number and operand.kind == "word":
            other = self._named(operand, "neither a number nor a name")
        else:
            return self._literal(term, operand)
        if other is None:
            return _NOTHING
        if not (term.is_number and other.is_number):
            return self._note(operand, f"{term.need}, but {other.need}")
        return other.sql

    def _literal(self, term: _Term, token: _Token) -> str:
        value = _meant(term.type, token)
        if value is not None:
            return self._bind(value)
        if term.type == "state" and token.kind != "number":
            return self._note(token, f"no such state: {token.text}", "the states are " + ", ".join(STATES))
        hint = f'write "{token.text}"' if token.kind == "number" and term.type not in _NEEDS else None
        return self._note(token, f"{term.need}, {token.shown} is not", hint)

    def _term(self, operand: _Operand) -> _Term | None:
        if isinstance(operand, _Aggregate):
            return self._over_group(operand)
        if isinstance(operand, _Point):
            return self._of_curve(operand)
        if operand.kind == "word":
            return self._named(operand)
        self._note(operand, f"a name was expected, {operand.shown} is a value")
        return None

    def _named(self, token: _Token, missing: str = "no such name") -> _Term | None:
        """A name of the run that is looked at."""
        if self.members is not None and self.table == "runs":
            self._of_many(token)
            return None
        return self._name(token, self.table, missing)

    def _of_many(self, operand: _Token | _Point) -> None:
        name = operand.text if isinstance(operand, _Token) else f"{operand.name.text}@{operand.step.text}"
        said = f"many runs are asked about here: mean({name}), max({name}), all({name} < 1)?"
        self._note(operand, f"{name} is of one run", said)

    def _of_curve(self, point: _Point) -> _Term | None:
        name, step = point.name.text, int(point.step.text)
        if self.members is not None and self.table == "runs":
            self._of_many(point)
            return None
        if name not in self.scope.metrics:
            self._note(point.name, f"no such metric: {name}", nearest(name, self.scope.metrics))
            return None
        sql = f"""(SELECT point.value FROM point JOIN metrics ON metrics.id = point.metric_id
                   WHERE point.run_id = {self.table}.id AND metrics.name = {self._bind(name)}
                   AND point.step = {self._bind(step)})"""
        return _Term(f"{name}@{step}", sql, "float")

    def _over_group(self, aggregate: _Aggregate) -> _Term | None:
        word = aggregate.function.text.lower()
        if self.table != "runs":
            self._note(aggregate.function, f"{word}(...) cannot stand inside of all(...)")
            return None
        if aggregate.name.kind != "word":
            self._note(aggregate.name, f"a name was expected, {aggregate.name.shown} is a value")
            return None
        term = self._name(aggregate.name, "g")
        if term is None:
            return None
        if not term.is_number:
            self._note(aggregate.name, f"{word} takes a number; {term.need}")
            return None
        done = " AND g.state = 'done'" if self.members is not None else ""
        sql = f"(SELECT {self.words.aggregate(word, term.sql)} FROM runs AS g WHERE {self._group()}{done})"
        self.values[f"{word}({term.name})"] = sql
        return _Term(f"{word}({term.name})", sql, "float")

    def _name(self, token: _Token, table: str, missing: str = "no such name") -> _Term | None:
        name = token.text
        if name in COLUMNS:
            return _Term(name, f"{table}.{name}", "state" if name == "state" else COLUMNS[name])
        if name == TAG:
            return _Term(name, _NOTHING, TAG)
        places = self._places(name)
        if len(places) > 1:
            message = f"{name} is both a config field and a summary metric"
            self._note(token, message, f"write config.{name} or summary.{name}")
        elif not places:
            self._note(token, f"{missing}: {name}", self._nearest(name))
        else:
            column, key = places[0]
            return self._field(token, table, key) if column == "config" else self._inside(name, table, column, key)
        return None

    def _places(self, name: str) -> list[tuple[str, str]]:
        """Which JSON column, and which key there, a name may mean."""
        known = {"config": {*self.scope.fields, *self.scope.aliases}, "summary": self.scope.metrics}
        column, _, key = name.partition(".")
        wanted = [(column, key)] if column in known and key else [("config", name), ("summary", name)]
        return [place for place in wanted if place[1] in known[place[0]]]

    def _nearest(self, name: str) -> str:
        prefix, _, key = name.partition(".")
        if key and prefix in ("config", "summary"):
            keys = {*self.scope.fields, *self.scope.aliases} if prefix == "config" else self.scope.metrics
            return nearest(name, [f"{prefix}.{known}" for known in keys])
        return nearest(name, {*COLUMNS, TAG, *self.scope.fields, *self.scope.aliases, *self.scope.metrics})

    def _field(self, token: _Token, table: str, key: str) -> _Term | None:
        """A config field; of a name that stages use for different ones, in each run the one that it has."""
        terms = [self._inside(token.text, table, "config", meant) for meant in self.scope.meant(key)]
        kinds = {term.type for term in terms}
        if kinds == {"int", "float"}:
            kinds = {"float"}
        if len(kinds) > 1:
            said = ", ".join(f"{meant} ({self.scope.fields[meant]})" for meant in self.scope.meant(key))
            self._note(token, f"{token.text} is another kind of value in some stages than in others: {said}",
                       "choose one by --stage, or write the field's own name")  # fmt: skip
            return None
        if len(terms) == 1:
            return terms[0]
        return _Term(token.text, f"coalesce({', '.join(term.sql for term in terms)})", kinds.pop())

    def _inside(self, name: str, table: str, column: str, key: str) -> _Term:
        """A value inside a JSON column. Nested config fields are nested objects; a metric's name may have dots."""
        keys = key.split(".") if column == "config" else [key]
        kind = self.scope.fields[key] if column == "config" else "float"
        return _Term(name, self.words.field(f"{table}.{column}", keys, kind, self._bind), kind)

    def _bind(self, value: Any) -> str:
        name = f"q{len(self.params)}"
        self.params[name] = value
        return f":{name}"

    def _note(self, operand: _Operand, message: str, hint: str | None = None) -> str:
        token = operand.function if isinstance(operand, _Aggregate) else operand
        word = token.shown if isinstance(token, _Token) else token.name.shown
        self.problems[_Problem(operand.at, message, hint, word)] = None
        return _NOTHING


def _is_literal(operand: _Operand) -> bool:
    return isinstance(operand, _Token) and operand.kind in ("number", "quoted")


def _meant(kind: str, token: _Token) -> Any:
    """The value that a token is beside a term of this type; None when it is none."""
    if kind in _NUMBERS:
        return _number(token.text) if token.kind == "number" else None
    if kind == "bool":
        return {"true": True, "false": False}.get(token.text.lower()) if token.kind == "word" else None
    if kind == "state":
        return token.text if token.text in STATES else None
    return token.text if token.kind != "number" else None
