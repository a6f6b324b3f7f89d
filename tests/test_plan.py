"""A definition becomes checked rows, or one list of everything that is wrong with it."""

from __future__ import annotations

import hashlib
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from rnnq import db, definitions, plan, queue
from rnnq.config import fingerprint, group_key, parse
from rnnq.errors import InputError
from rnnq.families.dynamics.config import DynamicsConfig
from rnnq.plan import Entry, Origin
from rnnq.queue import NewStage

Planned = Callable[..., list[NewStage]]

DYNAMICS = Origin("dynamics", DynamicsConfig, False, False, None, None)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_bytes(b"to be or not to be, that is the question. " * 100)  # 4,200 bytes: 210 held out, twice
    return str(path)


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """The stages of definition files: planned(text of the first, text of the second, ...)."""

    def make(*texts: str) -> list[NewStage]:
        folder = tmp_path / "defs"
        folder.mkdir(exist_ok=True)
        paths = [folder / f"d{number}.py" for number, _ in enumerate(texts, start=1)]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(textwrap.dedent(text))
        return plan.from_definitions([definitions.load(path) for path in paths], folder)

    return make


def problems(caught: pytest.ExceptionInfo[InputError]) -> list[str]:
    assert caught.value.exit_code == 2
    return caught.value.problems


# ----------------------------------------------------------------------------------------------------------- rows


def test_a_definition_becomes_rows_with_identity_label_and_budget(planned: Planned, corpus: str) -> None:
    [stage] = planned(f"""
        import rnnq
        stage = rnnq.stage("s", "dynamics", rnnq.grid(n_layers=[1, 2], use_forget_gate=[True, False]).seeds(2),
                           base=dict(steps=7, window=50, corpus={corpus!r}))
    """)

    assert (stage.name, stage.family, stage.version) == ("s", "dynamics", 1)
    assert (stage.family_in_source, stage.has_rule, stage.source) == (False, False, "d1.py")
    assert stage.seed_fields == ("seed",)
    assert [run.label for run in stage.runs] == [
        ".F..N.R L1 S256", ".F..N.R L1 S256", "....N.R L1 S256", "....N.R L1 S256",
        ".F..N.R L2 S256", ".F..N.R L2 S256", "....N.R L2 S256", "....N.R L2 S256",
    ]  # fmt: skip
    assert [run.seed for run in stage.runs] == [0, 1] * 4
    assert {run.budget for run in stage.runs} == {7}
    assert len({run.fingerprint for run in stage.runs}) == 8
    assert len({run.group_key for run in stage.runs}) == 4
    assert len({run.pack_key for run in stage.runs}) == 4
    for run in stage.runs:
        config = parse(DynamicsConfig, json.loads(run.config))
        assert run.fingerprint == fingerprint("dynamics", config)
        assert run.group_key == group_key("dynamics", config)
        assert set(json.loads(run.config)) == set(DynamicsConfig.model_fields), "the whole config is stored"


def test_a_stage_stores_what_promote_and_the_filter_need(planned: Planned, corpus: str, tmp_path: Path) -> None:
    [stage] = planned(f"""
        import rnnq
        stage = rnnq.stage("s", "dynamics", rnnq.grid(n_layers=[1]), base=dict(window=50, corpus={corpus!r}),
                           refine=lambda c: c)
    """)

    assert stage.has_rule
    assert stage.source_sha256 == hashlib.sha256((tmp_path / "defs" / "d1.py").read_bytes()).hexdigest()
    assert stage.fields["lr"] == "float"
    assert stage.fields["use_forget_gate"] == "bool"
    assert [metric["name"] for metric in stage.metrics if metric["primary"]] == ["loss"]
    assert stage.data == {corpus: hashlib.sha256(Path(corpus).read_bytes()).hexdigest()}


def test_a_family_of_the_file_itself_is_planned_by_its_own_config(planned: Planned) -> None:
    [stage] = planned("""
        import rnnq

        class ParityConfig(rnnq.Config):
            seed_fields = ("seed", "data_seed")
            data_seed: int = 0
            bits: tuple[int, ...] = (4,)

        @rnnq.family(ParityConfig)
        def parity(config):
            yield {"loss": 1.0}

        stage = rnnq.stage("p", parity, rnnq.configs([{"bits": (1, 2)}, {"bits": [3], "data_seed": 5}]))
    """)

    assert (stage.family, stage.family_in_source, stage.data) == ("parity", True, {})
    assert stage.seed_fields == ("seed", "data_seed")
    assert stage.fields == {"seed": "int", "data_seed": "int", "bits": "json"}
    assert [json.loads(run.config)["bits"] for run in stage.runs] == [[1, 2], [3]]
    assert [run.budget for run in stage.runs] == [None, None]
    assert [run.pack_key for run in stage.runs] == [None, None]


def test_the_same_definition_makes_the_same_rows_again(planned: Planned, corpus: str) -> None:
    text = f"""
        import rnnq
        stage = rnnq.stage("s", "dynamics", rnnq.grid(n_layers=[2, 1]), base=dict(window=50, corpus={corpus!r}))
    """
    assert planned(text) == planned(text)


def test_equal_configs_become_one_run_with_the_parents_of_all(corpus: str) -> None:
    base = {"window": 50, "corpus": corpus}
    entries = [
        Entry(base | {"n_layers": 2}, ((1, "promoted", "a"),)),
        Entry(base | {"n_layers": 3}, ((1, "promoted", "b"),)),
        Entry(base | {"n_layers": 2, "lr": 1e-3}, ((2, "promoted", "c"), (1, "promoted", "a"))),
        Entry(base | {"n_layers": 2, "state_size": 256}, ((3, "promoted", "d"),)),
    ]
    stage = plan.new_stage("s", DYNAMICS, entries)

    assert [run.label for run in stage.runs] == ["....N.R L2 S256", "....N.R L3 S256"]
    assert [run.parents for run in stage.runs] == [
        ((1, "promoted", "a"), (2, "promoted", "c"), (3, "promoted", "d")),
        ((1, "promoted", "b"),),
    ]


def test_the_hash_of_every_corpus_is_recorded(tmp_path: Path) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_bytes(path.name.encode() * 300)
    stage = plan.new_stage("s", DYNAMICS, [Entry({"corpus": str(path), "window": 50}) for path in paths])

    assert stage.data == {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_progress_sees_every_entry(corpus: str) -> None:
    seen: list[Any] = []

    def watch(entries: Any) -> Any:
        for entry in entries:
            seen.append(entry)
            yield entry

    entries = [Entry({"corpus": corpus, "window": 50, "seed": seed}) for seed in (1, 1, 2)]
    plan.new_stage("s", DYNAMICS, entries, watch)
    assert seen == entries


# ------------------------------------------------------------------------------------------------------- problems


def test_a_problem_that_many_entries_share_is_said_once_with_its_first_entry(corpus: str) -> None:
    good = {"corpus": corpus, "window": 50}
    entries = [good, good | {"lr": -1.0}, good | {"seed": 1}, good | {"lr": -1.0, "seed": 2, "n_layers": 0}]
    with pytest.raises(InputError) as caught:
        plan.new_stage("s", DYNAMICS, [Entry(values) for values in entries])

    assert problems(caught) == [
        "stage s, 2 entries, the first is 2: lr=-1.0: input should be greater than 0",
        "stage s, entry 4: n_layers=0: input should be greater than or equal to 1",
    ]


def test_a_problem_of_all_entries_says_so(corpus: str) -> None:
    with pytest.raises(InputError) as caught:
        plan.new_stage("s", DYNAMICS, [Entry({"hiden": 3, "seed": seed}) for seed in range(3)])

    [line] = problems(caught)
    assert line.startswith("stage s, all 3 entries, the first is 1: DynamicsConfig has no field hiden (")


def test_the_problems_of_all_files_and_stages_are_listed_at_once(planned: Planned, corpus: str) -> None:
    with pytest.raises(InputError) as caught:
        planned(
            f"""
            import rnnq
            a = rnnq.stage("a", "dynamics", rnnq.grid(lr=[0.0]), base=dict(corpus={corpus!r}, window=50))
            b = rnnq.stage("b", "dynamic", rnnq.grid(lr=[0.1]))
            """,
            """
            import rnnq
            c = rnnq.stage("c", "dynamics", rnnq.grid(stat_size=[3]))
            d = rnnq.stage("d", 3, rnnq.grid(lr=[0.1]))
            """,
        )

    text = "\n".join(problems(caught))
    assert "stage a, entry 1: lr=0.0" in text
    assert "there is no family 'dynamic' (did you mean dynamics?)" in text
    assert "stage c, entry 1: DynamicsConfig has no field stat_size (did you mean state_size" in text
    assert "3 is no family" in text


def test_two_stages_of_one_name_are_refused(planned: Planned, corpus: str) -> None:
    one = f"""
        import rnnq
        stage = rnnq.stage("same", "dynamics", rnnq.grid(seed=[1]), base=dict(corpus={corpus!r}, window=50))
    """
    with pytest.raises(InputError) as caught:
        planned(one, one, one.replace("same", "other"))
    assert problems(caught) == ["stage same is defined twice"]


def test_two_stages_of_one_name_are_said_even_when_one_is_wrong_otherwise(planned: Planned, corpus: str) -> None:
    one = f"""
        import rnnq
        stage = rnnq.stage("same", "dynamics", rnnq.grid(seed=[1]), base=dict(corpus={corpus!r}, window=50))
    """
    with pytest.raises(InputError) as caught:
        planned(one, one.replace("window=50", "window=1"))
    assert problems(caught) == [
        "stage same, entry 1: window=1: input should be greater than or equal to 2",
        "stage same is defined twice",
    ]


def test_a_corpus_that_is_missing_empty_or_short_is_listed_with_the_entry_that_names_it(tmp_path: Path) -> None:
    """The numbers are those of the entries as written, also after entries that are wrong or equal."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_bytes(b"x" * 900)
    (tmp_path / "good.txt").write_bytes(b"x" * 1000)
    good = {"corpus": str(tmp_path / "good.txt"), "window": 50}
    entries = [
        good,
        good,
        good | {"lr": -1.0},
        good | {"corpus": str(tmp_path / "missing.txt")},
        good | {"corpus": str(tmp_path / "empty.txt")},
        good | {"corpus": str(tmp_path / "short.txt"), "seed": 1},
        good | {"corpus": str(tmp_path / "short.txt"), "seed": 2},
        good | {"window": 51},
    ]
    with pytest.raises(InputError) as caught:
        plan.new_stage("s", DYNAMICS, [Entry(values) for values in entries])

    lines = problems(caught)
    assert len(lines) == 5
    assert lines[0].startswith("stage s, entry 3: lr=-1.0")
    assert lines[1].startswith("stage s, entry 4: ")
    assert "missing.txt" in lines[1]
    assert lines[2].startswith("stage s, entry 5: ")
    assert "is empty (0 bytes)" in lines[2]
    assert lines[3].startswith("stage s, 2 entries, the first is 6: ")
    assert "900 bytes are too few for window=50: val and test have 45 each" in lines[3]
    assert "a corpus of at least 1,0" in lines[3]
    assert lines[4].startswith("stage s, entry 8: ")


def test_what_is_stored_as_source_is_a_path_below_the_definitions(planned: Planned, corpus: str) -> None:
    text = f"""
        import rnnq
        stage = rnnq.stage("NAME", "dynamics", rnnq.grid(seed=[1]), base=dict(corpus={corpus!r}, window=50))
    """
    stages = planned(text.replace("NAME", "a"), text.replace("NAME", "b"))
    assert [stage.source for stage in stages] == ["d1.py", "d2.py"]


# ------------------------------------------------------------------------------- whatever a definition may hold

VALID = """
import rnnq

class Config(rnnq.Config):
    width: int = 1
    lr: float = 0.1
    name: str = ""
    gate: bool = True

@rnnq.family(Config)
def tiny(config):
    yield {"loss": 1.0}

def grow(config):
    yield config | {"width": 2}

sweep = rnnq.grid(width=[1, 2], lr=[0.1]).where(lambda c: c["width"] > 0).override(gate=False).seeds(2)
stage = rnnq.stage("s", tiny, sweep, base={"name": "x"}, refine=grow, next="t")
"""

HOSTILE = """
class Hostile:
    def _no(self, *_): raise RuntimeError("no")
    __repr__ = __str__ = __len__ = __bool__ = __eq__ = __hash__ = __iter__ = __index__ = __float__ = keys = _no
class Endless:
    def __iter__(self):
        while True: yield {}
    def __repr__(self): return "x" * 100
def raising():
    yield {"width": 1}
    raise KeyError("in the middle")
deep = []
for _ in range(5000): deep = [deep]
loop = {}
loop["width"] = loop
"""

# what may stand where a definition has something else
VALUES = st.sampled_from(
    """
    None | True | 3 | -1 | 0 | 10**30 | 1e400 | float("nan") | 1j | "" | "x" | "../x" | "a/b" | "\\x00"
    | "\\ud800" | "x" * 300 | b"x" | [] | {} | [1] | [{}] | [{1: 2}] | [{"width": 1}] | [{"seed": 10**30}]
    | [{"width": 10**30}] | {"seed": 0} | {"width": "wide"} | {"lr": float("nan")} | {"lr": 10**400}
    | {"name": "\\ud800"} | {"name": "a\\x00b"} | {"nme": 1} | {"name": 3} | {"seed": -1} | {"seed": 2**63}
    | {"width": Hostile()} | {"width": deep} | loop | {"name": "\\x1b[2J"} | {1, 2} | object() | int
    | range(10**12) | Endless() | Hostile() | Hostile | deep | raising() | lambda c: 1 / 0 | lambda: 1
    | lambda c: c["nowhere"] | lambda c: Hostile() | rnnq.grid() | rnnq.grid(width=range(10**9))
    | rnnq.zip(width=[1], lr=[]) | rnnq.grid(width=[1]).seeds([0, 0]) | rnnq.grid(width=[[1]]) | rnnq.union(1)
    | rnnq.grid(seed=[2**64]) | rnnq | tiny | Config | grow | rnnq.grid | rnnq.stage
    | rnnq.stage("s", tiny, [{}]) | "dynamics" | "nowhere" | print | __builtins__
    """.replace("\n", " ").split(" | ")
)  # fmt: skip
PLACES = ["[1, 2]", "[0.1]", 'lambda c: c["width"] > 0', "False", "seeds(2", '"s"', "tiny, sweep", "sweep, base",
          '{"name": "x"}', "=grow", '"t"', "(Config)", 'config | {"width": 2}', "rnnq.Config", "int = 1",
          "tiny"]  # fmt: skip
LINES = st.sampled_from(
    [
        "raise SystemExit(3)",
        'raise BaseException("x")',
        "raise SystemExit",
        "1 / 0",
        "import nowhere",
        'print("x" * 1000)',
        "exit()",
        "def f(): f()\nf()",
        "raise Hostile",
        'raise rnnq.InputError("mine")',
        "raise GeneratorExit",
        "import sys; sys.stdout = None",
        "stage = None",
        "del stage",
        "stage = [stage]",
        'twice = rnnq.stage("s", tiny, [{}])',
        "Config = 3",
        "return",
        "yield",
        "\x00",
        "\ufeff",
        "# coding: utf-16",
        "# coding: nowhere",
        "from rnnq import *",
        "import rnnq.queue",
        "class Config(Config): pass",
        "%%%",
        "\t x = 1",
        'Config.version = "x"',
        "Config.seed_fields = 3",
        "Config.metrics = None",
        "Config.pack_key = None",
        "tiny.Config = None",
        "Config.steps_total = lambda self: 1 / 0",
        "Config.label = lambda self: Hostile()",
        'Config.datasets = lambda self: {"x": 3}',
        'Config.label = lambda self: "\\ud800\\x1b[2J"',
        "Config.steps_total = lambda self: 10**30",
        "Config.primary = 3",
        "Config.pack_key = lambda self: 3",
        "Config.label = lambda self: None",
        'Config.steps_total = lambda self: "many"',
    ]
)
LETTERS = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    ["(", ")", "\n", '"', "=", ",", "'''", "\\", "\x00"]
)


@st.composite
def near_misses(draw: st.DrawFn) -> str:
    """A definition in which a few things are others."""
    text = VALID.replace("import rnnq\n", f"import rnnq\n{HOSTILE}", 1)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(PLACES))
        value = draw(VALUES)
        if place == "seeds(2":
            value = f"seeds({value}"
        elif place == "=grow":
            value = f"={value}"
        text = text.replace(place, value, 1)
    for line in draw(st.lists(LINES, max_size=1)):
        text = f"{text}\n{line}\n" if draw(st.booleans()) else f"{line}\n{text}"
    return text


@st.composite
def torn(draw: st.DrawFn) -> str:
    """A definition with a piece cut out, and something else in its place."""
    begin = draw(st.integers(0, len(VALID)))
    end = draw(st.integers(begin, min(len(VALID), begin + 40)))
    return VALID[:begin] + draw(LETTERS) + VALID[end:]


CONTENTS = st.one_of(
    near_misses(), near_misses(), torn(), st.text(st.characters(codec="utf-8"), max_size=200)
).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=200)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Engine]]:
    """A definition's place and a database."""
    folder = tmp_path_factory.mktemp("fuzz")
    db.upgrade(str(folder / "experiments.db"))
    engine = db.open(str(folder / "experiments.db"))
    yield folder / "defs.py", engine
    engine.dispose()


def everything(engine: Engine) -> list[Any]:
    with db.reading(engine) as connection:
        rows = [connection.exec_driver_sql(f"SELECT * FROM {name} ORDER BY 1").all() for name in ("stages", "runs")]
        return [tuple(row) for table in rows for row in table]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(CONTENTS)
def test_any_definition_is_taken_or_refused_in_words_and_then_the_database_is_as_it_was(
    fuzzed: tuple[Path, Engine], content: bytes
) -> None:
    path, engine = fuzzed
    path.write_bytes(content)
    before = everything(engine)
    streams = sys.stdout, sys.stderr
    try:
        stages = plan.from_definitions([definitions.load(path)], path.parent)
        queue.init(engine, stages)
    except InputError as error:
        assert error.problems
        assert all(isinstance(problem, str) and problem for problem in error.problems)
        assert everything(engine) == before
        return
    finally:
        assert (sys.stdout, sys.stderr) == streams
    with db.transaction(engine) as connection:  # so that the next one finds no stage of another family
        for stage in stages:
            assert stage.runs
        for table in ("runs", "intakes", "stages"):
            connection.exec_driver_sql(f"DELETE FROM {table}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('raise BaseException("out")', ": BaseException: out"),
        ("raise GeneratorExit", ": GeneratorExit"),
        ("class Mute(Exception): __str__ = None\nraise Mute", "Mute: (its text cannot be had)"),
        ('Config.label = lambda self: {}["x"]', "stage s: KeyError: 'x' (<lambda>, d1.py:"),
        ("Config.pack_key = lambda self: 3", "pack_key() of Config gives 3: neither a text nor None"),
        ("Config.steps_total = lambda self: 10**30", "no number of steps"),
        ("Config.steps_total = lambda self: 1.5", "no number of steps"),
    ],
)
def test_what_a_definitions_own_code_does_wrong_is_said_with_its_place(
    planned: Planned, change: str, said: str
) -> None:
    with pytest.raises(InputError) as caught:
        planned(f"{VALID}\n{change}\n")
    assert said in "\n".join(problems(caught))


def test_a_label_holds_no_control_codes(planned: Planned) -> None:
    [stage] = planned(VALID.replace('{"name": "x"}', '{"name": "\\x1b[2J"}'))
    assert "\\x1b[2J" in stage.runs[0].label
    assert "\x1b" not in stage.runs[0].label
