"""The command line. A command parses, calls and prints; what it does lives below.

Data goes to stdout, the rest to stderr. Exit codes: 0 done, 1 the world's fault or a run that failed, 2 the user's
input, 130 interrupted.
"""

from __future__ import annotations

import copy
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from rnnq import __version__
from rnnq.cli import (
    compare,
    coordinates,
    database,
    define,
    doctor,
    examine,
    exchange,
    gc,
    logs,
    look,
    output,
    plan,
    refine,
    sample,
    status,
    steer,
    train,
    verify,
    work,
)
from rnnq.errors import RnnqError

app = typer.Typer(
    name="rnnq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init", epilog="Example: rnnq init defs/stage1.py --dry-run")(define.init)
app.command("worker", epilog="Example: rnnq worker --gpu 0 --stage stage1")(work.worker)
app.command("train", epilog="Example: rnnq train configs/base.yaml --set model.hidden_dim=64 --gpu 0")(train.train)
app.command("status", epilog="Example: rnnq status --watch --until-done")(status.status)
app.command("workers", epilog="Example: rnnq workers --all --format json")(status.workers)
app.command("ls", epilog='Example: rnnq ls --filter "state=done and loss<1.9"')(look.ls)
app.command("show", epilog="Example: rnnq show 12")(look.show)
app.command("logs", epilog="Example: rnnq logs 12 --follow")(logs.logs)
app.command("plan", epilog="Example: rnnq plan --dry-run defs/stage1.py")(plan.plan)
app.command("examine", epilog='Example: rnnq examine --filter "loss<1.9" --by val_loss --groups')(examine.examine)
app.command("promote", epilog="Example: rnnq promote --stage stage1 --top 10% --dry-run")(refine.promote)
app.command("stages", epilog="Example: rnnq stages")(compare.stages)
app.command("diff", epilog="Example: rnnq diff 3 12")(compare.diff)
app.command("sample", epilog='Example: rnnq sample 12 --prompt "def " --length 300 --temperature 0.7')(sample.sample)
app.command("verify-resume", epilog="Example: rnnq verify-resume defs/stage1.py --times 5")(verify.verify_resume)
app.command("coordinates", epilog="Example: rnnq coordinates --widths 16,64,256 --set tie_embeddings=true")(
    coordinates.coordinates
)
app.command("retry", epilog="Example: rnnq retry --filter \"cause = 'oom'\" --set batch_size=128")(steer.retry)
app.command("cancel", epilog='Example: rnnq cancel --filter "lr>0.01"')(steer.cancel)
app.command("pause", epilog="Example: rnnq pause stage1")(steer.pause)
app.command("resume", epilog="Example: rnnq resume stage1")(steer.resume)
app.command("priority", epilog='Example: rnnq priority 5 --filter "n_layers = 1"')(steer.priority)
app.command("extend", epilog="Example: rnnq extend --steps +5000 12 13")(steer.extend)
app.command("note", epilog='Example: rnnq note 12 "spikes at step 3,000"')(steer.note)
app.command("tag", epilog='Example: rnnq tag good --filter "loss<1.9"')(steer.tag)
app.command("rename", epilog="Example: rnnq rename stage1 first-look")(steer.rename)
app.command("delete", epilog="Example: rnnq delete stage1 --dry-run")(steer.delete)
app.command("gc", epilog="Example: rnnq gc --dry-run")(gc.gc)
app.command("export", epilog="Example: rnnq export groups --stage stage1 --out groups.csv")(exchange.export)
app.command("import", epilog="Example: rnnq import results.csv --stage theirs --family dynamics --loss loss")(
    exchange.import_
)
app.command("doctor", epilog="Example: rnnq doctor --deep")(doctor.doctor)
app.add_typer(database.app, name="db", rich_help_panel="Data")

PANELS = {  # under which head `rnnq --help` shows a command
    "Make": ("init",),
    "Train": ("worker", "workers", "train", "verify-resume", "coordinates"),
    "Look": ("status", "plan", "ls", "show", "logs", "stages", "diff", "sample"),
    "Refine": ("examine", "promote"),
    "Steer": ("retry", "cancel", "pause", "resume", "priority", "extend", "note", "tag", "rename", "delete"),
    "Data": ("export", "import", "gc", "doctor"),
}
for _panel, _names in PANELS.items():
    for _command in app.registered_commands:
        if _command.name in _names:
            _command.rich_help_panel = _panel


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"rnnq {__version__}\n")
        raise typer.Exit


@app.callback()
def _rnnq(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """A database-backed, resumable queue for training studies of recurrent networks."""


def main() -> None:
    """Run the command line; the only place that prints an error of ours."""
    sys.exit(_run())


class _ReaderGone(Exception):
    """Nobody reads our output any more, as `head` does once it has seen enough: no error."""


class _Out(io.TextIOWrapper):
    """Standard output. Of a broken pipe it says so in our own words: those of the system end the option parser."""

    def write(self, words: str) -> int:
        """As ever. Raises _ReaderGone."""
        try:
            return super().write(words)
        except BrokenPipeError as error:
            raise _ReaderGone from error

    def flush(self) -> None:
        """As ever. Raises _ReaderGone."""
        try:
            super().flush()
        except BrokenPipeError as error:
            raise _ReaderGone from error


def _run() -> int:
    if sys.stdout is None or sys.stderr is None:  # closed by who started us
        nothing = open(os.devnull, "w")  # noqa: SIM115, PTH123
        sys.stdout, sys.stderr = sys.stdout or nothing, sys.stderr or nothing
    if type(sys.stdout) is io.TextIOWrapper:
        kept = (sys.stdout.encoding, sys.stdout.errors, None, sys.stdout.line_buffering, sys.stdout.write_through)
        sys.stdout = _Out(sys.stdout.detach(), *kept)
    try:
        code = int(typer.main.get_command(_asked(_words()))(standalone_mode=False) or 0)
        sys.stdout.flush()  # here, where a reader that has gone is no error
        return code
    except RnnqError as error:
        return _say(error.message, error.hint, error.exit_code)
    except (BrokenPipeError, _ReaderGone):
        # the reader has gone, as `head` does; keep the interpreter from complaining once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # it has printed the help
            return 2
        if hasattr(error, "format_message"):  # a usage error of the option parser
            where = getattr(getattr(error, "ctx", None), "command_path", "rnnq")
            return _say(error.format_message(), f"`{where} --help`", getattr(error, "exit_code", 2))
        if type(error).__name__ == "Abort":
            return 130
        raise


def _asked(words: Sequence[str]) -> typer.Typer:
    """The program with only the command that these words begin with, else whole: each parser takes 2 ms to build."""
    lean = copy.copy(app)
    lean.registered_commands = [command for command in app.registered_commands if command.name in words[:1]]
    lean.registered_groups = [group for group in app.registered_groups if group.name in words[:1]]
    return lean if lean.registered_commands or lean.registered_groups else app


def _words() -> list[str]:
    """What was typed after `rnnq`; when a shell asks what may come next, the words before that."""
    if "_RNNQ_COMPLETE" not in os.environ:
        return sys.argv[1:]
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    return f"{line}|".split()[1:-1]  # the last one is being typed: worker may become workers


def _say(message: str, hint: str | None, code: int) -> int:
    """error: what happened; hint: what to do. Several lines are set below, so that carets stay under their place."""
    lines = [output.harmless(line) for line in message.splitlines()] or [""]
    if len(lines) > 1:
        what = "the filter cannot be used" if lines[0].startswith("filter:") else f"{len(lines)} problems"
        sys.stderr.write(f"error: {what}\n" + "".join(f"  {line}\n" for line in lines))
    else:
        sys.stderr.write(f"error: {lines[0]}\n")
    if hint:
        sys.stderr.write(f"hint: {output.harmless(hint)}\n")
    return code
