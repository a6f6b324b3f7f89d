"""rnnq worker: claim and train."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnnq import processes
from rnnq.cli import output
from rnnq.cli.options import DB, DEFS, Db, Defs, Device, Format, Rows, Stage
from rnnq.cli.status import members_words
from rnnq.errors import InputError, nearest

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from rnnq import slices
    from rnnq.launch import Lookout
    from rnnq.ranks import Ranks


def worker(
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Train on this GPU; with --nproc on these: 0,1.", metavar="N")
    ] = None,
    device: Device = "auto",
    db: Db = DB,
    defs: Defs = DEFS,
    checkpoint_every: Annotated[
        str, typer.Option("--checkpoint-every", envvar="RNNQ_CHECKPOINT_EVERY", help="Seconds (60s) or steps (1000).")
    ] = "60s",
    stage: Stage = None,
    runs: Annotated[int | None, typer.Option("--runs", min=1, help="Leave after so many runs.")] = None,
    drain: Annotated[bool, typer.Option("--drain", help="Leave when nothing is claimable now.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Never leave: wait for more.")] = False,
    processes: Annotated[int, typer.Option("--processes", min=1, max=256, help="Worker processes side by side.")] = 1,
    nproc: Annotated[
        int, typer.Option("--nproc", min=1, max=256, help="Processes that train each run together, a device each.")
    ] = 1,
    job_id: Annotated[
        int | None, typer.Option("--job-id", "--job_id", help="Take only this slice of the runs, from 0 on.")
    ] = None,
    total_jobs: Annotated[int | None, typer.Option("--total-jobs", "--total_jobs", help="Of so many slices.")] = None,
    from_array: Annotated[
        bool, typer.Option("--slice", help="Take the slice that this task of a SLURM array has by its place.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs that it may take, and leave.")] = False,
    format: Rows = Format.table,
    bar: Annotated[bool, typer.Option("--bar/--no-bar", help="A progress bar on a terminal, or only lines.")] = True,
    keep_logs: Annotated[
        bool, typer.Option("--logs/--no-logs", help="Keep what runs print for `rnnq logs`, or let it be seen here.")
    ] = True,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Do not leave when several different runs fail at once.")
    ] = False,
    pack: Annotated[
        str,
        typer.Option(
            "--pack", help="Train runs of one shape together: auto finds how many are fastest; a number; or off."
        ),
    ] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the steps of third-level families with torch.compile.")
    ] = False,
    stop: Annotated[
        str | None, typer.Option("--stop", help="Ask this worker (see `rnnq workers`), or all, to give back and leave.")
    ] = None,
    after_run: Annotated[bool, typer.Option("--after-run", help="With --stop: once its run has ended.")] = False,
) -> None:
    """Train until nothing is pending, running or able to open. Start as many as you like, stop them as you like."""
    places = Places(gpu, device, nproc, compile)
    _refuse_together(("--drain", drain), ("--wait", wait))
    _refuse_together((f"--gpu {gpu}", gpu is not None), (f"--device {device}", device != "auto"))
    _refuse_together((f"--nproc {nproc}", nproc > 1), (f"--processes {processes}", processes > 1))
    _refuse_together((f"--nproc {nproc}", nproc > 1), (f"--pack {pack}", parse_pack(pack) not in (None, 1)))
    if after_run and stop is None:
        raise InputError("--after-run says when the worker of --stop leaves", "rnnq worker --stop ID --after-run")
    if stop is not None:
        _stop(db, stop, "drain" if after_run else "stop")
        return
    every, pack_size = parse_every(checkpoint_every), parse_pack(pack)
    if places.rank:
        raise typer.Exit(_follow(places, defs))

    from rnnq import db as database
    from rnnq import queue

    engine = database.open(db)
    part = None if places.rank == 0 else _slice(engine, stage, job_id, total_jobs, from_array)
    if dry_run:
        _list(engine, stage, part, format)
        return
    if part is not None and part.within is None:
        return  # an empty slice
    within = places.within(part)
    if processes > 1:
        raise typer.Exit(_side_by_side(places, processes))
    if not wait and places.needs_no_look() and not queue.has_open(engine, stage, within=within):
        output.remark("nothing is pending, running or able to open")
        return  # torch, a second's work to load, is not needed to say so
    if nproc > 1 and places.rank is None:
        raise typer.Exit(_group(places))

    from rnnq import train
    from rnnq import worker as work

    chosen = places.prepared()
    count = partial(queue.count, engine, stage, within)
    with places.ranks(chosen) as ranks, Display(bar, places.says_cpu(), count) as display:
        scope = work.Scope(stage, runs, drain, wait, within)
        options = (keep_logs, keep_going, 1 if ranks else pack_size, places.compile, ranks)
        made = work.Worker(engine, chosen, scope, defs, train.Every(*every), display.on_event, *options)
        if places.lookout is not None:
            places.lookout.leave = made.stop.set
        code = made.work()
    raise typer.Exit(code)


@dataclass
class Places:
    """What is computed on: the options of it, and which process of a group this is (None: of none)."""

    gpu: str | None
    device: str
    nproc: int
    compile: bool

    def __post_init__(self) -> None:
        """Raises InputError for numbers of GPUs that are none, or that are not as many as the processes."""
        text = self.gpu or "0"
        if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text):
            raise InputError(f"--gpu {text}: neither the number of a GPU nor several", "--gpu 0, or --gpu 0,1")
        self.gpus = [int(number) for number in text.split(",")] if self.gpu is not None else []
        if self.gpus and (len(self.gpus) != self.nproc or len(set(self.gpus)) != self.nproc):
            hint = f"--nproc {len(self.gpus)} trains each run on all of them" if self.nproc == 1 else "one for each"
            raise InputError(f"--gpu {text} is not one GPU for each of {self.nproc}", hint)
        self.lookout: Lookout | None = None  # of a process of a group
        self.rank = int(os.environ["RANK"]) if self.nproc > 1 and processes.FOLDER in os.environ else None

    def within(self, part: slices.Slice | None) -> tuple[int, int] | None:
        """The ids of a slice; in a process of a group those that the group had at its very first start."""
        if self.rank is not None:
            given = os.environ.get(processes.WITHIN)
            return (int(given.split("-")[0]), int(given.split("-")[1])) if given else None
        if part is None or part.within is None:
            return None
        if self.nproc > 1:
            os.environ[processes.WITHIN] = f"{part.within[0]}-{part.within[1]}"
        return part.within

    def needs_no_look(self) -> bool:
        """Whether nothing about the device can be wrong, or has been found right by who started this process."""
        return self.rank is None and not self.gpus and self.device in ("auto", "cpu")

    def chosen(self) -> list[Any]:
        """The device of each process. Raises InputError for one that is not there."""
        from rnnq import worker as work

        if self.nproc == 1 or self.gpus:
            numbers: list[int | None] = [*self.gpus] or [None]
            return [work.pick_device(gpu, self.device) for gpu in numbers]
        import torch

        there = torch.cuda.device_count()
        if self.device == "cpu" or (self.device == "auto" and there == 0):
            return [torch.device("cpu")] * self.nproc
        if self.device not in ("auto", "cuda"):
            raise InputError(
                f"--device {self.device} is one device, and --nproc {self.nproc} needs as many", "--gpu 0,1"
            )
        if there < self.nproc:
            raise InputError(f"--nproc {self.nproc}: there are {there} GPUs here", "`--device cpu` does without")
        return [torch.device("cuda", number) for number in range(self.nproc)]

    def prepared(self) -> Any:
        """The device of this process, made ready. Says so where --compile lacks what it needs."""
        from rnnq import train
        from rnnq import worker as work

        chosen = self.chosen()[self.rank or 0]
        work.prepare(chosen)
        if self.compile and (lacks := train.why_not_compiled(chosen)) is not None:
            if not self.rank:
                output.remark(f"--compile: {lacks}; runs are trained without it")
            self.compile = False
        return chosen

    def says_cpu(self) -> bool:
        """Whether a worker is to say that it found no GPU, where it is on the CPU."""
        return self.device == "auto" and not self.gpus and self.chosen()[0].type == "cpu"

    @contextlib.contextmanager
    def ranks(self, device: Any) -> Iterator[Ranks | None]:
        """The group of processes that this one is of, joined; left at the end."""
        if self.rank is None:
            yield None
            return
        from rnnq.launch import Lookout
        from rnnq.ranks import Ranks

        self.lookout = Lookout()
        ranks = Ranks(self.rank, self.nproc, device, Path(os.environ[processes.FOLDER]))
        try:
            yield ranks
        finally:
            ranks.leave()


def _refuse_together(*options: tuple[str, bool]) -> None:
    if all(given for _, given in options):
        raise InputError(f"{' and '.join(option for option, _ in options)} exclude each other")


def _slice(
    engine: Engine, stage: str | None, number: int | None, slices_: int | None, from_array: bool
) -> slices.Slice | None:
    from rnnq import runs as study
    from rnnq import slices

    if stage is not None:
        study.stage_info(engine, stage)
    asked = slices.asked(number, slices_, from_array, os.environ)
    if asked is None:
        return None
    found = slices.find(engine, stage, *asked)
    output.remark(found.words())
    return found


def _list(engine: Engine, stage: str | None, part: slices.Slice | None, format: Format) -> None:
    """The runs that a worker with these options may take, whatever their states."""
    from rnnq import slices

    part = part or slices.find(engine, stage, 0, 1)
    output.rows(format, slices.listed(engine, stage, part.within), ["run", "stage", "label", "state"])
    output.remark(output.count(part.runs, "run"))


def _side_by_side(places: Places, n: int) -> int:
    """Start n workers with the options of this command; what is wrong with these is said once, before."""
    if not places.needs_no_look():
        places.chosen()
    return processes.run(n, _words_without("--processes"))


def _group(places: Places) -> int:
    """Start the processes that train each run together, with the options of this command."""
    from rnnq import launch

    places.chosen()
    return launch.run(places.nproc, sys.argv[sys.argv.index("worker") + 1 :])


def _follow(places: Places, defs: Path) -> int:
    """Be one of these processes, but for the first, which is the worker."""
    import signal

    from rnnq import follower

    for number in processes.HEARD:
        signal.signal(number, signal.SIG_IGN)  # the first one says when to leave
    device = places.prepared()
    with places.ranks(device) as ranks:
        assert ranks is not None
        follower.follow(ranks, device, defs, places.compile)
    return 0


def _words_without(option: str) -> list[str]:
    words = sys.argv[sys.argv.index("worker") + 1 :]
    while (at := _place_of(option, words)) is not None:
        words = words[:at] + words[at + (1 if "=" in words[at] else 2) :]
    return words


def _place_of(option: str, words: list[str]) -> int | None:
    return next((i for i, word in enumerate(words) if word.split("=")[0] == option), None)


def _stop(db: str, wanted: str, wish: str) -> None:
    from rnnq import db as database
    from rnnq import queue
    from rnnq import status as overview

    engine = database.open(db)
    live = [str(row["worker"]) for row in overview.workers(engine) if row["state"] in ("live", "silent")]
    live = list(dict.fromkeys(live))
    chosen = live if wanted == "all" else [one for one in live if one == wanted]
    chosen = chosen or [one for one in live if one.startswith(wanted)]
    if wanted == "all" and not live:
        output.remark("no worker is live")
        return
    if not chosen:
        raise InputError(f"there is no live worker {wanted}", nearest(wanted, live) if live else "see `rnnq workers`")
    if len(chosen) > 1 and wanted != "all":
        raise InputError(f"--stop {wanted} begins the names of {len(chosen)} workers: {', '.join(chosen)}", "say more")
    asked = [one for one in chosen if queue.ask_to_leave(engine, one, wish)]
    beat = database.study(engine)[1] / 4
    how = "after its run" if wish == "drain" else f"its run is given back within about {beat:g} s"
    for one in asked:
        output.remark(f"asked {one} to leave: {how}")
    output.remark(f"asked {output.count(len(asked), 'worker')}")


def parse_every(text: str) -> tuple[float | None, int | None]:
    """Seconds between checkpoints ("60s"), or steps ("1000"), as train.Every has them. Raises InputError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s?)", text.strip())
    if found is None or float(found[1]) <= 0 or (not found[2] and "." in found[1]):
        raise InputError(f"--checkpoint-every {text}: neither seconds nor steps", "60s, or 1000 for steps")
    if found[2]:
        return float(found[1]), None
    return None, int(found[1])


def parse_pack(text: str) -> int | None:
    """auto is None, off is 1. Raises InputError."""
    wanted = text.strip().lower()
    if wanted == "auto":
        return None
    if wanted == "off":
        return 1
    if not wanted.isdigit() or not 1 <= int(wanted) <= 1024:
        raise InputError(f"--pack {text}: neither auto, nor off, nor a number from 1 to 1024", "--pack auto")
    return int(wanted)


class Display:
    """What a worker shows: a progress bar on a terminal, a line per event elsewhere. On stderr.

    Workers side by side on one terminal: one has the bar, the others print lines.
    """

    def __init__(self, bar: bool, says_cpu: bool, count: Callable[[], tuple[int, int]]) -> None:
        self.says_cpu, self.count = says_cpu, count
        self.said_away = -math.inf
        sys.stderr.flush()
        # our own way to the terminal: while a run is trained, the process's two streams lead to the run's log
        self.stream = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="backslashreplace")
        self.terminal = self.stream.isatty()
        self.bar = bar and self.terminal
        self.progress: Any = None
        self.task: Any = None
        self.steps: dict[int, int] = {}  # of the runs in the bar
        self.losses: dict[int, float] = {}

    def __enter__(self) -> Display:
        if self.bar:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.fields[runs]}"),
                TextColumn("{task.description}", markup=False),  # a label may hold brackets
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[loss]}"),
                TimeRemainingColumn(),
            )
            # redirecting would put the process's streams in the bar's place, and a run's log has them
            self.progress = Progress(
                *columns,
                console=Console(file=self.stream),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the terminal may have gone
            if self.progress is not None:
                self.progress.stop()
            self.stream.close()

    def line(self, text: str) -> None:
        """A line above the bar; on a terminal it first clears the line on which another worker's bar may stand."""
        text = output.harmless(text)
        if self.progress is not None:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self.stream.write(("\r\x1b[2K" if self.terminal else "") + text + "\n")
            self.stream.flush()

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

    def _packed(self, details: Mapping[str, Any]) -> None:
        """A pack begins: one bar, for the steps of all its runs together."""
        claims, members = details["claims"], details["members"]
        self.steps = {claim.run: member.step for claim, member in zip(claims, members, strict=True)}
        self.losses = {}
        if self.progress is None:
            return
        if self.task is not None:
            self.progress.remove_task(self.task)
        left, total = self.count()
        first, n = claims[0], len(claims)
        runs = members_words([{"run": claim.run} for claim in claims])
        who = f"run {runs}" if n == 1 else f"pack of {n}: runs {runs},"
        begun = {"completed": sum(self.steps.values()), "loss": "", "runs": f"{total - left}/{total} runs"}
        budget = sum(claim.budget or 0 for claim in claims) or None
        self.task = self.progress.add_task(f"{who} {first.stage}: {first.label}", total=budget, **begun)

    def _trying(self, details: Mapping[str, Any]) -> None:
        self.line(details["message"])

    def _scattered(self, details: Mapping[str, Any]) -> None:
        runs = ", ".join(str(claim.run) for claim in details["claims"])
        self.line(f"{details['message'].splitlines()[0]}; runs {runs} are given back")

    def _recorded(self, details: Mapping[str, Any]) -> None:
        if self.progress is None or self.task is None:
            return
        run = details["claim"].run
        self.steps[run] = details["step"]
        loss = next((value for name, _, value in reversed(details["points"]) if name == "loss"), None)
        if loss is not None:
            self.losses[run] = loss
        shown = f"loss {min(self.losses.values()):.3f}" if self.losses else ""
        self.progress.update(self.task, completed=sum(self.steps.values()), loss=shown)

    _saved = _recorded

    def _ended(self, details: Mapping[str, Any], text: str) -> None:
        claim = details["claim"]
        self.line(f"run {claim.run} {claim.stage}: {claim.label}: {text}")

    def _done(self, details: Mapping[str, Any]) -> None:
        self.steps[details["claim"].run] = details["step"]
        loss = "" if details["loss"] is None else f"loss {details['loss']:.4f} "
        self._ended(details, f"done, {loss}after {details['step']:,} steps, {details['seconds']:.1f} s")

    def _failed(self, details: Mapping[str, Any]) -> None:
        message = details["message"].splitlines()[0] if details["message"] else ""
        self._ended(
            details, f"FAILED ({details['cause']}): {message}; `rnnq show {details['claim'].run}` has the trace"
        )

    def _released(self, details: Mapping[str, Any]) -> None:
        self._ended(details, f"given back at step {details['step']:,}")

    def _delayed(self, details: Mapping[str, Any]) -> None:
        message = details["message"].splitlines()[0] if details["message"] else ""
        self._ended(details, f"failed ({details['cause']}), to be tried again: {message}")

    def _away(self, details: Mapping[str, Any]) -> None:
        if time.monotonic() - self.said_away > 10.0:
            self.said_away = time.monotonic()
            self.line(f"the database does not answer; {details['waiting']:,} points wait in memory")

    def _cancelled(self, details: Mapping[str, Any]) -> None:
        self._ended(details, f"cancelled at step {details['step']:,}")

    def _unfit(self, details: Mapping[str, Any]) -> None:
        stage = details["claim"].stage
        self.line(f"stage {stage} cannot be trained here, and is left to others: {details['message'].splitlines()[0]}")

    def _lost(self, details: Mapping[str, Any]) -> None:
        self._ended(details, f"lost: {details['message']}")

    def _inherited(self, details: Mapping[str, Any]) -> None:
        claim = details["claim"]
        self.line(f"run {claim.run} {claim.label}: starts from run {details['parent']} at step {details['step']:,}")

    def _decided(self, details: Mapping[str, Any]) -> None:
        n = len(details["runs"])
        runs = f"{n} run{'s' if n != 1 else ''} of {details['stage']}"
        what = f"{runs} may go on" if details["decision"] == "open" else f"{runs} skipped"
        self.line(f"{what}: {details['reason']}")

    def _reaped(self, details: Mapping[str, Any]) -> None:
        self.line(f"run {details['run']}: taken back from {details['worker']}; {details['state']}")
