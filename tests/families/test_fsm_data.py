"""The data of the family fsm: the published data sets to the byte, splits that share no machine, a cache that heals."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rnnq import kept
from rnnq.config import check, group_key
from rnnq.data import cache_folder
from rnnq.errors import DataError
from rnnq.families.fsm import baselines, data, machines
from rnnq.families.fsm.baselines import Scores
from rnnq.families.fsm.config import Machines
from rnnq.families.fsm.data import EOS, FIRST_ACTION, N_ACTIONS, N_STATES, PAD, QUERY, Dataset, Split

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "fsm.py"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "_loaded", {})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Data that several tests look at, in a cache of their own."""
    folder = tmp_path_factory.mktemp("shared")

    def load(**fields: Any) -> Dataset:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RNNQ_CACHE", str(folder))
            return data.load(Machines(**fields))

    return load


def ordinary() -> ModuleType:
    """The benchmark's plain program, which draws one number after the other."""
    spec = importlib.util.spec_from_file_location("ordinary_fsm", BENCHMARK)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def everything(split: Split) -> data.Batch:
    rows = np.arange(len(split))
    return split.batch(rows, split.picks(rows))


def sequences(batch: data.Batch) -> list[list[int]]:
    """The targets of a batch without padding."""
    return [row[:length].tolist() for row, length in zip(batch.targets, batch.lengths, strict=True)]


# --------------------------------------------------------------------------------- the published data sets

PUBLISHED = [
    (dict(states=3, actions=3), (111_189, 37_114, 36_968), "71e6299da0b4b58f", "2e4237d2e223a199", 185),
    (dict(), (476_649, 158_755, 159_163), "3c840c9a906a4121", "60eef9c7b42e1308", 765),
    (
        dict(demo_length=90, query_length=100),
        (596_578, 198_689, 199_179),
        "3c840c9a906a4121",
        "246e3098dda8761e",
        883,
    ),
    (
        dict(absorbing=True, demo_length=60),
        (476_649, 158_755, 159_163),
        "6639d1d2e9fc94a3",
        "50db8b7df49aaeb9",
        621,
    ),
]


@pytest.mark.parametrize(("fields", "steps", "tables", "test", "longest"), PUBLISHED, ids=lambda value: str(value)[:40])
def test_stream_makes_the_published_data_sets(
    shared: Any, fields: dict[str, Any], steps: tuple[int, ...], tables: str, test: str, longest: int
) -> None:
    made = shared(data_split="stream", **fields)
    splits = [made.train, made.val, made.test]
    assert tuple(int(split.query(np.arange(len(split))).lengths.sum()) for split in splits) == steps
    assert sha(b"".join(split.tables.tobytes() for split in splits)) == tables
    assert sha(b"".join(bytes(sequence) for sequence in sequences(everything(made.test)))) == test
    assert made.longest == data.max_length(Machines(data_split="stream", **fields)) == longest


def test_the_first_published_machines_and_walks_are_these(shared: Any) -> None:
    easy = shared(data_split="stream", states=3, actions=3).train
    assert easy.tables[0].tolist() == [[1, 2, 2], [2, 0, 2], [0, 2, 2]]
    assert easy.lengths[0].tolist() == [20, 15, 17, 16]
    assert easy.query_starts[0] == 0
    standard = shared(data_split="stream").train
    assert standard.tables[0].tolist() == [
        [3, 2, 4, 0, 3],
        [0, 4, 2, 4, 2],
        [4, 1, 0, 1, 0],
        [1, 2, 0, 1, 4],
        [0, 3, 2, 3, 2],
    ]
    assert standard.lengths[0].tolist() == [84, 64, 72, 71, 87, 66]
    batch = standard.batch(np.array([0]), np.array([[0, 1, 2]]))
    assert batch.targets[0, :9].tolist() == [0, 8, 3, 12, 4, 10, 2, 8, 4]
    assert batch.targets[0, batch.starts[0] :][:5].tolist() == [4, 8, 0, 9, 2]
    absorbing = shared(data_split="stream", absorbing=True, demo_length=60).train
    assert ["".join(map(str, row)) for row in absorbing.tables[0]] == ["10424", "11111", "00120", "10323", "21232"]
    assert absorbing.absorbs(np.array([0])).tolist() == [[False, True, False, False, False]]


@pytest.mark.parametrize(
    ("states", "actions", "absorbing", "seed"),
    [(2, 1, False, 0), (2, 2, True, 1), (4, 4, False, 7), (8, 8, True, 3), (8, 10, False, 2**40), (3, 10, True, 5)],
)
def test_stream_equals_a_program_that_draws_one_number_after_the_other(
    states: int, actions: int, absorbing: bool, seed: int
) -> None:
    plain = ordinary()
    samples = plain.ordinary(states, actions, 9, 13, 100, seed, absorbing, variation=0.9)
    config = Machines(
        states=states, actions=actions, absorbing=absorbing, data_seed=seed, data_split="stream", demos=2,
        demo_length=9, query_length=13, length_variation=0.9, n_train=50, n_val=20, n_test=30,
    )  # fmt: skip
    assert plain.same(samples, data.build(config))


def test_many_machines_are_the_same_stream_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, order = machines.stream_machines(1, 100, 5, 5, True, lambda done: None)
    monkeypatch.setattr(machines, "_MACHINES", 7)
    monkeypatch.setattr(machines, "_CHUNK", 11)
    in_parts, order_in_parts = machines.stream_machines(1, 100, 5, 5, True, lambda done: None)
    assert np.array_equal(whole, in_parts)
    assert np.array_equal(order, order_in_parts)
    config = Machines(n_train=20, n_val=10, n_test=10, data_split="stream")
    together = data.build(config)["steps"]
    monkeypatch.setattr(machines, "_TOGETHER", 3)
    assert np.array_equal(data.build(config)["steps"], together)
    chance = random.Random(9)
    assert machines.Mersenne(9).below(5, 100).tolist() == [chance.randrange(5) for _ in range(100)]


def test_stream_stops_where_the_published_generator_does_and_disjoint_goes_on() -> None:
    few = dict(states=6, actions=2, n_train=60, n_val=20, n_test=20)
    with pytest.raises(IndexError):
        ordinary().ordinary(6, 2, samples=100)
    with pytest.raises(DataError, match=r"states=6, actions=2: at .* has no free action") as refused:
        Machines(data_split="stream", **few).datasets()
    assert "data_split=disjoint" in str(refused.value.hint)
    tables = data.load(Machines(**few)).train.tables
    assert all(reached_from_0(table) == set(range(6)) for table in tables)


# ------------------------------------------------------------------------------------------- the sequences


def hand_made(picks: list[int], permuted: bool = False) -> Split:
    """One machine of two states and two actions: 0 -8-> 0, 0 -9-> 1, 1 -8-> 0, 1 -9-> 0."""
    arrays: dict[str, Any] = {
        "tables": np.array([[[0, 1], [0, 0]]], np.uint8),
        "lengths": np.array([[1, 2, 1]], np.uint16),  # 0 9 1; 1 9 0 8 0; the query 0 9 1
        "starts": np.array([0], np.uint8),
        "steps": np.array([1 << 3 | 1, 1 << 3 | 0, 0 << 3 | 0, 1 << 3 | 1], np.uint8),
        "picks": np.array([picks], np.uint8),
    }
    if permuted:
        arrays["ids"] = np.array([[6, 2, 17, 11]], np.uint8)
    return Split("val", arrays, slice(0, 1), np.array([[0, 1, 3]]), len(picks))


def test_a_sequence_is_laid_out_as_the_definition_says() -> None:
    batch = everything(hand_made([1]))
    assert batch.targets.tolist() == [[1, 9, 0, 8, 0, EOS, QUERY, 0, 9, 1, EOS]]
    assert batch.inputs.tolist() == [[1, 1, 9, 0, 8, 0, EOS, QUERY, 0, 9, 1]]
    assert np.flatnonzero(batch.mask).tolist() == [9]
    assert (batch.starts.tolist(), batch.lengths.tolist()) == ([7], [11])
    assert sequences(everything(hand_made([1, 0]))) == [[1, 9, 0, 8, 0, EOS, 0, 9, 1, EOS, QUERY, 0, 9, 1, EOS]]


def test_ids_of_its_own_rename_every_token_of_a_sample() -> None:
    split = hand_made([1], permuted=True)
    assert sequences(everything(split)) == [[2, 11, 6, 17, 6, EOS, QUERY, 6, 11, 2, EOS]]
    query = split.query(np.array([0]))
    assert (query.states.tolist(), query.actions.tolist(), query.next_states.tolist()) == ([[6]], [[11]], [[2]])
    after = split.next_tokens(np.array([0]))[0]
    assert (after[6, 17 - 8], after[6, 11 - 8], after[2, 17 - 8], after[2, 11 - 8]) == (6, 2, 6, 6)
    assert int((after != PAD).sum()) == 4


@pytest.mark.parametrize("permuted", [False, True])
def test_a_batch_says_the_same_as_its_samples_one_by_one(permuted: bool) -> None:
    made = data.load(Machines(states=4, actions=6, permute_tokens=permuted, n_train=50, n_val=20, n_test=20))
    split = made.train
    rows = np.array([7, 3, 3, 49, 0])
    picks = split.random_picks(rows, np.random.default_rng(0))
    batch = split.batch(rows, picks)
    assert batch.targets.shape == batch.inputs.shape == batch.mask.shape == (5, batch.lengths.max())
    query, after = split.query(rows), split.next_tokens(rows)
    for i in range(len(rows)):
        alone = split.batch(rows[i : i + 1], picks[i : i + 1])
        length = int(batch.lengths[i])
        assert batch.targets[i, :length].tolist() == alone.targets[0].tolist()
        assert batch.inputs[i, :length].tolist() == [alone.targets[0, 0], *alone.targets[0, :-1]]
        assert (batch.targets[i, length:] == PAD).all() and (batch.inputs[i, length:] == PAD).all()
        steps = int(query.lengths[i])
        assert length == 2 * (sum(int(split.lengths[rows[i], pick]) for pick in picks[i]) + steps) + 9
        scored = np.flatnonzero(batch.mask[i])
        assert scored.tolist() == [int(batch.starts[i]) + 2 * (k + 1) for k in range(steps)]
        # the model has read the true state and the action where it says the next state, and the machine agrees
        state, action, said = batch.inputs[i, scored - 1], batch.inputs[i, scored], batch.targets[i, scored]
        assert state.tolist() == query.states[i, :steps].tolist()
        assert action.tolist() == query.actions[i, :steps].tolist()
        assert said.tolist() == query.next_states[i, :steps].tolist()
        assert after[i, state, action - FIRST_ACTION].tolist() == said.tolist()
        assert (query.states[i, steps:] == PAD).all() and (query.next_states[i, steps:] == PAD).all()


def test_every_walk_starts_in_its_state_and_follows_the_machine() -> None:
    made = data.load(Machines(states=3, actions=4, demos=3, n_train=40, n_val=10, n_test=10))
    for split in (made.train, made.val, made.test):
        for row in range(len(split)):
            shown = split.batch(np.array([row]), np.array([[0, 1, 2]])).targets[0].tolist()
            walks = [list(group) for key, group in itertools.groupby(shown, lambda t: t in (EOS, QUERY)) if not key]
            assert [walk[0] for walk in walks] == [0, 1, 2, split.query_starts[row]]
            for walk in walks:
                for state, action, after in zip(walk[:-2:2], walk[1:-1:2], walk[2::2], strict=True):
                    assert after == split.tables[row, state, action - FIRST_ACTION]


def test_evaluation_shows_the_same_demonstrations_each_time_and_training_others() -> None:
    split = data.load(Machines(n_train=3000, n_val=10, n_test=10)).train
    rows = np.arange(len(split))
    assert np.array_equal(split.picks(rows), split.picks(rows))
    assert np.array_equal(split.picks(rows[::-1]), split.picks(rows)[::-1])
    chance = np.random.default_rng(3)
    for picks in (split.picks(rows), split.random_picks(rows, chance), split.random_picks(rows, chance)):
        assert picks.shape == (3000, 3)
        counts = Counter(map(tuple, picks.tolist()))
        assert all(len(set(pick)) == 3 for pick in counts)
        assert len(counts) == 60  # all ordered choices of 3 of 5 occur; each is expected 50 times
        assert max(counts.values()) < 50 + 5 * 50**0.5


def test_ids_are_drawn_out_of_all_that_there_are() -> None:
    split = data.load(Machines(permute_tokens=True, n_train=2000, n_val=10, n_test=10)).train
    for ids, first, count in ((split.state_ids, 0, N_STATES), (split.action_ids, FIRST_ACTION, N_ACTIONS)):
        assert set(np.unique(ids).tolist()) == set(range(first, first + count))
        assert all(len(set(row)) == 5 for row in ids.tolist())
        share = np.bincount(ids[:, 0] - first, minlength=count) / 2000
        assert np.abs(share - 1 / count).max() < 0.04  # five standard deviations are .037


# ---------------------------------------------------------------------------- machines, and whose they are


def reached_from_0(table: Any) -> set[int]:
    reached, todo = {0}, [0]
    while todo:
        new = {int(state) for state in table[todo.pop()]} - reached
        reached |= new
        todo += new
    return reached


def canonical(tables: Any, any_actions: bool = False) -> list[bytes]:
    """The first in order of all tables that renaming makes of each: every permutation is tried."""
    _, states, actions = tables.shape
    best: list[bytes] = []
    for order in itertools.permutations(range(states)):
        renamed = np.array(order, np.uint8)[tables[:, np.argsort(order)]]
        for columns in itertools.permutations(range(actions)) if any_actions else [range(actions)]:
            found = [row.tobytes() for row in np.ascontiguousarray(renamed[:, :, list(columns)])]
            best = found if not best else list(map(min, best, found))
    return best


def of_splits(made: Dataset, any_actions: bool = False) -> list[set[bytes]]:
    return [set(canonical(split.tables, any_actions)) for split in (made.train, made.val, made.test)]


@pytest.mark.parametrize(
    "fields",
    [
        dict(states=2, actions=2, demos=2),
        dict(states=2, actions=2, demos=2, permute_tokens=True),
        dict(states=3, actions=1),
        dict(states=3, actions=2, absorbing=True),
        dict(states=3, actions=3),
        dict(states=3, actions=3, permute_tokens=True),
        dict(states=4, actions=3, data_seed=1),
    ],
    ids=str,
)
def test_no_machine_is_in_two_splits_whatever_its_states_are_called(fields: dict[str, Any]) -> None:
    permuted = fields.get("permute_tokens", False)
    made = data.load(Machines(**fields, query_length=2, demo_length=2, n_train=600, n_val=200, n_test=200))
    train, val, test = of_splits(made, permuted)
    assert not (train & val or train & test or val & test)
    other = Machines(**fields, query_length=5, demo_length=3, n_train=300, n_val=500, n_test=100)
    for mine, theirs in itertools.permutations(range(3), 2):  # nor across sets of other lengths and sizes
        assert not of_splits(made, permuted)[mine] & of_splits(data.load(other), permuted)[theirs]


def test_few_machines_are_shared_out_kind_by_kind() -> None:
    """Of two states and two actions there are 9 machines that renaming does not make equal: 5, 2 and 2 of them."""
    made = data.load(Machines(states=2, actions=2, demos=2, n_train=600, n_val=200, n_test=200))
    assert [len(kinds) for kinds in of_splits(made)] == [5, 2, 2]
    three = data.load(Machines(states=3, actions=1, n_train=60, n_val=20, n_test=20))
    assert [len(kinds) for kinds in of_splits(three)] == [1, 1, 1]


def test_two_machines_are_too_few_for_three_splits() -> None:
    with pytest.raises(DataError, match="there are only 2 machines that renaming does not make equal") as refused:
        Machines(states=2, actions=1, demos=2).datasets()
    assert "data_split=stream" in str(refused.value.hint)
    assert Machines(states=2, actions=1, demos=2, data_split="stream").datasets()


def test_renaming_leaves_the_kind_of_a_machine_as_it_is_and_other_machines_differ() -> None:
    tables = machines.random_machines(machines.Stream("test"), 3000, 3, 3, False)
    order, columns = np.array([2, 0, 1], np.uint8), [1, 2, 0]
    renamed = order[tables[:, np.argsort(order)]]
    assert np.array_equal(machines.kinds(renamed), machines.kinds(tables))
    assert np.array_equal(machines.kinds(renamed[:, :, columns], True), machines.kinds(tables, True))
    assert (machines.kinds(renamed[:, :, columns]) != machines.kinds(tables)).mean() > 0.95
    assert len(set(machines.kinds(tables).tolist())) > 0.99 * len(set(canonical(tables)))


def test_the_size_of_one_split_changes_nothing_of_another() -> None:
    small = data.load(Machines(n_train=50, n_val=20, n_test=20, demo_length=5, query_length=5))
    other = data.load(Machines(n_train=500, n_val=10, n_test=20, demo_length=5, query_length=5))
    assert np.array_equal(other.train.tables[:50], small.train.tables)
    assert np.array_equal(other.val.tables, small.val.tables[:10])
    assert sequences(everything(other.test)) == sequences(everything(small.test))


@pytest.mark.parametrize(
    ("states", "actions", "loops", "connected"), [(3, 3, 0.257, 0.851), (5, 5, 0.167, 0.985)], ids=str
)
def test_machines_that_are_drawn_at_once_have_the_published_frequencies(
    states: int, actions: int, loops: float, connected: float
) -> None:
    """Measured on 3,000 published machines; a quarter of the tolerance is one standard deviation of both."""
    tables = machines.random_machines(machines.Stream("test"), 6000, states, actions, False)
    own = np.arange(states)[:, None]
    assert abs((tables == own).mean() - loops) < 0.013
    assert all(reached_from_0(table) == set(range(states)) for table in tables)
    step = np.zeros((len(tables), states, states), bool)
    step[np.arange(len(tables))[:, None, None], own, tables] = True
    reach = step | np.eye(states, dtype=bool)
    for _ in range(states):
        reach = (reach[:, :, :, None] & reach[:, None, :, :]).any(2)
    assert abs(reach.all((1, 2)).mean() - connected) < 0.032 * (1 - connected) ** 0.5 + 0.005


def test_actions_starts_and_lengths_are_uniform() -> None:
    split = data.load(Machines(states=4, actions=3, demo_length=100, query_length=50)).train
    rows = np.arange(len(split))
    query = split.query(rows)
    actions = np.bincount(query.actions[query.actions != PAD] - FIRST_ACTION) / query.lengths.sum()
    assert np.abs(actions - 1 / 3).max() < 0.005
    assert np.abs(np.bincount(split.query_starts) / len(split) - 0.25).max() < 0.03
    assert (split.lengths[:, :4].min(), split.lengths[:, :4].max()) == (80, 119)
    assert (split.lengths[:, 4].min(), split.lengths[:, 4].max()) == (40, 59)
    assert abs(split.lengths[:, :4].mean() - 99.5) < 0.5


def test_every_absorbing_machine_has_a_state_that_keeps_all_actions() -> None:
    made = data.load(Machines(absorbing=True, n_train=300, n_val=100, n_test=100))
    for split in (made.train, made.val, made.test):
        kept = split.absorbs(np.arange(len(split)))
        assert kept.any(1).all()
        assert kept.any(0).all()  # any state may be it


# --------------------------------------------------------------------------------------------- the config


def problems(**fields: Any) -> list[str]:
    return check(Machines, fields)[1]


def test_everything_that_is_wrong_is_said_at_once() -> None:
    said = problems(states=2, actions=11, data_split="both", n_val=0, permute=True)
    assert [line.partition("=")[0].split()[0] for line in said] == [
        "actions",
        "demos",
        "data_split",
        "n_val",
        "Machines",
    ]
    assert said[1] == "demos=3: there is one demonstration for each of the 2 states, and no more"
    assert "did you mean permute_tokens?" in said[-1]
    assert problems(states=9, demos=8) == ["states=9: input should be less than or equal to 8"]
    assert not problems(states=2, demos=2)


def test_a_missing_length_follows_from_the_size_of_the_table() -> None:
    automatic = [Machines(states=s, actions=a).base_lengths() for s, a in ((3, 3), (5, 5), (5, 8), (8, 8))]
    assert automatic == [(19, 19), (80, 80), (147, 147), (266, 266)]
    assert Machines(states=2, actions=1, demos=1).base_lengths() == (1, 1)
    assert Machines(query_length=7).base_lengths() == (80, 7)


def test_sequences_beyond_the_limit_are_refused_with_the_numbers(shared: Any) -> None:
    [said] = problems(max_seq_len=400)
    assert said == "max_seq_len=400: by the formula, even the shortest sequence has 521 tokens"
    shorter = dict(data_split="stream", states=3, actions=3)
    assert Machines(**shorter, max_seq_len=185).datasets()  # 185 occurs, and is the bound
    with pytest.raises(
        DataError, match="max_seq_len=184: the longest sequence of 3s3a 19/19 stream has 185 tokens"
    ) as no:
        Machines(**shorter, max_seq_len=184).datasets()
    assert "of the lengths that occur; the formula allows 185" in str(no.value)
    assert "max_seq_len=185" in str(no.value.hint)
    assert Machines().longest_possible() == 777  # more than the 765 that occur
    assert Machines(length_variation=0.5).longest_possible() == 2 * 4 * 120 + 9


def test_the_longest_sequence_is_that_of_the_longest_demonstrations() -> None:
    config = Machines(states=4, demos=2, n_train=20, n_val=10, n_test=10, demo_length=50, query_length=50)
    made = data.load(config)
    found = [
        split.batch(np.arange(len(split)), np.tile(picks, (len(split), 1))).lengths.max()
        for split in (made.train, made.val, made.test)
        for picks in itertools.permutations(range(4), 2)
    ]
    assert data.max_length(config) == max(found) < config.longest_possible()


def test_data_that_no_disk_should_hold_are_refused() -> None:
    [said] = problems(states=8, actions=10, demo_length=10_000, n_train=1_000_000)
    assert "1,004,000 samples of 8 demonstrations of 10000 steps" in said
    assert "the limit is 2 GiB" in said


def test_the_data_seed_is_of_the_group_and_no_seed_field() -> None:
    keys = {group_key("fsm", Machines(seed=seed, data_seed=data_seed)) for seed in (0, 1) for data_seed in (1, 2)}
    assert len(keys) == 2


# --------------------------------------------------------------------------------------------- the cache

TINY = dict(states=3, actions=2, n_train=60, n_val=20, n_test=20)


def forgotten() -> None:
    """As a process that has just started."""
    data._loaded.clear()


def test_data_are_made_once_and_found_again() -> None:
    made = data.load(Machines(**TINY))
    assert data.load(Machines(**TINY, seed=5, max_seq_len=500)) is made  # these change nothing of the data
    stamps = {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    forgotten()
    again = data.load(Machines(**TINY))
    assert again is not made
    assert (again.sha256, again.name, again.folder) == (made.sha256, made.name, made.folder)
    assert {path: path.stat().st_mtime_ns for path in made.folder.iterdir()} == stamps
    assert sequences(everything(again.val)) == sequences(everything(made.val))


def test_each_set_of_data_has_a_name_and_a_hash_of_its_own() -> None:
    changes: list[dict[str, Any]] = [
        {}, dict(actions=3), dict(absorbing=True), dict(demos=2), dict(demo_length=9), dict(query_length=9),
        dict(length_variation=0.1), dict(data_split="stream"), dict(data_seed=1), dict(n_train=61), dict(n_val=21),
        dict(n_test=21), dict(permute_tokens=True),
    ]  # fmt: skip
    found: dict[str, str] = {}
    for change in changes:
        found |= Machines(**(TINY | change)).datasets()
    assert len(found) == len(set(found.values())) == len(changes)
    assert all(name.startswith("fsm:3s") for name in found)
    automatic = Machines(**TINY).base_lengths()
    assert Machines(**TINY, demo_length=automatic[0]).datasets() == Machines(**TINY).datasets()


def test_a_thousand_configs_over_five_sets_of_data_make_five() -> None:
    configs = [Machines(**TINY, data_seed=i % 5, seed=i) for i in range(1000)]
    found: dict[str, str] = {}
    for config in configs:
        found |= config.datasets()
    assert len(found) == 5
    loaded = {id(data.load(config)) for config in configs}
    assert len(loaded) == len(list((cache_folder() / "fsm").iterdir())) == 5


def damage_of(folder: Path) -> dict[str, Any]:
    steps = folder / "steps.npy"

    def flipped() -> None:
        content = bytearray(steps.read_bytes())
        content[-1] ^= 1
        steps.write_bytes(content)

    return {
        "a bit is flipped": flipped,
        "a file is cut": lambda: steps.write_bytes(steps.read_bytes()[:-9]),
        "a file is empty": lambda: steps.write_bytes(b""),
        "a file is gone": (folder / "picks.npy").unlink,
        "a file is something else": lambda: steps.write_text("not an array"),
        "the manifest is gone": (folder / "manifest.json").unlink,
        "the manifest is cut": lambda: (folder / "manifest.json").write_text('{"content": '),
        "the manifest is a list": lambda: (folder / "manifest.json").write_text("[]"),
        "everything is gone": lambda: [path.unlink() for path in folder.iterdir()],
        "it is a file": lambda: (shutil.rmtree(folder), folder.write_text("")),
    }


@pytest.mark.parametrize("what", list(damage_of(Path())))
def test_damaged_data_are_noticed_and_made_anew(what: str) -> None:
    made = data.load(Machines(**TINY))
    expected = [sequences(everything(split)) for split in (made.train, made.val, made.test)]
    damage_of(made.folder)[what]()
    forgotten()
    again = data.load(Machines(**TINY))
    assert again.sha256 == made.sha256
    assert [sequences(everything(split)) for split in (again.train, again.val, again.test)] == expected
    assert [path.name for path in made.folder.parent.iterdir()] == [made.folder.name]  # nothing is left over
    stamp = (made.folder / "steps.npy").stat().st_mtime_ns
    forgotten()
    data.load(Machines(**TINY))
    assert (made.folder / "steps.npy").stat().st_mtime_ns == stamp


def test_what_a_killed_process_left_goes_after_a_day() -> None:
    made = data.load(Machines(**TINY))
    old, new = (made.folder.with_name(f".{made.folder.name}.{name}.part") for name in ("old", "new"))
    shutil.copytree(made.folder, new)
    made.folder.rename(old)
    os.utime(old, (0, 0))
    forgotten()
    data.load(Machines(**TINY))
    assert sorted(path.name for path in made.folder.parent.iterdir()) == [new.name, made.folder.name]


def test_processes_that_make_the_same_data_at_the_same_moment_all_get_them() -> None:
    code = (
        "import sys; from rnnq.families.fsm import data; from rnnq.families.fsm.config import Machines; "
        f"config = Machines(**{TINY}); print('ready', flush=True); sys.stdin.readline(); "
        "print(data.load(config).sha256)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(4)]  # type: ignore[call-overload]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:  # all stand ready; now they go
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60) for process in started]
    assert {(out.strip(), err) for out, err in said} == {(data.load(Machines(**TINY)).sha256, "")}
    assert len(list((cache_folder() / "fsm").iterdir())) == 1


def test_a_cache_folder_that_cannot_be_written_is_an_error_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RNNQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"3s2a 10/10 cannot be kept in .*file/fsm") as refused:
        data.load(Machines(**TINY))
    assert "RNNQ_CACHE" in str(refused.value.hint)


def test_who_waits_long_is_told_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data.load(Machines(**TINY))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(kept, "_TOLD_AFTER", 0.0)
    forgotten()
    data.load(Machines(**TINY))  # opening is no making
    assert capsys.readouterr() == ("", "")
    data.load(Machines(**TINY, data_seed=1))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("making the data 3s2a 10/10 (100 samples) in ")
    assert err.endswith("%\n") and err.count("\n") == 1  # the next is told ten seconds later


def test_the_data_reach_no_torch() -> None:
    code = "import sys, rnnq.families.fsm.baselines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ------------------------------------------------------------------------------------- what a plateau means

# U, A, S: accuracy and cross entropy; solver, also reading the query, open loop; all right; cells seen; covered
MEASURED = {
    "3s3a": (.487, .976, .651, .664, .607, .726, .9954, .9969, .989, .946, .960, .994),
    "5s5a": (.309, 1.525, .475, 1.113, .451, 1.161, .9986, .9991, .994, .941, .990, .998),
    "absorbing": (.940, .284, .942, .282, .957, .106, .9764, .9826, .957, .505, .556, .972),
    "5s8a": (.280, 1.565, .456, 1.152, .382, 1.353, .9913, .9967, .963, .637, .982, .989),
    "8s8a": (.188, 2.032, .328, 1.602, .310, 1.639, .9736, .9915, .843, .123, .955, .970),
}  # fmt: skip
FIELDS: dict[str, dict[str, Any]] = {
    "3s3a": dict(states=3, actions=3),
    "5s5a": {},
    "absorbing": dict(absorbing=True, demo_length=60),
    "5s8a": dict(actions=8, demo_length=70),
    "8s8a": dict(states=8, actions=8, demo_length=80),
}
NAMES = (
    "u_accuracy", "u_loss", "a_accuracy", "a_loss", "s_accuracy", "s_loss",
    "solver", "solver_online", "solver_open", "all_right", "cells_seen", "covered",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ("5s8a", "8s8a") else []) for name in MEASURED]
)
def test_shortcuts_and_solver_reach_what_was_measured_on_the_published_data(shared: Any, name: str) -> None:
    """The demonstrations are picked by the stream that the measurement had; it is rounded to three or four digits."""
    split = shared(data_split="stream", **FIELDS[name]).test
    chance = random.Random(0)
    picks = np.array([chance.sample(range(split.states), 3) for _ in range(len(split))])
    found = baselines.scores(split, picks)
    for field, expected in zip(NAMES, MEASURED[name], strict=True):
        assert abs(getattr(found, field) - expected) <= 0.0016, field
    if name == "absorbing":
        assert found.outside is not None and abs(found.outside - 0.072) < 0.001
        assert found.outside_solver is not None and abs(found.outside_solver - 0.676) < 0.005
    else:
        assert found.outside is found.outside_solver is found.outside_u is None


def test_the_default_data_have_nearly_the_ceilings_of_the_published(shared: Any) -> None:
    """Other machines of the same distribution. Over data seeds, the losses of 2,000 samples scatter by .005."""
    for name, tolerance in (("3s3a", 0.025), ("5s5a", 0.015)):
        made = shared(**FIELDS[name])
        found = made.scores("val")
        for field, expected in zip(NAMES, MEASURED[name], strict=True):
            assert abs(getattr(found, field) - expected) <= tolerance, (name, field)
        assert made.ceiling("val") == found.solver > 0.99
        assert made.shortcut("val") == found.a_accuracy


def plain_predictions(sequence: list[int], states: int, way: str) -> list[int]:
    """What a predictor says at each query step, by reading the sequence token by token."""
    cut = sequence.index(QUERY)
    demos = [list(g) for end, g in itertools.groupby(sequence[:cut], lambda t: t == EOS) if not end]
    query = sequence[cut + 1 : -1]
    table = {(w[i], w[i + 1]): w[i + 2] for w in demos for i in range(0, len(w) - 2, 2)}
    most = Counter(token for w in demos for token in w[::2]).most_common(1)[0][
        0
    ]  # of several the one that is met first
    steps = [(w[i], w[i + 1], w[i + 2]) for w in demos for i in range(0, len(w) - 2, 2)]
    said, state = [], query[0]
    for i in range(0, len(query) - 2, 2):
        now, action, after = query[i : i + 3]
        if way in ("solver", "open"):
            state = table.get((state if way == "open" else now, action), most)
            said.append(state)
            continue
        like = [s for s in steps if way == "U" or (way == "A" and s[1] == action) or (way == "S" and s[0] == now)]
        said.append(max(range(states), key=lambda s: ([t[2] for t in like].count(s), -s)))
        steps.append((now, action, after))
    return said


@pytest.mark.parametrize("fields", [dict(states=3, actions=3), dict(states=4, actions=3, demo_length=5)], ids=str)
def test_predictions_are_those_of_programs_that_read_the_sequence(fields: dict[str, Any]) -> None:
    split = data.load(Machines(**fields, n_train=60, n_val=100, n_test=20)).val
    rows = np.arange(len(split))[::-1]
    picks = split.picks(rows)
    shown = sequences(split.batch(rows, picks))
    found = {
        "solver": baselines.solver_predictions(split, rows, picks),
        "open": baselines.solver_predictions(split, rows, picks, open_loop=True),
        **{way: baselines.shortcut_predictions(split, rows, picks, way) for way in baselines.SHORTCUTS},
    }
    for way, said in found.items():
        for i, sequence in enumerate(shown):
            expected = plain_predictions(sequence, split.states, way)
            assert said[i, : len(expected)].tolist() == expected, (way, i)
            assert (said[i, len(expected) :] == PAD).all()
    after = split.query(rows).next_states
    right = (found["solver"] == after)[after != PAD]
    assert baselines.scores(split).solver == pytest.approx(right.mean())


def test_renamed_tokens_change_no_score() -> None:
    """Machines are shared out otherwise when actions may be renamed; so the scores are of the same split, renamed."""
    made = data.load(Machines(**TINY, permute_tokens=True))
    split = made.val
    plain = baselines.scores(split)
    rows = np.arange(len(split))
    said = baselines.solver_predictions(split, rows, split.picks(rows))
    after = split.query(rows).next_states
    assert plain.solver == pytest.approx((said == after)[after != PAD].mean())


def test_many_samples_are_scored_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    split = data.load(Machines(**TINY)).train
    whole = baselines.scores(split)
    monkeypatch.setattr(baselines, "_AT_ONCE", 7)
    in_parts = baselines.scores(split)
    assert whole.samples == in_parts.samples == 60
    assert vars(in_parts) == pytest.approx(vars(whole))


def test_scores_are_kept_beside_the_data_and_reckoned_again_when_damaged() -> None:
    made = data.load(Machines(**TINY))
    first = made.scores("test")
    [path] = made.folder.glob("scores-*.json")
    assert Scores(**json.loads(path.read_text())) == first
    path.write_text(path.read_text().replace(f'"solver": {first.solver}', '"solver": 0.5'))
    forgotten()
    assert data.load(Machines(**TINY)).scores("test").solver == 0.5  # read, not reckoned
    for damaged in ("{", "[]", "{}", path.read_text().replace("0.5", '"half"')):
        path.write_text(damaged)
        forgotten()
        assert data.load(Machines(**TINY)).scores("test") == first
        assert Scores(**json.loads(path.read_text())) == first
