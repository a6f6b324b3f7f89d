"""On a real GPU: the same program, the same promises. `make test-gpu` runs these; without a GPU they fail, not skip."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import rnnq
from rnnq import checkpoint, pack, train
from rnnq.checkpoint import Owner
from rnnq.families import stacked
from rnnq.families.base import Adam, Family, State
from rnnq.families.dynamics.config import FLAGS, DynamicsConfig
from rnnq.families.dynamics.model import Dynamics
from rnnq.families.single import Single
from rnnq.train import Every, Member, Training
from rnnq.worker import pick_device, prepare
from tests.processes import Study, pseudo_text

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
NEVER = Every(seconds=None, steps=10**9)

# the built-in family, but at step 37 of run seed 0 the process gets a signal, if it is the first to come there
STOPPING = """
import os
import signal
from pathlib import Path

import rnnq
from rnnq.families.dynamics.model import Dynamics


class Stopping(Dynamics):
    name = "stopping"

    def batch(self, configs, steps):
        stands = {config.seed: step for config, step in zip(configs, steps)}
        if stands.get(0) == 37 and Path("armed").exists():
            Path("armed").unlink()
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(configs, steps)


stage = rnnq.stage(
    "s", Stopping, rnnq.grid(lr=[0.01, 0.003]).seeds(2),
    base=dict(state_size=32, batch_size=32, window=24, steps=60, log_every=5, eval_every=25, corpus="text"),
)
"""

# a module with buffers, whose dropout draws from the GPU's own numbers; it may ask for too much memory
NET = """
import torch
from torch import nn

import rnnq


class Config(rnnq.Config):
    metrics = (rnnq.Metric("loss", primary=True), rnnq.Metric("val_loss"))
    best_metric = "val_loss"

    width: int = 16
    terabytes: int = 0
    steps: int = 40
    lr: float = 0.01
    log_every: int = 5
    eval_every: int = 10


class Net(rnnq.Family):
    Config = Config
    name = "net"

    def build(self, config):
        self.terabytes = config.terabytes
        return nn.Sequential(
            nn.Linear(6, config.width), nn.BatchNorm1d(config.width), nn.Dropout(0.3), nn.Linear(config.width, 6)
        )

    def batch(self, config, step):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1000 * config.seed + step))
        return {"x": x, "y": x.roll(1, 1)}

    def loss(self, module, data):
        if self.terabytes:
            torch.empty(self.terabytes << 40, dtype=torch.uint8, device=data["x"].device)
        return nn.functional.mse_loss(module(data["x"]), data["y"])

    def evaluate(self, module, config, split):
        x = torch.ones(4, 6, device=next(module.parameters()).device)
        return {f"{split}_loss": float(nn.functional.mse_loss(module(x), x))}


stage = rnnq.stage("s", Net, rnnq.grid(terabytes=[0]))
"""


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU, as a worker prepares it. There must be one: a test that is skipped is not one that passed."""
    found = pick_device(0, "auto")
    prepare(found)
    return found


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path) as made:
        (made.folder / "text").write_bytes(pseudo_text(8000))
        yield made


def start(study: Study, *words: str, code: int | None = 0, **environment: str) -> str:
    """`rnnq ...` as a process of its own that sees the GPU, to its end; returns what it wrote."""
    done = subprocess.run(
        [sys.executable, "-m", "rnnq", *words],
        cwd=study.folder,
        env={**os.environ, **study.environment, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert code is None or done.returncode == code, f"exit {done.returncode}\n{done.stdout}"
    return done.stdout


def on_gpu(study: Study, *words: str, code: int | None = 0, **environment: str) -> str:
    """A worker on the first GPU, to its end."""
    return start(study, "worker", "--gpu", "0", "--no-bar", *words, code=code, **environment)


def twin(study: Study, definition: str, *words: str, runs: int) -> dict[int, dict[str, Any]]:
    """What the same runs come to on the GPU when each is trained alone, undisturbed."""
    with Study(study.folder / "twin") as alone:
        (alone.folder / "text").write_bytes(pseudo_text(8000))
        alone.rnnq("init", alone.define(definition))
        on_gpu(alone, "--pack", "off", *words)
        return {run: alone.result(run) for run in range(1, runs + 1)}


def packed(study: Study) -> list[dict[str, Any]]:
    """What was found out of packs: members, equal, and on what."""
    rows = study.rows("SELECT shape, members, equal, rate, fits FROM packs ORDER BY members")
    return [row | {"numerics": json.loads(row["shape"])["numerics"]} for row in rows]


# ------------------------------------------------------------------------------------------------ through the program


def test_a_run_trains_on_the_gpu_and_comes_to_what_the_cpu_comes_to(study: Study) -> None:
    """The same batches, other roundings: after 60 steps losses agree to 1e-3."""
    study.rnnq("init", study.define(STOPPING))
    on_gpu(study)
    with Study(study.folder / "cpu") as other:
        (other.folder / "text").write_bytes(pseudo_text(8000))
        other.rnnq("init", other.define(STOPPING))
        other.worker().end()
        for run in range(1, 5):
            mine, its = study.run(run), other.run(run)
            assert [attempt["device"] for attempt in mine["attempts"]] == ["cuda:0"]
            assert mine["attempts"][0]["numerics"]["device"] == torch.cuda.get_device_name(0)
            for metric in ("loss", "val_loss", "test_loss", "val_loss_no_state"):
                assert mine["summary"][metric] == pytest.approx(its["summary"][metric], rel=1e-3), metric
            assert mine["curves"].keys() == its["curves"].keys()
    assert len(start(study, "sample", "1", "--device", "cuda:0", "--prompt", "the ", "--length", "20").strip()) > 0


@pytest.mark.parametrize("words", [("--pack", "off"), ("--pack", "4")], ids=" ".join)
def test_stopped_on_the_gpu_and_resumed_equals_never_stopped(study: Study, words: tuple[str, ...]) -> None:
    study.rnnq("init", study.define(STOPPING))
    (study.folder / "armed").touch()
    on_gpu(study, *words)
    stopped = study.rows("SELECT id, steps_done FROM runs WHERE state = 'pending'")
    assert {"id": 1, "steps_done": 38} in stopped
    on_gpu(study, *words)

    assert study.ended(1) == [("released", "preempted"), ("done", None)]
    assert [attempt["exact"] for attempt in study.run(1)["attempts"]] == [1, 1]
    expected = twin(study, STOPPING, runs=4)
    assert {run: study.result(run) for run in expected} == expected


def test_a_pack_of_four_has_its_certificate_and_nobody_can_tell_its_runs_from_lone_ones(study: Study) -> None:
    study.rnnq("init", study.define(STOPPING))
    on_gpu(study, "--pack", "4")

    [found] = [row for row in packed(study) if row["members"] == 4]
    assert found["equal"] and found["fits"]
    assert found["numerics"]["device"] == torch.cuda.get_device_name(0)
    assert len(study.rows("SELECT DISTINCT started_at FROM attempts")) == 2, "one in hand, then the others"
    expected = twin(study, STOPPING, runs=4)
    assert {run: study.result(run) for run in expected} == expected


def test_two_workers_on_one_gpu_train_what_one_would(study: Study) -> None:
    study.rnnq("init", study.define(STOPPING))
    on_gpu(study, "--processes", "2", "--runs", "2", "--pack", "off")
    assert len(study.rows("SELECT DISTINCT worker FROM attempts")) == 2
    expected = twin(study, STOPPING, runs=4)
    assert {run: study.result(run) for run in expected} == expected


def test_a_checkpoint_goes_from_the_gpu_to_the_cpu_and_back_and_the_attempts_are_marked_inexact(study: Study) -> None:
    study.rnnq("init", study.define(STOPPING.replace(".seeds(2)", "").replace("0.01, ", "")))
    (study.folder / "armed").touch()
    on_gpu(study)
    first = study.run(1)
    assert (first["state"], first["steps_done"]) == ("pending", 38)
    worker = study.worker({"at": "saved", "step": 50, "do": "kill"}, every=10, pack=1)
    worker.end(-signal.SIGKILL)
    on_gpu(study)

    run = study.run(1)
    assert run["state"] == "done"
    assert [attempt["device"] for attempt in run["attempts"]] == ["cuda:0", "cpu", "cuda:0"]
    assert [attempt["exact"] for attempt in run["attempts"]] == [1, 0, 0]
    assert all(math.isfinite(value) for curve in run["curves"].values() for _, value in curve)


def test_verify_resume_finds_no_difference_on_the_gpu(study: Study) -> None:
    """Nor with buffers, and dropout that draws from the GPU's own random numbers."""
    for content in (STOPPING, NET):
        said = start(study, "verify-resume", study.define(content), "--device", "cuda:0")
        assert said.count("equal to the bit") == 3


def test_a_run_that_needs_too_much_memory_fails_as_oom_and_the_worker_lives(study: Study) -> None:
    """Tried three times in all, as memory may come free."""
    study.rnnq("init", study.define(NET.replace("[0]", "[1, 0]")))
    on_gpu(study, code=1, RNNQ_RETRY_S="0.01")

    assert study.states() == {1: "failed", 2: "done"}
    assert study.ended(1) == [("failed", "oom")] * 3
    assert "CUDA out of memory" in study.run(1)["message"]
    workers = {attempt["worker"] for run in (1, 2) for attempt in study.run(run)["attempts"]}
    assert len(workers) == 1


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_claimed(study: Study) -> None:
    study.rnnq("init", study.define(STOPPING))
    count = torch.cuda.device_count()
    for words in (("--gpu", str(count)), ("--device", f"cuda:{count}")):
        said = start(study, "worker", *words, code=2)
        assert f"there is no GPU {count}: {count} GPU" in said
        assert "hint:" in said
    assert not study.rows("SELECT 1 FROM attempts")


def test_compiled_steps_train_on_the_gpu(study: Study) -> None:
    """Other roundings again: 1e-3 of what eager steps come to."""
    assert train.why_not_compiled(torch.device("cuda:0")) is None
    study.rnnq("init", study.define(STOPPING.replace(".seeds(2)", "").replace("0.01, ", "")))
    said = on_gpu(study, "--compile", "--pack", "off")
    assert "trained without it" not in said
    run = study.run(1)
    assert run["state"] == "done", run["message"]
    assert run["attempts"][0]["numerics"]["compile"] is True
    [eager] = twin(study, STOPPING.replace(".seeds(2)", "").replace("0.01, ", ""), runs=1).values()
    assert run["loss"] == pytest.approx(eager["loss"], rel=1e-3)


# ------------------------------------------------------------------------------------------------ the loop


class Desk:
    """The owner of a run who keeps nothing, and may wish it to stop."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.steps = stop_at, 0

    def record(self, step: int, points: Sequence[Any]) -> None: ...
    def save(self, step: int, points: Sequence[Any], state: Mapping[str, Any]) -> None: ...
    def leave_behind(self, points: Sequence[Any]) -> None: ...
    def wish(self) -> bool:
        self.steps += 1
        return self.steps == self.stop_at


class MlpConfig(rnnq.Config):
    metrics: ClassVar[tuple[rnnq.Metric, ...]] = (rnnq.Metric("loss", primary=True),)
    steps: int = 100


class Mlp(Family):
    """A module with batch statistics, in batches of dicts and tuples."""

    Config = MlpConfig
    name = "mlp"

    def build(self, config: MlpConfig) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 6))

    def batch(self, config: MlpConfig, step: int) -> Any:  # type: ignore[override]
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        return {"x": x, "rest": (x.roll(1, 1), [step])}

    def loss(self, module: nn.Module, data: Any) -> Tensor:  # type: ignore[override]
        return nn.functional.mse_loss(module(data["x"]), data["rest"][0])

    def optimizer(self, config: MlpConfig) -> Adam:
        return Adam(1e-2, weight_decay=0.1, clip=0.5, schedule=lambda done: 1 / (1 + done))


class Clipped(Dynamics):
    """Rates of their own, a clip, a decay and a schedule for each member."""

    def optimizer(self, config: DynamicsConfig) -> Adam:
        return Adam(config.lr, weight_decay=0.01, clip=0.1 * (1 + config.seed), schedule=lambda done: 1 / (1 + done))


class Taped(Dynamics):
    """With its gradients by autograd."""

    def loss(self, state: State, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return super().loss(state, batch)


def dynamics(seeds: int, folder: Path, **fields: Any) -> list[DynamicsConfig]:
    """Configs of one shape; a window is 8 bytes, so that its border comes often."""
    path = folder / "text"
    path.write_bytes(pseudo_text(8000))
    sizes = {"state_size": 32, "batch_size": 16, "window": 8, "corpus": str(path), "steps": 100} | fields
    return [DynamicsConfig(seed=seed, lr=0.001 * (1 + seed // 2), **sizes) for seed in range(seeds)]


def training(family: Family, configs: Sequence[Any], device: torch.device, apart: bool = False) -> Training:
    """A pack; with `apart` its members stand at different steps."""
    members = [Member(config, Desk(), config.steps) for config in configs]
    for k, member in enumerate(members):
        member.step = 3 * k if apart else 0
    return Training(family, members, device)


@pytest.fixture
def unwaiting() -> Iterator[Any]:
    """Within it an operation at which the host waits for the GPU raises."""

    class Watch:
        def __enter__(self) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is a prototype
                torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_: object) -> None:
            torch.cuda.set_sync_debug_mode("default")

    yield Watch()
    torch.cuda.set_sync_debug_mode("default")


def never_waits(made: Training, watch: Any, steps: int = 20) -> None:
    for _ in range(3):  # what is made once, at the first steps, may wait
        made.update()
    with watch:
        for _ in range(steps):
            made.update()
    assert bool(torch.isfinite(made.average).all())


def test_the_watch_sees_a_host_that_waits(gpu: torch.device, unwaiting: Any) -> None:
    x = torch.ones(3, device=gpu)
    with unwaiting, pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@pytest.mark.parametrize("kind", [Dynamics, Taped, Clipped], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("gates", [False, True], ids=["plain", "gates"])
def test_no_step_of_a_pack_waits_for_the_gpu(
    kind: type[Dynamics], gates: bool, gpu: torch.device, unwaiting: Any, tmp_path: Path
) -> None:
    flags = dict.fromkeys(FLAGS, True) if gates else {}
    for members in (1, 4):
        never_waits(training(kind(), dynamics(members, tmp_path, **flags), gpu), unwaiting)
    apart = training(kind(), dynamics(4, tmp_path, n_layers=2, **flags), gpu, apart=True)
    never_waits(apart, unwaiting)
    apart.freeze(apart.active[1])
    never_waits(apart, unwaiting)


def test_no_step_of_a_module_waits_for_the_gpu(gpu: torch.device, unwaiting: Any) -> None:
    mlp = training(Single(Mlp()), [MlpConfig()], gpu)
    never_waits(mlp, unwaiting)
    assert {t.device.type for t in mlp.carried.values()} == {"cuda"}
    assert int(mlp.carried["module.1.num_batches_tracked"]) == 23
    assert float(mlp.carried["module.1.running_var"].sub(1).abs().max()) > 0


@pytest.mark.parametrize("members", [2, 5, 16])
@pytest.mark.parametrize(("state", "batch", "gates"), [(32, 32, False), (21, 25, True), (128, 64, True)], ids=str)
def test_a_pack_of_the_built_in_family_has_its_certificate(
    members: int, state: int, batch: int, gates: bool, gpu: torch.device, tmp_path: Path
) -> None:
    flags = dict.fromkeys(FLAGS, True) if gates else {}
    [config] = dynamics(1, tmp_path, state_size=state, batch_size=batch, n_layers=2, **flags)
    assert pack.Trial(Dynamics, "dynamics", config, 10**6, gpu, {}).certify(members)


@pytest.mark.parametrize(("rows", "width", "inner"), [(32, 32, 64), (25, 21, 7), (256, 128, 300), (1, 5, 1)], ids=str)
def test_products_and_means_of_a_member_do_not_depend_on_who_is_beside_it(
    rows: int, width: int, inner: int, gpu: torch.device
) -> None:
    """And are torch's, gradients and all, up to the rounding of float32 sums of some hundreds."""
    chance = torch.Generator(gpu).manual_seed(0)
    a, b, c = (
        torch.randn(40, *shape, device=gpu, generator=chance, requires_grad=True)
        for shape in ((rows, inner), (inner, width), (1, width))
    )
    for act, own in (
        (lambda *x: stacked.bmm(*x[:2]), lambda *x: torch.bmm(*x[:2])),
        (lambda a, b, c: stacked.baddbmm(c, a, b), lambda a, b, c: torch.baddbmm(c, a, b)),
        (lambda a, *_: stacked.mean(a), lambda a, *_: a.mean((1, 2))),
    ):
        expected, found = own(a, b, c), act(a, b, c)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        gradients = [
            torch.autograd.grad(each.square().sum(), (a, b, c), allow_unused=True) for each in (found, expected)
        ]
        for mine, its in zip(*gradients, strict=True):
            assert (mine is None) == (its is None)
            torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-3) if mine is not None else None
        for members in (1, 2, 3, 8, 40):
            fewer = act(a[:members], b[:members], c[:members])
            assert torch.equal(fewer, found[:members]), members
            mine = torch.autograd.grad(fewer.square().sum(), a)[0][:members]
            assert torch.equal(mine, gradients[0][0][:members]), members


def test_a_checkpoint_of_the_gpu_opens_anywhere(gpu: torch.device, tmp_path: Path) -> None:
    """It holds tensors of the CPU alone, and gives the numbers that it had."""
    [config] = dynamics(1, tmp_path)
    there = train.train(Dynamics(), config, Desk(stop_at=40), gpu, 100, NEVER)
    assert there.state is not None
    owner = Owner("study", "s", 1, "f")
    path = checkpoint.relative_path(owner, 1, there.step)
    saved = checkpoint.publish(tmp_path, path, checkpoint.write_aside(tmp_path, path, owner, there.state), there.step)
    state = checkpoint.load(tmp_path, saved, owner)
    assert all(p.device.type == "cpu" for p in state["members"]["params"].values())
    for device in (CPU, gpu):
        outcome = train.train(Dynamics(), config, Desk(), device, 100, NEVER, checkpoint.load(tmp_path, saved, owner))
        assert outcome.finished
        assert outcome.state is not None
        assert outcome.state["curve"][: len(state["curve"])] == state["curve"]


def test_the_closed_form_is_autograds_on_the_gpu_for_all_flags(gpu: torch.device, tmp_path: Path) -> None:
    """In float32, to 1e-5 of the largest of each tensor: sums of tens of products in another order."""
    for code in range(1, 2 ** len(FLAGS)):
        flags = {flag: bool(code >> at & 1) for at, flag in enumerate(FLAGS)}
        if not (flags["use_new_state"] or flags["use_old_state"]):
            continue
        configs = dynamics(2, tmp_path, state_size=16, batch_size=8, **flags)
        made = training(Dynamics(), configs, gpu)
        for _ in range(2):
            made.update()
        data = train.to_device(made.family.batch(configs, [2, 2]), gpu)
        state = State(made.params, made.carried)
        losses, found, _ = train.gradients_of(made.family, state, data)
        expected_losses, expected, _ = train.by_autograd(made.family, state, data)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
        for name, gradient in expected.items():
            mine = found[name]
            if gradient is None or mine is None:  # what needs none may be given zeros by autograd
                assert mine is None and (gradient is None or not bool(gradient.any())), (code, name)
                continue
            assert float((mine - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max()) + 1e-7, (code, name)


def test_what_a_pack_needs_is_measured_in_the_gpus_memory(gpu: torch.device) -> None:
    """Its peak since the last look, not what is held at that moment."""
    pack._in_use(gpu)
    before = pack._in_use(gpu)
    torch.empty(1 << 28, dtype=torch.uint8, device=gpu)
    assert 1 << 28 <= pack._in_use(gpu) - before < 1 << 29
    assert pack._in_use(gpu) - before < 1 << 20
    assert 0 < pack._free(gpu) <= torch.cuda.get_device_properties(gpu).total_memory


def test_a_trial_gives_back_the_memory_that_it_took(gpu: torch.device, tmp_path: Path) -> None:
    """Other workers have the same GPU."""

    class Findings:
        def recall(self, shape: str) -> Sequence[pack.Size]:
            return []

        def remember(self, shape: str, size: pack.Size) -> None: ...

    [config] = dynamics(1, tmp_path, state_size=256, batch_size=256)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(gpu)
    trial = pack.Trial(Dynamics, "dynamics", config, 10**6, gpu, train.numerics(gpu))
    planner = pack.Planner(None, gpu, Findings())
    planner.find_out(trial, 32, 1)
    assert planner._recall(trial.shape)[1].rate
    assert torch.cuda.memory_reserved(gpu) - held <= 1 << 26
