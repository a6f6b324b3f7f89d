"""The coordinate check: under muP training changes as much in a wide model as in a narrow one, else it does not.

Nothing here is tuned by width: the rates are those of coordinates.RATES for all widths and parametrisations, the batch
is 8 streams of 32 bytes of the standard library, and slopes are of the standard deviation of what ten steps changed.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pandas import DataFrame

from rnnq import optimizer
from rnnq.errors import DataError, InputError
from rnnq.families.scaling import coordinates
from rnnq.families.scaling.coordinates import Row, Slope
from rnnq.figures import canvas
from rnnq.figures import coordinates as figures
from tests.conftest import Cli

FLAT = 0.1
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def last(changes: dict[str, Any], kinds: list[str], **options: Any) -> dict[tuple[str, str, str], Slope]:
    """The slopes after the last step, by optimiser, parametrisation and quantity."""
    common, optimizers = coordinates.settings(changes)
    rows = coordinates.check(optimizer.of, common, optimizers=optimizers, parametrizations=kinds, **options)
    found = coordinates.slopes(rows, [max(row.step for row in rows)])
    return {(slope.optimizer, slope.parametrization, slope.quantity): slope for slope in found}


def change(found: dict[tuple[str, str, str], Slope], *key: str) -> float:
    slope = found[key].change_std  # type: ignore[index]
    assert slope is not None
    return slope


def test_training_changes_the_logits_alike_at_three_widths_under_mup_and_more_in_wide_models_without() -> None:
    found = last({}, ["standard", "mup", "seed"], widths=(16, 48, 128), seeds=(0,))
    for name in ("adamw", "sgd"):
        assert abs(change(found, name, "mup", "logits")) <= FLAT
        # one seed alone; the slope is -0.6 where SGD's rate of the embedding does not grow with the width
        assert abs(change(found, name, "mup", "embedding")) <= 0.3
        assert change(found, name, "standard", "logits") > 0.4
        assert change(found, name, "seed", "logits") > 0.9


@SLOW
@pytest.mark.parametrize("norm", [True, False])
def test_with_a_read_out_of_zeros_every_change_is_the_same_at_all_widths(norm: bool) -> None:
    """Logits, layers and embedding, from 16 to 256, three seeds, AdamW, Adam and SGD."""
    for name in ("adamw", "adam", "sgd"):
        found = last({"use_layer_norm": norm, "optimizer": name}, ["mup"])
        assert len(found) == 4
        for key in found:
            assert abs(change(found, *key)) <= FLAT, key


@SLOW
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("readout", [{"readout_init": "random"}, {"tie_embeddings": True}], ids=["random", "tied"])
def test_with_a_random_read_out_the_logits_shrink_at_the_start_and_their_change_stays_bounded(
    readout: dict[str, Any], norm: bool
) -> None:
    for name in ("adamw", "sgd"):
        found = last(readout | {"use_layer_norm": norm, "optimizer": name}, ["mup"])
        assert -0.5 <= change(found, name, "mup", "logits") <= FLAT


@SLOW
@pytest.mark.parametrize("norm", [True, False])
def test_without_mup_wide_models_change_more_and_under_the_published_rule_most(norm: bool) -> None:
    found = last({"use_layer_norm": norm}, ["standard", "seed"])
    for name in ("adamw", "sgd"):
        assert change(found, name, "standard", "logits") > 0.4
        assert change(found, name, "seed", "logits") > 0.9


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("readout", [{"readout_init": "random"}, {"tie_embeddings": True}], ids=["random", "tied"])
def test_the_logits_of_a_random_read_out_fall_as_the_root_of_the_width_at_the_start(
    readout: dict[str, Any], norm: bool
) -> None:
    """A sum of h products with weights in proportion to 1/h, or to 1 and divided by m; ten seeds: 0.05."""
    common, _ = coordinates.settings(readout | {"use_layer_norm": norm})
    rows = coordinates.check(optimizer.of, common, (16, 64, 256), range(10), ("sgd",), ["mup"], steps=0)
    by_quantity = {slope.quantity: slope for slope in coordinates.slopes(rows)}
    assert by_quantity["logits"].std == pytest.approx(-0.5, abs=0.05)
    for name in ("embedding", "layer 1", "layer 2"):
        assert by_quantity[name].std == pytest.approx(0, abs=0.05)


def test_the_published_rules_logits_grow_as_the_root_of_the_width_at_the_start() -> None:
    """0.250, 0.500 and 1.000 at widths 16, 64 and 256, as measured of its code: the norm makes features of size 1."""
    common, _ = coordinates.settings({"mup_base_width": 16})
    rows = coordinates.check(optimizer.of, common, (16, 64, 256), range(4), ("sgd",), ["seed"], steps=0)
    sizes = coordinates.means((row.width, row.std) for row in rows if row.quantity == "logits")
    assert sizes == {
        16: pytest.approx(0.25, rel=0.04),
        64: pytest.approx(0.5, rel=0.04),
        256: pytest.approx(1, rel=0.04),
    }


def test_at_the_base_width_mup_with_a_random_read_out_is_the_standard_one_to_the_bit() -> None:
    common, _ = coordinates.settings({"readout_init": "random", "mup_base_width": 24})
    rows = coordinates.check(optimizer.of, common, (8, 24), (0,), parametrizations=["standard", "mup"], steps=3)
    for name in ("adamw", "sgd"):
        plain, mup = ([row[4:] for row in rows if row[:3] == (name, kind, 24)] for kind in ("standard", "mup"))
        assert plain == mup
        assert len(plain) == 4 * 4


def test_the_frozen_norms_of_the_published_rule_never_change() -> None:
    """A model whose only moving part would be its norms stays as it is."""
    common, _ = coordinates.settings({"layer_norm_position": "both"})
    config = coordinates._configs(common, [("sgd", "seed", 8, 0)], 1)[0]
    from rnnq.families.scaling import parametrization

    params = {n: p[None] for n, p in parametrization.draw(config, torch.Generator().manual_seed(0)).items()}
    start = {name: p.clone() for name, p in params.items()}
    updates = optimizer.of(params, [parametrization.spec(config)])
    updates.update([torch.ones_like(p) for p in params.values()], done=[0])
    assert {name for name, p in params.items() if torch.equal(p, start[name])} == {n for n in params if "norm" in n}


def test_a_slope_is_the_exponent_of_the_width_and_none_where_something_is_zero_or_infinite() -> None:
    def rows(power: float, seed: int, factor: float) -> list[Row]:
        return [Row("sgd", "mup", w, seed, 1, "logits", w**power * factor, 1, w**2.0, 1) for w in (4, 16, 32)]

    [found] = coordinates.slopes(rows(0.75, 0, 1) + rows(0.75, 1, 3))
    assert found.std == pytest.approx(0.75)
    assert found.change_std == pytest.approx(2.0)
    broken = rows(0.0, 0, 1)
    broken[1] = broken[1]._replace(std=0.0, change_std=math.inf)
    [found] = coordinates.slopes(broken)
    assert (found.std, found.change_std) == (None, None)


def test_what_the_check_decides_itself_and_what_it_does_not_read_is_refused() -> None:
    with pytest.raises(InputError) as refused:
        coordinates.settings({"hidden_dim": 8, "use_mup": True, "learning_rat": 1, "num_layers": 3})
    said = refused.value.message.splitlines()
    assert said == [
        "hidden_size has no place here: --widths",
        "use_mup has no place here: all three parametrisations are compared",
        "learning_rat is no field that the check reads",
    ]
    assert refused.value.hint == "did you mean learning_rate?"
    assert coordinates.settings({"lr": 0.5, "optimizer": "adam"})[1] == ("adam",)


def test_a_check_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    common, _ = coordinates.settings({})
    with pytest.raises(InputError, match="one width"):
        coordinates.check(optimizer.of, common, (16, 16))
    with pytest.raises(InputError, match="num_layers"):
        coordinates.check(optimizer.of, common | {"num_layers": 0}, (4, 8))
    corpus = tmp_path / "short"
    corpus.write_bytes(b"too short")
    with pytest.raises(DataError, match=r"the training text has 7 tokens; the batch of the check needs 264"):
        coordinates.check(optimizer.of, common | {"data_path": str(corpus)}, (4, 8))


# ----------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_slopes_and_draws_them_with_their_numbers_beside(cli: Cli, tmp_path: Path) -> None:
    words = ("coordinates", "--widths", "4,8", "--steps", "2", "--seeds", "2", "--save", str(tmp_path / "f"))
    done = cli(*words, "--format", "json")
    found = json.loads(done.stdout)
    assert [(row["optimizer"], row["quantity"]) for row in found] == [
        (name, what)
        for name in ("adamw", "sgd")
        for what in ("start: logits", "embedding", "layer 1", "layer 2", "logits")
    ]
    assert set(found[0]) == {"optimizer", "quantity", "standard", "mup", "seed"}
    assert found[0]["mup"] is None, "a read-out of zeros"
    assert found[0]["standard"] == found[5]["standard"], "the start is the same for all optimisers"
    assert all(isinstance(row[kind], float) for row in found[1:5] for kind in ("standard", "mup", "seed"))
    assert (tmp_path / "f" / "mup_coordinates.png").stat().st_size > 10_000
    with (tmp_path / "f" / "mup_coordinates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 2 * 2 * 2 * 4, "kinds, widths, seeds, the first and the last step, quantities"
    assert "nan" not in done.stdout.lower()


def test_tied_embeddings_many_layers_and_models_that_diverge_are_drawn_too(tmp_path: Path) -> None:
    changes = {"tie_embeddings": True, "optimizer": "sgd", "lr": 1000, "weight_decay": 1e9, "num_layers": 6}
    common, optimizers = coordinates.settings(changes)
    assert coordinates.compared(common) == ("standard", "mup"), "the published rule knows no tied embedding"
    rows = coordinates.check(optimizer.of, common, (4, 8), (0,), optimizers, steps=4)
    slopes = coordinates.slopes(rows)
    assert [slope.std for slope in slopes if slope.quantity == "logits"][-1] is None
    with canvas.style():
        canvas.saver(tmp_path, ("svg",))(*figures.draw(DataFrame(rows), DataFrame(slopes)))
    drawn = (tmp_path / "mup_coordinates.svg").read_text()
    assert all(f"layer {n} " in drawn for n in (1, 2, 5, 6)) and "layer 3" not in drawn, "the first and the last ones"
    assert "not finite" in drawn and "published" not in drawn
