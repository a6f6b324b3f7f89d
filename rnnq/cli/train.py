"""rnnq train: one config, without a queue."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from rnnq import processes
from rnnq.cli import output
from rnnq.cli.options import Device, Format, Rows
from rnnq.errors import InputError

if TYPE_CHECKING:
    import torch

    from rnnq.single import Desk, Result, Subject, Training

SHOW_EVERY = 0.1  # seconds between two movements of the bar
OUT = Path("runs")


def train(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="A config in YAML.")] = None,
    family: Annotated[
        str | None, typer.Option("--family", help="Its family, where CONFIG does not say; alone: its defaults.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE: change a field; may be repeated.")
    ] = None,
    gpu: Annotated[int | None, typer.Option("--gpu", min=0, help="Train on this GPU.")] = None,
    device: Device = "auto",
    out: Annotated[Path, typer.Option("--out", help="Where the run's folder is made.")] = OUT,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the interrupted training in this folder.")
    ] = None,
    checkpoint_every: Annotated[
        str, typer.Option("--checkpoint-every", envvar="RNNQ_CHECKPOINT_EVERY", help="Seconds (60s) or steps (1000).")
    ] = "60s",
    figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Draw figures at the end.")] = True,
    image: Annotated[
        list[str] | None, typer.Option("--image", help="png (default), svg, pdf; may be repeated, or with commas.")
    ] = None,
    format: Rows = Format.table,
) -> None:
    """Train one config without a queue, into a folder of its own. Ctrl-C leaves a checkpoint to go on from."""
    from rnnq.cli.work import parse_every

    if gpu is not None and device != "auto":
        raise InputError(f"--gpu {gpu} and --device {device} exclude each other")
    if resume is not None and (config or family or changes):
        raise InputError(f"--resume {resume} goes on with the config in that folder; give nothing else")
    if resume is None and config is None and family is None:
        raise InputError("there is nothing to train", "rnnq train CONFIG, or rnnq train --family NAME")
    if image:
        from rnnq.figures import canvas

        canvas.images(image)  # refused before the training, not after it
    every = parse_every(checkpoint_every)
    from rnnq import single
    from rnnq.train import Every

    training = single.go_on(resume) if resume is not None else None
    subject = training.subject if training else single.read(config, family, changes or ())
    chosen = _device(subject, gpu, device)
    training = training or single.begin(subject, out)
    if training.state is not None:
        again = single.difference(training, chosen)
        output.remark(f"goes on at step {training.state['step']:,}" + (f"; {again}" if again else ""))
    with _progress() as progress:
        desk = single.Desk(training, chosen, progress)
        with _stoppable(desk), _told_where(training):
            result = single.run(training, chosen, Every(*every), desk)
    _end(training, result, image or ["png"], figures, format)


def _device(subject: Subject, gpu: int | None, device: str) -> torch.device:
    """The device of the options, else the config's; one that is not here is none to insist on."""
    from rnnq import single, worker

    wished = single.wished_device(subject)
    if gpu is None and device == "auto" and wished is not None:
        try:
            chosen = worker.pick_device(None, wished)
        except InputError as error:
            chosen = worker.pick_device(None, "auto")
            output.remark(f"the config's device {wished} is not here ({error.message}): trained on {chosen}")
    else:
        chosen = worker.pick_device(gpu, device)
    worker.prepare(chosen)
    return chosen


@contextmanager
def _progress() -> Iterator[Callable[[int, int | None], None]]:
    shown = 0.0
    with output.bars() as watch:

        def progress(step: int, budget: int | None) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown > SHOW_EVERY:
                shown = now
                watch("training", step, budget or 0)

        yield progress


@contextmanager
def _stoppable(desk: Desk) -> Iterator[None]:
    """The first signal, or SLURM's warning, ends the training after its step; a second one ends the program at once."""
    asked = processes.Asked()

    def stop(number: int, _frame: FrameType | None) -> None:
        if asked.is_at_once(number):
            raise KeyboardInterrupt
        desk.stop = True

    before = {number: signal.signal(number, stop) for number in processes.HEARD}
    try:
        yield
    finally:
        processes.restore(before, desk.stop)


@contextmanager
def _told_where(training: Training) -> Iterator[None]:
    """Say of a training that fails where the rest of it is."""
    try:
        yield
    except Exception:
        output.remark(f"{training.folder} has what was measured until then")
        raise


def _end(training: Training, result: Result, image: list[str], figures: bool, format: Format) -> None:
    from rnnq import single

    place = str(result.folder)
    if result.finished and figures:
        single.draw(result, training.subject, image)
    primary = training.subject.config.primary().name
    row = {
        "folder": place,
        "finished": result.finished,
        "step": result.step,
        primary: result.summary.get(primary),
        "time": output.duration(result.seconds) if format is Format.table else round(result.seconds, 3),
    }
    output.rows(format, [row], list(row))
    if result.finished:
        return
    if result.can_go_on:
        output.remark(f"interrupted at step {result.step:,}; `rnnq train --resume {place}` goes on")
    else:
        output.remark(f"interrupted at step {result.step:,}; the family keeps no checkpoint: it cannot go on")
    raise typer.Exit(130)
