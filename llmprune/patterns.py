"""Which weights may stay: a pattern turns a saliency matrix into a mask.

The last dimension is always the linear's inputs: a saliency has the shape (out_features, in_features).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args

import numpy
import torch
from torch import Tensor

from llmprune.errors import UserError
from llmprune.parts import some_rows, zeros

Scope = Literal["row", "matrix"]
_FEW = 2**18
"""Weights of N:M groups that are few enough to compare all with all at once."""

_MANY = 2**24
"""Weights whose order takes too much memory."""

SCOPES: tuple[str, ...] = get_args(Scope)


class Pattern(Protocol):
    """A frozen rule for where zeros may stand."""

    @property
    def sparsity(self) -> float:
        """The fraction of weights that are pruned."""

    @property
    def row_independent(self) -> bool:
        """Whether each row's mask depends on that row alone, so that linears can be solved as one stack of rows."""

    @property
    def group(self) -> int:
        """Consecutive inputs that are chosen from together: M of N:M, 1 otherwise."""

    def keep(self, saliency: Tensor, before: int = 0) -> Tensor:
        """Mask of the weights to keep.

        Args:
            saliency: (out, in), any float dtype, the higher the more worth keeping; all inputs, or a block of them.
            before: inputs that stand before the block; counts are such that the blocks add up to the whole.

        Returns:
            (out, in) bool, True = kept. Ties are broken by position (the earlier weight is pruned by `Unstructured`,
            the later one by `NM`), so that the same saliency gives the same mask everywhere.
        """

    def holds(self, weight: Tensor) -> bool:
        """Whether a pruned (out, in) weight has the zeros that this pattern promises."""

    def count(self, shape: tuple[int, int]) -> int:
        """How many zeros an (out, in) weight gets."""


@dataclass(frozen=True)
class Unstructured:
    """Prune the given fraction of weights wherever they are.

    Args:
        sparsity: fraction of zeros, in (0, 1).
        scope: what the fraction is counted over: each `row` (one output neuron), or the whole `matrix`.
        up: whether a fraction of a weight is rounded up. The published rules round down.
    """

    sparsity: float
    scope: Scope = "row"
    up: bool = False
    group = 1

    @property
    def row_independent(self) -> bool:
        return self.scope == "row"

    def _pruned(self, count: int) -> int:
        share = self.sparsity * count  # the small constant keeps 0.29 * 100 at 29
        return math.ceil(share - 1e-6) if self.up else math.floor(share + 1e-6)

    def keep(self, saliency: Tensor, before: int = 0) -> Tensor:
        rows, width = saliency.shape
        if self.scope == "row":
            return ~_lowest(saliency, self._pruned(before + width) - self._pruned(before), -1)
        return ~_lowest(saliency, self._pruned(rows * (before + width)) - self._pruned(rows * before), None)

    def divided(self, rows: int, width: int, first: int) -> tuple[Unstructured, Unstructured]:
        """The same number of zeros in a (rows, width) weight, as many of them as can be in `first` of its inputs.

        Returns:
            What that is for these inputs, and for the others.
        """
        rows = 1 if self.scope == "row" else rows
        total = self._pruned(rows * width)
        here = min(total, rows * first)
        shares = here / max(1, rows * first), (total - here) / max(1, rows * (width - first))
        return Unstructured(shares[0], self.scope), Unstructured(shares[1], self.scope)

    def holds(self, weight: Tensor) -> bool:
        if self.scope == "row":
            pruned = self._pruned(weight.shape[-1])
            return all(bool(((rows == 0).sum(-1) >= pruned).all()) for rows in some_rows(weight))
        return zeros(weight) >= self._pruned(weight.numel())

    def count(self, shape: tuple[int, int]) -> int:
        rows, width = shape
        return rows * self._pruned(width) if self.scope == "row" else self._pruned(rows * width)

    def __str__(self) -> str:
        return f"{self.sparsity * 100:g}%"


@dataclass(frozen=True)
class NM:
    """N:M semi-structured sparsity: at most `n` of every `m` consecutive inputs are kept, in every row."""

    n: int
    m: int
    scope: ClassVar[Scope] = "row"
    row_independent = True

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @property
    def group(self) -> int:
        return self.m

    def keep(self, saliency: Tensor, before: int = 0) -> Tensor:
        parts = some_rows(saliency)
        return torch.cat([self._kept(rows) for rows in parts]) if len(parts) > 1 else self._kept(saliency)

    def _kept(self, saliency: Tensor) -> Tensor:
        # (m, out, groups): the weights of one place lie together, which is several times as fast.
        places = saliency.reshape(*saliency.shape[:-1], -1, self.m).movedim(-1, 0).contiguous()
        # How many of its group stand before each weight: the greater ones, and among equals the earlier ones.
        if places.device.type != "cpu" and places.numel() <= _FEW:  # what counts there is how many kernels are started
            earlier = torch.ones(self.m, self.m, dtype=torch.bool, device=places.device).tril(-1)
            each, other = places[:, None], places[None]
            before = (other > each) | ((other == each) & earlier[..., None, None])
            return (before.sum(1) < self.n).movedim(0, -1).reshape(saliency.shape)
        rivals = torch.zeros_like(places, dtype=torch.int16)
        for place, rival in enumerate(places):
            rivals[:place] += rival > places[:place]
            rivals[place + 1 :] += rival >= places[place + 1 :]
        return (rivals < self.n).movedim(0, -1).reshape(saliency.shape)

    def holds(self, weight: Tensor) -> bool:
        parts = (rows.reshape(len(rows), -1, self.m) for rows in some_rows(weight))
        return all(bool(((groups != 0).sum(-1) <= self.n).all()) for groups in parts)

    def count(self, shape: tuple[int, int]) -> int:
        rows, width = shape
        return rows * (width // self.m) * (self.m - self.n)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Columns:
    """Whole inputs of a linear go, in all rows: `kept` units of them stay, each of as many consecutive inputs.

    Args:
        kept: units that stay.
        units: how many there are.
        what: a word for them: channels, heads.
    """

    kept: int
    units: int
    what: str = "channels"
    scope: ClassVar[Scope] = "matrix"
    row_independent = False
    group = 1

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.units

    def inputs(self, width: int) -> Tensor:
        """(units, each) the inputs of each unit, of a linear that has so many."""
        return torch.arange(width).view(self.units, -1)

    def keep(self, saliency: Tensor, before: int = 0) -> Tensor:
        if before or saliency.shape[1] % self.units:
            raise ValueError(f"{saliency.shape[1]} inputs are no {self.units} whole {self.what}")
        stays = self.of_scores(saliency.sum(0).view(self.units, -1).sum(1))
        return stays.repeat_interleave(saliency.shape[1] // self.units).expand_as(saliency)

    def of_scores(self, scores: Tensor) -> Tensor:
        """(units,) bool, the units that stay by (units,) scores; among equals the later ones."""
        return ~_lowest(scores[None].float(), self.units - self.kept, -1)[0]

    def staying(self, weight: Tensor) -> Tensor:
        """(units,) bool, the units that a pruned (out, in) weight has left; as many as should be, whatever is zero."""
        return self.of_scores(weight.detach().abs().amax(0).view(self.units, -1).amax(1).cpu())

    def holds(self, weight: Tensor) -> bool:
        alive = (weight != 0).any(0).view(self.units, -1).any(1)
        return int(alive.sum()) <= self.kept

    def count(self, shape: tuple[int, int]) -> int:
        rows, width = shape
        return rows * (self.units - self.kept) * (width // self.units)

    def __str__(self) -> str:
        return f"{self.kept:,} of {self.units:,} {self.what}"


def keep_more(pattern: Pattern, saliency: Tensor, part: float) -> Tensor:
    """A mask on the way to that of a pattern: of what it would prune only the lowest part is.

    Args:
        saliency: (out, in), as for `Pattern.keep`.
        part: of the pattern's sparsity, in [0, 1]; at 1 the mask is the pattern's own.
    """
    if part >= 1:
        return pattern.keep(saliency)
    rule = Unstructured(part * pattern.sparsity, "row" if pattern.row_independent else "matrix")
    if pattern.group == 1:  # the lowest of the lowest are the lowest of all
        return rule.keep(saliency)
    return rule.keep(saliency.masked_fill(pattern.keep(saliency), torch.inf))


def parse(text: str | float | Pattern, scope: Scope = "row") -> Unstructured | NM:
    """Read a pattern: `2:4`, `4:8`, any `N:M`, `0.5`, or `50%`.

    Args:
        text: the pattern as written by a user, or a pattern, which is returned unchanged.
        scope: for an unstructured pattern, what its fraction is counted over.

    Raises:
        UserError: the text is no pattern, or its numbers make no sense.
    """
    if isinstance(text, Unstructured | NM):
        return text
    if scope not in SCOPES:
        raise UserError(f"scope {scope!r} is not one of {', '.join(SCOPES)}")
    written = str(text).strip()
    if found := re.fullmatch(r"(\d+):(\d+)", written):
        n, m = int(found[1]), int(found[2])
        if not 0 < n < m:
            raise UserError(f"sparsity {written}: N:M keeps at most N of every M weights, so 0 < N < M must hold")
        return NM(n, m)
    try:
        value = float(written.removesuffix("%")) / (100 if written.endswith("%") else 1)
    except ValueError:
        raise UserError(f"sparsity {written!r} is not understood: write 2:4, 4:8, 0.5 or 50%") from None
    if not 0 < value < 1:
        hint = f" (did you mean {value:g}%?)" if 1 <= value < 100 and not written.endswith("%") else ""
        raise UserError(f"sparsity {written!r} must lie between 0 and 1, or 0% and 100%{hint}")
    return Unstructured(value, scope)


def _lowest(saliency: Tensor, count: int, dim: int | None) -> Tensor:
    """True at the `count` lowest of each row (dim -1) or of all (dim None); among equals at the earlier ones."""
    if count == 0:
        return torch.zeros_like(saliency, dtype=torch.bool)
    if dim is None:
        return _lowest_of_all(saliency, count)
    found = torch.empty_like(saliency, dtype=torch.bool)
    for rows, lowest in zip(some_rows(saliency), some_rows(found), strict=True):
        threshold = _nth(rows, count)
        torch.lt(rows, threshold, out=lowest)
        equal = rows == threshold
        short = count - lowest.sum(-1, keepdim=True)
        if saliency.device.type == "cpu" and bool((equal.sum(-1, keepdim=True) == short).all()):
            lowest.logical_or_(equal)
        else:
            lowest.logical_or_(equal & (equal.cumsum(-1) <= short))
    return found


def _lowest_of_all(saliency: Tensor, count: int) -> Tensor:
    if saliency.device.type != "cpu" and saliency.numel() <= _MANY:
        return _first_in_order(saliency, count)
    # The order does not matter for the threshold: no copy is made where rows and columns are swapped in memory.
    flat = saliency if saliency.is_contiguous() else saliency.T
    threshold = _nth(flat.reshape(1, -1), count).squeeze()
    below, equal = saliency < threshold, saliency == threshold
    missing = count - int(below.count_nonzero())
    if int(equal.count_nonzero()) == missing:
        return below.logical_or_(equal)
    first = equal.flatten().nonzero()[:missing, 0]
    below[first // saliency.shape[1], first % saliency.shape[1]] = True
    return below


def _first_in_order(saliency: Tensor, count: int) -> Tensor:
    """The same by sorting all of it: on a GPU nothing waits for numbers to come back to the host."""
    lowest = saliency.flatten().sort(stable=True).indices[:count]
    found = torch.zeros(saliency.numel(), dtype=torch.bool, device=saliency.device)
    return found.index_fill_(0, lowest, True).view_as(saliency)


def _nth(values: Tensor, count: int) -> Tensor:
    """(rows, 1) the `count`th lowest value of each row."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        # On a CPU numpy's selection is many times as fast as torch's.
        sorted_there = numpy.partition(values.detach().numpy(), count - 1, axis=-1)
        return torch.from_numpy(sorted_there[:, count - 1 : count].copy())
    if len(values) == 1 and values.numel() <= _MANY:  # torch's selection on a GPU has one group of threads for a row
        return values.sort(dim=-1).values[:, count - 1 : count]
    return values.kthvalue(count, dim=-1, keepdim=True).values
