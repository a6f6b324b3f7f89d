"""What becomes of a definition file, and which files a database may name."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from rnnq.definitions import load, load_source, relative_source, resolve_source
from rnnq.errors import InputError
from rnnq.sweep import refined

GOOD = 'from rnnq.sweep import grid, stage\nstage1 = stage("stage1", "dynamics", grid(n_layers=[1, 2]))\n'


def write(folder: Path, text: str, name: str = "study.py") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(dedent(text))
    return path


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        load(path)
    assert caught.value.exit_code == 2
    return caught.value


# -------------------------------------------------------------------------------------------- definitions


def test_a_definition_knows_its_stages_in_order_and_the_hash_of_its_bytes(tmp_path):
    path = write(
        tmp_path,
        """
        from rnnq.sweep import grid, stage
        second = stage("b", "dynamics", grid(n_layers=[1, 2]))
        first = stage("a", object(), grid(n_layers=3), next="a-long")
        also_first = first
        """,
    )

    definition = load(path)

    assert [stage.name for stage in definition.stages] == ["b", "a"]
    assert definition.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert definition.path == path
    assert definition.module.__file__ == str(path)
    assert definition.rule("a") is definition.module.first
    assert definition.rule("a-long") is None


def test_a_rule_is_found_through_a_chain_of_next(tmp_path):
    definition = load(
        write(
            tmp_path,
            """
            from rnnq.sweep import grid, stage
            last = stage("c")
            middle = stage("b", refine=lambda c: c | {"steps": 9}, next=last)
            first = stage("a", "dynamics", grid(n_layers=1), next=middle)
            other = stage("x", "dynamics", grid(n_layers=1), next=stage("y", next=stage("z")))
            named = stage("p", "dynamics", grid(n_layers=1), next="q")
            q = stage("q", refine=lambda c: c)
            """,
        )
    )

    assert [stage.name for stage in definition.stages] == ["a", "x", "p"]
    assert refined(definition.rule("b"), {}) == [{"steps": 9}]
    assert [definition.rule(name).name for name in "abcxyzpq"] == list("abcxyzpq")
    assert definition.rule("d") is None


def test_each_loading_is_a_fresh_module_that_stays_known(tmp_path):
    path = write(tmp_path, GOOD)
    first, second = load(path), load(str(path))

    assert first.module is not second.module
    assert sys.modules[first.module.__name__] is first.module
    assert sys.modules[second.module.__name__] is second.module


def test_the_future_imports_of_rnnq_are_not_the_definitions(tmp_path):
    definition = load(write(tmp_path, GOOD + "def f(x: 1 + 1): ...\n"))

    assert definition.module.f.__annotations__ == {"x": 2}


def test_a_definition_may_hold_a_dataclass(tmp_path):
    # dataclasses look their module up in sys.modules while it is still running
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"

    assert load(write(tmp_path, text + GOOD)).module.A(3).x == 3


def test_a_definition_may_import_what_lies_beside_it_and_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # as in a user's shell
    write(tmp_path, "SIZES = [1, 2, 3]\n", "beside_the_study.py")
    path = write(
        tmp_path,
        """
        from beside_the_study import SIZES
        from rnnq.sweep import grid, stage
        import sys
        sys.path.append("/somewhere")
        stage1 = stage("stage1", "dynamics", grid(size=SIZES))
        """,
    )
    before = sys.path[:]

    assert len(load(path).stages[0].sweep) == 3

    assert sys.path == before
    assert not sys.dont_write_bytecode
    assert sorted(file.name for file in tmp_path.iterdir()) == ["beside_the_study.py", "study.py"]


def test_two_folders_may_each_have_a_helper_of_one_name(tmp_path):
    text = """
        from helper_of_one_name import SIZE
        from rnnq.sweep import grid, stage
        stage1 = stage("stage1", "dynamics", grid(size=SIZE))
        """
    sizes = []
    for size in (1, 2, 3):
        write(tmp_path / str(size), f"SIZE = {size}\n", "helper_of_one_name.py")
        sizes += [c["size"] for c in load(write(tmp_path / str(size), text)).stages[0].configs()]

    assert sizes == [1, 2, 3]


def test_what_a_definition_prints_does_not_stand_among_the_data(tmp_path, capsys):
    load(write(tmp_path, "print('hello')\n" + GOOD))

    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


def test_paths_that_are_no_definition_are_refused(tmp_path):
    write(tmp_path, GOOD, "stage1.py")
    write(tmp_path, "", "stage1.txt")

    missing = refusal(tmp_path / "stage2.py")
    assert missing.message == f"{tmp_path / 'stage2.py'} does not exist"
    assert missing.hint == "did you mean stage1.py?"
    assert "does not exist" in refusal(tmp_path / "nowhere" / "stage1.py").message
    assert "does not exist" in refusal(tmp_path / "stage1.py" / "stage1.py").message
    assert "cannot be opened" in refusal(tmp_path / ("a" * 300 + ".py")).message
    assert "cannot be opened" in refusal(Path("a\0.py")).message
    assert "is not a file" in refusal(tmp_path).message
    assert "is not a definition" in refusal(tmp_path / "stage1.txt").message


def test_a_syntax_error_is_shown_with_its_line(tmp_path):
    path = write(tmp_path, "x = 1\ny = = 2\n")

    error = refusal(path)

    assert error.message == f"{path}:2: SyntaxError: invalid syntax"
    assert "y = = 2" in error.hint


@pytest.mark.parametrize("content", [b"x = '\xff'\n", b"x = 1\0\n", b"# coding: nonsense\n"])
def test_bytes_that_are_no_python_are_refused(tmp_path, content):
    path = tmp_path / "study.py"
    path.write_bytes(content)

    assert str(path) in refusal(path).message


def test_a_definition_that_raises_is_shown_with_its_line_and_its_trace(tmp_path):
    path = write(tmp_path, "def half(x):\n    return 1 / x\n\nhalf(0)\n")
    known = set(sys.modules)

    error = refusal(path)

    assert error.message == f"{path}:2: ZeroDivisionError: division by zero"
    assert "half(0)" in error.hint
    assert "rnnq/definitions" not in error.hint
    assert set(sys.modules) == known


def test_a_definition_that_leaves_the_program_is_refused_too(tmp_path):
    assert "SystemExit: 3" in refusal(write(tmp_path, "raise SystemExit(3)\n")).message


def test_an_interrupt_while_a_definition_is_loaded_is_passed_on(tmp_path):
    before, known = sys.path[:], set(sys.modules)

    with pytest.raises(KeyboardInterrupt):
        load(write(tmp_path, "raise KeyboardInterrupt\n"))

    assert (sys.path, set(sys.modules)) == (before, known)


def test_an_input_error_inside_a_definition_keeps_its_words_and_gets_the_line(tmp_path):
    path = write(tmp_path, "from rnnq.sweep import grid\n\nx = grid(\n    lr=[],\n    size=[],\n)\n")

    assert refusal(path).problems == [f"{path}:3: axis lr is empty", f"{path}:3: axis size is empty"]


def test_a_definition_without_a_stage_is_shown_the_form(tmp_path):
    for text in ("", "from rnnq.sweep import *\nstage1 = grid(a=1)\n"):
        error = refusal(write(tmp_path, text))
        assert "lacks `stage`" in error.message
        assert "stage = rnnq.stage(" in error.hint


def test_everything_wrong_with_the_stages_of_a_file_is_listed_at_once(tmp_path):
    path = write(
        tmp_path,
        """
        from rnnq.sweep import grid, stage
        a = stage("same", "dynamics", grid(n_layers=1))
        b = stage("same", "dynamics", grid(n_layers=2))
        c = stage("empty", "dynamics", grid(n_layers=1).where(lambda c: False))
        d = stage("nothing")
        e = stage("no_family", None, grid(n_layers=1))
        f = stage("no_sweep", "dynamics", base=dict(n_layers=1))
        g = stage("h", "dynamics", grid(n_layers=1), next=stage("same"))
        i = stage("j", "dynamics", grid(n_layers=1), next=stage("based", base=dict(n_layers=1)))
        k = stage("l", "dynamics", grid(n_layers=1), next=stage("inline", "dynamics", grid(n_layers=1)))
        """,
    )
    known = set(sys.modules)

    problems = refusal(path).problems

    assert problems == [
        f"{path}: {problem}"
        for problem in (
            "3 stages are named same",
            "stage empty is empty: its sweep has no configs",
            "stage nothing lacks its family and its sweep",
            "stage no_family lacks its family",
            "stage no_sweep lacks its sweep",
            "stage based has base= but no sweep that it could apply to",
            "stage inline is only the next= of another, and its sweep would never be used",
        )
    ]
    assert set(sys.modules) == known


def test_stages_that_only_follow_each_other_are_no_study(tmp_path):
    path = write(tmp_path, 'from rnnq.sweep import stage\na = stage("a", next="b")\nb = stage("b", next="a")\n')

    assert "no stage has a sweep" in refusal(path).message


# ---------------------------------------------------------------------------- definitions that a row names


def test_a_source_is_relative_to_the_definitions_folder_or_a_bare_name(tmp_path, monkeypatch):
    defs = tmp_path / "defs"
    deep = write(defs, "", "top.py") and write(defs / "more", "", "deep.py")
    outside = write(tmp_path, "", "outside.py")
    (tmp_path / "link").symlink_to(defs)
    (defs / "out.py").symlink_to(outside)
    monkeypatch.chdir(tmp_path)

    assert relative_source("defs/top.py", "defs") == "top.py"
    assert relative_source(deep, "defs") == "more/deep.py"
    assert relative_source("link/more/deep.py", defs) == "more/deep.py"
    assert relative_source(defs / "more" / ".." / "top.py", "link") == "top.py"
    assert relative_source(outside, defs) == "outside.py"
    assert relative_source("defs/out.py", "defs") == "out.py"


def test_a_source_below_the_definitions_folder_is_resolved(tmp_path):
    path = write(tmp_path / "more", GOOD, "deep.py")
    (tmp_path / "latest.py").symlink_to(path)

    assert resolve_source("more/deep.py", tmp_path) == path
    assert resolve_source("latest.py", tmp_path).resolve() == path


@pytest.mark.parametrize(
    "source",
    [
        "",
        ".",
        "/etc/passwd",
        "../out.py",
        "more/../../out.py",
        "..",
        "C:\\x.py",
        "C:x.py",
        "..\\out.py",
        "\\x",
        "a\0.py",
    ],
)
def test_a_source_that_names_anything_else_is_refused(tmp_path, source):
    write(tmp_path, GOOD, "out.py")

    with pytest.raises(InputError, match="only a path below") as caught:
        resolve_source(source, tmp_path / "defs")
    assert "--defs" in caught.value.hint


def test_a_link_out_of_the_definitions_folder_is_refused(tmp_path):
    outside = write(tmp_path / "elsewhere", GOOD)
    defs = tmp_path / "defs"
    defs.mkdir()
    (defs / "link.py").symlink_to(outside)
    (defs / "folder").symlink_to(outside.parent)
    (defs / "loop.py").symlink_to(defs / "loop.py")

    for source in ("link.py", "folder/study.py"):
        with pytest.raises(InputError, match="does not lead to a place below"):
            resolve_source(source, defs)
    with pytest.raises(InputError, match=r"loop\.py"):
        load_source("loop.py", "", defs)


def test_a_recorded_source_is_executed_while_its_hash_matches(tmp_path):
    path = write(tmp_path, GOOD)
    first = load(path)

    again = load_source(relative_source(path, tmp_path), first.sha256, tmp_path)

    assert (again.path, again.sha256) == (path, first.sha256)
    assert [stage.name for stage in again.stages] == ["stage1"]


def test_a_recorded_source_that_has_changed_is_never_executed(tmp_path):
    ran = tmp_path / "ran"
    before = load(write(tmp_path, GOOD)).sha256
    path = write(tmp_path, f"open({str(ran)!r}, 'w').close()\n" + GOOD)

    with pytest.raises(InputError) as caught:
        load_source("study.py", before, tmp_path)

    assert not ran.exists()
    assert caught.value.exit_code == 2
    assert str(path) in caught.value.message
    assert "--defs" in caught.value.hint
    assert "--rules" in caught.value.hint
    load(path)
    assert ran.exists()  # the proof that it would have shown


def test_a_recorded_source_in_yaml_is_data_and_is_not_even_opened(tmp_path):
    # a stranger's database must not have us read base configs from wherever it likes
    write(tmp_path, "family: dynamics\nbase_config: ../elsewhere.yaml\nexperiments: [{name: a}]\n", "study.yaml")

    with pytest.raises(InputError, match="is data: a definition in YAML holds neither a family nor a rule"):
        load_source("study.yaml", "0" * 64, tmp_path)


def test_a_recorded_source_that_is_gone_names_the_options_that_help(tmp_path):
    with pytest.raises(InputError, match=r"gone\.py does not exist") as caught:
        load_source("gone.py", "0" * 64, tmp_path)
    assert "--defs" in caught.value.hint
    assert "--rules" in caught.value.hint


def test_the_bytes_that_are_hashed_are_the_bytes_that_are_executed(tmp_path):
    # the file rewrites itself while it runs: the hash must be of what ran
    path = write(tmp_path, "from pathlib import Path\nPath(__file__).write_text('other')\n" + GOOD)
    content = path.read_bytes()

    assert load(path).sha256 == hashlib.sha256(content).hexdigest()
    assert path.read_text() == "other"
