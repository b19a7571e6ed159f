"""The norms of what linears are given, and nothing else of it: for what is decided before a block is solved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from llmprune import distributed
from llmprune.model.linears import Linear
from llmprune.model.watch import Shown, Watch
from llmprune.stats import sums_dtype


class Norms(Watch):
    """Adds up the squares of what linears are given, over all batches of all ranks."""

    def __init__(self, linears: Iterable[Linear], groups: Iterable[Sequence[str]], device: torch.device) -> None:
        """Nothing is seen yet.

        Args:
            linears: those that are of interest.
            groups: names of linears that are given the same tensor, of which one sum is kept; others are left out.
        """
        super().__init__(linears)
        self._groups = [names for group in groups if (names := [name for name in group if name in self.linears])]
        self._squares = {
            names[0]: torch.zeros(self.linears[names[0]].shape[1], device=device, dtype=sums_dtype(device))
            for names in self._groups
        }
        self._tokens = dict.fromkeys(self._squares, 0)

    def ready(self, inputs: Shown) -> None:
        """Take in the inputs of linears."""
        for names, tensor in inputs.items():
            for name in self._squares.keys() & names:
                x = tensor().reshape(-1, len(self._squares[name]))
                self._squares[name] += x.float().square().sum(0)
                self._tokens[name] += len(x)

    def finish(self) -> dict[str, Tensor]:
        """By the names of the linears the root mean square (in,) of each input; none where no token was seen."""
        norms = {}
        for names in self._groups:
            squares = self._squares[names[0]]
            count = torch.tensor([self._tokens[names[0]]], device=squares.device)
            distributed.total(count, squares)
            if int(count):
                norms.update(dict.fromkeys(names, (squares / count).sqrt().float()))
        return norms
