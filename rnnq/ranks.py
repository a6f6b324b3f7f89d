"""Processes that train one run together, by torch's DistributedDataParallel, and what they tell each other.

Process 0 is the worker. The others do what it says: they are given the run's state when a training begins or goes on,
and then one number before each thing that all do together. It goes over gloo, whatever carries the gradients, so that
no step waits for a device. Each process makes the whole batch, keeps its share, and makes the same optimiser step.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rnnq import host
from rnnq.errors import InputError
from rnnq.families.base import Family, State

AGAIN = 75  # exit code of a worker whose group must be started anew: EX_TEMPFAIL of sysexits.h
AGAIN_SOUND = 76  # and where a run has ended well in it: neither the device nor the code is broken
LEAVE, BEGIN, END, STEP, JOIN = range(5)  # what process 0 says
LONG = datetime.timedelta(days=30)  # a worker may wait for runs; a process that ends is noticed at once, however
JOINING = datetime.timedelta(minutes=5)  # for the agent's store to answer
SOON = 3.0  # seconds within which a process that breaks the connection is seen to be gone


class CannotShare(InputError):
    """The runs of a family cannot be trained by several processes, or not by so many. None of them is to blame."""


@contextlib.contextmanager
def _sharing() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise CannotShare(error.problems, error.hint) from error


class Ranks:
    """One of the processes of a group. Each of them calls the methods in the same order."""

    def __init__(self, rank: int, size: int, device: torch.device, folder: Path) -> None:
        """Join the group whose address torch's environment variables have; returns when all are there."""
        self.rank, self.size, self.device, self.folder = rank, size, device, folder
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host; its name need not lead to it
        cuda = device.type == "cuda"
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*place, timeout=JOINING)  # type: ignore[attr-defined]
        # the agent has one store for all that it starts: what dead processes have left there must not be read
        start = f"rnnq-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
        mine = dist.PrefixStore(start, store)  # type: ignore[attr-defined]
        backend, patience = ("nccl", None) if cuda else ("gloo", LONG)
        dist.init_process_group(backend, store=mine, rank=rank, world_size=size, timeout=patience)
        self.control = dist.new_group(backend="gloo", timeout=LONG)
        me = (os.getpid(), host.process_start(os.getpid()))
        self._pids: list[tuple[int, str | None]] = [me] * size
        dist.all_gather_object(self._pids, me, group=self.control)
        self.subject: Mapping[str, Any] = {}  # what is trained next, for the others
        self.broken = False  # something has begun that not all have ended: the processes no longer stand at one place
        self._module: DistributedDataParallel | None = None

    # ---------------------------------------------------------------------------------------- what process 0 says

    def say(self, what: int) -> None:
        """Tell the others what comes next; nothing where another one says it."""
        if self.rank == 0:
            dist.broadcast(torch.tensor([what]), 0, group=self.control)

    def heard(self) -> int:
        """What process 0 says next. Raises RuntimeError when it is gone."""
        word = torch.tensor([LEAVE])
        dist.broadcast(word, 0, group=self.control)
        return int(word)

    def begin(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Process 0 tells the others what to train, and where it stands."""
        self.broken = True  # until `wrap` has ended
        if self.rank == 0:
            brief = {**self.subject, "state": {**state(), "best": None, "curve": []}}
            self.say(BEGIN)
            dist.broadcast_object_list([brief], 0, group=self.control)

    def awaited(self) -> dict[str, Any] | None:
        """What `begin` told, or None when there is nothing more to do."""
        if self.heard() == LEAVE:
            return None
        found: list[Any] = [None]
        dist.broadcast_object_list(found, 0, group=self.control)
        brief: dict[str, Any] = found[0]
        return brief

    def end(self) -> None:
        """The training has come to an end. After a step that was not ended the others cannot hear of it."""
        self._module = None
        if not self.broken:
            self.broken = True
            with contextlib.suppress(RuntimeError):  # one of them is gone: so the run that has ended is not to blame
                self.say(END)
                self.broken = False

    def leave(self) -> None:
        """The worker leaves, and the others with it."""
        with contextlib.suppress(RuntimeError):  # they are gone
            if not self.broken:
                self.say(LEAVE)

    # ------------------------------------------------------------------------------------------------ the shares

    def check(self, family: Family, data: Any, carried: dict[str, Tensor]) -> None:
        """Raises CannotShare where the family cannot part this batch, or what is carried, for so many processes."""
        with _sharing():
            for rank in range(self.size):
                family.share(data, rank, self.size)
                family.carried_share(carried, rank, self.size)

    def share(self, family: Family, data: Any) -> Any:
        """This process's part of a batch."""
        return family.share(data, self.rank, self.size)

    def carried_share(self, family: Family, carried: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of what is carried."""
        return {name: c.contiguous() for name, c in family.carried_share(carried, self.rank, self.size).items()}

    def joined(self, family: Family, carried: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is carried as a whole, where process 0 asks for it; the others get their own part back.

        Raises CannotShare where the parts do not make a whole.
        """
        if not carried:
            return carried
        self.broken = True
        self.say(JOIN)
        mine = {name: c.detach().cpu() for name, c in carried.items()}
        parts: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(mine, parts, 0, group=self.control)
        self.broken = False
        if parts is None:
            return carried
        with _sharing():
            whole = family.joined(parts)
        return {name: c.to(self.device) for name, c in whole.items()}

    # --------------------------------------------------------------------------------------------------- the step

    def wrap(self, family: Family, state: State, data: Any) -> None:
        """Make ready for a training of these parameters; `data` is this process's part of a batch like those to come.

        Goes through it twice without an optimiser step: first to see whether the loss depends on all parameters, then
        so that the way in which the gradients are bundled is settled before the first step, also of a resumed run.
        """
        part = family.micro_batches(data)[0]
        losses, _ = family.loss(state, part)
        found = torch.autograd.grad(losses.sum(), list(state.params.values()), allow_unused=True)
        unused = any(gradient is None for gradient in found)
        module = _Loss(family, state.params)
        self._module = DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=unused)
        losses, _ = self._module(state.carried, part)
        losses.sum().backward()
        self._take_gradients(1)
        self.broken = False

    def _take_gradients(self, parts: int) -> list[Tensor | None]:
        assert self._module is not None
        found = []
        for p in self._module.parameters():
            found.append(None if p.grad is None else p.grad / parts if parts > 1 else p.grad)
            p.grad = None
        return found

    def gradients(
        self, family: Family, state: State, data: Any
    ) -> tuple[Tensor, Mapping[str, Tensor | None], dict[str, Tensor]]:
        """The losses of the whole batch, their gradients, and the next carried state of this process's part."""
        assert self._module is not None
        parts, carried = family.micro_batches(data), state.carried
        total = torch.zeros((), device=self.device)
        for place, part in enumerate(parts, start=1):
            with self._module.no_sync() if place < len(parts) else contextlib.nullcontext():
                losses, carried = self._module(carried, part)
                losses.sum().backward()
            total = total + losses.detach()
        dist.all_reduce(total)
        found = self._take_gradients(len(parts))
        carried = {name: c.detach() for name, c in carried.items()}
        return total / (self.size * len(parts)), dict(zip(state.params, found, strict=True)), carried

    # -------------------------------------------------------------------------------------------- what went wrong

    def leave_words(self, words: Mapping[str, str]) -> None:
        """Before this process ends by an error: what it was, for process 0."""
        aside = self.folder / f".words-{self.rank}"
        aside.write_text(json.dumps(dict(words)))
        aside.replace(self.folder / f"words-{self.rank}-{os.getpid()}")

    def lost(self) -> tuple[list[int], dict[str, str] | None]:
        """After an error inside a step: which other processes are gone, and the words of one, if it left any.

        When one ends, the step of the others ends by an error, too, and a moment may pass until it is seen to be gone.
        """
        until = time.monotonic() + SOON
        while True:
            gone = [r for r, (pid, start) in enumerate(self._pids) if host.is_gone(host.name(), pid, start)]
            for rank in range(self.size):
                left = self.folder / f"words-{rank}-{self._pids[rank][0]}"
                if rank != self.rank and left.exists():
                    return gone, json.loads(left.read_text())
            if gone or time.monotonic() > until:
                return gone, None
            time.sleep(0.05)


class _Loss(nn.Module):
    """A family's loss as a module that has the run's parameters, in their storage, as its own."""

    def __init__(self, family: Family, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.family, self.names = family, list(params)
        # a list: the names may hold dots
        self.held = nn.ParameterList([nn.Parameter(p.detach()) for p in params.values()])

    def forward(self, carried: dict[str, Tensor], data: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The training losses, and the next carried state."""
        return self.family.loss(State(dict(zip(self.names, self.held, strict=True)), carried), data)
