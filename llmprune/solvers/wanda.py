"""Wanda: weights are ranked by their size times the norm of what flows through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.patterns import Pattern, Scope
from llmprune.solvers import Buffers
from llmprune.stats import LinearStats, Needs


@dataclass(frozen=True)
class Solver:
    """Saliency |W_ij|·‖X_j‖₂, compared within a row, weights not updated (arXiv:2306.11695)."""

    needs: ClassVar[Needs] = "norms"
    scope: ClassVar[Scope] = "row"
    updates: ClassVar[bool] = False
    row_independent: ClassVar[bool] = True
    products: ClassVar[float] = 0
    buffers: ClassVar[Buffers] = Buffers()

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        return weight * pattern.keep(stats.ranked(weight.abs() * stats.norms, weight))
