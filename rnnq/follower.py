"""A process that trains runs together with a worker: it makes the same steps on its own share, and decides nothing."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rnnq import config, definitions, families, logs, train
from rnnq.errors import cause_of, message_of
from rnnq.families.base import Family
from rnnq.ranks import END, STEP, Ranks
from rnnq.train import Member, NoDesk, Training


def follow(ranks: Ranks, device: torch.device, defs: Path, compile: bool = False) -> bool:
    """Train what process 0 says until it leaves; whether that was in good order.

    What it prints is nobody's: process 0 prints the same into the run's log. An error of the run's code is left as
    words for process 0, whose run it is.
    """
    try:
        with logs.unheard():
            while (brief := ranks.awaited()) is not None:
                _train(ranks, device, _family(brief, defs, compile), brief)
    except (Exception, SystemExit) as error:  # a run's code may also ask Python to leave
        if not ranks.lost()[0]:  # else it is the connection that broke
            ranks.leave_words(_words(error))
        return False
    return True


def _train(ranks: Ranks, device: torch.device, family: Family, brief: Mapping[str, Any]) -> None:
    made = config.parse(family.Config, brief["config"])
    training = Training(family, [Member(made, NoDesk(), brief["budget"], brief["state"])], device, ranks)
    while (what := ranks.heard()) != END:
        if what == STEP:
            training.update()
        else:
            training.joined()
    ranks.end()


def _family(brief: Mapping[str, Any], defs: Path, compile: bool) -> Family:
    """The code of the family, under the same rules as the worker's: from below --defs, while its hash matches."""
    source = brief["source"], brief["source_sha256"]
    definition = definitions.load_source(*source, defs) if None not in source else None
    found = families.find(brief["family"], definition)
    assert isinstance(found, Family)
    return train.compiled(found) if compile and found.stacks else found


def _words(error: Exception | SystemExit) -> dict[str, str]:
    trace = "".join(traceback.format_exception(error))
    return {"cause": cause_of(error), "message": message_of(error), "trace": trace}
