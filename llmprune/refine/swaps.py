"""Swaps: one kept weight of a row goes, a pruned one comes back, as long as the row's error falls."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.matrix import product
from llmprune.parts import AT_ONCE, by_rows
from llmprune.patterns import Pattern
from llmprune.stats import LinearStats, Needs

_LOOK = 8
"""Swaps from one look at which rows are done to the next: it waits for the device."""

Choose = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From weight, mask, c and G to the places (rows, count) of weights to prune, and of those to bring back, to pair."""


@dataclass(frozen=True)
class Refiner:
    """The best exchange of a kept with a pruned weight of the same row, again and again (arXiv:2512.10922).

    With d the pruned part of a row w and c = G d, taking p out and u back in changes the row's error dᵀGd by exactly
    2 w_p c_p + w_p² G_pp − 2 w_u c_u + w_u² G_uu − 2 w_p w_u G_pu. A row is done when no pair at all makes it fall. For
    N:M both are of one group of M.

    Args:
        steps: swaps for each row at the most.
        candidates: how many of the kept weights that cost the least, and of the pruned ones that bring the most, are
            paired at first. Where none of these pairs helps any more, all are looked at, and as many of the kept
            weights with the best of them are paired until none of these helps either. Null to take the best of all
            pairs every time. N:M always does.
    """

    needs: ClassVar[Needs] = "gram"
    room: ClassVar[int] = 10 * 4 * AT_ONCE

    steps: int = 100
    candidates: int | None = 32

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if self.candidates is not None and self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, not {self.candidates}")

    @property
    def products(self) -> float:
        return 3 * self.steps

    def refine(self, weight: Tensor, keep: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        width = weight.shape[1]
        count = min(self.candidates or 1, width)
        pairs = width * pattern.group if pattern.group > 1 else count**2
        rows = max(1, AT_ONCE // max(pairs, 2 * width))
        return by_rows(lambda w, k: self._swapped(w, k, stats.gram, pattern.group, count), weight, keep, rows=rows)

    def _swapped(self, weight: Tensor, keep: Tensor, gram: Tensor, group: int, count: int) -> Tensor:
        least = -1e-6 * _errors(weight, keep, gram)  # less than this is rounding
        taken = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        if group > 1:
            return self._by(partial(_best_in_groups, group=group), 1, weight, keep, gram, least, taken)
        if self.candidates is not None:
            keep = self._by(partial(_likely, count=count), 1, weight, keep, gram, least, taken)
        often = 1 if self.candidates is None else _LOOK
        return self._by(partial(_best_of_all, count=count), often, weight, keep, gram, least, taken)

    def _by(
        self, choose: Choose, often: int, weight: Tensor, keep: Tensor, gram: Tensor, least: Tensor, taken: Tensor
    ) -> Tensor:
        """The mask after the best swaps of pairs that are chosen anew every so many swaps, until none of them helps.

        Args:
            often: 1 or `_LOOK`.
            least: (rows,) what a swap must change a row's error by.
            taken: (rows,) swaps that each row has had; those that follow are added.
        """
        result = keep.clone()
        here = (taken < self.steps).nonzero()[:, 0]
        weight, keep, least = weight[here], keep[here], least[here]
        pull = product(torch.where(keep, 0.0, weight), gram)  # c
        for step in itertools.count():
            if not len(here):
                return result
            if step % often == 0:
                outs, backs = choose(weight, keep, pull, gram)
            change, out, back = _best(weight, keep, pull, gram, outs, backs)
            better = (change < least) & (taken[here] < self.steps)
            if step % _LOOK == 0:
                result[here] = keep
                going = better.nonzero()[:, 0]
                if len(going) < len(here):
                    weight, keep, pull, least, here = (part[going] for part in (weight, keep, pull, least, here))
                    outs, backs, out, back, better = (part[going] for part in (outs, backs, out, back, better))
            taken[here] += better
            keep = keep.scatter(1, out, keep.gather(1, out) & ~better[:, None])
            keep = keep.scatter(1, back, keep.gather(1, back) | better[:, None])
            gone, come = (weight.gather(1, place) * better[:, None] for place in (out, back))
            pull = pull.addcmul(gram[out[:, 0]], gone).addcmul_(gram[back[:, 0]], come, value=-1)
        return result


def _errors(weight: Tensor, keep: Tensor, gram: Tensor) -> Tensor:
    """(rows,) dᵀGd of each row."""
    lost = torch.where(keep, 0.0, weight)
    return product(lost, gram).mul_(lost).sum(1)


def _singly(weight: Tensor, keep: Tensor, pull: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """What pruning each kept weight and bringing back each pruned one would change alone; infinite for the others."""
    square = weight.square() * gram.diagonal()
    cross = 2 * weight * pull
    return (square + cross).masked_fill_(~keep, torch.inf), (square - cross).masked_fill_(keep, torch.inf)


def _best(
    weight: Tensor, keep: Tensor, pull: Tensor, gram: Tensor, outs: Tensor, backs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the best change (rows,) of its error by a pair of these places, and the two places (rows, 1)."""
    cost, gain = (one.gather(1, at) for one, at in zip(_singly(weight, keep, pull, gram), (outs, backs), strict=True))
    together = gram[outs[:, :, None], backs[:, None, :]]
    together *= weight.gather(1, outs)[:, :, None] * weight.gather(1, backs)[:, None, :]
    table = (cost[:, :, None] + gain[:, None, :]).sub_(together, alpha=2)
    change, place = table.flatten(1).min(1)
    place, count = place[:, None], backs.shape[1]
    return change, outs.gather(1, place // count), backs.gather(1, place % count)


def _likely(weight: Tensor, keep: Tensor, pull: Tensor, gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The kept weights that cost the least, and the pruned ones that bring the most."""
    costs, gains = _singly(weight, keep, pull, gram)
    outs, backs = (one.topk(count, 1, largest=False, sorted=False).indices for one in (costs, gains))
    return outs, backs


def _best_of_all(weight: Tensor, keep: Tensor, pull: Tensor, gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The kept weights that are in the best of all pairs, and the other ones of these pairs."""
    kept = max(1, int(keep.sum(1).max()))
    rows = max(1, AT_ONCE // (kept * weight.shape[1]))
    both = by_rows(lambda w, k, c: _best_of_rows(w, k, c, gram, kept, count), weight, keep, pull, rows=rows)
    return both[:, 0], both[:, 1]


def _best_of_rows(weight: Tensor, keep: Tensor, pull: Tensor, gram: Tensor, kept: int, count: int) -> Tensor:
    """(rows, 2, count) as `_best_of_all`, of few rows, of which none keeps more than `kept`."""
    costs, gains = _singly(weight, keep, pull, gram)
    places = costs.topk(kept, 1, largest=False, sorted=False).indices
    best = costs.gather(1, places)
    width = max(1, AT_ONCE // weight.numel())
    for some, change in zip(torch.split(places, width, 1), torch.split(best, width, 1), strict=True):
        change += _with_each(weight, gains, gram, some).amin(2)
    outs = places.gather(1, best.topk(min(count, kept), 1, largest=False, sorted=False).indices)
    return torch.stack([outs, _with_each(weight, gains, gram, outs).argmin(2)], 1)


def _with_each(weight: Tensor, gains: Tensor, gram: Tensor, outs: Tensor) -> Tensor:
    """(rows, count, in) what bringing each weight back changes besides pruning alone, for each of these to prune."""
    table = gram.index_select(0, outs.flatten()).view(*outs.shape, -1)
    return table.mul_(weight[:, None]).mul_(-2 * weight.gather(1, outs)[:, :, None]).add_(gains[:, None])


def _best_in_groups(weight: Tensor, keep: Tensor, pull: Tensor, gram: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The best pair of each row inside the groups."""
    count = weight.shape[1] // group
    costs, gains = (part.reshape(-1, count, group) for part in _singly(weight, keep, pull, gram))
    blocks = gram.reshape(count, group, count, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = weight.reshape(-1, count, group)
    table = (parts[..., :, None] * parts[..., None, :]).mul_(blocks).mul_(-2)
    table.add_(costs[..., :, None]).add_(gains[..., None, :])
    place = table.flatten(1).argmin(1, keepdim=True)
    first = place // group**2 * group
    return first + place % group**2 // group, first + place % group
