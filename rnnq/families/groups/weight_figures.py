"""What the last weights are like: what neurons are tuned to, how W_mix joins them, and what the net answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas import DataFrame
from torch import Tensor

from rnnq.errors import CheckpointError
from rnnq.families.groups import groups as algebra
from rnnq.families.groups import model, nets, theory, tuples
from rnnq.families.groups.config import GroupsConfig
from rnnq.families.groups.shown import COLOURS, DARK, GREY, REST, Group, Save, Weights, heading, plain, wrapped

MOST = 3  # groups that are shown
SHOWN = 3  # tuples
DEAD = 0.05  # of the largest norm: a neuron whose weights are below it


def draw(groups: Sequence[Group], weights: Weights, remarks: Sequence[str], save: Save) -> list[Path]:
    """Draw neurons, W_mix and predictions of the best groups; returns what `save` wrote."""
    last = _last_weights(groups, weights)
    shown = [group for group in groups if group.runs[0] in last][:MOST]
    if not shown:
        return []
    more = [f"the best {MOST} of {len(groups)} groups"] if len(groups) > MOST else []
    remarks = [*(remark for remark in remarks if not (more and remark.startswith("the best"))), *more]
    written = _neurons(shown, last, remarks, save)
    mixing = [group for group in groups if group.runs[0] in last and _mixes(group.config)][:MOST]
    if mixing:
        written += _mixing(mixing, weights, last, save)
    return written + _predictions(shown, last, remarks, save)


def _last_weights(groups: Sequence[Group], weights: Weights) -> dict[int, dict[str, Tensor]]:
    """Of each run, where they can be read."""
    found = {}
    for group in groups:
        for run in group.runs:
            steps = weights.steps(run)
            try:
                if steps:
                    found[run] = dict(weights.at(run, steps[-1]))
            except CheckpointError:
                continue  # said of the figure of powers already
    return found


def answers(config: GroupsConfig, params: Mapping[str, Tensor], most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a net answers after the last element, what it should, and for which tuples: (V, n), (V, n), (V, k).

    The tuples are `most` of those that it is measured on, the same each time.
    """
    elements = chosen(config, most)
    found, truth = model.predictions(config, dict(params), elements)
    return found[:, -1], truth[:, -1], elements.numpy()


def chosen(config: GroupsConfig, most: int) -> Tensor:
    """That many of the tuples that a net is measured on, (V, k)."""
    elements = tuples.measured(config, "val")
    places = np.random.default_rng(0).permutation(len(elements))[:most]
    return elements[torch.from_numpy(places)]


# ---------------------------------------------------------------------------------------------------------- neurons


@dataclass(frozen=True, eq=False)
class Tuned:
    """What the neurons of a run's last weights are tuned to, by their weights to the output."""

    neurons: theory.Neurons
    dead: np.ndarray  # (d,)
    of: np.ndarray  # (d,): the place among the modes of the group that are shown; after these, another; -1 dead


def tuned(group: Group, config: GroupsConfig, params: Mapping[str, Tensor]) -> Tuned:
    """The same from weights, (1, ...) each."""
    found = nets.matrices(config, dict(params))
    rows = found["W"] if "W" in found else found["W_out"].T
    neurons = theory.neurons(config.data, rows)
    dead = neurons.norm < DEAD * neurons.norm.max()
    places = {mode.place: i for i, mode in enumerate(group.modes)}
    of = np.array([places.get(int(mode), len(places)) for mode in neurons.mode])
    return Tuned(neurons, dead, np.where(dead, -1, of))


def _neurons(groups: Sequence[Group], last: Mapping[int, Any], remarks: Sequence[str], save: Save) -> list[Path]:
    figure = Figure(figsize=(10.5, 3.3 * len(groups) + 0.8), layout="constrained")
    grid = figure.subplots(len(groups), 2, squeeze=False, width_ratios=(1, 1.5))
    numbers = []
    for (left, right), group in zip(grid, groups, strict=True):
        each = {
            run: tuned(group, config, last[run])
            for run, config in zip(group.runs, group.configs, strict=True)
            if run in last
        }
        _draw_counts(left, group, list(each.values()))
        _draw_phases(right, group, each[group.runs[0]])
        numbers += [_neuron_numbers(group, run, found) for run, found in each.items()]
    handles = [Line2D([], [], color=DARK, linewidth=1, marker="_", label="± std over seeds")]
    if any(table["dead"].any() for table in numbers):
        label = f"dead: below {DEAD:.0%} of the largest norm"
        handles.append(Line2D([], [], color=GREY, linestyle="", marker="x", markersize=4, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    heading(figure, "what neurons are tuned to, by their weights to the output", remarks)
    return save(figure, "neurons", pd.concat(numbers))


def _names(group: Group) -> tuple[list[str], list[str]]:
    """The kinds of neurons that are told apart, and their colours: the last is for the dead."""
    modes = group.modes
    return [*(mode.words for mode in modes), REST, "dead"], [*(mode.colour for mode in modes), "#555555", "#cccccc"]


def _draw_counts(axes: Axes, group: Group, each: Sequence[Tuned]) -> None:
    names, colours = _names(group)
    kinds = [*range(len(names) - 1), -1]
    counts = np.array([[int((found.of == kind).sum()) for kind in kinds] for found in each])
    shown = [i for i in range(len(names)) if i < len(group.modes) or counts[:, i].any()]
    mean = counts.mean(0)[shown]
    std = counts.std(0, ddof=1)[shown] if len(each) > 1 else np.zeros(len(shown))
    places = np.arange(len(shown))
    axes.bar(places, mean, 0.65, yerr=std, color=[colours[i] for i in shown], capsize=3, error_kw={"elinewidth": 1})
    axes.set_xticks(places, [names[i] for i in shown], rotation=25 if len(shown) > 4 else 0)
    axes.set_ylabel("neurons")
    axes.grid(False, axis="x")
    axes.set_title(wrapped(f"{group.name} (n = {len(each)}): neurons by strongest mode", 52), fontsize=9)


def _draw_phases(axes: Axes, group: Group, found: Tuned) -> None:
    """Phase against share; where there is no phase, the norm against the share."""
    names, colours = _names(group)
    has_phase = bool(np.isfinite(found.neurons.phase).any())
    x = found.neurons.phase if has_phase else found.neurons.norm
    for kind in sorted(set(found.of.tolist()) - {-1}):
        own = found.of == kind
        mark = group.modes[kind].marker if kind < len(group.modes) else "."
        axes.scatter(x[own], found.neurons.share[own], s=22, color=colours[kind], marker=mark, alpha=0.75,
                     linewidths=0, label=f"{names[kind]} ({own.sum()})", clip_on=False, zorder=3)  # fmt: skip
    axes.scatter(x[found.dead], found.neurons.share[found.dead], s=14, color=GREY, marker="x", linewidths=0.8, zorder=2)
    axes.set_ylim(0, 1.04)
    axes.set_ylabel("share of its power in that mode")
    if has_phase:
        axes.set_xlim(0, 2 * np.pi)
        axes.set_xticks(np.arange(5) * np.pi / 2, ["0", "π/2", "π", "3π/2", "2π"])
        axes.set_xlabel("phase there (radians)")
    else:
        axes.set_xlim(left=0)
        axes.set_xlabel("norm of its weights")
    axes.set_title(plain(f"each neuron of run {group.runs[0]} (seed {group.seeds[0]})"))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7.5)


def _neuron_numbers(group: Group, run: int, found: Tuned) -> DataFrame:
    names = [theory.modes(group.data)[mode] for mode in found.neurons.mode]
    return DataFrame({
        "group": group.name, "run": run, "seed": group.seeds[group.runs.index(run)], "neuron": range(len(names)),
        "mode": [" ".join(map(str, mode)) for mode in names], "phase": found.neurons.phase,
        "share": found.neurons.share, "norm": found.neurons.norm, "dead": found.dead,
    })  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- W_mix


def _mixes(config: GroupsConfig) -> bool:
    return config.model.model_type == "QuadraticRNN" and config.data.k > 2


def _checkpoints(group: Group, weights: Weights) -> list[int]:
    """The steps that the config's `analysis.checkpoints` names among those that there are weights of."""
    steps = weights.steps(group.runs[0])
    return [steps[place] for place in sorted({int(f * (len(steps) - 1)) for f in group.config.analysis.checkpoints})]


def _mixing(groups: Sequence[Group], weights: Weights, last: Mapping[int, Any], save: Save) -> list[Path]:
    columns = max(len(_checkpoints(group, weights)) for group in groups)
    figure = Figure(figsize=(2.3 * columns + 1.6, 2.5 * len(groups) + 0.5), layout="constrained")
    grid = figure.subplots(len(groups), columns, squeeze=False)
    numbers = []
    for row, group in zip(grid, groups, strict=True):
        found = tuned(group, group.config, last[group.runs[0]])
        order = ordered(group, found)
        images = _matrices(group, weights, order)
        # a few large weights, such as those of the smallest modes, would leave all others white
        top = 2 * max(float(np.quantile(np.abs(image), 0.95)) for image in images.values()) or 1.0
        for axes, (step, image) in zip(row, images.items(), strict=False):
            drawn = axes.imshow(image, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
            _separate(axes, group, found, named=axes is row[0])
            axes.set_title(f"step {step:,}")
            axes.set_xlabel("neuron that is read", fontsize=8)
        for axes in row[len(images) :]:
            axes.remove()
        row[0].set_ylabel(f"{wrapped(group.name, 26)}\nrun {group.runs[0]}: neuron that receives", fontsize=8)
        figure.colorbar(drawn, ax=row[: len(images)].tolist(), shrink=0.8, pad=0.01, label="weight", extend="both")
        numbers.append(_mixing_numbers(group, images, found, order))
    heading(figure, "W_mix: neurons by strongest mode (the template's strongest first), then by phase", [])
    return save(figure, "mixing", pd.concat(numbers))


def ordered(group: Group, found: Tuned) -> np.ndarray:
    """Neurons by the mode that they are tuned to, strongest of the template first, then by phase; the dead last."""
    power = theory.power(group.data, group.template)
    ranks = np.argsort(np.argsort(-power, kind="stable"), kind="stable")
    return theory.by_mode_and_phase(found.neurons, ranks, DEAD * float(found.neurons.norm.max()))


def _matrices(group: Group, weights: Weights, order: np.ndarray) -> dict[int, np.ndarray]:
    images = {}
    for step in _checkpoints(group, weights):
        try:
            params = dict(weights.at(group.runs[0], step))
        except CheckpointError:
            continue  # said of the figure of powers already
        images[step] = theory.rearranged(nets.matrices(group.config, params)["W_mix"], order)
    return images


def _separate(axes: Axes, group: Group, found: Tuned, named: bool) -> None:
    """Lines between neurons of one mode and those of the next; their names at the left."""
    names, colours = _names(group)
    kinds = [*range(len(names) - 1), -1]
    counts = [int((found.of == kind).sum()) for kind in kinds]
    ends = np.cumsum(counts)
    for end in ends[:-1]:
        if 0 < end < ends[-1]:
            axes.axhline(end - 0.5, color=DARK, linewidth=0.5)
            axes.axvline(end - 0.5, color=DARK, linewidth=0.5)
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    if named:
        shown = [i for i, count in enumerate(counts) if count]
        axes.set_yticks([ends[i] - counts[i] / 2 - 0.5 for i in shown], [f"{names[i]} ({counts[i]})" for i in shown],
                        fontsize=7)  # fmt: skip
        axes.tick_params(axis="y", length=0)
        for i, label in zip(shown, axes.get_yticklabels(), strict=True):
            label.set_color(colours[i] if i < len(group.modes) else DARK)


def _mixing_numbers(group: Group, images: Mapping[int, np.ndarray], found: Tuned, order: np.ndarray) -> DataFrame:
    """By step and by the modes of the two sides: how many weights, and the root of their mean square."""
    names, _ = _names(group)
    of = found.of[order]
    rows = []
    for step, image in images.items():
        for a in sorted(set(of.tolist())):
            for b in sorted(set(of.tolist())):
                block = image[np.ix_(of == a, of == b)]
                rows.append({"group": group.name, "run": group.runs[0], "step": step, "receives": names[a],
                             "read": names[b], "weights": block.size,
                             "rms": float(np.sqrt((block**2).mean()))})  # fmt: skip
    return DataFrame(rows)


# -------------------------------------------------------------------------------------------------------- predictions


def _predictions(groups: Sequence[Group], last: Mapping[int, Any], remarks: Sequence[str], save: Save) -> list[Path]:
    flat = [group for group in groups if group.data.group_name != "cnxcn"]
    square = [group for group in groups if group.data.group_name == "cnxcn"]
    written = []
    for name, chosen_groups, figure_of in (("predictions", flat, _lines), ("predictions_2d", square, _images)):
        if chosen_groups:
            figure, numbers = figure_of(chosen_groups, last)
            unseen = ["the tuples are held out from training"] * all(bool(g.data.held_out) for g in chosen_groups)
            heading(figure, "what the net answers, and the truth, for a few tuples", [*remarks, *unseen])
            written += save(figure, name, numbers)
    return written


def _seeds_of(group: Group, last: Mapping[int, Any]) -> list[int]:
    """The runs that are shown: all where they have one task and no tuples that only some of them have not seen."""
    if not group.has_one_task or group.data.held_out:
        return [group.runs[0]]
    return [run for run in group.runs if run in last]


def _answers_of(group: Group, last: Mapping[int, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each run that is shown answers, (R, V, n); the truth, (V, n); the tuples, (V, k)."""
    elements = chosen(group.config, SHOWN)
    found = []
    for run in _seeds_of(group, last):
        answer, truth = model.predictions(group.config, last[run], elements)
        found.append(answer[:, -1])
    return np.stack(found), truth[:, -1], elements.numpy()


def _lines(groups: Sequence[Group], last: Mapping[int, Any]) -> tuple[Figure, DataFrame]:
    figure = Figure(figsize=(3.7 * SHOWN, 2.6 * len(groups) + 0.8), layout="constrained")
    grid = figure.subplots(len(groups), SHOWN, squeeze=False, sharey="row")
    numbers = []
    for row, group in zip(grid, groups, strict=True):
        found, truth, elements = _answers_of(group, last)
        for axes, place in zip(row, range(len(truth)), strict=False):
            _draw_line(axes, group, found[:, place], truth[place])
            axes.set_title(_tuple_words(group, elements[place]), fontsize=9)
        for axes in row[len(truth) :]:
            axes.remove()
        row[0].set_ylabel(wrapped(f"{group.name} (n = {len(found)})", 26) + "\noutput", fontsize=8)
        numbers.append(_answer_numbers(group, last, found, truth, elements))
    handles = [
        Line2D([], [], color=GREY, linewidth=3, alpha=0.6, label="truth: the template, moved"),
        Line2D([], [], color=COLOURS[1], marker="o", markersize=4, linewidth=1, label="the net, mean ± std over seeds"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure, pd.concat(numbers)


def _draw_line(axes: Axes, group: Group, found: np.ndarray, truth: np.ndarray) -> None:
    places = np.arange(len(truth))
    mean = found.mean(0)
    std = found.std(0, ddof=1) if len(found) > 1 else np.zeros_like(mean)
    small = len(truth) <= 40
    if group.data.group_name == "cn":
        axes.plot(places, truth, color=GREY, linewidth=3, alpha=0.6)
        axes.errorbar(places, mean, yerr=std, color=COLOURS[1], marker="o" if small else None, markersize=3.5,
                      linewidth=1, elinewidth=0.9, capsize=2)  # fmt: skip
        axes.set_xlabel("place m")
    else:  # elements have no order: bars, not lines
        axes.bar(places, truth, 0.8, color=GREY, alpha=0.6)
        axes.errorbar(places, mean, yerr=std, color=COLOURS[1], marker="o", markersize=3.5 if small else 2.2,
                      linestyle="", elinewidth=0.9, capsize=2)  # fmt: skip
        axes.set_xlabel("element h")
    if small:
        every = 1 if len(truth) <= 12 else 4
        axes.set_xticks(places[::every], [element_words(group, int(place)) for place in places[::every]],
                        fontsize=7.5)  # fmt: skip


def _images(groups: Sequence[Group], last: Mapping[int, Any]) -> tuple[Figure, DataFrame]:
    """Of the best run of each group: for each tuple the truth, the answer, and their difference."""
    figure = Figure(figsize=(3 * SHOWN + 1.5, 6.6 * len(groups) + 0.6), layout="constrained")
    grid = figure.subplots(3 * len(groups), SHOWN, squeeze=False)
    numbers = []
    for at, group in enumerate(groups):
        found, truth, elements = _answers_of(group, last)
        own = grid[3 * at : 3 * at + 3]
        shape = (int(group.data.p1 or 0), int(group.data.p2 or 0))
        top = max(float(np.abs(truth).max()), float(np.abs(found[0]).max()))
        error = float(np.abs(found[0] - truth).max()) or 1.0
        rows = (("truth", truth, top), ("the net", found[0], top), ("the net - truth", found[0] - truth, error))
        for row, (words, values, most) in zip(own, rows, strict=True):
            for axes, place in zip(row, range(len(truth)), strict=False):
                drawn = axes.imshow(values[place].reshape(shape), cmap="RdBu_r", vmin=-most, vmax=most)
                axes.grid(False)
                axes.set_xticks([])
                axes.set_yticks([])
            for axes in row[len(truth) :]:
                axes.remove()
            row[0].set_ylabel(words)
            figure.colorbar(drawn, ax=row[: len(truth)].tolist(), pad=0.01, shrink=0.9, label="output")
        for axes, place in zip(own[0], range(len(truth)), strict=False):
            name = f"{wrapped(group.name, 30)}, run {group.runs[0]}\n" if place == 0 else "\n"
            axes.set_title(name + _tuple_words(group, elements[place]), fontsize=8.5)
        numbers.append(_answer_numbers(group, last, found, truth, elements))
    return figure, pd.concat(numbers)


def _tuple_words(group: Group, elements: np.ndarray) -> str:
    """ "3 · 7 = 0": the tuple and its product."""
    product = int(algebra.of(group.data).products(elements[None])[0, -1])
    words = [element_words(group, int(element)) for element in elements]
    if len(words) > 6:
        words = [*words[:3], "…", *words[-2:]]
    sign = " + " if group.data.group_name in ("cn", "cnxcn") else " · "
    return f"{sign.join(words)} = {element_words(group, product)}"


def element_words(group: Group, element: int) -> str:
    """A shift as a number or a pair of them; of D_n r0, r1, ... for rotations, s0, s1, ... with the reflection."""
    if group.data.group_name == "cnxcn":
        return "({}, {})".format(*divmod(element, int(group.data.p2 or 1)))
    if group.data.group_name == "dihedral":
        flip, turn = divmod(element, int(group.data.group_n or 1))
        return f"{'rs'[flip]}{turn}"
    return str(element)


def _answer_numbers(
    group: Group, last: Mapping[int, Any], found: np.ndarray, truth: np.ndarray, elements: np.ndarray
) -> DataFrame:
    runs = _seeds_of(group, last)
    return pd.concat(
        DataFrame({
            "group": group.name, "run": run, "seed": group.seeds[group.runs.index(run)],
            "tuple": " ".join(map(str, elements[place])), "entry": range(truth.shape[1]),
            "truth": truth[place], "answer": found[i, place],
        })
        for i, run in enumerate(runs) for place in range(len(truth))
    )  # fmt: skip
