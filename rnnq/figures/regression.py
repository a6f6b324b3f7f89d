"""A linear regression of the logarithm of the metric on the hyper-parameters, as the original study made one.

The target and every feature have mean 0 and standard deviation 1 over the runs, so that coefficients compare. It is
fitted on four fifths of the runs and judged on the rest; 200 other such splits say how far that judgement is chance.
It knows no interactions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas import DataFrame, Series

from rnnq import frame
from rnnq.figures import canvas
from rnnq.figures.canvas import BLUE, DARK, RED, count, plain
from rnnq.figures.influence import REST, TEXTS, is_number, texts_of
from rnnq.figures.subject import NO_WORDS, Examined, Words

TEST = 0.2  # of the runs
STATE = 42  # of the split, as in the original study
SPLITS = 200
MANY = 2000  # runs from which FEWER splits say as much
FEWER = 50
LEAST = 10  # runs
BARS = 30  # coefficients that are drawn: the largest

CORRELATED = 0.3  # |r| of two features from which we warn that marginal means mix them
EXPLAINED = 0.9  # R² of a feature on all others from which we warn that coefficients cannot be told apart
RARE = 0.25  # of its even share of the runs: a value that has fewer is warned of
OUTLYING = 5  # standard deviations from the mean
WARNINGS = 5  # of a kind that are spelt out

Drawn = tuple[Figure, str, DataFrame]


@dataclass(frozen=True)
class Regression:
    """What a fit says. With a `reason`, why there is none."""

    target: str  # "log(loss)"
    n: int  # runs
    reason: str | None = None
    splits: int = SPLITS
    remarks: tuple[str, ...] = ()  # what to keep in mind
    test: int = 0  # runs of n that the fit did not see
    mse: float = math.nan  # on these, of the z-scored target
    r2: float = math.nan  # on these
    r2_mean: float = math.nan  # the same over other splits
    r2_std: float = math.nan
    r2_all: float = math.nan  # of a fit on all runs, on all runs
    coefficients: DataFrame | None = None  # feature, scale, coefficient, std (over the splits), all; largest first
    runs: DataFrame | None = None  # run, part (fit, test), measured, predicted

    def numbers(self) -> dict[str, Any]:
        """The numbers that are of the whole fit."""
        names = ("target", "n", "test", "mse", "r2", "splits", "r2_mean", "r2_std", "r2_all")
        return {name: getattr(self, name) for name in names}

    def judgement(self) -> str:
        """How good the fit is, in words."""
        return (
            f"on the {self.test:,} of {self.n:,} runs not fitted: R² {self.r2:.3f}, MSE {self.mse:.3f}; over "
            f"{self.splits} splits: R² {self.r2_mean:.3f} ± {self.r2_std:.3f}; fit on all runs: R² {self.r2_all:.3f}"
        )


# ------------------------------------------------------------------------------------------------------- features


def features(rows: DataFrame, fields: list[str]) -> tuple[DataFrame, dict[str, str]]:
    """The columns of a fit, a row for each run, and in words what each is: feature -> scale.

    Booleans are 0 and 1; numbers as they are, or their logarithm where that spaces the values more evenly; all else
    is a column for each value but the first, against which the others are counted.
    """
    columns: dict[str, Series] = {}
    scales: dict[str, str] = {}
    for field in fields:
        values = rows[frame.CONFIG + field]
        if all(isinstance(value, (bool, np.bool_)) for value in values):
            columns[field], scales[field] = values.astype(float), "0 or 1"
        elif all(is_number(value) for value in values):
            number = values.astype(float)
            logged = _is_spaced_by_factors(number)
            name = f"log({field})" if logged else field
            columns[name], scales[name] = np.log(number) if logged else number, "logarithm" if logged else "as it is"
        else:
            for name, column, against in _one_hot(field, values):
                columns[name], scales[name] = column, f"1 or 0, against {against}"
    varies = [name for name, column in columns.items() if column.nunique() > 1]
    return DataFrame({name: columns[name] for name in varies}, index=rows.index), {n: scales[n] for n in varies}


def _is_spaced_by_factors(values: Series) -> bool:
    """Whether positive values lie more evenly by their logarithm: 16, 32, 64, or 0.001, 0.003, 0.01; not 1, 2, 3."""
    distinct = np.sort(values.unique())
    if len(distinct) < 3 or distinct[0] <= 0:
        return False
    gaps = np.diff(np.log(distinct)), np.diff(distinct)
    by_factors, by_steps = (float(each.std() / each.mean()) for each in gaps)  # to load scipy.stats takes a second
    return by_factors < by_steps


def _one_hot(field: str, values: Series) -> list[tuple[str, Series, str]]:
    """(feature, column, what it is counted against); the rarest of many values are one."""
    texts = texts_of(values)
    often = texts.value_counts()
    if len(often) > TEXTS:
        texts = texts.where(texts.isin(often.index[: TEXTS - 1]), REST)
    coded = pd.get_dummies(texts, dtype=float)
    against, *others = coded.columns
    return [(f"{field}={name}", coded[name], str(against)) for name in others]


# ------------------------------------------------------------------------------------------------------------ fit


@lru_cache(maxsize=2)  # a table and a figure ask for the same
def regress(found: Examined, filtered: bool = False) -> Regression:
    """Fit the metric of the finished runs; `filtered`, of those of the filter alone.

    The split is fixed: rows by run id, random_state 42, as in the original study.
    """
    rows = found.shown(filtered)
    positive = bool((rows["metric"] > 0).all())
    target = f"log({found.name})" if positive else found.name
    columns, scales = features(rows, found.varying) if len(rows) else (DataFrame(), {})
    reason = _why_not(found, rows, columns)
    if reason is not None:
        return Regression(target, len(rows), reason)
    from scipy.stats import zscore

    measured = np.log(rows["metric"]) if positive else rows["metric"]
    x, y = zscore(columns.to_numpy(float)), zscore(measured.to_numpy(float))
    remarks = (
        [] if positive else [f"{found.name} is not positive everywhere: it is fitted as it is, without a logarithm"]
    )
    remarks += [*_outlying(y), *_unbalanced(found, rows), *_entangled(columns, x), *_leaking(rows)]
    return _fitted(target, rows, x, y, list(columns), scales, tuple(remarks))


def _why_not(found: Examined, rows: DataFrame, columns: DataFrame) -> str | None:
    """Why there can be no fit; None when there can."""
    need = max(LEAST, math.ceil((columns.shape[1] + 2) / (1 - TEST)))
    if not found.varying:
        return "no hyper-parameter varies"
    if len(rows) < need:
        terms = f"{columns.shape[1]} coefficient{'' if columns.shape[1] == 1 else 's'}"
        has = f"{count(len(rows), 'finished run')} with a finite {found.name}"
        return f"too few runs: {has}; {terms or 'it'} would need at least {need}"
    if columns.empty:
        return "no hyper-parameter varies among these runs"
    if rows["metric"].nunique() == 1:
        return f"every run has the same {found.name}"
    return None


def _fitted(
    target: str, rows: DataFrame, x: np.ndarray, y: np.ndarray, names: list[str], scales: dict[str, str],
    remarks: tuple[str, ...],
) -> Regression:  # fmt: skip
    from sklearn.linear_model import LinearRegression
    from sklearn.metrics import mean_squared_error
    from sklearn.model_selection import ShuffleSplit, cross_validate, train_test_split

    seen, unseen = train_test_split(np.arange(len(y)), test_size=TEST, random_state=STATE)
    model = LinearRegression().fit(x[seen], y[seen])
    whole = LinearRegression().fit(x, y)
    splits = SPLITS if len(y) < MANY else FEWER
    shuffled = ShuffleSplit(splits, test_size=TEST, random_state=STATE)
    others = cross_validate(LinearRegression(), x, y, cv=shuffled, return_estimator=True)
    scores = Series(others["test_score"])
    spread = DataFrame([other.coef_ for other in others["estimator"]]).std()
    coefficients = DataFrame({
        "feature": names,
        "scale": [scales[name] for name in names],
        "coefficient": model.coef_,
        "std": spread.to_numpy(),
        "all": whole.coef_,
    })  # fmt: skip
    return Regression(
        target=target,
        n=len(y),
        splits=splits,
        remarks=remarks,
        test=len(unseen),
        mse=float(mean_squared_error(y[unseen], model.predict(x[unseen]))),
        r2=float(model.score(x[unseen], y[unseen])),
        r2_mean=float(scores.mean()),
        r2_std=float(scores.std()),
        r2_all=float(whole.score(x, y)),
        coefficients=coefficients.sort_values("coefficient", key=lambda c: -c.abs(), ignore_index=True),
        runs=DataFrame({
            "run": rows.index,
            "part": np.where(np.isin(np.arange(len(y)), unseen), "test", "fit"),
            "measured": y,
            "predicted": model.predict(x),
        }),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ what to beware of


def _some(found: list[str]) -> str:
    more = f", and {len(found) - WARNINGS} more" if len(found) > WARNINGS else ""
    return ", ".join(found[:WARNINGS]) + more


def _outlying(y: np.ndarray) -> list[str]:
    far = int((np.abs(y) > OUTLYING).sum())
    if not far:
        return []
    lie, rule = ("run lies", "rules") if far == 1 else ("runs lie", "rule")
    return [f"{far} {lie} over {OUTLYING} standard deviations from the mean and {rule} the fit"]


def _unbalanced(found: Examined, rows: DataFrame) -> list[str]:
    """Values that have far less than their even share of the runs."""
    rare = []
    for field in found.varying:
        sizes = texts_of(rows[frame.CONFIG + field]).value_counts()
        if len(sizes) <= TEXTS and sizes.iloc[-1] < RARE * len(rows) / len(sizes):
            rare.append(f"{field}={sizes.index[-1]} (n={sizes.iloc[-1]} of {len(rows)})")
    return [f"unbalanced, so little is known of: {_some(rare)}"] if rare else []


def _entangled(columns: DataFrame, x: np.ndarray) -> list[str]:
    """Pairs that vary together, and features that the others explain."""
    from sklearn.linear_model import LinearRegression

    names = list(columns)
    fields = [name.split("=")[0] for name in names]
    related = np.triu(columns.corr().to_numpy(), 1)
    order = np.argsort(-np.abs(related), axis=None)
    pairs = [divmod(int(at), len(names)) for at in order if abs(related.flat[at]) > CORRELATED]
    parts = [
        f"{names[i]} with {names[j]} (r={related[i, j]:.2f})"
        for i, j in pairs
        if fields[i] != fields[j] or fields[i] == names[i]  # values of one field exclude each other
    ]
    found = [f"not independent, so that means by value mix them: {_some(parts)}"] if parts else []
    if len(names) > 1:
        rest = [np.delete(x, i, axis=1) for i in range(len(names))]
        share = [LinearRegression().fit(others, x[:, i]).score(others, x[:, i]) for i, others in enumerate(rest)]
        told = [f"{name} (R²={r2:.2f})" for name, r2 in zip(names, share, strict=True) if r2 > EXPLAINED]
        found += [f"collinear, so that their coefficients cannot be told apart: {_some(told)}"] if told else []
    return found


def _leaking(rows: DataFrame) -> list[str]:
    if rows["group_key"].duplicated().any():
        return ["seeds of one config fall on both sides of a split: R² on unseen configs is likely lower"]
    return []


# --------------------------------------------------------------------------------------------------------- figure


def regression_figure(found: Examined, fit: Regression, words: Words = NO_WORDS, filtered: bool = False) -> Drawn:
    """The coefficients with their spread, and what the fit predicts against what was measured."""
    stem = "regression_filtered" if filtered else "regression"
    which = f" with {found.filter}" if filtered else ""
    if fit.coefficients is None or fit.runs is None:
        empty = DataFrame(columns=["panel", "feature", "scale", "coefficient", "std", "all"])
        return canvas.note(f"stage {found.info.name}: no regression of {fit.target}{which}: {fit.reason}"), stem, empty
    drawn = fit.coefficients.head(BARS)
    figure = Figure(figsize=(10.5, max(4.6, 0.26 * len(drawn) + 2.6)), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_coefficients(left, drawn, fit)
    _draw_runs(right, fit.runs, fit, words.get(found.name, found.name))
    left_out = len(fit.coefficients) - len(drawn)
    canvas.heading(
        figure,
        f"{found.info.name}: linear regression of {fit.target}, z-scored, on the hyper-parameters, "
        f"{count(fit.n, 'run')}{which}",
        fit.judgement().replace("R² ", "R²\u00a0").replace("MSE ", "MSE\u00a0"),
        *fit.remarks,
        *([f"the {left_out} smallest coefficients are not drawn"] if left_out else []),
    )
    parts = [fit.coefficients.assign(panel="coefficients"), fit.runs.assign(panel="runs")]
    numbers = pd.concat(parts).astype({"run": "Int64"})
    return figure, stem, numbers[["panel", *fit.coefficients.columns, *fit.runs.columns]]


def _draw_coefficients(axes: Axes, drawn: DataFrame, fit: Regression) -> None:
    y = np.arange(len(drawn))
    axes.barh(y, drawn["coefficient"], height=0.62, color=BLUE, alpha=0.55)
    axes.errorbar(drawn["coefficient"], y, xerr=drawn["std"], fmt="none", ecolor=DARK, elinewidth=1, capsize=2.5)
    axes.scatter(drawn["all"], y, marker="D", s=26, facecolors="white", edgecolors=RED, linewidths=1.2, zorder=4)
    axes.axvline(0, color=DARK, linewidth=0.8)
    axes.set_yticks(y, [plain(name, 36) for name in drawn["feature"]])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(plain(f"coefficient: standard deviations of {fit.target} for one of the feature", 90))
    handles = [
        axes.patches[0],
        Line2D([], [], color=DARK, linewidth=1, marker="|", label=f"± std over {fit.splits} splits"),
        Line2D([], [], linestyle="", marker="D", markersize=5, markerfacecolor="white", markeredgecolor=RED,
               label="fit on all runs"),
    ]  # fmt: skip
    axes.patches[0].set_label(f"fit on {fit.n - fit.test:,} runs")
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)


def _draw_runs(axes: Axes, runs: DataFrame, fit: Regression, word: str) -> None:
    size = canvas.dot_area(len(runs))
    for part, colour, marker in (("fit", "#9db6cc", "o"), ("test", RED, "^")):
        own = runs[runs["part"] == part]
        label = f"fitted (n={len(own):,})" if part == "fit" else f"not fitted (n={len(own):,})"
        dots = axes.scatter(
            own["predicted"], own["measured"], s=size, color=colour, marker=marker, alpha=0.6, linewidths=0, label=label
        )
        canvas.rasterize(dots, len(runs))
    low = float(runs[["predicted", "measured"]].min().min())
    axes.axline((low, low), slope=1, color=DARK, linewidth=1)
    axes.set_xlabel(plain(f"predicted {fit.target}, z-scored", 60))
    axes.set_ylabel(plain(f"measured {fit.target}, z-scored", 60))
    axes.set_title(plain(word, 60))
    legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    for handle in filter(None, legend.legend_handles):
        handle.set(sizes=[25])
