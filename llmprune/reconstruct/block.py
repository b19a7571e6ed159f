"""Block: the kept weights of a whole block are fitted to what the dense block makes of the dense model's states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from llmprune.model.activations import Activations, Call, apart
from llmprune.model.backward import Numbers, Run
from llmprune.model.checkpoint import LoadedBlock
from llmprune.model.cpu import widens
from llmprune.model.linears import Linear
from llmprune.stats import Needs


@dataclass(frozen=True)
class Next:
    """The block that comes after the one that is fitted, dense and loaded, and what it is called with."""

    block: LoadedBlock
    calls: Sequence[Call]


@dataclass(frozen=True)
class Reconstructor:
    """Adam on ‖f(x; Ŵ) − f(x₀; W)‖² / ‖f(x₀; W)‖² of each token, mask frozen (as arXiv:2510.14444, on whole blocks).

    x are the hidden states that come out of the pruned blocks before this one, x₀ those of the dense model, so that
    what earlier blocks lost is made up for. Each token counts as much as any other, however large its states are: a
    few with massive activations would else be nearly all there is from some block on. Nor does one that gets such
    activations by mistake stand for all: beyond 1, a distance d counts as 1 + ln d. A step takes one batch of the
    calibration, about a thousand tokens; its size falls to nothing in a half cosine. A block for which what is
    minimised does not fall is left as it was.

    Not every difference matters as much to what comes after. With `ahead` the next block, dense, is run on what the
    fitted one returns, and what it makes of that counts too.

    Args:
        steps: of Adam for each block.
        first: how many times as many for the first block: what it loses goes through all others, and more help there.
        rate: the first step's size, as a fraction of the root mean square of a matrix's kept weights.
        ahead: from 0 to 1, the share in what is minimised of the distance behind the next block.
    """

    needs: ClassVar[Needs] = "norms"

    steps: int = 64
    first: int = 4
    rate: float = 0.01
    ahead: float = 0.5

    def __post_init__(self) -> None:
        for name, steps in (("steps", self.steps), ("first", self.first)):
            if steps < 1:
                raise ValueError(f"{name} must be at least 1, not {steps}")
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0, not {self.rate}")
        if not 0 <= self.ahead <= 1:
            raise ValueError(f"ahead must lie in [0, 1], not {self.ahead}")

    @property
    def runs(self) -> int:
        """How many blocks a step runs, where the model goes on for as many."""
        return 2 if self.ahead else 1

    def steps_of(self, number: int) -> int:
        """How many steps a block takes, by its place in the model."""
        return self.steps if number else self.first * self.steps

    def fit(
        self,
        number: int,
        block: LoadedBlock,
        linears: Sequence[Linear],
        calls: Sequence[Call],
        given: Activations,
        wanted: Activations,
        following: Next | None = None,
    ) -> tuple[float, float]:
        """Fit the weights of a block that is loaded and pruned; its tensors are changed in place.

        Args:
            number: the block's place in the model.
            linears: those that are pruned.
            calls: what the block is called with, batch by batch.
            given: x, batch by batch (sequences, length, hidden).
            wanted: f(x₀; W), likewise.
            following: the block that is looked ahead to; None where there is none.

        Returns:
            The mean over all tokens of ‖f(x; Ŵ) − f(x₀; W)‖² / ‖f(x₀; W)‖², as `apart` takes it, before and after.
        """
        weights = _Weights(block, linears)
        distance = _Distance(weights, calls, given, wanted, following, self.ahead)
        own, aim = distance.mean()
        trained = weights.trained()
        if not trained:  # nothing is left to be fitted
            return own, own
        optimizer = torch.optim.Adam([{"params": [value]} for value, _ in trained], betas=(0.9, 0.99))
        order = torch.Generator().manual_seed(0)
        turn: list[int] = []
        steps = self.steps_of(number)
        for step in range(steps):
            pace = self.rate * (1 + math.cos(math.pi * step / steps)) / 2
            for group, (_, size) in zip(optimizer.param_groups, trained, strict=True):
                group["lr"] = pace * size
            turn = turn or torch.randperm(len(calls), generator=order).tolist()
            batch = turn.pop()
            with torch.enable_grad():  # the sum, not the mean: gradients for each token would be too small for float16
                (distance.of(batch).aim * distance.tokens(batch)).backward()  # type: ignore[no-untyped-call]
            weights.mask_gradients()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.state.clear()  # torch's optimizers stand in a circle of references, and would keep all they hold
        optimizer.param_groups.clear()
        weights.round()
        new, reached = distance.mean()
        if not reached < aim:
            return own, own
        weights.put_back()
        return own, new


class _Away(NamedTuple):
    """How far tokens are from where they should be, as a fraction of that: scalars.

    Attributes:
        own: behind the block itself.
        aim: what is minimised.
    """

    own: Tensor
    aim: Tensor


class _Distance:
    """What is minimised, batch by batch."""

    def __init__(
        self,
        weights: _Weights,
        calls: Sequence[Call],
        given: Activations,
        wanted: Activations,
        following: Next | None,
        ahead: float,
    ) -> None:
        self._weights, self._calls, self._given, self._wanted, self._share = weights, calls, given, wanted, ahead
        self._next = None
        if following is not None:
            self._next = Run(following.block.module, weights.numbers), following.calls

    def of(self, batch: int) -> _Away:
        """The means over the tokens of one batch."""
        wanted = self._wanted.read(batch)
        found = self._weights.run(self._calls[batch], self._given.read(batch))
        own = apart(found, wanted)
        if self._next is None:
            return _Away(own, own)
        run, calls = self._next
        with torch.no_grad():  # each time anew: kept, it would be a third set of states of all batches
            beyond = run(calls[batch], wanted)
        return _Away(own, torch.lerp(own, apart(run(calls[batch], found), beyond), self._share))

    def tokens(self, batch: int) -> int:
        """How many there are in a batch."""
        return self._wanted.read(batch).shape[:-1].numel()

    def mean(self) -> tuple[float, float]:
        """Both means over all tokens."""
        own = aim = 0.0
        counts = [self.tokens(batch) for batch in range(len(self._calls))]
        for batch, count in enumerate(counts):
            found = self.of(batch)
            own += count * float(found.own) / sum(counts)
            aim += count * float(found.aim) / sum(counts)
        return own, aim


class _Weights:
    """The weights of a block in float32, in which they are fitted, and what becomes of hidden states with them."""

    def __init__(self, block: LoadedBlock, linears: Sequence[Linear]) -> None:
        self._block = block
        running = block.module.state_dict(prefix=f"{block.name}.")
        device = next(iter(running.values())).device
        dtype = next(running[linear.parameter].dtype for linear in linears)
        self.numbers = Numbers(dtype, widens(device, dtype))
        self._keep: dict[str, Tensor] = {}
        for linear in linears:
            weight = block.state[linear.parameter]
            keep = self._keep.setdefault(linear.parameter, torch.zeros(weight.shape, dtype=torch.bool))
            linear.view(keep).copy_(linear.view(weight) != 0)
        self._keep = {name: keep for name, keep in self._keep.items() if bool(keep.any())}
        self._free = {name: block.state[name].to(device, torch.float32, copy=True) for name in self._keep}
        self._keep = {name: keep.to(device) for name, keep in self._keep.items()}
        self._run = Run(block.module, self.numbers, {self._inside(name) for name in self._keep})
        for value in self._free.values():
            value.requires_grad_()

    def trained(self) -> list[tuple[Tensor, float]]:
        """The weights, and the root mean square of those that are kept."""
        return [
            (value, float(value.detach()[self._keep[name]].square().mean().sqrt()))
            for name, value in self._free.items()
        ]

    def mask_gradients(self) -> None:
        """Let pruned weights, and those of linears that are left dense, stay where they are."""
        for name, value in self._free.items():
            if value.grad is not None:  # some experts see no token of a batch
                value.grad.mul_(self._keep[name])

    def run(self, call: Call, given: Tensor) -> Tensor:
        """What the block returns for a batch."""
        return self._run(call, given, {self._inside(name): value for name, value in self._free.items()})

    def round(self) -> None:
        """Take the weights as they will be stored."""
        for name, value in self._free.items():
            value.data.copy_(value.data.to(self._block.state[name].dtype))

    def put_back(self) -> None:
        """Put the weights into the block."""
        for name, value in self._free.items():
            kept = torch.where(self._keep[name], value.detach(), self._block.state[name].to(value))
            self._block.state[name].copy_(kept)
        self._block.refresh(self._free)

    def _inside(self, name: str) -> str:
        """The name of a parameter in the block's module."""
        return name.removeprefix(f"{self._block.name}.")
