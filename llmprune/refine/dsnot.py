"""DSnoT: weights are exchanged so that the mean of a row's output comes back to where it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.parts import AT_ONCE, by_rows
from llmprune.patterns import Pattern
from llmprune.stats import LinearStats, Needs


@dataclass(frozen=True)
class Refiner:
    """Dynamic sparse no training (arXiv:2310.08915).

    The pruned weights of a row take e = Σ W_j mean(X_j) from its mean output. In each cycle the pruned weight that
    lowers |e| most, by W_j mean(X_j) / var(X_j)^power, comes back, and of the kept weights whose loss lowers |e| too
    the one with the smallest |W_j|·‖X_j‖₂ goes. A row is done when |e| is at most `threshold`, or e has changed its
    sign. For N:M both are of one group of M.

    Args:
        cycles: exchanges for each row at the most.
        threshold: of |e|, in the units of the linear's output.
        power: of the variance.
    """

    needs: ClassVar[Needs] = "norms"
    room: ClassVar[int] = 8 * 4 * AT_ONCE

    cycles: int = 50
    threshold: float = 0.1
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise ValueError(f"cycles must be at least 1, not {self.cycles}")
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, not {self.threshold}")

    @property
    def products(self) -> float:
        return self.cycles / 4

    def refine(self, weight: Tensor, keep: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        if stats.tokens == 0:
            return keep
        return by_rows(lambda part, kept: self._exchanged(part, kept, stats, pattern), weight, keep)

    def _exchanged(self, weight: Tensor, keep: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        flow = weight * stats.means  # (out, in): what each weight adds to the mean output
        worth = weight.abs() * stats.norms
        spread = stats.variances.pow(self.power)
        lost = torch.where(keep, 0.0, flow).sum(1, keepdim=True)  # e
        sign = lost.sign()
        steady = torch.where(spread > 0, 1 / spread, 0.0)
        keep = keep.clone()
        for _ in range(self.cycles):
            going = (lost.abs() > self.threshold) & (lost.sign() == sign)
            if not bool(going.any()):
                break
            toward = sign * flow  # above 0: bringing it back lowers |e|, and pruning it raises |e|
            gain = torch.where(~keep & (toward > 0), toward * steady, -torch.inf)
            cost = torch.where(keep & (toward < 0), worth, torch.inf)
            back, out = _pair(gain, cost, pattern.group)
            possible = going & (gain.gather(1, back) > -torch.inf) & (cost.gather(1, out) < torch.inf)
            if not bool(possible.any()):
                break
            keep.scatter_(1, back, keep.gather(1, back) | possible)
            keep.scatter_(1, out, keep.gather(1, out) & ~possible)
            lost = lost + possible * (flow.gather(1, out) - flow.gather(1, back))
            sign = torch.where(possible, sign, 0.0)  # a row that finds no pair is done
        return keep


def _pair(gain: Tensor, cost: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(rows, 1) places of the best weight to bring back, and of the best to prune: in its group where there are any."""
    if group == 1:
        return gain.argmax(1, keepdim=True), cost.argmin(1, keepdim=True)
    whole = gain.reshape(len(gain), -1, group), cost.reshape(len(cost), -1, group)
    both = (whole[0] > -torch.inf).any(2) & (whole[1] < torch.inf).any(2)  # groups that have one of each
    gain = whole[0].masked_fill(~both[..., None], -torch.inf).flatten(1)
    back = gain.argmax(1, keepdim=True)
    chosen = whole[1].gather(1, (back // group)[..., None].expand(-1, -1, group))[:, 0]
    return back, back // group * group + chosen.argmin(1, keepdim=True)
