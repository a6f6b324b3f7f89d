"""One config without a queue: the folder that it leaves, an interruption, and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from pydantic import Field

import rnnq
from rnnq import families, single
from rnnq.cli import train as command
from rnnq.config import Config
from rnnq.errors import Diverged, InputError
from rnnq.families.base import Family, State
from rnnq.train import Every
from tests.conftest import Cli

CPU = torch.device("cpu")
STEPS = 40


class LineConfig(Config):
    """A line through noise."""

    metrics: ClassVar = (rnnq.Metric("loss", primary=True), rnnq.Metric("val_loss"))
    best_metric: ClassVar[str | None] = "val_loss"
    steps: int = Field(default=STEPS, ge=1)
    log_every: int = 4
    eval_every: int = 8
    lr: float = 0.1
    device: str | None = None
    explode_at: int = -1

    def samples_seen(self, step: int) -> int:
        """Eight numbers a step."""
        return 8 * step

    def sample_space(self) -> int:
        """As if there were so many."""
        return 10**400


class Line(Family):
    """y = a x, of the third level."""

    Config = LineConfig
    name = "line"

    def init(self, configs: Any) -> State:
        """One parameter a member."""
        return State({"a": torch.stack([torch.randn(1) for _ in configs])}, {"n": torch.zeros(len(configs), 1)})

    def batch(self, configs: Any, steps: Any) -> torch.Tensor:
        """Noise of the seed and the step alone."""
        rows = []
        for config, step in zip(configs, steps, strict=True):
            noise = torch.randn(8, generator=torch.Generator().manual_seed(config.seed * 1000 + step))
            rows.append(noise * math.inf if step == config.explode_at else noise)
        return torch.stack(rows)

    def loss(self, state: State, data: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Squared distance to 3 x."""
        return ((state.params["a"] * data - 3 * data) ** 2).mean(1), {"n": state.carried["n"] + 1}

    def evaluate(self, state: State, configs: Any, split: str) -> list[dict[str, float]]:
        """The distance of the slope."""
        return [{f"{split}_loss": float((a - 3) ** 2)} for a in state.params["a"]]


@rnnq.family(LineConfig)
def steps_only(config: Any) -> Iterator[dict[str, float]]:
    """A generator."""
    for step in range(config.steps):
        yield {"loss": 1 / (step + 1)}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The families of this file by name, and a folder to work in."""
    monkeypatch.setitem(families.BUILTIN, "line", (f"{__name__}:LineConfig", f"{__name__}:Line"))
    monkeypatch.setitem(families.BUILTIN, "steps_only", (f"{__name__}:LineConfig", f"{__name__}:steps_only"))
    monkeypatch.setitem(families.BUILTIN, "nested", ("tests.studies:Nested", "tests.studies:Nested"))
    monkeypatch.chdir(tmp_path)


def config(text: str, name: str = "c.yaml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


NEVER = Every(seconds=None, steps=10**9)


def trained(training: single.Training, stop_at: int | None = None) -> single.Result:
    """Train; a wish to stop comes at a step."""

    def progress(step: int, budget: int | None) -> None:
        desk.stop = step == stop_at

    desk = single.Desk(training, CPU, progress)
    return single.run(training, CPU, NEVER, desk)


def metadata(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metadata.json").read_text())
    return found


# ------------------------------------------------------------------------------------------------ what it leaves


def test_a_training_leaves_its_config_histories_metadata_and_weights_in_a_folder_of_its_own() -> None:
    subject = single.read(config("family: line\nseed: 3\nlr: 5e-2\n"))

    result = trained(single.begin(subject, Path("runs")))

    assert result.finished
    folder = result.folder
    assert folder.parent == Path("runs")
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"family": "line", **subject.config.model_dump()}
    assert np.load(folder / "train_loss_steps.npy").tolist() == list(range(4, STEPS + 1, 4))
    assert np.load(folder / "val_loss_steps.npy").tolist() == list(range(8, STEPS + 1, 8))
    history = np.load(folder / "train_loss_history.npy")
    assert history.shape == (10,)
    assert history[-1] < history[0]
    rows = (folder / "curves.csv").read_text().splitlines()
    assert rows[0] == "name,step,value"
    assert rows[1] == f"loss,4,{float(history[0])!r}"
    assert np.load(folder / "samples_seen.npy").tolist() == [8 * step for step in range(4, STEPS + 1, 4)]
    assert np.load(folder / "fraction_of_space_seen.npy").shape == (10,)
    weights = torch.load(folder / "checkpoints" / "final_model.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {"a": (1,), "n": (1,)}
    assert weights["n"].tolist() == [STEPS]
    known = metadata(folder)
    assert known["status"] == "completed"
    assert (known["seed"], known["final_step"], known["budget"], known["num_parameters"]) == (3, STEPS, STEPS, 1)
    assert known["final_train_loss"] == history[-1]
    assert known["final_val_loss"] == np.load(folder / "val_loss_history.npy")[-1]
    assert known["device"] == "cpu"
    assert known["training_time_seconds"] >= 0
    assert known["versions"]["torch"] == torch.__version__
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["best_model.pt", "final_model.pt"]


def test_the_config_that_it_leaves_trains_the_same_again() -> None:
    first = trained(single.begin(single.read(config("family: line\n"), changes=["seed=5"]), Path("runs")))
    again = trained(single.begin(single.read(first.folder / "config.yaml"), Path("runs")))

    assert again.folder != first.folder  # also within one second
    assert (again.folder / "curves.csv").read_bytes() == (first.folder / "curves.csv").read_bytes()


def test_an_interrupted_training_that_goes_on_equals_one_that_was_not_to_the_bit() -> None:
    subject = single.read(config("family: line\n"))
    whole = trained(single.begin(subject, Path("whole")))

    first = trained(single.begin(subject, Path("runs")), stop_at=13)
    assert (first.finished, first.step, first.can_go_on) == (False, 13, True)
    assert metadata(first.folder)["status"] == "interrupted"
    second = trained(single.go_on(first.folder), stop_at=17)
    third = trained(single.go_on(second.folder))

    assert third.finished
    assert metadata(third.folder)["attempt"] == 3
    for name in ("curves.csv", "val_loss_history.npy"):
        assert (third.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    ours, theirs = (
        torch.load(result.folder / "checkpoints" / "final_model.pt", weights_only=True) for result in (third, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # what was only for going on is gone
    assert [path.name for path in sorted((third.folder / "checkpoints").iterdir())] == [
        "best_model.pt",
        "final_model.pt",
    ]
    with pytest.raises(InputError, match="this training is complete, at step 40"):
        single.go_on(third.folder)


def test_a_training_that_is_killed_goes_on_from_its_newest_checkpoint() -> None:
    training = single.begin(single.read(config("family: line\n")), Path("runs"))

    def killed(step: int, budget: int | None) -> None:
        if step == 25:
            raise SystemExit(137)

    with pytest.raises(SystemExit):
        single.run(training, CPU, Every(None, 10), single.Desk(training, CPU, killed))

    assert sorted(path.name for path in (training.folder / "checkpoints").iterdir()) == ["a1-s20.pt"]
    again = single.go_on(training.folder)
    assert again.state is not None
    assert again.state["step"] == 20
    with pytest.raises(SystemExit):  # before it has made one of its own
        single.run(again, CPU, Every(None, 10), single.Desk(again, CPU, killed))
    for left in ("checkpoints/a1-s10.pt", "checkpoints/.a2-s22.pt.7.tmp", ".metadata.json.7.part"):
        (training.folder / left).touch()  # as of a process that was killed between two of its files
    mine = training.folder / "checkpoints" / "a_note.txt"
    mine.touch()

    assert trained(single.go_on(training.folder)).finished
    names = sorted(path.name for path in (training.folder / "checkpoints").iterdir())
    assert names == ["a_note.txt", "best_model.pt", "final_model.pt"]
    assert not list(training.folder.glob(".*"))


def test_a_folder_in_which_a_process_trains_is_refused_to_a_second_one_and_left_as_it_is() -> None:
    first = trained(single.begin(single.read(config("family: line\n")), Path("runs")), stop_at=5)
    running = single.go_on(first.folder)
    late = single.go_on(first.folder)  # has read what the other one is about to go on from
    refused: list[str] = []

    def resume_elsewhere(step: int, budget: int | None) -> None:
        if step == 20:
            before = {path: path.read_bytes() for path in first.folder.rglob("*.*")}
            again = [sys.executable, "-m", "rnnq", "train", "--resume", str(first.folder)]
            found = subprocess.run(again, capture_output=True, text=True, timeout=120)
            refused.append(f"{found.returncode} {found.stderr}")
            assert {path: path.read_bytes() for path in first.folder.rglob("*.*")} == before

    result = single.run(running, CPU, Every(None, None), single.Desk(running, CPU, resume_elsewhere))

    assert result.finished
    assert refused[0].startswith(f"2 error: {first.folder}: another process trains there")
    with pytest.raises(InputError, match="another process went on with it just now, as attempt 2"):
        trained(late)


def test_a_training_that_diverges_says_so_in_its_folder() -> None:
    training = single.begin(single.read(config("family: line\nexplode_at: 20\n")), Path("runs"))

    with pytest.raises(Diverged):
        trained(training)

    known = metadata(training.folder)
    assert (known["status"], known["cause"]) == ("failed", "diverged")
    assert "step 24" in known["error"]
    assert (training.folder / "curves.csv").exists()
    assert known["final_train_loss"] is None


def test_a_generator_can_be_trained_and_stopped_but_does_not_go_on() -> None:
    training = single.begin(single.read(config("family: steps_only\n")), Path("runs"))
    stopped = trained(training, stop_at=10)

    assert (stopped.finished, stopped.can_go_on) == (False, False)
    with pytest.raises(InputError, match="it left no checkpoint"):
        single.go_on(training.folder)
    assert trained(single.begin(training.subject, Path("runs"))).summary == {"loss": 1 / STEPS}


def test_a_checkpoint_of_another_config_is_refused() -> None:
    first = trained(single.begin(single.read(config("family: line\n")), Path("runs")), stop_at=10)
    text = (first.folder / "config.yaml").read_text()
    (first.folder / "config.yaml").write_text(text.replace("lr: 0.1", "lr: 0.2"))

    with pytest.raises(rnnq.errors.Damaged):
        single.go_on(first.folder)


# ------------------------------------------------------------------------------------------- what is read, refused


def test_the_seed_of_the_data_is_that_of_everything_where_no_other_is_given() -> None:
    seeded = config("family: nested\ndata: {seed: 7}\n")

    assert single.read(seeded).config.seed == 7
    assert single.read(seeded, changes=["seed=1"]).config.seed == 1
    assert single.read(seeded, changes=["data.seed=9"]).config.seed == 9
    assert single.read(None, "nested").config.seed == 0


def test_a_probe_without_a_net_to_read_is_refused() -> None:
    with pytest.raises(InputError, match="a run of fsm_probe starts from one of fsm, and there are none here"):
        single.read(None, "fsm_probe")


def test_the_parameters_are_those_that_the_family_counts() -> None:
    subject = single.read(None, "fsm", ["model=solver", "states=2", "actions=2", "demos=2", "data_split=stream",
                                        "n_train=8", "n_val=8", "n_test=8"])  # fmt: skip

    assert metadata(trained(single.begin(subject, Path("runs"))).folder)["num_parameters"] == 0


def test_a_field_with_dots_is_set_inside_its_section() -> None:
    found = single.read(config("family: nested\nmodel: {hidden_dim: 3}\n"), changes=["model.init_scale=1e-3"])

    assert found.config.model_dump()["model"] == {"hidden_dim": 3, "init_scale": 0.001}


def test_everything_wrong_with_a_config_is_listed_at_once_with_its_line() -> None:
    path = config("family: nested\ndata:\n  pp: 3\nmodel:\n  hidden_dim: 0\n")

    with pytest.raises(InputError) as caught:
        single.read(path, changes=["training.optimizer=adm", "sed=1"])

    assert [problem.partition(": ")[0] for problem in sorted(caught.value.problems)] == [
        "--set",
        "--set",
        "c.yaml:3",
        "c.yaml:5",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "there is nothing to train"),
        ({"config": "nope.yaml"}, "nope.yaml does not exist"),
        ({"config": "c.py"}, "a config is a .yaml file"),
        ({"config": "."}, "a config is a .yaml file"),
        ({"config": "folder.yaml"}, "cannot be read"),
        ({"config": "c.yaml"}, "there is no family 'nowhere'"),
        ({"config": "none.yaml"}, "does not say of which family it is"),
        ({"config": "s.yaml"}, "belongs to a sweep"),
        ({"family": "line", "changes": ["steps"]}, "not of the form key=value"),
        ({"family": "line", "changes": ["a..b=1"]}, "is no name of a field"),
        ({"family": "line", "gpu": 0, "device": "cpu"}, "exclude each other"),
        ({"family": "line", "gpu": 99}, "there is no GPU 99"),
        ({"family": "line", "image": ["bmp"]}, "bmp"),
        ({"family": "line", "checkpoint_every": "x"}, "neither seconds nor steps"),
        ({"family": "line", "out": "c.yaml"}, "--out c.yaml"),
        ({"resume": "nowhere"}, "there is no config.yaml and no metadata.json there"),
        ({"resume": "nowhere", "changes": ["lr=1"]}, "give nothing else"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_no_folder_is_made(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    config("family: nowhere\n")
    config("steps: 3\n", "none.yaml")
    config("experiments: []\n", "s.yaml")
    Path("folder.yaml").mkdir()
    paths = {name: Path(value) for name, value in options.items() if name in ("config", "out", "resume")}

    with pytest.raises(InputError, match=re.escape(said)):
        command.train(**{**options, **paths})

    assert not (tmp_path / "runs").exists()


def test_the_devices_option_beats_the_configs_which_is_a_wish(capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = single.read(config("family: line\ndevice: cuda:99\n"))

    chosen = command._device(elsewhere, None, "auto")

    assert chosen.type in ("cpu", "cuda")
    assert "the config's device cuda:99 is not here" in capsys.readouterr().err
    assert command._device(elsewhere, None, "cpu").type == "cpu"
    assert not capsys.readouterr().err
    with pytest.raises(InputError, match="there is no GPU 98"):
        command._device(elsewhere, 98, "auto")


# ---------------------------------------------------------------------------------------------------- the command

SMALL = ["state_size=8", "batch_size=2", "window=32", "steps=60", "log_every=10", "eval_every=30"]


def test_the_command_trains_draws_and_prints_where(cli: Cli, tmp_path: Path) -> None:
    config("family: dynamics\nstate_size: 8\nbatch_size: 2\nwindow: 32\nlog_every: 10\neval_every: 30\n")

    [row] = json.loads(cli("train", "c.yaml", "--set", "steps=60", "--format", "json", "--out", "o").stdout)

    folder = tmp_path / row["folder"]
    assert row["finished"] is True
    assert row["step"] == 60
    assert row["loss"] == metadata(folder)["final_train_loss"]
    assert {path.name for path in (folder / "figures").iterdir()} >= {"curves.png", "curves.csv", "memory.png"}


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path, cli: Cli) -> None:
    words = [word for change in [*SMALL, "steps=1000000"] for word in ("--set", change)]
    command_line = [sys.executable, "-m", "rnnq", "train", "--family", "dynamics", *words, "--checkpoint-every", "20"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command_line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/checkpoints/*.pt")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)  # polling: a process of its own has no other way to say that it trains
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    [folder] = (tmp_path / "runs").iterdir()
    assert f"`rnnq train --resume runs/{folder.name}` goes on" in err
    assert "Traceback" not in err
    known = metadata(folder)
    assert known["status"] == "interrupted"
    assert known["checkpoint"]["step"] == known["final_step"] >= 20
    assert str(known["final_step"]) in out


def test_the_echo_of_a_signal_and_a_schedulers_warning_let_the_step_end_and_a_second_signal_does_not() -> None:
    desk = single.Desk(single.begin(single.read(config("family: line\n")), Path("runs")), CPU, lambda *_: None)

    with command._stoppable(desk):
        signal.raise_signal(signal.SIGUSR1)
        assert desk.stop
        signal.raise_signal(signal.SIGTERM)  # `timeout` sends it to its child, and again to the group of its child
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGUSR1)  # while what was trained is being drawn
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
