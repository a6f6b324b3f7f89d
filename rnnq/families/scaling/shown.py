"""What the figures of the family show: kinds of training, and in each the groups of runs by width and learning rate.

Reaches no torch.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from pandas import DataFrame

from rnnq.config import check
from rnnq.families.scaling.config import ScalingConfig

Save = Callable[[Figure, str, DataFrame], list[Path]]

DARK, GREY = "#444444", "#999999"
MARKERS = "os^DvP"
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 2, 1, 2)), (0, (1, 1)))
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # of kinds, where no width has a colour
MOST = len(MARKERS)  # kinds that are shown, those of most runs first
TIMELESS = ("constant", "step", "inverse_sqrt")  # schedules that do not end with the steps: any moment of them counts

# fields that may change with the width or the rate inside of one kind, as budgets do
QUANTITIES = (
    *("max_characters", "steps", "max_tokens_training", "token_to_param_ratio", "num_epochs"),
    *("batch_size", "gradient_accumulation_steps", "min_lr", "min_lr_multiplier", "mup_base_width", "warmup_frac"),
)
SILENT = ("log_every", "csv_log_interval", "hidden_size", "learning_rate")  # what tells no two kinds apart
COLUMNS = ("kind", "form", "width", "rate", "cell", "run", "n", "of", "diverged", "mean", "std", "tokens", "flops",
           "flops_lstm", "parameters", "annealed")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Shown:
    """The runs of a study, as its figures see them.

    cells   a row for each group that has a finished run: COLUMNS. Numbers are means over its finished runs, std with
            n - 1; `diverged` of the `of` runs have, and the group is whole where n is `of`
    every   a row for each run: run, seed, state, cause, cell, kind, form, width, rate, loss, steps, what is in cells,
            and with step_ before it the tokens and FLOPs of a step
    ended   of these the finished ones whose loss is finite

    A form is what kinds are that differ by their budget alone: what compute buys is asked of all budgets together.
    """

    cells: DataFrame
    ended: DataFrame
    every: DataFrame
    kinds: tuple[str, ...]  # that are shown, in the order of their colours
    forms: tuple[str, ...]  # the same
    metric: str  # what is compared
    unit: str
    remarks: tuple[str, ...]
    has_gpt2: bool  # the loss is per GPT-2 token, as in the published study

    @property
    def metric_curve(self) -> str:
        """The curve of what is compared."""
        return "val_loss" if self.metric == "loss" else self.metric

    @property
    def words(self) -> str:
        """What an axis of the loss is called."""
        return f"validation loss ({self.unit})"

    @property
    def whole(self) -> DataFrame:
        """The groups all of whose runs have finished."""
        return self.cells[self.cells["n"] == self.cells["of"]]

    def of(self, kind: str) -> DataFrame:
        """The groups of a kind, by width and rate."""
        return self.cells[self.cells["kind"] == kind].sort_values(["width", "rate"])


def read(runs: DataFrame) -> Shown:
    """Sort the runs of a stage, as of frame.of_rows. What cannot be shown is in the remarks."""
    rows = [(row, config_of(row)) for row in runs.to_dict("records")]
    known = [(row, config) for row, config in rows if config is not None]
    remarks = [f"{len(rows) - len(known)} left out: not of this version"] if len(known) < len(rows) else []
    metric, unit = "loss", "nats/token"  # the primary metric's column is called loss
    kinds_of_tokens = {config.tokens for _, config in known}
    if len(kinds_of_tokens) > 1:
        metric, unit = "val_loss_per_byte", "nats/byte"
        remarks.append(f"per byte, as tokens differ: {', '.join(sorted(kinds_of_tokens))}")
    every = DataFrame([_run(row, config, row.get(metric)) for row, config in known], columns=_RUN)
    configs = [config for _, config in known]
    every["kind"], every["form"] = kinds_of(configs), kinds_of(configs, ())
    ended = every[(every["state"] == "done") & np.isfinite(every["loss"].astype(float))]
    cells = DataFrame([_cell(own, ended) for _, own in every.groupby(["kind", "cell"], sort=False)], columns=COLUMNS)
    cells = cells[cells["n"] > 0].sort_values(["kind", "width", "rate"], ignore_index=True)
    kinds, forms = (list(map(str, ended[name].value_counts(sort=True).index)) for name in ("kind", "form"))
    if len(kinds) > MOST:
        remarks.append(f"of {len(kinds)} kinds the {MOST} with most runs")
    has_gpt2 = kinds_of_tokens == {"gpt2"}
    return Shown(cells, ended, every, tuple(kinds[:MOST]), tuple(forms[:MOST]), metric, unit, tuple(remarks), has_gpt2)


_RUN = ["run", "seed", "state", "cause", "cell", "width", "rate", "loss", "steps", "tokens", "flops", "flops_lstm",
        "parameters", "annealed", "step_tokens", "step_flops", "step_flops_lstm"]  # fmt: skip


def _run(row: Mapping[Any, Any], config: ScalingConfig, loss: Any) -> dict[str, Any]:
    from rnnq.families.scaling import counts

    steps = row.get("steps_done")
    of_step = config.counted(1)
    steps = int(steps) if steps is not None and steps == steps else 0
    numbers = {name: _number(row.get(name), value * steps) for name, value in of_step.items()}
    numbers["parameters"] = _number(row.get("parameters"), float(counts.parameters(config)))
    same = {"run": int(row["id"]), "seed": row["seed"], "state": row["state"], "cause": row.get("cause")}
    place = {"cell": row["group_key"], "width": config.hidden_size, "rate": config.learning_rate}
    more = {"loss": _number(loss, np.nan), "steps": steps, "annealed": config.lr_schedule not in TIMELESS}
    return same | place | more | numbers | {f"step_{name}": value for name, value in of_step.items()}


def _number(value: Any, otherwise: float) -> float:
    return otherwise if value is None or value != value else float(value)


def _cell(own: DataFrame, ended: DataFrame) -> dict[str, Any]:
    done = ended[ended["run"].isin(own["run"])]
    first = own.iloc[0]
    numbers = {name: done[name].mean() for name in ("tokens", "flops", "flops_lstm", "parameters")}
    return {
        **{name: first[name] for name in ("kind", "form", "width", "rate", "cell", "run", "annealed")},
        **{"n": len(done), "of": len(own), "diverged": len(diverged(own))},
        **{"mean": done["loss"].mean(), "std": done["loss"].std(), **numbers},
    }


def diverged(runs: DataFrame) -> DataFrame:
    """Of runs as in `Shown.every` those that diverged: they failed by it, or ended without a finite loss."""
    without = (runs["state"] == "done") & ~np.isfinite(runs["loss"].astype(float))
    return runs[((runs["state"] == "failed") & (runs["cause"] == "diverged")) | without]


def config_of(row: Mapping[Any, Any]) -> ScalingConfig | None:
    """The config of a row of a frame; None where it is not of this version."""
    given = {str(name).removeprefix("config."): _value(v) for name, v in row.items() if str(name).startswith("config.")}
    config, _ = check(ScalingConfig, given)
    return config if isinstance(config, ScalingConfig) else None


def _value(value: Any) -> Any:
    """A value as it was in the config: pandas makes NaN of null, and floats of whole numbers beside it."""
    if value is None or value != value:
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


# ------------------------------------------------------------------------------------------------------------- kinds


def kinds_of(configs: Sequence[ScalingConfig], quantities: Sequence[str] = QUANTITIES) -> list[str]:
    """What each config is one of: "adamw, muP", with the fields that tell such apart: "adamw, muP, num_layers=1".

    Width, rate and seed are no part of it. One of `quantities`, such as a budget, is where runs of one width and one
    rate differ by it.
    """
    heads = [head_of(config) for config in configs]
    fields = [_fields(config) for config in configs]
    for names, within in (([n for n in (fields or [{}])[0] if n not in QUANTITIES], False), (quantities, True)):
        places = [
            (head, config.hidden_size, config.learning_rate) if within else head
            for head, config in zip(heads, configs, strict=True)
        ]
        telling = [name for name in names if _varies(places, [own[name] for own in fields])]
        heads = [
            ", ".join([head, *(f"{n}={_said(own[n])}" for n in telling if own[n] is not None)])
            for head, own in zip(heads, fields, strict=True)
        ]
    return heads


def head_of(config: ScalingConfig) -> str:
    """Optimiser and parametrisation: "sgd, muP"."""
    published = "muP as published" if config.mup_rule == "seed" else "muP"
    return f"{config.optimizer}, {published if config.use_mup else 'standard'}"


def _fields(config: ScalingConfig) -> dict[str, Any]:
    """What may tell two kinds apart; what has no effect in a config is None."""
    found = config.model_dump(mode="json", exclude={*SILENT, *config.seed_fields, "optimizer", "use_mup", "mup_rule"})
    found["readout_init"] = "zero" if config.has_zero_readout() else "random"
    if not config.use_mup:
        found["mup_base_width"] = None
    unused = ("adam_beta1", "adam_beta2", "adam_epsilon") if config.optimizer == "sgd" else ("momentum",)
    return found | dict.fromkeys(unused)


def _varies(places: Sequence[Any], values: Sequence[Any]) -> bool:
    first: dict[Any, Any] = {}
    return any(first.setdefault(place, value) != value for place, value in zip(places, values, strict=True))


def _said(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# --------------------------------------------------------------------------------------------------------- the canvas


def colours_of(values: Sequence[float]) -> dict[float, Any]:
    """A colour of viridis for each width or rate, by its logarithm."""
    known = sorted(set(values))
    low, high = np.log(known[0]), np.log(known[-1])
    places = [0.92 * (np.log(value) - low) / (high - low) if high > low else 0.35 for value in known]
    return {value: matplotlib.colormaps["viridis"](place) for value, place in zip(known, places, strict=True)}


def key_of(
    colours: Mapping[float, Any], what: str, words: Callable[[float], str] = "{:g}".format, most: int = 9
) -> list[Line2D]:
    """What a legend says of the colours; of many every n-th."""
    known = list(colours)
    kept = known if len(known) <= most else [known[i] for i in np.linspace(0, len(known) - 1, most).round().astype(int)]
    return [Line2D([], [], color=colours[value], linewidth=2.2, label=f"{what} {words(value)}") for value in kept]


def grid_of(n: int, width: float = 4.6, height: float = 3.9, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with n panels, up to three in a row; one alone is wider."""
    columns = n if n <= 3 else 2 if n == 4 else 3
    rows = -(-n // columns)
    wide = width * (1.6 if columns == 1 else 1.15 if columns == 2 else 1)
    figure = Figure(figsize=(wide * columns, height * rows + 1.1), layout="constrained")
    grid: list[Axes] = figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()
    for place, axes in enumerate(grid):
        if place >= n:
            axes.remove()
        else:  # below it there may be none of its own column
            axes.tick_params(labelbottom=True, labelleft=True)
    return figure, grid[:n]


def heading(figure: Figure, *lines: str) -> None:
    """A title in one or more lines; long ones are wrapped to the width of the figure, empty ones left out."""
    width = int(figure.get_figwidth() * 11.5)
    figure.suptitle("\n".join(plain(part) for line in lines for part in textwrap.wrap(line, width)))


def plain(text: str) -> str:
    """Text for a figure: a dollar sign opens no formula."""
    return text.replace("$", r"\$")


def log_axis(axis: XAxis | YAxis, values: Sequence[float], few: int = 9) -> None:
    """A logarithmic axis in plain numbers; where there are few values, these are its ticks."""
    known = sorted(set(values))
    (axis.axes.set_xscale if isinstance(axis, XAxis) else axis.axes.set_yscale)("log")
    if len(known) == 1:
        (axis.axes.set_xlim if isinstance(axis, XAxis) else axis.axes.set_ylim)(known[0] / 2, known[0] * 2)
    if len(known) <= few and _apart(known):
        axis.set_major_locator(FixedLocator(known))
        axis.set_minor_locator(NullLocator())
    else:
        decades = np.log10(known[-1] / known[0])
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def flop_axis(axes: Axes) -> None:
    """A logarithmic x axis of large numbers, after all is drawn: 10^13, and between them where there are few."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high < 30 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e+", "e")))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _apart(known: Sequence[float]) -> bool:
    """Whether ticks at these values leave room for their numbers."""
    if len(known) < 2:
        return True
    logs = np.log(known)
    return bool(np.diff(logs).min() > 0.07 * (logs[-1] - logs[0]))


def log_losses(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis of losses with plain numbers, although they may span less than a decade."""
    axes.set_yscale("log")
    if max(values) < 12 * min(values):
        axes.yaxis.set_major_locator(MaxNLocator(7))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def short(value: float) -> str:
    """A number of a tick: 0.0316, 512, 13.2M."""
    for least, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= least:
            return f"{value / (1e3 if sign == 'k' else least):.3g}{sign}"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
