"""YAML in and out: values that remember their place, and text that every safe loader reads alike.

Plain words are read by the core schema of YAML 1.2: `1e-3` is a number, `no` a text, `010` ten. Nothing is ever
constructed but mappings, lists and plain values. Size, depth and what aliases multiply to are bounded; a key that
stands twice, a tag, a merge key and a second document are refused, all of them with their lines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml import events

from rnnq.errors import InputError

LARGEST = 1_000_000  # bytes of a file
DEEPEST = 32  # mappings and lists inside each other
MOST = 200_000  # values in a file, each alias counted as what it stands for
LONGEST = 400  # digits of a number

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TAG = "tag:yaml.org,2002:"
_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "null": type(None),
}


# -------------------------------------------------------------------------------------------------- what is read


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it was written: a plain value, a list of nodes, or a dict of nodes."""

    value: Any
    file: str
    line: int  # from 1; of an entry of a mapping the line of its key

    @property
    def place(self) -> str:
        """Where it stands: defs/sizes.yaml:12."""
        return f"{self.file}:{self.line}"

    def plain(self) -> Any:
        """The value alone."""
        if isinstance(self.value, dict):
            return {name: node.plain() for name, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def at(self, path: Sequence[object]) -> Node:
        """What a path of keys leads to, as far as it is there."""
        here = self
        for part in path:
            if not isinstance(here.value, dict) or part not in here.value:
                break
            here = here.value[part]
        return here


def bytes_of(path: Path) -> bytes:
    """What a file holds; of one that is too large for `read` no more than shows it. Raises OSError."""
    with path.open("rb") as file:
        return file.read(LARGEST + 1)


def read(file: str | Path, content: bytes) -> Node:
    """The one document of a YAML file. Raises InputError with everything that is wrong, each with its line."""
    if len(content) > LARGEST:
        raise InputError(f"{file} has more than {LARGEST:,} bytes, and is not read as YAML")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"{file}:{line}: byte {content[error.start]:#04x} is not UTF-8"
        raise InputError(what, "save it as UTF-8") from error
    try:
        return _Builder(str(file), text).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" {error.context}" if error.context else ""
        what = f"{file}:{mark.line + 1 if mark else 1}: {error.problem or 'no YAML'}{context}"
        raise InputError(what, "YAML is indented with spaces" if "'\\t'" in what else None) from error
    except yaml.YAMLError as error:
        said = str(error).partition("\n")[0]
        raise InputError(f"{file} is no YAML: {said}") from error


def core(text: str) -> Any:
    """What a plain word means by the core schema of YAML 1.2. Raises ValueError for a number without end."""
    if _NULL.fullmatch(text):
        return None
    if found := _BOOL.fullmatch(text):
        return bool(found[1])
    if (is_int := _INT.fullmatch(text)) or _FLOAT.fullmatch(text):
        if len(text) > LONGEST:
            raise ValueError(f"a number of {len(text):,} digits")
        return _integer(text) if is_int else _float(text)
    return text


def _integer(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(text: str) -> float:
    lower = text.lower()
    if lower.endswith((".inf", ".nan")):
        return float(lower.replace(".", ""))
    return float(text)


class _Builder:
    """Makes nodes of the parser's events, counts them, and notes what is wrong."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self.events = yaml.parse(text, Loader=yaml.SafeLoader)  # as they are asked for
        self.ahead: Any = None
        self.problems: list[str] = []
        self.anchors: dict[str, tuple[Node, int] | None] = {}  # None: it is not complete yet
        self.count = 0

    def document(self) -> Node:
        """The only document; an empty file is null."""
        self._next()  # the stream begins
        if self._comes(events.StreamEndEvent):
            return Node(None, self.file, 1)
        self._next()
        found = self._node(0)
        self._next()
        last = self._next()
        if not isinstance(last, events.StreamEndEvent):
            self._note(last, "a second document begins here; a file holds one")
        if self.problems:
            raise InputError(self.problems)
        return found

    def _comes(self, kind: type) -> bool:
        """Whether the next event is of a kind."""
        if self.ahead is None:
            self.ahead = next(self.events)
        return isinstance(self.ahead, kind)

    def _next(self) -> Any:
        event, self.ahead = self.ahead, None
        return next(self.events) if event is None else event

    def _note(self, event: Any, problem: str) -> None:
        self.problems.append(f"{self.file}:{event.start_mark.line + 1}: {problem}")

    def _made(self, event: Any, value: Any) -> Node:
        return Node(value, self.file, event.start_mark.line + 1)

    def _counted(self, event: Any, n: int = 1) -> None:
        self.count += n
        if self.count > MOST:
            place = f"{self.file}:{event.start_mark.line + 1}"
            what = f"more than {MOST:,} values, aliases counted as what they stand for"
            raise InputError([*self.problems, f"{place}: {what}"])

    def _node(self, depth: int) -> Node:
        event = self._next()
        if isinstance(event, events.AliasEvent):
            return self._alias(event)
        before = self.count
        self._counted(event)
        if depth > DEEPEST:
            place = f"{self.file}:{event.start_mark.line + 1}"
            raise InputError([*self.problems, f"{place}: more than {DEEPEST} mappings and lists inside each other"])
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, events.ScalarEvent):
            found = self._made(event, self._scalar(event))
        elif isinstance(event, events.SequenceStartEvent):
            self._check_tag(event, "seq")
            found = self._made(event, list(self._items(depth)))
        else:
            self._check_tag(event, "map")
            found = self._made(event, self._mapping(depth))
        if event.anchor is not None:
            self.anchors[event.anchor] = (found, self.count - before)
        return found

    def _alias(self, event: Any) -> Node:
        known = self.anchors.get(event.anchor)
        if known is None:
            inside = event.anchor in self.anchors
            why = "stands inside what it names" if inside else "names nothing that stands before it"
            self._note(event, f"the alias *{event.anchor} {why}")
            return self._made(event, None)
        node, size = known
        self._counted(event, size)
        return self._made(event, node.value)

    def _items(self, depth: int) -> Iterator[Node]:
        while not self._comes(events.SequenceEndEvent):
            yield self._node(depth + 1)
        self._next()

    def _mapping(self, depth: int) -> dict[str, Node]:
        found: dict[str, Node] = {}
        while not self._comes(events.MappingEndEvent):
            key = self._next_key(depth)
            value = self._node(depth + 1)
            if key is None:
                continue
            line, name = key
            if name in found:
                self.problems.append(f"{self.file}:{line}: {name} stands twice; first on line {found[name].line}")
            else:
                found[name] = Node(value.value, value.file, line)
        self._next()
        return found

    def _next_key(self, depth: int) -> tuple[int, str] | None:
        """Line and text of a key: a word, whatever it would mean as a value. None where it is none."""
        if not self._comes(events.ScalarEvent):
            node = self._node(depth + 1)
            self.problems.append(f"{node.place}: a key is a word, not an alias, a list or a mapping")
            return None
        event = self._next()
        self._counted(event)
        if event.value == "<<" and event.style is None:
            self._note(event, "merge keys (<<) are not read; write the fields out")
            return None
        return event.start_mark.line + 1, str(event.value)

    def _scalar(self, event: Any) -> Any:
        try:
            if event.tag is None:
                return core(event.value) if event.style is None else event.value
            return self._tagged(event)
        except ValueError as error:
            self._note(event, str(error))
            return None

    def _tagged(self, event: Any) -> Any:
        kind = event.tag.removeprefix(_TAG)
        if event.tag == "!" or kind == "str":
            return event.value
        if kind not in _TYPES or kind == event.tag:
            raise ValueError(f"the tag {_shown(event.tag)} is not read; only plain values are")
        found = core(event.value)
        if not isinstance(found, _TYPES[kind]) or (isinstance(found, bool) and kind != "bool"):
            raise ValueError(f"{event.value[:40]!r} is no {kind}")
        return _float(event.value) if kind == "float" else found

    def _check_tag(self, event: Any, kind: str) -> None:
        if event.tag not in (None, "!", _TAG + kind):
            self._note(event, f"the tag {_shown(event.tag)} is not read; only plain values are")


def _shown(tag: str) -> str:
    return f"!!{tag.removeprefix(_TAG)}" if tag.startswith(_TAG) else tag


# ----------------------------------------------------------------------------------------------- what is written


def dump(value: Mapping[str, Any]) -> str:
    """A mapping of plain values as YAML, in its own order, which YAML 1.1 and 1.2 read as the same."""
    return str(yaml.dump(_written(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes a value that stands in two places twice, without aliases, and quotes what 1.2 would take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    if not text.isprintable():  # only in double quotes does PyYAML escape every end of a line that Unicode has
        return dumper.represent_scalar(_TAG + "str", text, style='"')
    is_word = len(text) <= LONGEST and not isinstance(core(text), str)
    return dumper.represent_scalar(_TAG + "str", text, style="'" if is_word else None)


_Dumper.add_representer(str, _text)


def _written(value: Any) -> Any:
    """Tuples as lists, and numbers that are none as null: not every reader of YAML knows .nan."""
    if isinstance(value, Mapping):
        return {str(name): _written(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_written(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
