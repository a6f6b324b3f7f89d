"""Which tokens of a corpus a run is trained on, and which are held out. Reaches no torch.

The held-out parts are places of the corpus alone: they do not depend on how much of it is trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnnq import tokens
from rnnq.errors import DataError

if TYPE_CHECKING:
    from rnnq.families.scaling.config import ScalingConfig
    from rnnq.tokens import Tokens

STREAMS = 32  # that a held-out part is read in, side by side


@dataclass(frozen=True)
class Parts:
    """Places of tokens, from first to before last."""

    train: tuple[int, int]
    val: tuple[int, int]
    test: tuple[int, int]


def parts(config: ScalingConfig, found: Tokens) -> Parts:
    """Train begins the corpus, val follows train_split of it, and test follows val.

    With max_characters the training text is train_split of so many, of the corpus' first. Raises DataError when the
    corpus is shorter than that.
    """
    size = len(found.corpus.bytes)
    trained = size
    if config.max_characters is not None:
        trained = tokens.bytes_of(found.corpus, config.max_characters)
    val, test = (int(size * share) for share in (config.train_split, config.train_split + config.val_split))
    end = int(size * min(1.0, config.train_split + config.val_split + config.test_split))
    train = found.tokens_in(int(trained * config.train_split))
    held = [(found.tokens_from(first), found.tokens_in(last)) for first, last in ((val, test), (test, end))]
    short = [(first, min(last, first + config.fixed_val_tokens)) for first, last in held]
    return Parts((0, train), short[0], short[1])


def windows(config: ScalingConfig) -> int:
    """Micro-batches in one pass over the training text: batch_size streams, a window of each at a time."""
    first, last = parts(config, tokens.load(config.data_path, config.tokens)).train
    return windows_of(config, last - first)


def windows_of(config: ScalingConfig, trained: int) -> int:
    """As `windows`, of so many tokens; the last one of a stream is only said, not read."""
    return max(0, (trained // config.batch_size - 1) // config.sequence_length)


def check(config: ScalingConfig) -> dict[str, str]:
    """The sha256 of the corpus and of its tokens. Raises DataError with all for which the corpus is too short."""
    found = tokens.load(config.data_path, config.tokens)
    split = parts(config, found)
    problems = _problems(config, split)
    if problems:
        where = f"data_path={config.data_path}, {len(found.ids):,} tokens ({config.tokens})"
        raise DataError([f"{where}: {problem}" for problem in problems], "a longer text, or less of it at a time")
    return {config.data_path: found.corpus.sha256, f"{config.data_path} as {config.tokens}": found.sha256}


def _problems(config: ScalingConfig, split: Parts) -> list[str]:
    trained = split.train[1] - split.train[0]
    least = config.batch_size * (config.sequence_length + 1)
    if trained < least:
        what = f"batch_size={config.batch_size} windows of {config.sequence_length + 1} are {least:,}"
        return [f"the training text has {trained:,} tokens; {what}"]
    problems = []
    there = config.num_epochs * windows_of(config, trained) * config.batch_size * config.sequence_length
    asked = config.budget_in_tokens()
    if asked > there:
        passes = -(-asked * config.num_epochs // there)
        what = f"the budget is {asked:,} tokens, and num_epochs={config.num_epochs} over the text are {there:,}"
        problems.append(f"{what}: num_epochs={passes} would do")
    elif asked < config.tokens_per_step():
        problems.append(f"the budget is {asked:,} tokens, and one optimiser step reads {config.tokens_per_step():,}")
    for name in ("val", "test"):
        first, last = getattr(split, name)
        if last - first <= STREAMS:
            problems.append(f"{name} has {max(0, last - first):,} tokens, and is read in {STREAMS} streams")
    return problems
