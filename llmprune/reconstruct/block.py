"""Block: the kept weights of a whole block are fitted to what the dense block makes of the dense model's states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmprune.model import blocks
from llmprune.model.activations import Activations, Call
from llmprune.model.checkpoint import LoadedBlock
from llmprune.model.cpu import widens
from llmprune.model.linears import Linear
from llmprune.stats import Needs


@dataclass(frozen=True)
class Reconstructor:
    """Adam on ‖f(x; Ŵ) − f(x₀; W)‖² / ‖f(x₀; W)‖² of each token, mask frozen (as arXiv:2510.14444, on whole blocks).

    x are the hidden states that come out of the pruned blocks before this one, x₀ those of the dense model, so that
    what earlier blocks lost is made up for. Each token counts as much as any other, however large its states are: a
    few with massive activations would else be nearly all there is from some block on. A step takes one batch of the
    calibration; its size falls to nothing in a half cosine. A block that it does not bring nearer to the dense one is
    left as it was. More and longer steps come nearer on the calibration, and on 32 x 1,024 tokens of it they are worse
    elsewhere.

    Args:
        steps: of Adam for each block.
        rate: the first step's size, as a fraction of the root mean square of a matrix's kept weights.
    """

    needs: ClassVar[Needs] = "norms"

    steps: int = 64
    rate: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0, not {self.rate}")

    def fit(
        self,
        block: LoadedBlock,
        linears: Sequence[Linear],
        calls: Sequence[Call],
        given: Activations,
        wanted: Activations,
    ) -> tuple[float, float]:
        """Fit the weights of a block that is loaded and pruned; its tensors are changed in place.

        Args:
            linears: those that are pruned.
            calls: what the block is called with, batch by batch.
            given: x, batch by batch (sequences, length, hidden).
            wanted: f(x₀; W), likewise.

        Returns:
            The mean over all tokens of ‖f(x; Ŵ) − f(x₀; W)‖² / ‖f(x₀; W)‖², before and after.
        """
        weights = _Weights(block, linears)
        before = weights.error(calls, given, wanted)
        optimizer = torch.optim.Adam(
            [{"params": [value], "lr": self.rate * size} for value, size in weights.trained()], betas=(0.9, 0.99)
        )
        pace = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        order = torch.Generator().manual_seed(0)
        turn: list[int] = []
        for _ in range(self.steps):
            turn = turn or torch.randperm(len(calls), generator=order).tolist()
            batch = turn.pop()
            with torch.enable_grad():
                weights.loss(calls[batch], given.read(batch), wanted.read(batch)).backward()  # type: ignore[no-untyped-call]
            weights.mask_gradients()
            optimizer.step()
            optimizer.zero_grad()
            pace.step()
        weights.round()
        after = weights.error(calls, given, wanted)
        if after < before:
            weights.put_back()
        return before, min(before, after)


class _Weights:
    """The weights of a block in the dtype that they are fitted in, and what becomes of hidden states with them."""

    def __init__(self, block: LoadedBlock, linears: Sequence[Linear]) -> None:
        self._block, prefix = block, f"{block.name}."
        running = block.module.state_dict(prefix=prefix)
        device = next(iter(running.values())).device
        self._dtype = next(running[linear.parameter].dtype for linear in linears)
        self._wide = widens(device, self._dtype)
        self._keep: dict[str, Tensor] = {}
        for linear in linears:
            weight = block.state[linear.parameter]
            keep = self._keep.setdefault(linear.parameter, torch.zeros(weight.shape, dtype=torch.bool))
            linear.view(keep).copy_(linear.view(weight) != 0)
        self._free = {name: block.state[name].to(device, torch.float32, copy=True) for name in self._keep}
        self._keep = {name: keep.to(device) for name, keep in self._keep.items()}
        self._others = {name: self._cast(value) for name, value in running.items() if name not in self._keep}
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
            assert value.grad is not None
            value.grad.mul_(self._keep[name])

    def loss(self, call: Call, given: Tensor, wanted: Tensor) -> Tensor:
        """Of one batch: the mean over its tokens of how far each is from what is wanted, as a fraction of that."""
        target = wanted.float()
        lost = (self._run(call, given).float() - target).square().sum(-1)
        size = target.square().sum(-1)
        return (lost / size.masked_fill_(size == 0, torch.inf)).mean()  # a padding token's states may be zero

    def error(self, calls: Sequence[Call], given: Activations, wanted: Activations) -> float:
        """Of all batches."""
        lost, tokens = 0.0, 0
        for batch, call in enumerate(calls):
            count = wanted.read(batch).shape[:-1].numel()
            lost += count * float(self.loss(call, given.read(batch), wanted.read(batch)))
            tokens += count
        return lost / tokens

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

    def _run(self, call: Call, given: Tensor) -> Tensor:
        prefix = len(self._block.name) + 1
        weights = {name[prefix:]: self._cast(value) for name, value in (*self._others.items(), *self._free.items())}
        return blocks.run(self._block.module, self._cast(call), self._cast(given), weights)

    def _cast(self, value: Any) -> Any:
        """Tensors in the dtype that is run in, wherever they are; float32 on a CPU that has no products in it."""
        if isinstance(value, Tensor):
            if value.dtype == self._dtype:
                return value.float() if self._wide else value
            return value.to(self._dtype) if value.requires_grad and not self._wide else value
        if isinstance(value, Call):
            return Call(self._cast(value.args), self._cast(value.kwargs))
        if isinstance(value, list | tuple):
            return type(value)(self._cast(item) for item in value)
        if isinstance(value, Mapping):
            return {key: self._cast(item) for key, item in value.items()}
        return value
