"""What the benchmarks rest on: the nets that they measure are trained rightly, and what they count does not drift."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKS = Path(__file__).parent.parent / "benchmarks" / "packs.py"
GROUPS = PACKS.with_name("groups.py")
SCALING = PACKS.with_name("scaling.py")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PACKS), *words], capture_output=True, text=True, timeout=120)


def test_the_gradients_of_the_benchmarked_nets_are_those_of_autograd() -> None:
    done = run("--check")
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_a_pack_of_eight_dispatches_an_eighth_of_the_operations_for_each_member() -> None:
    """At most a tenth more; the optimiser's calls aside, of which each member has its own."""
    done = run("ops", "dynamics-32", "dynamics-32-gates", "plain", "quadratic")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "/K" in line]
    assert len(rows) == 8
    assert not [line for line in rows if "MISSED" in line]


def test_the_ordinary_script_and_the_family_groups_follow_one_curve_from_one_start() -> None:
    done = subprocess.run([sys.executable, str(GROUPS), "--check"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (0, ""), done.stdout


def test_the_ordinary_script_and_the_family_scaling_follow_one_curve_from_one_start() -> None:
    done = subprocess.run([sys.executable, str(SCALING), "--check"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (0, ""), done.stdout


def test_the_family_scaling_and_its_ordinary_script_are_measured_side_by_side() -> None:
    """At width 4 and 256 tokens of vocabulary, where neither is quick: that both are measured is all that counts."""
    words = [sys.executable, str(SCALING), "1", "4", "bytes", "0.1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ordinary, family = (line for line in done.stdout.splitlines() if "micro-batch  " in line)
    assert "1.00 times as fast" in ordinary
    assert family.startswith("rnnq")
