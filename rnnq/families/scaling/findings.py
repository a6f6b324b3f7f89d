"""What the numbers of a study say, as tables and as sentences: best rates and whether they transfer, power laws.

Groups of which a run is missing are in no optimum and no fit: the mean of those that remain would flatter them. A rate
at which a run diverged bounds a sweep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pandas import DataFrame

from rnnq.families.scaling import intervals, laws, lr_optimum
from rnnq.families.scaling.laws import Parametric, PowerLaw
from rnnq.families.scaling.lr_optimum import Optimum, Shift, Transfer
from rnnq.families.scaling.shown import Shown, diverged

PUBLISHED_E = (1.69, 1.76, 1.9)  # nats per token: Hoffmann et al. 2022, and two of the published study
SHARES = (0.25, 0.5, 0.75)  # of the lowest loss, that E is set to where no E is known
COSTS = ("flops", "flops_lstm")


# ------------------------------------------------------------------------------------------------------ learning rates


@dataclass(frozen=True)
class Sweep:
    """The learning rates of one kind."""

    kind: str
    optima: tuple[tuple[int, Optimum], ...]  # by width
    intervals: tuple[tuple[float, float] | None, ...]  # of their rates, over seeds
    shift: Shift | None
    transfer: Transfer
    seeds: int  # the most that a rate of it has
    tokens: tuple[float, float]  # the smallest and the largest budget of its runs

    @property
    def words(self) -> str:
        """Whether the best rate carries over, in a sentence."""
        if self.transfer.answer == "cannot say" and len(self.optima) < 2:
            return f"whether the rate carries over cannot be said: {self.transfer.why}"
        first, last = self.optima[0][0], self.optima[-1][0]
        at_least = "at least " if self.transfer.answer == "no" and self.transfer.why else ""
        moved = f"optimum moves by {at_least}{self.transfer.steps:.2f} half-decade steps over widths {first}-{last}"
        why = f" ({self.transfer.why})" if self.transfer.why and not at_least else ""
        answer = {"yes": "it transfers", "no": "it does not transfer"}.get(self.transfer.answer, "whether it transfers")
        return f"{moved}: {answer}{' cannot be said' if self.transfer.answer == 'cannot say' else ''}{why}"

    @property
    def short(self) -> str:
        """The same in a few words."""
        answer = {"yes": "transfers", "no": "does not transfer"}.get(self.transfer.answer, "cannot say")
        if len(self.optima) < 2:
            return f"cannot say: {self.transfer.why}"
        least = "at least " if self.transfer.why and self.transfer.answer == "no" else ""
        why = ", the optimum is at an edge" if answer == "cannot say" else ""
        return f"optimum moves {least}{self.transfer.steps:.2f} half-decades: {answer}{why}"

    @property
    def law(self) -> str:
        """The line through the optima: "η = 0.243 h^-0.555 [-0.632, -0.477], R² 0.994, 5 widths"."""
        if self.shift is None:
            return ""
        interval = within(None if self.shift.low is None else (self.shift.low, self.shift.high or 0.0))
        r2 = f", R² {self.shift.r2:.3f}" if self.shift.low is not None and np.isfinite(self.shift.r2) else ""
        return f"η = {self.shift.factor:.3g} h^{self.shift.slope:.3f}{interval}{r2}, {self.shift.widths} widths"


def within(interval: tuple[float, float] | None, digits: int = 3) -> str:
    """An interval behind a number; nothing where there is none."""
    return "" if interval is None else f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def sweeps(shown: Shown) -> list[Sweep]:
    """Of each kind, where a width has several rates."""
    found = []
    for kind in shown.kinds:
        own = shown.of(kind)
        if own.groupby("width")["rate"].nunique().max() > 1:
            found.append(_sweep(shown, kind, own))
    return found


def _sweep(shown: Shown, kind: str, own: DataFrame) -> Sweep:
    optima, known = [], []
    every = shown.every[shown.every["kind"] == kind]
    for width, runs in every.groupby("width"):
        swept = _swept(own[own["width"] == width], runs)
        best = lr_optimum.find([rate for rate, _ in swept], [loss for _, loss in swept])
        if best is not None:
            optima.append((int(str(width)), best))
            known.append(_interval(shown, kind, int(str(width)), best))
    inside = [(width, one.rate) for width, one in optima if not one.edge]
    shift = lr_optimum.shift([w for w, _ in inside], [r for _, r in inside]) if len(inside) > 1 else None
    tokens = float(own["tokens"].min()), float(own["tokens"].max())
    return Sweep(kind, tuple(optima), tuple(known), shift, lr_optimum.transfer(optima), int(own["n"].max()), tokens)


def _swept(own: DataFrame, runs: DataFrame) -> list[tuple[float, float]]:
    """Rates and mean losses of a width: of whole groups, and infinite where a run of the rate diverged."""
    means = {float(row.rate): float(row.mean) for row in _rows(own) if row.n == row.of}
    return sorted(({float(rate): np.inf for rate in diverged(runs)["rate"]} | means).items())


def _rows(table: DataFrame) -> list[Any]:
    """Rows with their columns as attributes; `mean` and `std` among them, which a namedtuple has, too."""
    return list(table.itertuples(index=False))


def _interval(shown: Shown, kind: str, width: int, best: Optimum) -> tuple[float, float] | None:
    """Of the best rate: by drawing the seeds anew."""
    cells = shown.whole[(shown.whole["kind"] == kind) & (shown.whole["width"] == width)]
    n = int(cells["n"].min()) if len(cells) else 0
    if n < 2:
        return None
    groups = [shown.ended[shown.ended["cell"] == cell].sort_values("seed") for cell in cells["cell"]]
    seeds = {tuple(own["seed"]) for own in groups}
    losses = [own["loss"].to_numpy(float) for own in groups]
    drawn = lr_optimum.replicates(cells["rate"].tolist(), losses, len(seeds) == 1, intervals.generator())
    found = intervals.percentile(float(np.log10(best.rate)), drawn, n)
    return None if found is None else (10 ** found[0], 10 ** found[1])


# -------------------------------------------------------------------------------------------------------------- laws


@dataclass(frozen=True)
class Fit:
    """How the loss of a form falls with one cost."""

    form: str
    cost: str  # one of COSTS
    runs: tuple[int, ...]  # that were fitted: those of the groups on the front
    laws: tuple[tuple[str, PowerLaw], ...]  # how E was come by, and what follows
    why_not: tuple[str, ...]  # of the others

    @property
    def chosen(self) -> PowerLaw | None:
        """The one that is drawn: with E fitted, where runs pin E down; else with 1.76 as published, or 0."""
        free = next((law for words, law in self.laws if words == "fitted"), None)
        if free is not None and free.e_interval is not None and free.e_interval[0] > 0:
            return free
        given = {words: law for words, law in self.laws}
        return given.get("1.76") or given.get("0") or free

    @property
    def words(self) -> str:
        """The law that is drawn: "L = 1.76 + 27.9 C^-0.055 [-0.06, -0.05], R² 0.99, 5 runs"."""
        law = self.chosen
        if law is None:
            return f"no power law: {self.why_not[0]}"
        e = f"{law.e:.3g} + " if law.e else ""
        how = ("E given" if law.e else "E = 0 given") if law.is_e_given else f"E fitted{within(law.e_interval, 2)}"
        interval = within(law.alpha_interval)
        return f"L = {e}{law.a:.3g} C^{law.alpha:.3f}{interval}, {how}, R² {law.r2:.3f}, {law.n} runs"


def fits(shown: Shown) -> list[Fit]:
    """Power laws of every form in every cost, for several E."""
    return [_fit(shown, form, cost) for form in shown.forms for cost in COSTS]


def on_front(shown: Shown, form: str, cost: str) -> DataFrame:
    """The groups of a form, all of whose runs have finished, that no other beats at their cost, by cost."""
    own = shown.whole[shown.whole["form"] == form]
    return own.iloc[laws.front(own[cost].tolist(), own["mean"].tolist())]


def _fit(shown: Shown, form: str, cost: str) -> Fit:
    runs = shown.ended[shown.ended["cell"].isin(on_front(shown, form, cost)["cell"]) & (shown.ended["form"] == form)]
    if runs.empty:
        return Fit(form, cost, (), (), ("no group has all of its runs",))
    made, why = [], []
    for words, e in [*_given_e(shown, float(runs["loss"].min())), ("fitted", None)]:
        law = laws.power_law(runs[cost].tolist(), runs["loss"].tolist(), e)
        if isinstance(law, str):
            why.append(law)
        else:
            made.append((words, law))
    return Fit(form, cost, tuple(runs["run"].tolist()), tuple(made), tuple(why))


def _given_e(shown: Shown, lowest: float) -> list[tuple[str, float | None]]:
    if shown.has_gpt2:
        return [("0", 0.0), *((f"{e:g}", e) for e in PUBLISHED_E)]
    return [("0", 0.0), *((f"{share:.0%} of the lowest loss", share * lowest) for share in SHARES)]


def parametric(shown: Shown, form: str) -> Parametric | str:
    """L = E + A N^-alpha + B D^-beta of the best rate of each size and budget; or why there is none."""
    own = shown.whole[shown.whole["form"] == form]
    best = own.loc[own.groupby(["parameters", "tokens"])["mean"].idxmin(), "cell"]
    runs = shown.ended[shown.ended["cell"].isin(best)]
    return laws.parametric(runs["parameters"].tolist(), runs["tokens"].tolist(), runs["loss"].tolist())


# ---------------------------------------------------------------------------------------------------------- sentences


def sentences(shown: Shown) -> list[str]:
    """What there is to say of a study, a line each."""
    if shown.cells.empty:
        return []
    lines = list(shown.remarks)
    if len(shown.ended) < len(shown.every):
        lines.append(f"{len(shown.ended)} of {len(shown.every)} runs have finished with a finite loss")
    found = sweeps(shown)
    if not found:
        lines.append("learning rate: no width has several rates, so there is no optimum to tell")
    for one in found:
        lines.append(f"learning rate, {one.kind}: {one.words}" + (f"; {one.law}" if one.law else ""))
        lines += doubts(one)
    for form in shown.forms:
        lines.append(f"compute, {form}: {_fit(shown, form, 'flops').words}")
        lines.append(f"parameters and tokens, {form}: {parametric_words(parametric(shown, form))}")
    return lines


def doubts(one: Sweep) -> list[str]:
    """What makes the answer of a sweep doubtful: few seeds, unequal budgets."""
    found = []
    open_by = [math.log10(known[1] / known[0]) / lr_optimum.STEP for known in one.intervals if known is not None]
    if open_by and max(open_by) > 1:
        found.append(f"learning rate, {one.kind}: seeds leave a best rate open by {max(open_by):.1f} half-decades")
    low, high = one.tokens
    if high >= 1.05 * low:
        tokens = f"widths read {low:.3g} to {high:.3g} tokens"
        found.append(f"learning rate, {one.kind}: {tokens}: part of a shift may be the budget's")
    return found


def parametric_words(law: Parametric | str) -> str:
    """The parametric form in a line, or why there is none."""
    if isinstance(law, str):
        return law
    alpha, beta, e = (within(part) for part in (law.alpha_interval, law.beta_interval, law.e_interval))
    terms = f"L = {law.e:.3g}{e} + {law.a:.3g} N^-{law.alpha:.3f}{alpha} + {law.b:.3g} D^-{law.beta:.3f}{beta}"
    return f"{terms}, R² {law.r2:.3f}, {law.n} runs; the best N grows as C^{law.share:.2f}"


def best_of_widths(shown: Shown) -> DataFrame:
    """Of each kind and width the whole group of the lowest mean; where none is whole, of those that there are."""
    own = shown.cells[shown.cells["kind"].isin(shown.kinds)]
    cells = own.assign(partial=own["n"] < own["of"])
    ordered = cells.sort_values(["kind", "width", "partial", "mean"])
    return ordered.drop_duplicates(["kind", "width"]).reset_index(drop=True)


def table_of_optima(found: Sequence[Sweep]) -> DataFrame:
    """A row for each kind and width, and one for the line through them."""
    rows: list[dict[str, Any]] = []
    for one in found:
        for (width, best), interval in zip(one.optima, one.intervals, strict=True):
            low, high = interval or (None, None)
            rows.append({"kind": one.kind, "what": "optimum", "width": width, "rate": best.rate, "low": low,
                         "high": high, "lowest": best.lowest, "parabola": best.parabola, "r2": best.r2,
                         "rates": best.rates, "edge": best.edge, "why_not_parabola": best.why_not})  # fmt: skip
        if one.shift is not None:
            rows.append({"kind": one.kind, "what": "shift: log10 rate = intercept + slope log10 width",
                         "slope": one.shift.slope, "low": one.shift.low, "high": one.shift.high, "r2": one.shift.r2,
                         "intercept": one.shift.intercept})  # fmt: skip
        rows.append({"kind": one.kind, "what": "transfer", "answer": one.transfer.answer, "steps": one.transfer.steps,
                     "why_not_parabola": one.transfer.why})  # fmt: skip
    columns = ["kind", "what", "width", "rate", "low", "high", "lowest", "parabola", "r2", "rates", "edge",
               "why_not_parabola", "slope", "intercept", "answer", "steps"]  # fmt: skip
    return DataFrame(rows, columns=columns)


def table_of_fits(found: Sequence[Fit]) -> DataFrame:
    """A row for each kind, cost and E."""
    rows = []
    for one in found:
        for words, law in one.laws:
            alpha, e = law.alpha_interval or (None, None), law.e_interval or (None, None)
            rows.append({"kind": one.form, "cost": one.cost, "E": words, "e": law.e, "e_low": e[0], "e_high": e[1],
                         "a": law.a, "alpha": law.alpha, "alpha_low": alpha[0], "alpha_high": alpha[1], "r2": law.r2,
                         "runs": law.n, "drawn": law == one.chosen})  # fmt: skip
    columns = [
        "kind",
        "cost",
        "E",
        "e",
        "e_low",
        "e_high",
        "a",
        "alpha",
        "alpha_low",
        "alpha_high",
        "r2",
        "runs",
        "drawn",
    ]
    return DataFrame(rows, columns=columns)
