"""The house itself: imports go one way, the code is clean and typed, the documents are true, starting is quick."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

import rnnq
from rnnq import cli as command_line
from rnnq import db
from tests.conftest import ROOT

BIN = Path(sys.executable).parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "words", [("lint-imports",), ("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)], ids=" ".join
)
def test_the_house_is_in_order(words: tuple[str, ...]) -> None:
    done = run(str(BIN / words[0]), *words[1:])
    assert done.returncode == 0, done.stdout + done.stderr


def commands() -> list[tuple[str, typer.main.TyperCommand]]:  # type: ignore[name-defined]
    """Every command and its words: ("db check", ...)."""
    group = typer.main.get_command(command_line.app)
    found = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        children = getattr(command, "commands", None)
        found += [(f"{name} {sub}", c) for sub, c in children.items()] if children else [(name, command)]
    return found


def test_every_command_and_option_has_help_and_is_documented() -> None:
    reference = (ROOT / "docs" / "commands.md").read_text()
    for name, command in commands():
        assert command.help, name
        assert f"`rnnq {name}" in reference, f"docs/commands.md lacks rnnq {name}"
        for option in command.params:
            assert getattr(option, "help", None) or name == "show", f"rnnq {name}: {option.name} has no help"
            for flag in option.opts:
                if flag.startswith("--"):
                    assert flag in reference, f"docs/commands.md lacks {flag} of rnnq {name}"


def test_every_command_shows_an_example_that_its_parser_takes() -> None:
    for name, command in commands():
        said = re.fullmatch(r"Example: rnnq (.+)", command.epilog or "")
        assert said, f"rnnq {name} has no example: epilog={command.epilog!r}"
        words = shlex.split(said[1])
        own = name.split()
        assert words[: len(own)] == own, f"the example of rnnq {name} is one of another command"
        command.make_context(name, words[len(own) :])  # raises for options that do not exist, and for bad values


def test_help_shows_the_examples_and_every_command_under_a_head() -> None:
    for name in ("sample", "db check"):
        shown = subprocess.run([BIN / "rnnq", *name.split(), "--help"], capture_output=True, text=True).stdout
        assert f"Example: rnnq {name}" in shown
    shown = subprocess.run([BIN / "rnnq", "--help"], capture_output=True, text=True).stdout
    heads = re.findall(r"^╭─ (\w+)", shown, re.M)
    assert heads == ["Options", *command_line.PANELS], "a command is under no head of rnnq/cli/__init__.py: PANELS"
    assert max(map(len, shown.splitlines())) <= 80


def test_the_program_says_its_version() -> None:
    done = subprocess.run([BIN / "rnnq", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"rnnq {rnnq.__version__}\n")


def test_every_command_that_a_document_shows_exists() -> None:
    known = {name for name, _ in commands()} | {"db"}
    for document in DOCUMENTS:
        for line in re.findall(r"^\s*(?:\$ )?rnnq ([a-z]+(?: [a-z]+)?)", document.read_text(), re.M):
            words = line.split()
            assert words[0] in known or " ".join(words[:2]) in known, f"{document.name}: rnnq {line}"


def test_every_link_in_the_documents_leads_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_export_is_there_and_documented() -> None:
    documents = "".join(document.read_text() for document in DOCUMENTS)
    for name in rnnq.__all__:
        assert getattr(rnnq, name) is not None
        assert name.startswith("__") or f"rnnq.{name}" in documents, f"no document mentions rnnq.{name}"


def test_every_public_function_and_class_says_what_it_is() -> None:
    silent = []
    for path in sorted((ROOT / "rnnq").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name == "rnnq.__main__":
            continue
        module = importlib.import_module(name)
        assert module.__doc__, name
        for public, value in vars(module).items():
            ours = getattr(value, "__module__", None) == name
            if ours and not public.startswith("_") and callable(value) and not value.__doc__:
                silent.append(f"{name}.{public}")
    assert not silent


def imported_by(*words: str, folder: Path) -> set[str]:
    """The modules that a command has loaded when it ends."""
    program = (
        "import sys, runpy\n"
        f"sys.argv = ['rnnq', *{list(words)!r}]\n"
        "try: runpy.run_module('rnnq', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('LOADED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    return set(done.stdout.rpartition("LOADED")[2].split())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the 432 runs of the seed."""
    folder = tmp_path_factory.mktemp("study")
    done = subprocess.run(
        [sys.executable, "-m", "rnnq", "init", str(ROOT / "defs" / "stage1.py")], cwd=folder, capture_output=True
    )
    assert done.returncode == 0
    return folder


@pytest.mark.parametrize(
    ("words", "never"),
    [
        (("--help",), {"torch", "pandas", "matplotlib", "sqlalchemy", "pydantic"}),
        (("status",), {"torch", "pandas", "matplotlib", "pydantic", "rnnq.tables", "numpy"}),
        (("ls",), {"torch", "pandas", "matplotlib"}),
        (("init", str(ROOT / "defs" / "stage1.py")), {"torch", "pandas", "matplotlib"}),
        (("worker", "--dry-run"), {"torch", "pandas", "matplotlib", "numpy"}),
        (("worker", "--checkpoint-every", "often"), {"torch", "sqlalchemy"}),
        (("worker", "--job-id", "999", "--total-jobs", "1000"), {"torch"}),  # an empty slice
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_command_loads_only_what_it_needs(study: Path, words: tuple[str, ...], never: set[str]) -> None:
    loaded = imported_by(*words, folder=study)
    assert "rnnq.cli" in loaded
    assert not loaded & never


@pytest.mark.parametrize("words", [(), ("--nproc", "2")], ids=" ".join)
def test_a_worker_that_finds_nothing_to_do_does_not_load_torch(tmp_path: Path, words: tuple[str, ...]) -> None:
    db.upgrade(str(tmp_path / "experiments.db"))
    assert "torch" not in imported_by("worker", *words, folder=tmp_path)


def seconds(*words: str, folder: Path) -> float:
    # as on a user's machine, where what was compiled once is kept
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, check=True, env=environment)
    return time.perf_counter() - began


def test_help_and_status_answer_at_once(study: Path) -> None:
    """Within 1.6 times the time of importing what they are made of; the best of several, taken in turn."""
    baseline, shown, helped = [], [], []
    for _ in range(6):
        baseline.append(seconds("-c", "import typer, rich, sqlalchemy", folder=study))
        shown.append(seconds("-m", "rnnq", "status", folder=study))
        helped.append(seconds("-m", "rnnq", "--help", folder=study))
    assert min(shown) < 1.6 * min(baseline)
    assert min(helped) < 1.6 * min(baseline)


@pytest.mark.parametrize("format", ["table", "json", "csv"])
def test_a_reader_that_has_seen_enough_is_no_error(study: Path, format: str) -> None:
    words = [sys.executable, "-m", "rnnq", "ls", "--format", format]
    with subprocess.Popen(words, cwd=study, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as shown:
        assert shown.stdout is not None
        assert shown.stderr is not None
        assert shown.stdout.readline()
        shown.stdout.close()  # as `head -1` does
        said = shown.stderr.read()
        assert shown.wait() == 0, said
    assert "Traceback" not in said
    assert "Broken" not in said


def test_the_seeds_study_has_432_runs_and_the_second_init_adds_none(study: Path) -> None:
    words = [sys.executable, "-m", "rnnq", "init", str(ROOT / "defs" / "stage1.py"), "--format", "json"]
    again = subprocess.run(words, cwd=study, capture_output=True, text=True)
    assert '"added": 0' in again.stdout
    assert '"present": 432' in again.stdout


def test_no_file_says_utils() -> None:
    assert not [path for path in (ROOT / "rnnq").rglob("*.py") if re.search("util|common|helper|misc", path.name)]
