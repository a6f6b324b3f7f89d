"""A definition in Python is executed: as a fresh module, beside its helpers, and without a trace in the process."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from rnnq.errors import InputError
from rnnq.sweep import last_line, whole_trace

_counter = itertools.count(1)
_helpers: dict[str, Path] = {}  # modules that a definition imported from beside itself, and the folder of each


def execute(path: Path, content: bytes) -> ModuleType:
    """Run the bytes of a definition as a fresh module. Raises InputError with the line that raised."""
    real = path.resolve()
    name = f"rnnq_definition_{next(_counter)}_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}"
    code = _compiled(path, real, content)
    spec = importlib.util.spec_from_file_location(name, real)
    if spec is None:
        raise InputError(f"{path} is not a definition", "a definition is a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # while it runs too: dataclasses and pydantic look their module up
    try:
        # what a definition prints must not stand between the rows of --format json
        with _importable(real.parent), contextlib.redirect_stdout(sys.stderr):
            exec(code, module.__dict__)
    except BaseException as error:
        sys.modules.pop(name, None)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _raised(path, real, error) from error
    return module


def _compiled(path: Path, real: Path, content: bytes) -> Any:
    try:
        # dont_inherit: the __future__ imports of this module are not the definition's
        return compile(content, str(real), "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        text = getattr(error, "msg", None) or str(error)
        shown = "".join(traceback.format_exception_only(error)).rstrip()
        raise InputError(f"{path}:{line or 1}: {type(error).__name__}: {text}", shown) from error


def _raised(path: Path, real: Path, error: BaseException) -> InputError:
    """The error of a definition that raised: the line of the file that led to it, and the trace from there on."""
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename != str(real):
        trace = trace.tb_next
    lines = [line for frame, line in traceback.walk_tb(trace) if frame.f_code.co_filename == str(real)]
    place = f"{path}:{lines[-1]}" if lines else str(path)
    if isinstance(error, InputError):
        return InputError([f"{place}: {problem}" for problem in error.problems], error.hint)
    return InputError(f"{place}: {last_line(error)}", whole_trace(error, trace))


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a definition import what lies beside it, and leave no trace in sys.path nor in the folder."""
    _forget_helpers(folder)
    path, writes_nothing, known = sys.path[:], sys.dont_write_bytecode, set(sys.modules)
    sys.path_importer_cache.pop(str(folder), None)  # it may list the folder as it was a moment ago
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path[:] = path
        sys.dont_write_bytecode = writes_nothing
        if str(folder) not in path:
            fresh = [name for name in sys.modules if name not in known and "." not in name]
            _helpers.update({name: folder for name in fresh if _lies_in(sys.modules[name], folder)})


def _forget_helpers(folder: Path) -> None:
    """Drop the helpers of other folders: two studies may each have a `common.py`, and must not share one."""
    old = {name for name, home in _helpers.items() if home != folder}
    for name in [name for name in sys.modules if name.partition(".")[0] in old]:
        del sys.modules[name]
    for name in old:
        del _helpers[name]


def _lies_in(module: Any, folder: Path) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(place is not None and Path(place).parent == folder for place in places)
