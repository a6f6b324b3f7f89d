"""rnnq sample: text from a checkpoint."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnnq.cli import output
from rnnq.cli.options import DB, DEFS, Db, Defs, Device, Format, Rows, RunId
from rnnq.errors import InputError

if TYPE_CHECKING:
    from rnnq.sample import Sampled


class Which(StrEnum):
    """Which of a run's checkpoints."""

    best = "best"
    last = "last"


def sample(
    run: RunId,
    prompt: Annotated[str, typer.Option("--prompt", help="What it goes on from; may be empty.")] = "",
    length: Annotated[
        int, typer.Option("--length", help="How many tokens to write: bytes, unless the config says otherwise.")
    ] = 500,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 takes the likeliest token each time; 1 draws as it was trained.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed draws the same text.")] = 0,
    which: Annotated[
        Which | None,
        typer.Option("--checkpoint", help="Which checkpoint; default: the best where one is kept, else the last."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write what was drawn, byte for byte, to a file.")] = None,
    device: Device = "cpu",
    db: Db = DB,
    defs: Defs = DEFS,
    format: Rows = Format.table,
) -> None:
    """Text that the net of a run writes; also of a run that is still in training."""
    from rnnq import db as database
    from rnnq import sample as drawing
    from rnnq import worker

    if out is not None:
        _refuse_place(out)
    engine = database.open(db)
    chosen = worker.pick_device(None, device)
    worker.prepare(chosen)
    request = drawing.Request(prompt, length, temperature, seed, which)
    found = drawing.sample(engine, run, request, chosen, defs)
    for line in found.remarks:
        output.remark(line)
    if out is not None:
        _write(out, found.written)
    _show(found, prompt, format, out)


def _refuse_place(out: Path) -> None:
    """Now: a long text takes minutes to draw."""
    if out.is_dir():
        raise InputError(f"--out {out}: it is a folder", "name a file in it")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}", "make it first")


def _write(out: Path, written: bytes | str) -> None:
    raw = written if isinstance(written, bytes) else written.encode("utf-8", "replace")
    try:
        out.write_bytes(raw)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from error
    output.remark(f"wrote {output.count(len(raw), 'byte')} to {out}")


def _show(found: Sampled, prompt: str, format: Format, out: Path | None) -> None:
    from rnnq.queue import clean_text

    raw = prompt.encode("utf-8", "surrogateescape")
    start, text = _text(raw), _text(found.written)
    where: dict[str, Any] = {"run": found.run, "stage": found.stage, "label": found.label}
    where |= {"checkpoint": found.checkpoint, "step": found.step}
    if format is Format.json:
        output.as_json({**where, "metrics": found.metrics, "prompt": start, "text": text})
    elif format is Format.csv:
        shown = {"prompt": clean_text(start), "text": clean_text(text)}
        output.rows(format, [{**where, **shown}], [*where, *shown])
    else:
        output.remark(
            f"run {found.run} {found.stage}: {found.label}; {found.checkpoint} checkpoint, step {found.step:,}"
        )
        output.remark("  " + ", ".join(f"{name} {output.cell(value)}" for name, value in found.metrics.items()))
        if out is None:
            whole = raw + found.written if isinstance(found.written, bytes) else start + found.written
            output.say(clean_text(_text(whole)))


def _text(written: bytes | str) -> str:
    return written.decode("utf-8", "replace") if isinstance(written, bytes) else written
