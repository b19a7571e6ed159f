"""Swaps: one kept weight of a row goes, a pruned one comes back, as long as the row's error falls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.matrix import product
from llmprune.parts import AT_ONCE, by_rows
from llmprune.patterns import Pattern
from llmprune.stats import LinearStats, Needs


@dataclass(frozen=True)
class Refiner:
    """The best exchange of a kept with a pruned weight of the same row, again and again (arXiv:2512.10922).

    With d the pruned part of a row w and c = G d, taking p out and u back in changes the row's error dᵀGd by exactly
    2 w_p c_p + w_p² G_pp − 2 w_u c_u + w_u² G_uu − 2 w_p w_u G_pu. A row is done when no pair makes it fall. For N:M
    both are of one group of M.

    Args:
        steps: swaps for each row at the most.
        candidates: how many of the kept weights that cost the least, and of the pruned ones that bring the most, are
            paired; null for all, which takes (in / candidates)² times as long. N:M always looks at all.
    """

    needs: ClassVar[Needs] = "gram"
    room: ClassVar[int] = 8 * 4 * AT_ONCE

    steps: int = 100
    candidates: int | None = 32

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if self.candidates is not None and self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, not {self.candidates}")

    @property
    def products(self) -> float:
        return self.steps

    def refine(self, weight: Tensor, keep: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        width = weight.shape[1]
        pairs = width * pattern.group if pattern.group > 1 else min(self.candidates or width, width) ** 2
        rows = max(1, AT_ONCE // max(pairs, width))
        return by_rows(lambda w, k: self._swapped(w, k, stats.gram, pattern.group), weight, keep, rows=rows)

    def _swapped(self, weight: Tensor, keep: Tensor, gram: Tensor, group: int) -> Tensor:
        result = keep.clone()
        lost = torch.where(keep, 0.0, weight)
        pull = product(lost, gram)  # c
        least = -1e-6 * (lost * pull).sum(1)  # less than this is rounding
        here = torch.arange(len(weight), device=weight.device)
        for step in range(self.steps):
            change, out, back = (
                _best_in_groups(weight, keep, pull, gram, group) if group > 1 else self._best(weight, keep, pull, gram)
            )
            better = change < least
            if step % 8 == 7 or step == 0:  # rows that are done are let go, now and then: it waits for the device
                going = better.nonzero()[:, 0]
                result[here] = keep
                if not len(going):
                    return result
                if len(going) < 0.8 * len(here):
                    weight, keep, pull, least, here = (part[going] for part in (weight, keep, pull, least, here))
                    out, back, better = out[going], back[going], better[going]
            out, back = out[:, None], back[:, None]
            keep = keep.scatter(1, out, keep.gather(1, out) & ~better[:, None])
            keep = keep.scatter(1, back, keep.gather(1, back) | better[:, None])
            gone, come = (weight.gather(1, place) * better[:, None] for place in (out, back))
            pull = pull.addcmul(gram[out[:, 0]], gone).addcmul_(gram[back[:, 0]], come, value=-1)
        result[here] = keep
        return result

    def _best(self, weight: Tensor, keep: Tensor, pull: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each row the best change of its error, and the places of the weights to prune and to bring back."""
        costs, gains = _singly(weight, keep, pull, gram)
        count = min(self.candidates or weight.shape[1], weight.shape[1])
        cost, out = costs.topk(count, 1, largest=False, sorted=False)
        gain, back = gains.topk(count, 1, largest=False, sorted=False)
        together = gram[out[:, :, None], back[:, None, :]]
        together *= weight.gather(1, out)[:, :, None] * weight.gather(1, back)[:, None, :]
        table = (cost[:, :, None] + gain[:, None, :]).sub_(together, alpha=2)
        change, place = table.flatten(1).min(1)
        place = place[:, None]
        return change, out.gather(1, place // count)[:, 0], back.gather(1, place % count)[:, 0]


def _singly(weight: Tensor, keep: Tensor, pull: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """What pruning each kept weight and bringing back each pruned one would change alone; infinite for the others."""
    square = weight.square() * gram.diagonal()
    cross = 2 * weight * pull
    return (square + cross).masked_fill_(~keep, torch.inf), (square - cross).masked_fill_(keep, torch.inf)


def _best_in_groups(
    weight: Tensor, keep: Tensor, pull: Tensor, gram: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `Refiner._best`, over all pairs inside the groups."""
    count = weight.shape[1] // group
    costs, gains = (part.reshape(-1, count, group) for part in _singly(weight, keep, pull, gram))
    blocks = gram.reshape(count, group, count, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = weight.reshape(-1, count, group)
    table = (parts[..., :, None] * parts[..., None, :]).mul_(blocks).mul_(-2)
    table.add_(costs[..., :, None]).add_(gains[..., None, :])
    change, place = table.flatten(1).min(1)
    first = place // group**2 * group
    return change, first + place % group**2 // group, first + place % group
