"""rnnq worker: claim and train."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnnq.cli import output
from rnnq.cli.options import DB, DEFS, Db, Defs
from rnnq.errors import InputError

if TYPE_CHECKING:
    from rnnq.train import Every


def worker(
    gpu: Annotated[int | None, typer.Option("--gpu", min=0, help="Train on this GPU.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda:N, or auto.")] = "auto",
    db: Db = DB,
    defs: Defs = DEFS,
    checkpoint_every: Annotated[
        str, typer.Option("--checkpoint-every", envvar="RNNQ_CHECKPOINT_EVERY", help="Seconds (60s) or steps (1000).")
    ] = "60s",
    stage: Annotated[str | None, typer.Option("--stage", help="Only runs of this stage.")] = None,
    runs: Annotated[int | None, typer.Option("--runs", min=1, help="Leave after so many runs.")] = None,
    drain: Annotated[bool, typer.Option("--drain", help="Leave when nothing is claimable now.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Never leave: wait for more.")] = False,
    bar: Annotated[bool, typer.Option("--bar/--no-bar", help="A progress bar on a terminal, or only lines.")] = True,
) -> None:
    """Train until nothing is pending, running or able to open. Start as many as you like, stop them as you like."""
    if drain and wait:
        raise InputError("--drain and --wait exclude each other")
    if gpu is not None and device != "auto":
        raise InputError(f"--gpu {gpu} and --device {device} exclude each other")
    every = parse_every(checkpoint_every)

    from rnnq import db as database
    from rnnq import queue
    from rnnq import runs as study
    from rnnq import worker as work

    engine = database.open(db)
    if stage is not None:
        study.stage_info(engine, stage)
    if not wait and gpu is None and device in ("auto", "cpu") and not queue.has_open(engine, stage):
        output.remark("nothing is pending, running or able to open")
        return  # torch, a second's work to load, is not needed to say so
    chosen = work.pick_device(gpu, device)
    work.prepare(chosen)
    scope = work.Scope(stage, runs, drain, wait)
    says_cpu = chosen.type == "cpu" and device == "auto"
    with Display(bar, says_cpu, lambda: queue.count(engine, stage)) as display:
        code = work.Worker(engine, chosen, scope, defs, every, display.on_event).work()
    raise typer.Exit(code)


def parse_every(text: str) -> Every:
    """ "60s" is seconds, "1000" is steps. Raises InputError."""
    from rnnq.train import Every

    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s?)", text.strip())
    if found is None or float(found[1]) <= 0 or (not found[2] and "." in found[1]):
        raise InputError(f"--checkpoint-every {text}: neither seconds nor steps", "60s, or 1000 for steps")
    if found[2]:
        return Every(seconds=float(found[1]))
    return Every(seconds=None, steps=int(found[1]))


class Display:
    """What a worker shows: a progress bar on a terminal, a line per event elsewhere. On stderr.

    Workers side by side on one terminal: one has the bar, the others print lines.
    """

    def __init__(self, bar: bool, says_cpu: bool, count: Callable[[], tuple[int, int]]) -> None:
        self.says_cpu, self.count = says_cpu, count
        self.terminal = sys.stderr.isatty()
        self.bar = bar and self.terminal
        self.progress: Any = None
        self.task: Any = None

    def __enter__(self) -> Display:
        if self.bar:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.fields[runs]}"),
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[loss]}"),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def line(self, text: str) -> None:
        """A line above the bar; on a terminal it first clears the line on which another worker's bar may stand."""
        if self.progress is not None:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            output.remark(("\r\x1b[2K" if self.terminal else "") + text)

    def on_event(self, event: str, details: Mapping[str, Any]) -> None:
        """Show an event of the worker, if it is one for people."""
        show = getattr(self, f"_{event}", None)
        if show is not None:
            show(details)

    def _started(self, details: Mapping[str, Any]) -> None:
        why = " (no GPU here: one thread of the CPU)" if self.says_cpu else ""
        self.line(f"worker {details['worker']} on {details['device']}{why}")

    def _restored(self, details: Mapping[str, Any]) -> None:
        claim = details["claim"]
        for problem in details["problems"]:
            self.line(f"run {claim.run}: {problem}")
        if details["problems"]:
            back = f"step {details['step']:,}" if details["step"] else "the start"
            self.line(f"run {claim.run}: goes on from {back}")
        elif details["step"]:
            inexact = "" if details["exact"] else ", under other numerics: not to the bit"
            self.line(f"run {claim.run} {claim.label}: resumed at step {details['step']:,}{inexact}")
        if self.progress is not None:
            if self.task is not None:
                self.progress.remove_task(self.task)
            left, total = self.count()
            name = f"run {claim.run} {claim.stage}: {claim.label}"
            begun = {"completed": details["step"], "loss": "", "runs": f"{total - left}/{total} runs"}
            self.task = self.progress.add_task(name, total=claim.budget, **begun)

    def _recorded(self, details: Mapping[str, Any]) -> None:
        if self.progress is None or self.task is None:
            return
        loss = next((f"loss {value:.3f}" for name, _, value in reversed(details["points"]) if name == "loss"), "")
        self.progress.update(self.task, completed=details["step"], **({"loss": loss} if loss else {}))

    _saved = _recorded

    def _ended(self, details: Mapping[str, Any], text: str) -> None:
        claim = details["claim"]
        self.line(f"run {claim.run} {claim.stage}: {claim.label}: {text}")

    def _done(self, details: Mapping[str, Any]) -> None:
        loss = "" if details["loss"] is None else f"loss {details['loss']:.4f} "
        self._ended(details, f"done, {loss}after {details['step']:,} steps, {details['seconds']:.1f} s")

    def _failed(self, details: Mapping[str, Any]) -> None:
        message = details["message"].splitlines()[0] if details["message"] else ""
        self._ended(
            details, f"FAILED ({details['cause']}): {message}; `rnnq show {details['claim'].run}` has the trace"
        )

    def _released(self, details: Mapping[str, Any]) -> None:
        self._ended(details, f"given back at step {details['step']:,}")

    def _unfit(self, details: Mapping[str, Any]) -> None:
        stage = details["claim"].stage
        self.line(f"stage {stage} cannot be trained here, and is left to others: {details['message'].splitlines()[0]}")

    def _lost(self, details: Mapping[str, Any]) -> None:
        self._ended(details, f"lost: {details['message']}")

    def _reaped(self, details: Mapping[str, Any]) -> None:
        self.line(f"run {details['run']}: taken back from {details['worker']}; {details['state']}")
