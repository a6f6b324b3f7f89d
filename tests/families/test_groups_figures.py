"""The figures of groups: plateaus, powers, neurons, W_mix and predictions are what weights of known making say."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pandas import DataFrame
from torch import Tensor

from rnnq import db, examine, frame, runs, single, weights
from rnnq.config import parse
from rnnq.errors import CheckpointError, Damaged
from rnnq.families.groups import figures, nets, shown, templates, theory, weight_figures
from rnnq.families.groups.config import GroupsConfig
from tests.processes import Study

SHOWN: dict[str, tuple[Figure, DataFrame]] = {}
C10: dict[str, Any] = {"p": 10, "k": 2, "template_type": "fourier", "n_freqs": 3, "seed": 5, "batch_size": 64}


@pytest.fixture(autouse=True)
def _nothing_shown() -> None:
    SHOWN.clear()


def save(figure: Figure, name: str, numbers: DataFrame) -> list[Path]:
    """In place of files."""
    figure.draw_without_rendering()
    SHOWN[name] = figure, numbers
    return [Path(f"{name}.png"), Path(f"{name}.csv")]


def config_of(seed: int = 0, **parts: Any) -> GroupsConfig:
    return parse(GroupsConfig, {"seed": seed, **parts})  # type: ignore[return-value]


def frame_of(*configs: GroupsConfig, losses: list[float] | None = None, group: str = "g") -> DataFrame:
    """Finished runs of one group as frame.of_rows has them."""
    return DataFrame(
        {"id": i, "stage": "s", "state": "done", "seed": config.seed, "group_key": group, "label": config.label(),
         "loss": losses[i - 1] if losses else 0.1 * i}
        | {f"config.{name}": value for name, value in frame.flat(config.model_dump(mode="json")).items()}
        for i, config in enumerate(configs, start=1)
    )  # fmt: skip


class Held:
    """Weights that are at hand; a step whose weights are None cannot be read."""

    def __init__(self, held: Mapping[int, Mapping[int, dict[str, Tensor] | None]]) -> None:
        self.held = held

    def steps(self, run: int) -> list[int]:
        return sorted(self.held.get(run, {}))

    def at(self, run: int, step: int) -> dict[str, Tensor]:
        found = self.held[run][step]
        if found is None:
            raise Damaged("gone")
        return found


def waves(config: GroupsConfig, modes: list[tuple[int, float]], size: float = 1.0) -> dict[str, Tensor]:
    """Weights of a QuadraticRNN whose neurons are cosines to the output: (frequency, phase) each."""
    n, d = config.order(), len(modes)
    out = np.stack([np.cos(2 * np.pi * f * np.arange(n) / n + phase) for f, phase in modes])
    return {
        "W_in": torch.zeros(1, n, d),
        "W_mix": torch.arange(d * d).view(1, d, d).float(),
        "W_drive": torch.zeros(1, n, d),
        "W_out": size * torch.from_numpy(out)[None].float(),
    }


# -------------------------------------------------------------------------------------------------- what is shown


def test_a_config_comes_back_from_a_frame_as_it_was() -> None:
    """Null beside whole numbers, lists as texts, and a text that only looks like a list."""
    configs = [
        config_of(3, data=C10, description="[x]"),
        config_of(4, data={"p1": 4, "p2": 6, "template_type": "fourier", "vary_template": True}),
        config_of(5, data={"group_name": "dihedral", "template_type": "custom_fourier", "powers": [0, 30, 3000.5]}),
    ]
    assert [shown.config_of(row) for row in frame_of(*configs).to_dict("records")] == configs


def test_groups_are_shown_best_first_and_what_cannot_be_is_told() -> None:
    good, other, broken = (frame_of(config_of(data=C10), losses=[loss], group=key)
                           for key, loss in (("a", 0.5), ("b", 0.1), ("c", 0.2)))  # fmt: skip
    broken["config.data.k"] = 1
    runs = DataFrame([*good.to_dict("records"), *other.to_dict("records"), *broken.to_dict("records")])
    runs["id"] = [1, 2, 3]
    groups, remarks = shown.groups_of(runs, 6)
    assert [group.runs for group in groups] == [(2,), (1,)]
    assert [group.name[-8:] for group in groups] == [" (run 2)", " (run 1)"]
    assert len(remarks) == 1 and "left out: 1" in remarks[0] and "data.k" in remarks[0]
    assert shown.groups_of(runs, 1)[1][0] == "the best 1 of 2 groups"


# ------------------------------------------------------------------------------------------------------- plateaus


def test_losses_stand_between_the_predicted_plateaus_with_a_name_each() -> None:
    runs = frame_of(config_of(0, data=C10), config_of(1, data=C10))
    curves = DataFrame(
        [(run, "loss", step, value * run) for run in (1, 2) for step, value in ((10, 1.0), (100, 0.4), (1000, 0.01))]
        + [(1, "loss", 2000, math.nan)],
        columns=["run", "name", "step", "value"],
    )
    figures.draw(runs, curves, save)
    figure, numbers = SHOWN["plateaus"]
    levels = numbers[numbers["what"] == "plateau"]
    assert levels["value"].tolist() == pytest.approx([1, 0.393939, 0.060606], rel=1e-4)
    assert levels["mode"].tolist() == ["", "f = 4", "f = 3"]
    [axes] = figure.axes
    assert [text.get_text() for text in axes.texts] == ["nothing learnt: 1", "+ f = 4: 0.3939", "+ f = 3: 0.06061"]
    means = numbers[numbers["what"] == "mean"]
    assert means["mean"].tolist() == pytest.approx([1.5, 0.6, 0.015])
    assert means["std"].tolist() == pytest.approx([0.5**0.5, 0.4 * 0.5**0.5, 0.01 * 0.5**0.5])


# --------------------------------------------------------------------------------------------------------- powers


def test_the_power_of_a_net_that_answers_one_mode_is_that_mode_alone() -> None:
    """A TwoLayerNet of constructed weights: linear, U passes the second of two elements on, V the first is dropped."""
    data = C10 | {"p": 5, "n_freqs": 2}
    config = config_of(data=data, model={"model_type": "TwoLayerNet", "hidden_dim": 5, "nonlinearity": "linear"},
                       training={"optimizer": "adam"})  # fmt: skip
    template = templates.draw(config)
    spectrum = np.fft.rfft(np.eye(5), axis=0)
    strongest = int(theory.cyclic_power(template).argmax())
    spectrum[np.arange(len(spectrum)) != strongest] = 0
    only = torch.from_numpy(np.fft.irfft(spectrum, 5, axis=0)).float()  # keeps one frequency of a vector
    params = {"U": only[None], "V": torch.zeros(1, 5, 5), "W": torch.eye(5)[None]}
    empty = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    held = Held({1: {0: empty, 50: None, 100: params}})
    [group], _ = shown.groups_of(frame_of(config), 6)

    table, remarks = figures.powers([group], held)

    assert remarks == ["1 file of weights cannot be read"]
    own = table.set_index(["step", "mode"])["power"]
    names = [mode.words for mode in group.modes]
    assert names[0] == f"f = {strongest}"
    assert own[100].tolist() == pytest.approx([group.modes[0].power, 0, 0], abs=1e-5)
    assert own[0].tolist() == [0, 0, 0]
    assert table["template"].iloc[:2].tolist() == pytest.approx([mode.power for mode in group.modes])


def test_few_snapshots_are_bars_and_many_are_curves_with_the_templates_power_beside() -> None:
    config = config_of(data=C10, model={"hidden_dim": 3})
    drawn = nets.draw(config)
    for steps, label in (([9], "mode, after step 9"), ([0, 5, 9], "optimiser step")):
        figures.draw_weights(frame_of(config), Held({1: dict.fromkeys(steps, drawn)}), save)
        [axes] = SHOWN["power"][0].axes
        assert axes.get_xlabel() == label
        assert len(SHOWN["power"][1].query("what == 'run'")) == 4 * len(steps)  # three modes, and the rest


def test_of_many_snapshots_the_first_the_last_and_more_of_the_early_ones_are_read() -> None:
    steps = list(range(0, 20_001, 100))
    found = figures.thinned(steps)
    assert len(found) <= figures.SNAPSHOTS and (found[0], found[-1]) == (0, 20_000)
    assert sum(step < 4000 for step in found) > len(found) / 2
    assert figures.thinned([0, 3, 7]) == [0, 3, 7]


# ------------------------------------------------------------------------------------------- neurons, W_mix, answers


def test_neurons_of_known_frequency_and_phase_are_told_apart_and_ordered() -> None:
    """The template's modes are 4, 3, 1. One neuron is dead; the frequency 2 is none of the template's."""
    config = config_of(data=C10 | {"k": 3}, model={"hidden_dim": 6})
    made = [(1, 0.5), (4, 2.0), (3, 1.0), (4, 1.0), (2, 3.0), (4, 0.1)]
    params = waves(config, made)
    params["W_out"][0, 5] *= 1e-3
    [group], _ = shown.groups_of(frame_of(config), 6)

    found = weight_figures.tuned(group, config, params)
    assert found.of.tolist() == [2, 0, 1, 0, 3, -1]
    assert found.neurons.phase.tolist() == pytest.approx([phase for _, phase in made], abs=1e-4)
    assert weight_figures.ordered(group, found).tolist() == [3, 1, 2, 0, 4, 5]

    figures.draw_weights(frame_of(config), Held({1: {0: params, 9: params}}), save)
    numbers = SHOWN["neurons"][1]
    assert numbers["mode"].tolist() == ["1", "4", "3", "4", "2", "4"]
    assert numbers["share"].tolist() == pytest.approx([1] * 6)
    blocks = SHOWN["mixing"][1].query("step == 9").set_index(["receives", "read"])["rms"]
    mix = nets.matrices(config, params)["W_mix"]  # (receives, read)
    assert blocks["f = 1", "f = 3"] == mix[0, 2]
    assert blocks["f = 4", "f = 4"] == pytest.approx(np.sqrt((mix[np.ix_([1, 3], [1, 3])] ** 2).mean()))
    image = SHOWN["mixing"][0].axes[0].images[0].get_array()
    assert np.array_equal(image, mix[np.ix_([3, 1, 2, 0, 4, 5], [3, 1, 2, 0, 4, 5])])


def test_w_mix_is_not_drawn_where_it_plays_no_part() -> None:
    config = config_of(data=C10, model={"hidden_dim": 2})
    figures.draw_weights(frame_of(config), Held({1: {0: waves(config, [(1, 0.0), (4, 0.0)])}}), save)
    assert set(SHOWN) == {"power", "neurons", "predictions"}


def test_answers_stand_beside_the_truth_for_the_same_tuples_of_all_seeds() -> None:
    """Nets of zeros answer 0; the truth is the template moved by the sum."""
    configs = [config_of(seed, data=C10, model={"hidden_dim": 2}) for seed in (0, 1)]
    zeros = waves(configs[0], [(1, 0.0), (4, 0.0)], 0.0)
    figures.draw_weights(frame_of(*configs), Held({1: {9: zeros}, 2: {9: zeros}}), save)
    numbers = SHOWN["predictions"][1]
    template = templates.draw(configs[0])
    assert sorted(set(numbers["run"])) == [1, 2]
    assert (numbers["answer"] == 0).all()
    for (_, words), own in numbers.groupby(["run", "tuple"]):
        moved = np.roll(template, sum(map(int, words.split())) % 10)
        assert own["truth"].to_numpy() == pytest.approx(moved, abs=1e-6)


def test_a_product_of_groups_is_shown_as_images_and_another_group_by_element() -> None:
    plane = config_of(data={"p1": 3, "p2": 4, "k": 2, "template_type": "fourier"}, model={"hidden_dim": 2})
    figures.draw_weights(frame_of(plane), Held({1: {9: nets.draw(plane)}}), save)
    images = [axes.images[0].get_array() for axes in SHOWN["predictions_2d"][0].axes if axes.images]
    assert {image.shape for image in images} == {(3, 4)} and len(images) == 9
    turns = config_of(data={"group_name": "dihedral", "k": 2}, model={"hidden_dim": 2})
    figures.draw_weights(frame_of(turns), Held({1: {9: nets.draw(turns)}}), save)
    [axes, *_] = SHOWN["predictions"][0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["r0", "r1", "r2", "s0", "s1", "s2"]
    assert SHOWN["neurons"][1]["phase"].isna().all()


# ---------------------------------------------------------------------------------------------------- as users do it

SMALL = """
data: {p: 5, k: 3, template_type: fourier, n_freqs: 2, seed: 5, batch_size: 32}
model: {hidden_dim: 8, return_all_outputs: true}
training: {num_steps: 60, save_param_interval: 20}
"""
MADE = {"plateaus", "power", "neurons", "mixing", "predictions"}


def test_examine_draws_the_snapshots_of_a_study(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(SMALL)
    (tmp_path / "small.yaml").write_text("base_config: base.yaml\nn_seeds: 2\nexperiments: [{name: one}]\n")
    with Study(tmp_path) as study:
        study.rnnq("init", "small.yaml")
        study.rnnq("worker", "--drain", "--pack", "1")
    engine = db.open(study.address)
    found = examine.examine(engine, "small")
    written = examine.draw(engine, found, tmp_path / "figures")
    assert {f"{name}.{end}" for name in MADE for end in ("png", "csv")} <= {path.name for path in written}
    with (tmp_path / "figures" / "power.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["what"] == "run"]
    assert {(row["seed"], row["step"]) for row in rows} == {(s, t) for s in "01" for t in ("0", "20", "40", "60")}

    reader = weights.OfStage(engine, found.rows)
    assert reader.steps(1) == [0, 20, 40, 60]
    first = nets.draw(shown.config_of(found.frame.iloc[0]))
    assert all(torch.equal(reader.at(1, 0)[name], tensor) for name, tensor in first.items())
    _, _, root = db.study(engine)
    (root / runs.snapshots(engine, 1)[1]["path"]).write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        weights.OfStage(engine, found.rows).at(1, 20)
    figures.draw_weights(found.frame, weights.OfStage(engine, found.rows), save)
    assert "1 file of weights cannot be read" in SHOWN["power"][0].get_suptitle()
    engine.dispose()


def test_train_draws_the_same_figures_into_the_runs_folder(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("family: groups\n" + SMALL)
    subject = single.read(tmp_path / "one.yaml")
    training = single.begin(subject, tmp_path / "runs")
    desk = single.Desk(training, torch.device("cpu"), lambda step, budget: None)
    result = single.run(training, torch.device("cpu"), single.Every(None, 1000), desk)
    single.draw(result, subject, ["png"])
    made = {path.name for path in (result.folder / "figures").iterdir()}
    assert {f"{name}.{end}" for name in MADE for end in ("png", "csv")} <= made
    reader = weights.OfFolder(result.folder, result.step)
    assert reader.steps(1) == [0, 20, 40, 60]
    final = torch.load(result.folder / "checkpoints" / "final_model.pt", weights_only=True)
    assert all(torch.equal(reader.at(1, 60)[name][0], tensor) for name, tensor in final.items())
    (result.folder / "param_history.pt").write_bytes(b"no weights")
    with pytest.raises(Damaged, match="param_history"):
        weights.OfFolder(result.folder, result.step).at(1, 20)
