"""The command line. A command parses, calls and prints; what it does lives below.

Data goes to stdout, the rest to stderr. Exit codes: 0 done, 1 the world's fault or a run that failed, 2 the user's
input, 130 interrupted.
"""

from __future__ import annotations

import os
import sys

import typer

from rnnq.cli import database, define, look, refine, work
from rnnq.errors import RnnqError

app = typer.Typer(
    name="rnnq",
    help="A database-backed, resumable queue for training studies of recurrent networks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init")(define.init)
app.command("worker")(work.worker)
app.command("status")(look.status)
app.command("ls")(look.ls)
app.command("show")(look.show)
app.command("examine")(refine.examine)
app.command("promote")(refine.promote)
app.add_typer(database.app, name="db")


def main() -> None:
    """Run the command line; the only place that prints an error of ours."""
    sys.exit(_run())


def _run() -> int:
    try:
        code = int(typer.main.get_command(app)(standalone_mode=False) or 0)
        sys.stdout.flush()  # here, where a reader that has gone is no error
        return code
    except RnnqError as error:
        return _say(error.message, error.hint, error.exit_code)
    except BrokenPipeError:
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


def _say(message: str, hint: str | None, code: int) -> int:
    """error: what happened; hint: what to do. Several lines are set below, so that carets stay under their place."""
    lines = message.splitlines() or [""]
    if len(lines) > 1:
        what = "the filter cannot be used" if lines[0].startswith("filter:") else f"{len(lines)} problems"
        sys.stderr.write(f"error: {what}\n" + "".join(f"  {line}\n" for line in lines))
    else:
        sys.stderr.write(f"error: {lines[0]}\n")
    if hint:
        sys.stderr.write(f"hint: {hint}\n")
    return code
