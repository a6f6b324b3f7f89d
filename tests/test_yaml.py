"""YAML in: plain values with their places, by the rules of 1.2, and nothing that could hurt. YAML out: as it was."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
import yaml as plain_yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rnnq.definitions import yaml
from rnnq.errors import InputError


def values(text: str) -> Any:
    return yaml.read("f.yaml", text.encode()).plain()


def problems(text: str | bytes) -> list[str]:
    with pytest.raises(InputError) as caught:
        yaml.read("f.yaml", text.encode() if isinstance(text, str) else text)
    assert caught.value.exit_code == 2
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.0e-3", 0.001),
        (".5", 0.5),
        ("-5", -5),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("-.inf", -math.inf),
        ("2024-01-01", "2024-01-01"),
        ('"1e-3"', "1e-3"),
        ("'true'", "true"),
        ("!!str 1e-3", "1e-3"),
        ("! 5", "5"),
        ("!!float 5", 5.0),
        ("!!int 5", 5),
        ("[1, no, x: {y: }]", [1, "no", {"x": {"y": None}}]),
    ],
)
def test_words_are_read_by_the_rules_of_yaml_1_2(text: str, value: Any) -> None:
    found = values(f"a: {text}")["a"]

    assert found == value
    assert type(found) is type(value)


def test_a_key_is_a_word_whatever_it_would_mean_as_a_value() -> None:
    assert values("no: 1\n1: 2\ntrue: 3\nnull: 4") == {"no": 1, "1": 2, "true": 3, "null": 4}


def test_every_value_knows_its_line_and_an_entry_that_of_its_key() -> None:
    top = yaml.read("f.yaml", b"a: 1\nb:\n  c:\n    - 3\n    - d: 4\n")

    assert top.value["b"].place == "f.yaml:2"
    assert top.at(["b", "c"]).place == "f.yaml:3"
    assert top.at(["b", "c"]).value[1].value["d"].place == "f.yaml:5"
    assert top.at(["b", "nowhere", "x"]) is top.value["b"]  # as far as there is something


def test_an_alias_is_what_it_names_at_its_own_line() -> None:
    top = yaml.read("f.yaml", b"a: &x [1, 2]\nb: *x\n")

    assert top.plain() == {"a": [1, 2], "b": [1, 2]}
    assert top.value["b"].line == 2


def test_everything_wrong_is_listed_at_once_with_its_line() -> None:
    text = "a: 1\nb: !!python/name:os.system\nc: *nothing\na: 2\nd: &d [*d]\ne: {<<: 1}\n? [1]\n: 2\nf: !own {}\n"

    assert problems(text) == [
        "f.yaml:2: the tag !!python/name:os.system is not read; only plain values are",
        "f.yaml:3: the alias *nothing names nothing that stands before it",
        "f.yaml:4: a stands twice; first on line 1",
        "f.yaml:5: the alias *d stands inside what it names",
        "f.yaml:6: merge keys (<<) are not read; write the fields out",
        "f.yaml:7: a key is a word, not an alias, a list or a mapping",
        "f.yaml:9: the tag !own is not read; only plain values are",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\n---\nb: 2", "f.yaml:2: a second document begins here"),
        ("a: [1", "f.yaml:1: expected ',' or ']'"),
        ("a:\n\tb: 1", "f.yaml:2: found character '\\t'"),
        ("a: b: c", "f.yaml:1: mapping values are not allowed here"),
        ("a: \0", "f.yaml is no YAML"),
        ("a: !!int x", "f.yaml:1: 'x' is no int"),
        ("a: !!int true", "f.yaml:1: 'true' is no int"),
        ("a: " + "9" * 5000, "f.yaml:1: a number of 5,000 digits"),
    ],
)
def test_what_is_no_yaml_of_ours_is_refused_with_its_line(text: str, said: str) -> None:
    assert problems(text)[0].startswith(said)


def test_bytes_that_are_no_utf_8_are_refused_with_their_line() -> None:
    assert problems(b"a: 1\nb: \xff") == ["f.yaml:2: byte 0xff is not UTF-8"]
    assert yaml.read("f.yaml", b"\xef\xbb\xbfa: 1").plain() == {"a": 1}  # a byte order mark is none of the text


LAUGHTER = "\n".join(
    ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 900_000, "more than 32 mappings and lists inside each other"),
        ("- " * 400_000, "more than 32 mappings and lists inside each other"),
        ("{a: " * 100_000, "more than 32 mappings and lists inside each other"),
        (LAUGHTER, "more than 200,000 values, aliases counted as what they stand for"),
        (" " * 1_000_001, "more than 1,000,000 bytes"),
    ],
    ids=["lists", "blocks", "mappings", "aliases", "size"],
)
def test_depth_aliases_and_size_are_bounded_before_they_cost_anything(text: str, said: str) -> None:
    began = time.process_time()

    assert said in problems(text)[-1]

    assert time.process_time() - began < 5  # seconds; each takes well under one


# ----------------------------------------------------------------------------------------------- what is written

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=8), PLAIN, max_size=4))
@example({"a": "1e-3", "b": 1e-5, "c": "no", "d": "010", "e": "1_000", "f": "12:30", "g": "0o7", "h": 1e22, "i": "=2"})
@example({"<<": {"a": 1}})
@example({"1e-3": 1, "no": 2, "": 3, "null": 4})
def test_what_is_written_is_read_back_equal_by_every_safe_loader(content: dict[str, Any]) -> None:
    written = yaml.dump(content)

    theirs = plain_yaml.safe_load(written)
    assert theirs == content
    assert json.dumps(theirs) == json.dumps(content)  # 1 is not 1.0, nor is it true
    assert json.dumps(values(written)) == json.dumps(content)


def test_numbers_that_are_none_are_written_as_null() -> None:
    assert yaml.dump({"a": math.nan, "b": (1, math.inf)}) == "a: null\nb:\n- 1\n- null\n"
