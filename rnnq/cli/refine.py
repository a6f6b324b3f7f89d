"""rnnq examine, promote: what came of a stage, and what comes next."""

from __future__ import annotations


def examine() -> None:
    """x"""


def promote() -> None:
    """x"""
