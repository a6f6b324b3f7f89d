"""What figures are of: a stage, the metric that it is ranked by, and its runs and groups in that order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pandas import DataFrame

from rnnq import frame, ranking, runs
from rnnq.query import OPEN
from rnnq.ranking import Ranked
from rnnq.runs import StageInfo
from rnnq.spread import Spread, counted, half_width

Row = Mapping[str, Any]
Words = Mapping[str, str]  # metric -> what it is called on an axis, where that is not its name
NO_WORDS: Words = {}


@dataclass(frozen=True, eq=False)
class Examined:
    """What was asked of a stage, and the runs that answer it."""

    info: StageInfo
    metric: Row  # name, unit, better
    filter: str | None
    rows: list[dict[str, Any]]  # every run of the stage, by id
    best: list[dict[str, Any]]  # the finished ones that fulfil the filter, best first
    frame: DataFrame  # of `rows`
    spread: Spread = Spread.std  # what ± means

    @property
    def name(self) -> str:
        """What runs are ranked by."""
        return str(self.metric["name"])

    @property
    def open(self) -> int:
        """Runs of the stage that have not ended yet."""
        return sum(row["state"] in OPEN for row in self.rows)

    @property
    def finished(self) -> int:
        """Runs of the stage that are done."""
        return sum(row["state"] == "done" for row in self.rows)

    def value(self, row: Row) -> float | None:
        """What a run is ranked by."""
        return runs.value_of(row, self.name, self.info.primary)

    @cached_property
    def by_id(self) -> dict[int, dict[str, Any]]:
        """Every run of the stage."""
        return {row["id"]: row for row in self.rows}

    @cached_property
    def varying(self) -> list[str]:
        """The config fields that differ between runs, seeds aside."""
        return frame.varying(self.frame, self.info)

    @cached_property
    def ranked(self) -> list[dict[str, Any]]:
        """All finished runs that have the metric, best first, whatever the filter."""
        return [r for r in ranking.best_first(self.rows, self.info, self.metric) if self.value(r) is not None]

    @cached_property
    def places(self) -> dict[int, int]:
        """Run -> its rank among these, from 1."""
        return {row["id"]: place for place, row in enumerate(self.ranked, start=1)}

    @cached_property
    def has_seeds(self) -> bool:
        """Whether a group of the stage has more than one run."""
        return bool(self.frame["group_key"].duplicated().any())

    @cached_property
    def groups(self) -> list[Ranked]:
        """All groups with a finished run that has the metric: best first, those that lack seeds last."""
        return ranking.with_lacking(self.rows, set(self.by_id), self.metric, self.info)

    @cached_property
    def chosen_groups(self) -> list[Ranked]:
        """The same of the runs that fulfil the filter alone."""
        if self.filter is None:
            return self.groups
        return ranking.with_lacking(self.rows, {row["id"] for row in self.best}, self.metric, self.info)

    def half(self, group: Ranked) -> float | None:
        """What stands behind the ± of a group's mean; None of one run."""
        return half_width(group.std, group.n, self.spread)

    def counted(self, group: Ranked) -> str:
        """ "0.9871 ± 0.0031 (5)": a group's mean, its spread, and of how many runs."""
        return counted(group.mean, self.half(group), group.n, group.of)

    def shown(self, filtered: bool) -> DataFrame:
        """The finished runs whose metric is finite, by id, the metric in the column `metric`."""
        by_run = self.frame.assign(metric=self.frame[frame.column(self.info, self.name)]).set_index("id")
        kept = (by_run["state"] == "done") & by_run["metric"].abs().lt(float("inf"))
        if filtered:
            kept &= by_run.index.isin([row["id"] for row in self.best])
        return by_run[kept]
