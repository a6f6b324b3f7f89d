"""What a family is, in three levels; a definition file may hold one of any level.

1. A generator: `@rnnq.family(Config)` on a function that takes a config and yields a dict of numbers per step.
   Nothing can be resumed inside it: an interrupted run starts again at step 0.
2. A class with `build`, `batch`, `loss` and, if it likes, `evaluate`: ordinary torch modules. Buys exact resume, the
   evaluation schedule and the best checkpoint.
3. A class with `init`, `batch` and `loss` over a leading axis of K members. Buys packs, too.

The promises of a family, held by tests/families/test_contract.py: a config survives JSON and back unchanged; the
same config gives the same numbers twice; three steps are finite and the gradient reaches every parameter that is
meant to learn; stopped at step k and resumed equals not stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rnnq.config import Config
from rnnq.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Curve = Sequence[tuple[str, int, float]]  # name, step, value


@dataclass
class State:
    """What training changes: trees of tensors, each with a leading axis of K members."""

    params: dict[str, Tensor]
    carried: dict[str, Tensor] = field(default_factory=dict)  # from step to step, without gradient


@dataclass(frozen=True)
class Group:
    """Parameters with a rate and a weight decay of their own."""

    names: tuple[str, ...]
    lr: float = 1.0  # what the optimiser's own lr is multiplied with
    weight_decay: float = 0.0  # in place of the optimiser's own


@dataclass(frozen=True)
class Adam:
    """The Adam optimiser (Kingma and Ba, 2015), as torch.optim has it."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True  # weight decay as in AdamW (Loshchilov and Hutter, 2019), not added to the gradient
    clip: float | None = None  # the largest L2 norm of all gradients together
    schedule: Callable[[int], float] | None = None  # steps done -> what lr is multiplied with; pure
    groups: tuple[Group, ...] = ()  # each parameter in exactly one; none: all with lr and weight_decay as they are


@dataclass(frozen=True)
class SGD:
    """Gradient descent with momentum, as torch.optim has it: v = momentum v + g + weight_decay p; p = p - lr v."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None  # the largest L2 norm of all gradients together
    schedule: Callable[[int], float] | None = None  # steps done -> what lr is multiplied with; pure
    groups: tuple[Group, ...] = ()  # each parameter in exactly one; none: all with lr and weight_decay as they are


@dataclass(frozen=True)
class PerNeuron:
    """Gradient descent with a rate for each neuron: lr times r^exponent, r the L2 norm of all that the neuron owns.

    For a net in which a neuron's parameters times a change its part of the output by a^degree, the exponent
    2 - degree makes all neurons grow at one pace, however small they begin.
    """

    lr: float
    exponent: float
    axes: tuple[tuple[str, int], ...]  # a parameter and which of its axes counts neurons, the members' being 0
    rest: Adam | None = None  # for the parameters that no neuron owns; its clip is not asked
    clip: float | None = None  # the largest L2 norm of all gradients together, before they are scaled
    eps: float = 1e-12  # under the root of the norm


Spec = Adam | SGD | PerNeuron


@dataclass(frozen=True)
class Parent:
    """The run that another one starts from, as its checkpoint has it; on the CPU, with a leading axis of one."""

    run: int
    family: str
    config: Mapping[str, Any]  # all its fields
    step: int
    params: Mapping[str, Tensor]
    carried: Mapping[str, Tensor]


class Family:
    """A family of the second or the third level; each run is independent of all others to the bit.

    The third level is described by the methods below: K members side by side, each with its place on a leading axis.
    A family that has a method `build(config) -> torch.nn.Module` is of the second level, where the axis is hidden:

        batch(config, step) -> data             a tensor, or a tuple, list or dict of tensors, on the CPU
        loss(module, data) -> loss              a scalar
        evaluate(module, config, split) -> {metric: value}
        sample(module, config, prompt, length, temperature, seed) -> text
        begin(module, config, parent)           changes the module in place; parent's tensors are without the axis
    """

    Config: ClassVar[type[Config]]
    name: ClassVar[str]
    smoothing: ClassVar[tuple[float, float] | None] = None  # (decay, start) of the average of the training loss
    loss_bound: ClassVar[float] = 1e6  # a training loss above it counts as diverged
    training_loss: ClassVar[str | None] = None  # what its curve is called; none: as the primary metric
    tests_best: ClassVar[bool] = False  # the test at the end is of the best checkpoint's weights, not of the last
    flushes_denormals: ClassVar[bool] = False  # losses and gradients take numbers below 1e-38 for zero, on the CPU
    stacks: ClassVar[bool] = True  # members can stand side by side; not those of the second level

    def init(self, configs: Sequence[Any]) -> State:
        """Parameters and carried state on the CPU; member k from configs[k].seed alone."""
        raise NotImplementedError

    def begin(self, config: Any, drawn: State, parent: Parent) -> State:
        """The state at step 0 of one run that starts from another's weights; `drawn` is what `init` gave it.

        By default all parameters are the parent's, and nothing that it carried is. Raises InputError when the two do
        not have the same parameters.
        """
        return State(taken_over(drawn.params, parent.params, parent.run), drawn.carried)

    def is_enough(self, config: Any, curve: Curve) -> bool:
        """Whether a run may end before its budget; asked after each point, and a function of these alone."""
        return False

    def batch(self, configs: Sequence[Any], steps: Sequence[int]) -> Any:
        """The data of one step, on the CPU: a pure function of each member's (config, step)."""
        raise NotImplementedError

    def micro_batches(self, data: Any) -> Sequence[Any]:
        """The parts of a step's batch that are gone through one after the other, to need the memory of one.

        The step takes the mean of their losses and gradients; what one carries, the next begins with. By default the
        batch is one part.
        """
        return [data]

    def loss(self, state: State, data: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The training losses, (K,), and the next carried state, detached."""
        raise NotImplementedError

    def share(self, data: Any, rank: int, ranks: int) -> Any:
        """The part of a step's batch that process `rank` of `ranks` goes through, where several train one run.

        Optional: `rnnq worker --nproc` needs it. The parts are disjoint, together the whole batch, and of one size:
        the step takes the mean of the processes' losses and gradients. What was drawn for the whole batch, such as
        dropout's masks, is shared out, too. Raises InputError where the batch cannot be parted so.
        """
        raise cannot_share(self.name, "share(self, data, rank, ranks)")

    def carried_share(self, carried: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
        """What of the carried state belongs to that part; asked when a training begins or goes on.

        By default nothing can be carried; see `share`.
        """
        if carried:
            raise cannot_share(self.name, "carried_share(self, carried, rank, ranks)")
        return carried

    def joined(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The carried state of the whole batch, from that of each process, in their order; undoes `carried_share`."""
        if any(parts):
            raise cannot_share(self.name, "joined(self, parts)")
        return parts[0]

    def gradients(self, state: State, data: Any) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
        """The losses, (K,), the gradient of each parameter, (K, ...), and the next carried state; all detached.

        Optional, for a family that knows them in closed form; else they are autograd's, of the sum of `loss`. None for
        a parameter that the loss does not depend on.
        """
        raise NotImplementedError

    def evaluate(self, state: State, configs: Sequence[Any], split: str) -> list[dict[str, float]]:
        """Metrics on held-out data ("val" or "test"), one dict a member. Called without gradient."""
        return [{} for _ in configs]

    def sample(
        self,
        state: State,
        configs: Sequence[Any],
        prompts: Sequence[str],
        length: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> list[bytes | str]:
        """What each member writes after its prompt: `length` tokens, without the prompt. Called without gradient.

        Optional: `rnnq sample` needs it. Temperature 0 takes the likeliest token each time; else chance comes from the
        member's seed alone. A prompt may be empty, and holds bytes that are no UTF-8 as os.fsdecode does.
        """
        raise cannot_sample(self.name, "sample(self, state, configs, prompts, length, temperature, seeds)")

    def optimizer(self, config: Any) -> Spec:
        """How a member's parameters are updated. By default Adam with the config's `lr`, or 1e-3."""
        return Adam(lr=float(getattr(config, "lr", 1e-3)))

    def summary(self, config: Any, curve: Curve) -> dict[str, Any]:
        """The numbers that a finished run is known by. By default the last value of each metric."""
        return {name: value for name, _, value in sorted(curve, key=lambda point: point[1])}


class Generator:
    """The first level: a function that yields measurements."""

    def __init__(self, function: Callable[[Any], Iterator[Mapping[str, float]]], config: type[Config]) -> None:
        self.function = function
        self.Config = config
        self.name = function.__name__
        self.__doc__ = function.__doc__

    def __call__(self, config: Any) -> Iterator[Mapping[str, float]]:
        return self.function(config)


def taken_over(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], run: int) -> dict[str, Tensor]:
    """The tensors of run `run` in place of one's own. Raises InputError with all that differs in name or shape."""
    problems = []
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        here, there = ([*t[name].shape[1:]] if name in t else None for t in (mine, theirs))
        if here != there:
            places = ((here, "here"), (there, f"in run {run}"))
            said = [f"{'missing' if shape is None else f'of shape {shape}'} {place}" for shape, place in places]
            problems.append(f"{name} is {' and '.join(said)}")
    if problems:
        hint = "both runs need a model of one shape, or the family a method begin(); see docs/families.md"
        raise InputError([f"run {run} cannot be started from: {problem}" for problem in problems], hint)
    return {name: theirs[name].to(tensor.dtype) for name, tensor in mine.items()}


def cannot_sample(name: str, signature: str) -> InputError:
    """What is said of a family from which no text can be drawn, and what it lacks."""
    return InputError(
        f"the family {name} cannot be sampled from: it has no method sample", f"write {signature}; see docs/families.md"
    )


def cannot_share(name: str, signature: str) -> InputError:
    """What is said of a family whose runs several processes cannot train together, and what it lacks."""
    method = signature.partition("(")[0]
    return InputError(
        f"the family {name} cannot be trained by several processes: it has no method {method}",
        f"`rnnq worker` without --nproc trains it; or write {signature}; see docs/distributed.md",
    )


def family(config: type[Config]) -> Callable[[Callable[[Any], Iterator[Mapping[str, float]]]], Generator]:
    """Make a family of a generator function.

        @rnnq.family(ParityConfig)
        def parity(config):
            for step in range(config.steps):
                yield {"loss": ...}

    Each dict that it yields is one step; the last value of each name goes into the run's summary.
    """
    if not (isinstance(config, type) and issubclass(config, Config)):
        raise InputError(
            f"@rnnq.family takes a subclass of rnnq.Config, not {config!r}", "write @rnnq.family(MyConfig)"
        )
    return lambda function: Generator(function, config)
