"""rnnq coordinates: whether a parametrisation lets training change as much in a wide model as in a narrow one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnnq.cli import output
from rnnq.cli.options import Format, Rows
from rnnq.errors import InputError

if TYPE_CHECKING:
    from rnnq.families.scaling.coordinates import Row, Slope
    from rnnq.figures.canvas import Save

SAVE = Path("figures/coordinates")


def coordinates(
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="FIELD=VALUE of all models, such as tie_embeddings=true; may be repeated."),
    ] = None,
    widths: Annotated[str, typer.Option("--widths", help="Values of hidden_size, with commas.")] = "16,32,64,128,256",
    steps: Annotated[int, typer.Option("--steps", min=1, max=10_000, help="Optimiser steps.")] = 10,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=1000, help="Models of each kind: seeds 0..N-1.")] = 3,
    save: Annotated[Path, typer.Option("--save", help="Where the figure and its CSV go.")] = SAVE,
    image: Annotated[
        list[str] | None, typer.Option("--image", help="png (default), svg, pdf; may be repeated, or with commas.")
    ] = None,
    format: Rows = Format.table,
) -> None:
    """Check of the family scaling whether what training changes depends on the width, under muP and without."""
    from rnnq.figures import canvas

    chosen = _widths(widths)
    formats = canvas.images(image or ["png"])
    import torch

    from rnnq import optimizer, plan, worker
    from rnnq.families.scaling import coordinates as checks
    from rnnq.families.scaling.config import ScalingConfig

    common, optimizers = checks.settings(plan.parse_changes(changes or (), ScalingConfig))
    if "seed" not in checks.compared(common):
        output.remark("tie_embeddings: the published study's rule knows no tied embedding, and is left out")
    draw = canvas.saver(save, formats)  # before the training: a folder that cannot be had is refused at once
    worker.prepare(torch.device("cpu"))
    with output.bars() as watch:
        rows = checks.check(optimizer.of, common, chosen, range(seeds), optimizers, None, steps, watch)
    found = checks.slopes(rows)
    _draw(rows, found, draw)
    shown = _table(found, steps)
    title = f"slopes over the width, log-log: logits at the start, then what {steps} steps change"
    columns = list(shown[0])
    output.rows(format, [_for_people(row) for row in shown] if format is Format.table else shown, columns, title)


def _widths(text: str) -> list[int]:
    """ "16,32" as numbers. Raises InputError."""
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and int(part) > 0)]
    if wrong:
        raise InputError([f"--widths {text}: {part!r} is no width" for part in wrong], "--widths 16,32,64")
    return [int(part) for part in parts]


def _draw(rows: list[Row], slopes: list[Slope], save: Save) -> None:
    from pandas import DataFrame

    from rnnq.figures import canvas
    from rnnq.figures import coordinates as figures

    with canvas.style():
        written = save(*figures.draw(DataFrame(rows), DataFrame(slopes)))
    for path in written:
        output.remark(f"wrote {path}")


def _table(slopes: list[Slope], steps: int) -> list[dict[str, Any]]:
    """A row for each optimiser and quantity, a column for each parametrisation; the logits also at the start."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for slope in slopes:
        at_start = slope.step == 0 and slope.quantity == "logits"
        if at_start or slope.step == steps:
            quantity = "start: logits" if at_start else slope.quantity
            row = found.setdefault((slope.optimizer, quantity), {"optimizer": slope.optimizer, "quantity": quantity})
            row[slope.parametrization] = slope.std if at_start else slope.change_std
    return list(found.values())


def _for_people(row: dict[str, Any]) -> dict[str, Any]:
    return {name: f"{round(x, 2) + 0.0:+.2f}" if isinstance(x, float) else x for name, x in row.items()}
