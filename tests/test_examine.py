"""The best runs and groups, which figures are drawn, and what leads on to promote."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from sqlalchemy import Engine

from rnnq import cli as command_line
from rnnq import definitions, examine, families, plan, queue
from rnnq.errors import InputError
from rnnq.figures import canvas, regression
from rnnq.figures.canvas import Scale
from rnnq.spread import Spread
from tests.conftest import Cli, claim_one
from tests.studies import add, add_study, finish, new_run


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canvas, "DPI", 40)  # a third of the time


@pytest.fixture
def study(engine: Engine) -> Engine:
    """Six finished runs."""
    add_study(engine)
    return engine


def ids(found: examine.Examined) -> list[int]:
    """The best runs, in their order."""
    return [row["id"] for row in found.best]


# ------------------------------------------------------------------------------------------------- the best runs


def test_low_is_good_unless_the_metric_says_otherwise_and_ties_go_to_the_lower_id(study: Engine) -> None:
    assert ids(examine.examine(study, "s")) == [4, 2, 6, 1, 5, 3]
    assert ids(examine.examine(study, "s", by="accuracy")) == [1, 2, 3, 4, 5, 6]


def test_a_run_without_the_metric_is_last_and_one_that_failed_is_not_there(engine: Engine) -> None:
    add(engine, [new_run(i) for i in range(4)])
    finish(engine, math.nan)
    finish(engine, 2.0)
    queue.fail(engine, claim_one(engine), "bug", "broken")

    assert ids(examine.examine(engine, "s")) == [2, 1]


def test_a_filter_chooses_among_all_runs(study: Engine) -> None:
    found = examine.examine(study, "s", "loss < 2.5 and gate")

    assert ids(found) == [1]
    assert len(found.rows) == 6


def test_what_the_user_got_wrong_is_named(study: Engine) -> None:
    for words, message in (
        (("t",), "no stage 't'"),
        (("s", "lss < 1"), "no such name: lss"),
        (("s", None, "acuracy"), "no metric 'acuracy'"),
    ):
        with pytest.raises(InputError, match=message):
            examine.examine(study, *words)


def test_the_table_has_the_fields_that_differ_and_the_metrics(study: Engine) -> None:
    rows, columns = examine.table(examine.examine(study, "s", by="accuracy"), 2)

    assert columns == ["id", "label", "width", "gate", "accuracy", "loss"]
    assert rows[0] == {"id": 1, "label": "label0", "width": 128, "gate": True, "accuracy": 1.0, "loss": 2.0}
    assert len(rows) == 2


def test_the_table_tells_seeds_apart_and_a_field_from_a_column(engine: Engine) -> None:
    add(engine, [new_run(i, "g", seed=i, label="ab"[i], loss=i) for i in range(2)])
    finish(engine, 1.0)

    rows, columns = examine.table(examine.examine(engine, "s"), 9)

    assert columns == ["id", "label", "seed", "config.label", "config.loss", "loss"]
    assert rows == [{"id": 1, "label": "label0", "seed": 0, "config.label": "a", "config.loss": 0, "loss": 1.0}]


def test_a_record_is_a_run_whole_with_checkpoints_as_paths(engine: Engine) -> None:
    add(engine, [new_run(0)])
    saved = {"path": "checkpoints/last.pt", "step": 10, "sha256": "00", "bytes": 1}
    queue.finish(engine, claim_one(engine), 10, {"loss": 1.0, "accuracy": 0.5}, "loss", checkpoint=saved)

    assert examine.records(examine.examine(engine, "s"), 20) == [
        {
            "id": 1,
            "stage": "s",
            "label": "label0",
            "state": "done",
            "seed": 0,
            "attempt": 1,
            "loss": 1.0,
            "config": {"width": 16, "gate": True, "seed": 0},
            "summary": {"loss": 1.0, "accuracy": 0.5},
            "checkpoint": "checkpoints/last.pt",
            "checkpoint_best": None,
        }
    ]


def test_the_promote_line_names_what_was_asked_and_counts_groups(study: Engine) -> None:
    def line(limit: int = 20, **asked: str) -> str:
        return shlex.join(examine.promote_words(examine.examine(study, "s", **asked), limit) or [])

    assert line() == "rnnq promote --stage s --top 6"
    assert line(2, by="loss") == "rnnq promote --stage s --top 2"
    assert line(filter="loss<2.4", by="accuracy") == "rnnq promote --stage s --by accuracy --filter 'loss<2.4' --top 4"


def test_the_promote_line_of_an_open_stage_is_partial_and_seeds_are_one_group(engine: Engine) -> None:
    add(engine, [new_run(i, "ab"[i // 2], seed=i % 2) for i in range(4)])
    for value in (1.0, 2.0, math.nan):
        finish(engine, value)

    assert examine.promote_words(examine.examine(engine, "s"), 20) == (
        ["rnnq", "promote", "--stage", "s", "--top", "1", "--partial"]
    )
    assert examine.promote_words(examine.examine(engine, "s", "loss > 9"), 20) is None


# ------------------------------------------------------------------------------------------------- the best groups


def with_seeds(engine: Engine) -> None:
    """Three groups of three seeds. The best run is of the second best group; the last group lacks a seed."""
    add(engine, [new_run(i, "abc"[i // 3], seed=i % 3, width=[16, 32, 64][i // 3]) for i in range(9)])
    for value in (2.0, 2.1, 2.2, 1.0, 3.0, 5.0, 1.5, 1.5):
        finish(engine, value)
    queue.fail(engine, claim_one(engine), "bug", "broken")


def test_groups_are_ranked_as_promote_ranks_them_and_one_that_lacks_seeds_has_no_place(engine: Engine) -> None:
    with_seeds(engine)

    rows, columns = examine.groups_table(examine.examine(engine, "s"), 9)

    assert columns == ["place", "label", "width", "mean", "std", "n", "of", "min", "max"]
    assert [(row["place"], row["width"], row["n"], row["of"]) for row in rows] == [
        (1, 16, 3, 3), (2, 32, 3, 3), (None, 64, 2, 3),
    ]  # fmt: skip
    assert rows[1] | {"std": 0} == {
        "place": 2, "label": "label3", "width": 32, "mean": 3.0, "std": 0, "n": 3, "of": 3, "min": 1.0, "max": 5.0,
    }  # fmt: skip
    assert rows[1]["std"] == pytest.approx(2.0)


def test_a_filter_that_leaves_out_a_seed_takes_the_place_of_its_group(engine: Engine) -> None:
    with_seeds(engine)

    rows, _ = examine.groups_table(examine.examine(engine, "s", "loss < 4"), 9)

    assert [(row["place"], row["width"], row["n"]) for row in rows] == [(1, 16, 3), (None, 64, 2), (None, 32, 2)]


def test_the_promote_line_of_groups_counts_those_with_a_place(engine: Engine) -> None:
    with_seeds(engine)
    found = examine.examine(engine, "s")

    assert examine.promote_words(found, 20, groups=True) == ["rnnq", "promote", "--stage", "s", "--top", "2"]
    assert examine.promote_words(found, 1, groups=True) == ["rnnq", "promote", "--stage", "s", "--top", "1"]


# ---------------------------------------------------------------------------------------------------- all figures


def test_each_figure_lies_beside_its_numbers(study: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "figures" / "s"

    written = examine.draw(study, examine.examine(study, "s"), folder)

    names = ("curves", "hyperparameters", "regression", "cost")
    assert [path.name for path in written] == [f"{name}.{suffix}" for name in names for suffix in ("png", "csv")]
    assert all(path.stat().st_size for path in written)
    assert written[0].read_bytes().startswith(b"\x89PNG")
    curves = pd.read_csv(folder / "curves.csv")
    assert curves.columns.tolist() == ["run", "label", "rank", "step", "loss"]
    assert len(curves) == 60
    assert curves[curves["run"] == 4][["rank", "step", "loss"]].to_numpy().tolist()[-1] == [1, 10, 1.1]
    numbers = pd.read_csv(folder / "hyperparameters.csv")
    assert numbers.columns.tolist() == ["hyperparameter", "value", "run", "loss", "n", "mean"]
    off = numbers[(numbers["hyperparameter"] == "gate") & (numbers["value"] == "False")]
    assert off["run"].tolist() == [2, 4, 6]
    assert off["mean"].tolist() == pytest.approx([4 / 3] * 3) and off["n"].tolist() == [3, 3, 3]


def test_a_filter_has_a_figure_of_its_own_unless_nothing_fulfils_it(study: Engine, tmp_path: Path) -> None:
    def names(filter: str) -> list[str]:
        written = examine.draw(study, examine.examine(study, "s", filter), tmp_path / filter)
        return [path.name for path in written if path.suffix == ".png"]

    plain = ["curves.png", "hyperparameters.png", "regression.png", "cost.png"]
    assert names("loss<2.2") == [*plain[:3], "hyperparameters_filtered.png", "regression_filtered.png", plain[3]]
    assert len(pd.read_csv(tmp_path / "loss<2.2" / "curves.csv")) == 60
    assert set(pd.read_csv(tmp_path / "loss<2.2" / "hyperparameters_filtered.csv")["run"]) == {1, 2, 4, 6}
    assert names("loss<0") == plain


def test_a_stage_with_seeds_has_the_curves_of_its_groups(engine: Engine, tmp_path: Path) -> None:
    with_seeds(engine)

    written = examine.draw(engine, examine.examine(engine, "s"), tmp_path)

    assert [path.name for path in written][2:8] == [
        f"{name}.{suffix}" for name in ("groups", "curves_groups", "curves_seeds") for suffix in ("png", "csv")
    ]


def test_figures_are_saved_in_every_format_asked_for_and_svg_has_text_as_text(study: Engine, tmp_path: Path) -> None:
    how = examine.drawing(["SVG, png", "svg"], "linear")

    written = examine.draw(study, examine.examine(study, "s"), tmp_path, how=how)

    assert (how.formats, how.scale) == (("svg", "png"), Scale.linear)
    assert [path.name for path in written][:3] == ["curves.svg", "curves.png", "curves.csv"]
    assert ">optimiser step</text>" in (tmp_path / "curves.svg").read_text()
    again = examine.draw(study, examine.examine(study, "s"), tmp_path / "again", how=how)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_formats_that_do_not_exist_are_all_named() -> None:
    with pytest.raises(InputError) as refused:
        examine.drawing(["png,jpg", "gif", ""], "auto")

    assert refused.value.problems == [f"--image {name}: no format of figures" for name in ("jpg", "gif", "''")]
    assert refused.value.hint is not None and "png, svg or pdf" in refused.value.hint


def test_a_folder_that_cannot_be_made_is_the_users_fault(study: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="figures cannot be written to"):
            examine.draw(study, examine.examine(study, "s"), folder)


def test_the_users_own_style_changes_nothing_and_stays(study: Engine, tmp_path: Path) -> None:
    with matplotlib.rc_context({"text.usetex": True, "font.size": 3}):
        examine.draw(study, examine.examine(study, "s"), tmp_path)
        assert matplotlib.rcParams["font.size"] == 3


def test_odd_words_are_drawn_as_they_are(engine: Engine, tmp_path: Path) -> None:
    words = ["$x^2", r"$\nonsense{$", "中文", "_hidden", "a_very_long_word_without_a_single_space_in_it" * 3]
    add(engine, [new_run(i, name=word) for i, word in enumerate(words)])
    for value in range(5):
        finish(engine, float(value))

    examine.draw(engine, examine.examine(engine, "s", 'label ~ "*" or label = "$\\\\x$"'), tmp_path)


def test_examining_loads_neither_torch_nor_what_only_a_regression_needs() -> None:
    code = """import sys, rnnq.cli, rnnq.examine, rnnq.families as families
assert families.find_figures("dynamics").draw and families.find_figures("toy") is None
assert not {"torch", "seaborn", "matplotlib.pyplot", "sklearn", "scipy"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_family_of_a_definition_file_has_not_the_figures_of_its_namesake(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(families, "find_figures", asked.append)
    for name, in_source in (("mine", True), ("s", False)):
        add(engine, [new_run(0)], name, family="dynamics", family_in_source=in_source)
        examine.draw(engine, examine.examine(engine, name), tmp_path)

    assert asked == ["dynamics"]


# ------------------------------------------------------------------------------------------------ the command line

DEFINITION = """
import rnnq

class Toy(rnnq.Config):
    width: int = 1

@rnnq.family(Toy)
def toy(config):
    yield {"loss": 1.0}

stage = rnnq.stage("toys", toy, rnnq.grid(width=[1, 2, 3]).seeds(SEEDS))
"""


class Terminal:
    """`rnnq ...` in this process: (exit code, stdout, stderr)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["rnnq", *words])
        with pytest.raises(SystemExit) as left:
            command_line.main()
        out, err = self.capsys.readouterr()
        return int(left.value.code or 0), out, err


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(monkeypatch, capsys)


def define(engine: Engine, tmp_path: Path, seeds: int = 1) -> None:
    """The stage `toys`, with a definition file that promote finds."""
    (tmp_path / "defs").mkdir()
    path = tmp_path / "defs" / "toys.py"
    path.write_text(DEFINITION.replace("SEEDS", str(seeds)))
    queue.init(engine, plan.from_definitions([definitions.load(path)], tmp_path / "defs"))


def test_a_stage_is_examined_from_the_command_line(study: Engine, cli: Cli, tmp_path: Path) -> None:
    done = cli("examine", "--limit", "3", "--filter", "loss<2.2")

    lines = done.stdout.splitlines()
    assert lines[0].strip() == "s: 3 of 4 finished runs with loss<2.2, lowest loss in nats/byte first"
    assert lines[1].split() == ["id", "label", "width", "gate", "loss"]
    assert [line.split()[0] for line in lines[2:5]] == ["4", "2", "6"]
    assert lines[-1] == "rnnq promote --stage s --filter 'loss<2.2' --top 3"
    assert done.stderr.splitlines() == [
        "stage s (the newest with finished runs)",
        "figures in figures/s/: curves.png, hyperparameters.png, regression.png, hyperparameters_filtered.png, "
        "regression_filtered.png, cost.png",
    ]
    assert (tmp_path / "figures" / "s" / "hyperparameters_filtered.csv").exists()


def test_json_and_csv_are_alone_on_stdout(study: Engine, terminal: Terminal, tmp_path: Path) -> None:
    _, out, err = terminal("examine", "--stage", "s", "--by", "accuracy", "--format", "json", "--save", "pictures")

    assert [row["id"] for row in json.loads(out)] == [1, 2, 3, 4, 5, 6]
    assert err.splitlines()[-1] == "rnnq promote --stage s --by accuracy --top 6"
    assert (tmp_path / "pictures" / "curves.png").exists()
    _, out, _ = terminal("examine", "--stage", "s", "--format", "csv", "--limit", "1")
    assert out == "id,label,width,gate,loss\n4,label3,128,False,1.0\n"


def test_a_filter_that_nothing_fulfils_is_no_error(study: Engine, terminal: Terminal, tmp_path: Path) -> None:
    code, out, err = terminal("examine", "--filter", "loss<0")

    assert (code, out) == (0, "")
    assert "none of the 6 finished runs of stage s fulfils loss<0" in err
    assert "promote" not in err
    assert not (tmp_path / "figures" / "s" / "hyperparameters_filtered.png").exists()
    assert terminal("examine", "--filter", "loss<0", "--format", "json")[1] == "[]\n"


def test_bad_input_exits_with_2_and_says_what_is_right(study: Engine, terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for words, message in (
        (["--stage", "t"], "there is no stage 't'"),
        (["--by", "acuracy"], "did you mean accuracy?"),
        (["--filter", "loss<"], "error: the filter cannot be used"),
        (["--limit", "0"], "--limit"),
        (["--save", "file"], "figures cannot be written to file"),
        (["--image", "gif"], "hint: png, svg or pdf"),
        (["--scale", "cubic"], "--scale"),
        (["--groups", "--regression"], "hint: ask for one at a time"),
        (["--db", "none.db"], "there is no database none.db"),
    ):
        code, out, err = terminal("examine", *words)
        assert (code, out) == (2, "") and message in err, err


def test_a_study_without_finished_runs_says_so(engine: Engine, terminal: Terminal) -> None:
    add(engine, [new_run(0)])

    assert terminal("examine")[0] == 2
    code, _, err = terminal("examine", "--stage", "s")
    assert code == 0
    assert "none of the 1 run of stage s has finished yet" in err


def test_a_stage_of_which_nothing_will_finish_says_so(engine: Engine, terminal: Terminal) -> None:
    add(engine, [new_run(i) for i in range(3)])
    for _ in range(3):
        queue.fail(engine, claim_one(engine), "bug", "broken")

    for words in ([], ["--groups"], ["--format", "json"]):
        code, out, err = terminal("examine", "--stage", "s", *words)
        assert (code, out.strip()) == (0, "[]" if "json" in words else "")
        assert "none of the 3 runs of stage s has finished, and none is open: 3 failed" in err


def test_the_promote_line_does_what_it_says(engine: Engine, terminal: Terminal, tmp_path: Path) -> None:
    define(engine, tmp_path)
    for value in (2.0, 1.0, 3.0):
        finish(engine, value)

    _, out, _ = terminal("examine", "--filter", "loss < 2.5", "--db", str(tmp_path / "experiments.db"))
    line = out.splitlines()[-1]
    code, out, err = terminal(*shlex.split(line)[1:], "--dry-run", "--format", "json")

    assert line.endswith(f"--top 2 --db {tmp_path / 'experiments.db'}")
    assert code == 0, err
    assert [group["runs"] for group in json.loads(out)["ranked"]] == [[2], [1]]


def test_with_seeds_the_promote_line_says_that_means_are_ranked(
    engine: Engine, terminal: Terminal, tmp_path: Path
) -> None:
    define(engine, tmp_path, seeds=2)
    for value in (1.0, 9.0, 2.0, 3.0, 4.0):
        finish(engine, value)
    queue.fail(engine, claim_one(engine), "bug", "broken")

    _, out, err = terminal("examine", "--limit", "1")

    assert out.splitlines()[-1] == "rnnq promote --stage toys --top 1"
    assert (
        "promote ranks groups by their mean over seeds: of the 1 group shown it takes 0; "
        "it leaves out 1 that lack seeds (see --allow-missing)"
    ) in err


def test_groups_are_shown_with_their_spread_and_the_plain_table_leads_to_them(
    engine: Engine, terminal: Terminal
) -> None:
    with_seeds(engine)

    _, _, err = terminal("examine", "--stage", "s")
    assert "these are runs, in 3 groups of 3 equal but for their seeds: see --groups" in err
    _, out, err = terminal("examine", "--stage", "s", "--groups")
    lines = out.splitlines()
    assert lines[0].strip() == "s: 3 of 3 groups, lowest loss in nats/byte first"
    assert lines[1].split() == ["place", "label", "width", "mean", "±", "std", "(n)"]
    assert lines[2].split() == ["1", "label0", "16", "2.10", "±", "0.10", "(3)"]
    assert lines[4].split() == ["label6", "64", "1.500", "±", "0.0", "(2", "of", "3)"]
    assert lines[-1] == "rnnq promote --stage s --top 2"
    assert "1 group lacks seeds and has no place: promote leaves such out" in err
    _, out, _ = terminal("examine", "--stage", "s", "--groups", "--format", "json", "--limit", "1")
    [group] = json.loads(out)
    assert (group["metric"], group["mean"], group["runs"], group["config"]) == (
        "loss", pytest.approx(2.1), [1, 2, 3], {"width": 16, "gate": True},
    )  # fmt: skip


def test_an_interval_may_stand_in_place_of_the_std(engine: Engine, terminal: Terminal) -> None:
    with_seeds(engine)

    _, out, _ = terminal("examine", "--stage", "s", "--groups", "--interval", "t95")
    assert out.splitlines()[1].split()[3:] == ["mean", "±", "t95", "(n)"]
    assert "2.10 ± 0.25 (3)" in out  # 4.303 times 0.1 over the root of 3
    _, out, _ = terminal("examine", "--stage", "s", "--groups", "--interval", "t95", "--format", "json")
    assert json.loads(out)[0]["t95"] == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-4)
    code, _, _ = terminal("examine", "--stage", "s", "--interval", "95")
    assert code == 2


def test_a_csv_of_groups_has_the_interval_as_a_column(engine: Engine) -> None:
    with_seeds(engine)

    rows, columns = examine.groups_table(examine.examine(engine, "s", spread=Spread.t95), 9)

    assert columns == ["place", "label", "width", "mean", "std", "t95", "n", "of", "min", "max"]
    assert rows[0]["t95"] == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-4)


def test_a_regression_is_shown_with_what_to_beware_of(
    engine: Engine, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regression, "SPLITS", 5)
    add(engine, [new_run(i, width=16 << i % 3, gate=i % 2 == 0) for i in range(30)])
    for i in range(30):
        finish(engine, math.exp(i % 3 - (i % 2 == 0) / 2 + i / 1000))

    _, out, err = terminal("examine", "--stage", "s", "--regression")
    lines = out.splitlines()
    assert lines[0].strip() == "s: log(loss) by hyper-parameter, 30 runs, all z-scored"
    assert [line.split()[0] for line in lines[2:4]] == ["log(width)", "gate"]
    assert lines[4].startswith("on the 6 of 30 runs not fitted: R² 1.000, MSE 0.000; over 5 splits: R² 1.000")
    assert "promote" not in out + err
    _, out, _ = terminal("examine", "--stage", "s", "--regression", "--filter", "gate", "--format", "json")
    found = json.loads(out)
    assert (found["n"], found["target"], found["reason"]) == (15, "log(loss)", None)
    assert [row["feature"] for row in found["coefficients"]] == ["log(width)"]
    words = ("--regression", "--filter", "loss < 0.7", "--format", "csv")
    code, out, err = terminal("examine", "--stage", "s", *words)
    assert (code, out) == (
        0,
        "feature,scale,coefficient,std,all\n",
    ) and "no regression of log(loss): too few runs: 5 finished runs" in err


def test_all_stages_stand_side_by_side_each_by_its_own_metric(engine: Engine, terminal: Terminal) -> None:
    add_study(engine)
    add(engine, [new_run(90 + i, "same", seed=i, width=9) for i in range(2)], name="later")
    finish(engine, 4.0, accuracy=0.25)
    finish(engine, 5.0, accuracy=0.75)
    code, out, err = terminal("examine", "--across", "--by", "accuracy", "--format", "json")
    assert code == 0, err
    rows = json.loads(out)
    assert {row["stage"] for row in rows} == {"s", "later"}
    [later] = [row for row in rows if row["stage"] == "later"]
    assert (later["mean"], later["n"], later["of"], later["metric"]) == (0.5, 2, 2, "accuracy")
    _, out, _ = terminal("examine", "--across")
    assert "4.50 ± 0.71 (2)" in out
    code, _, err = terminal("examine", "--across", "--by", "acuracy")
    assert code == 2 and "accuracy" in err
    code, _, err = terminal("examine", "--across", "--stage", "s")
    assert code == 2 and "leave out --stage" in err
