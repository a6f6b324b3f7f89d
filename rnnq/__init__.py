"""rnnq: a database-backed, resumable queue for training studies of recurrent networks.

What a definition file needs is here. Everything is loaded on first use: `import rnnq` alone is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> module that has it (and its name there, when that differs)
_EXPORTS = {
    "Adam": "rnnq.families.base",
    "PerNeuron": "rnnq.families.base",
    "Config": "rnnq.config",
    "Family": "rnnq.families.base",
    "Group": "rnnq.families.base",
    "Metric": "rnnq.config",
    "SGD": "rnnq.families.base",
    "State": "rnnq.families.base",
    "best": "rnnq.sweep",
    "configs": "rnnq.sweep",
    "family": "rnnq.families.base",
    "grid": "rnnq.sweep",
    "last": "rnnq.sweep",
    "load": "rnnq.study",
    "question": "rnnq.questions",
    "runs_of": "rnnq.sweep",
    "stage": "rnnq.sweep",
    "union": "rnnq.sweep",
    "zip": "rnnq.sweep",
}

__all__ = sorted([*_EXPORTS, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'rnnq' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
