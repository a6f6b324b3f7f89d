"""Which machines a run sees, and what a sequence shows of them. Reaches no torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rnnq.config import Config
from rnnq.errors import DataError

SIZE_LIMIT = 2**31  # steps that all walks of one set of data may have together, and about as many bytes on the disk

_NOT_CONTENT = ("seed", "max_seq_len")  # fields that change nothing of the data


class Machines(Config):
    """Data of one kind of machine: how many of each split, and how long the walks through them are."""

    states: int = Field(default=5, ge=2, le=8)
    actions: int = Field(default=5, ge=1, le=10)
    absorbing: bool = False  # one state, drawn for each machine, keeps every action to itself
    demos: int = Field(default=3, ge=1, le=8)  # demonstrations that a sequence shows, of the `states` that there are
    demo_length: int | None = Field(default=None, ge=1, le=10_000)  # steps; none: int(S A ln(S A))
    query_length: int | None = Field(default=None, ge=1, le=10_000)  # steps; none: the same
    length_variation: float = Field(default=0.2, ge=0, lt=1)  # each length is drawn within this part of it
    data_split: Literal["disjoint", "stream"] = "disjoint"  # stream: as the published study has it; machines recur
    data_seed: int = Field(default=42, ge=0, lt=2**63)  # decides the machines and walks; of the group, unlike `seed`
    n_train: int = Field(default=6000, ge=1, le=10_000_000)  # samples, and so below
    n_val: int = Field(default=2000, ge=1, le=10_000_000)
    n_test: int = Field(default=2000, ge=1, le=10_000_000)
    max_seq_len: int | None = Field(default=None, ge=1)  # tokens; a longer sequence is refused
    permute_tokens: bool = False  # each sample has ids of its own, out of all 8 states and 10 actions

    @field_validator("demos")
    @classmethod
    def _has_so_many_demonstrations(cls, demos: int, info: ValidationInfo) -> int:
        states = info.data.get("states")  # missing when it is wrong itself
        if states is not None and demos > states:
            raise ValueError(f"there is one demonstration for each of the {states} states, and no more")
        return demos

    @model_validator(mode="after")
    def _fits(self) -> Machines:
        problems = [text for text in (self._too_long(), self._too_large()) if text]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _too_long(self) -> str | None:
        least = self.sequence_length(*(self.lengths(base)[0] for base in self.base_lengths()))
        if self.max_seq_len is None or least <= self.max_seq_len:
            return None
        return f"max_seq_len={self.max_seq_len}: by the formula, even the shortest sequence has {least:,} tokens"

    def _too_large(self) -> str | None:
        demo, query = self.base_lengths()
        steps = self.samples() * (self.states * self.lengths(demo)[1] + self.lengths(query)[1])
        if steps <= SIZE_LIMIT:
            return None
        return (
            f"{self.samples():,} samples of {self.states} demonstrations of {demo} steps and a query of {query}: "
            f"up to {steps / 2**30:,.1f} GiB; the limit is {SIZE_LIMIT / 2**30:,.0f} GiB"
        )

    def samples(self) -> int:
        """How many there are, of all splits."""
        return self.n_train + self.n_val + self.n_test

    def base_lengths(self) -> tuple[int, int]:
        """Steps of a demonstration and of a query, before their variation."""
        cells = self.states * self.actions
        automatic = max(1, int(cells * math.log(cells)))
        return self.demo_length or automatic, self.query_length or automatic

    def lengths(self, base: int) -> tuple[int, int]:
        """The smallest and the largest number of steps that the variation makes of a length."""
        low, high = (int(base * (1 + sign * self.length_variation)) for sign in (-1, 1))
        return max(1, low), max(1, high)

    def sequence_length(self, demo: int, query: int) -> int:
        """Tokens of a sequence whose demonstrations have `demo` steps each and whose query has `query`."""
        return self.demos * (2 * demo + 2) + 2 * query + 3

    def longest_possible(self) -> int:
        """Tokens of the longest sequence that the formula allows. Those that are drawn may all be shorter."""
        return self.sequence_length(*(self.lengths(base)[1] for base in self.base_lengths()))

    def content(self) -> dict[str, object]:
        """What decides the data, with the lengths worked out: equal for configs that have the same data."""
        demo, query = self.base_lengths()
        fields = {name: getattr(self, name) for name in Machines.model_fields if name not in _NOT_CONTENT}
        return fields | {"demo_length": demo, "query_length": query}

    def data_name(self) -> str:
        """A name for people: "5s5a 80/80", with what is not as usual behind it."""
        demo, query = self.base_lengths()
        marks = [
            "absorbing" if self.absorbing else "",
            "stream" if self.data_split == "stream" else "",
            "permuted" if self.permute_tokens else "",
        ]
        return " ".join([f"{self.states}s{self.actions}a {demo}/{query}", *filter(None, marks)])

    def datasets(self) -> dict[str, str]:
        """The sha256 of the data, which are made if they are not in the cache.

        Raises DataError when there are too few machines for three splits, when the generator of `stream` cannot go
        on, and when a sequence is longer than max_seq_len.
        """
        from rnnq.families.fsm import data

        made = data.load(self)
        if self.max_seq_len is not None and made.longest > self.max_seq_len:
            raise DataError(
                f"max_seq_len={self.max_seq_len}: the longest sequence of {self.data_name()} has {made.longest:,} "
                f"tokens (of the lengths that occur; the formula allows {self.longest_possible():,})",
                f"max_seq_len={made.longest}, fewer demos, or shorter walks (demo_length, query_length)",
            )
        return {f"fsm:{made.name}": made.sha256}
