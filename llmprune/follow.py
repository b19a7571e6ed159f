"""The dense model's hidden states, all or a sample of them, which go through the blocks beside the pruned one's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from llmprune import distributed
from llmprune.budget import SAMPLE
from llmprune.model import blocks
from llmprune.model.activations import Activations, Call, Slim, apart
from llmprune.model.checkpoint import Checkpoint
from llmprune.plan import Plan


class DenseWay:
    """The way of the dense model's states: through each block as it was, and through those that were taken out."""

    def __init__(self, whole: Checkpoint, kept: Sequence[int] | None, hidden: Sequence[int] | None = None) -> None:
        """Nothing is run yet.

        Args:
            whole: the dense model.
            kept: the numbers of its blocks that are left; None where all are.
            hidden: likewise of its hidden channels.
        """
        self._left = range(len(whole.blocks)) if kept is None else kept
        self._whole, self._hidden = whole, hidden
        self._gaps = [range(before + 1, after) for before, after in pairwise((-1, *self._left, len(whole.blocks)))]
        self._calls: list[list[Call]] = []

    def start(self, plan: Plan, beside: Activations, batches: Sequence[Tensor], folder: Path) -> Activations:
        """The states in front of the first block that is left.

        Args:
            beside: those of the pruned model.
            batches: token ids (sequences, length) each, the first or all of those.
            folder: where they may be kept.
        """
        if not any(self._gaps) and self._hidden is None:
            return beside.twin(len(batches))
        wanted = blocks.start(self._whole, plan.chain, batches, plan.schedule.place, folder)
        self._calls, wanted.calls = wanted.calls, []
        self._cross(-1, wanted)
        return wanted if self._hidden is None else Slim(wanted, torch.tensor(self._hidden))

    def lost(self, number: int) -> bool:
        """Whether anything went behind a block that is left, or with −1 in front of all."""
        return len(self._gaps[number + 1]) > 0 or self._hidden is not None

    def follow(
        self,
        checkpoint: Checkpoint,
        number: int,
        calls: Sequence[Call],
        wanted: Activations,
        through: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Take the states through a block that is loaded and dense, and up to the next that is left.

        Args:
            checkpoint: what is pruned.
            number: of the block in it.
            calls: what it is called with, batch by batch; the states may be of the first of them alone.
            through: what it returns for a batch; by default it is run.
        """
        if isinstance(wanted, Slim):  # what is loaded has fewer
            wanted = wanted.whole
            self._through(self._left[number], wanted)
        else:
            blocks.pass_through(checkpoint, number, calls[: len(wanted)], wanted, through)
        self._cross(number, wanted)

    def _cross(self, number: int, wanted: Activations) -> None:
        for gone in self._gaps[number + 1]:
            self._through(gone, wanted)

    def _through(self, number: int, wanted: Activations) -> None:
        """Take the states through a block of the whole model that is not loaded."""
        self._whole.load_block(number)
        blocks.pass_through(self._whole, number, self._calls[number], wanted)
        self._whole.unload_block(number)
        self._calls[number].clear()


def drift(found: Activations, wanted: Activations) -> float:
    """How far the pruned model's states are from the dense one's: `apart`, over the sample of all ranks."""
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in range(min(SAMPLE, len(wanted))):
        target = wanted.read(batch)
        tokens = target.shape[:-1].numel()
        sums += torch.tensor([tokens * float(apart(found.read(batch), target)), tokens], dtype=torch.float64)
    distributed.total(sums)
    return float(sums[0] / sums[1])
