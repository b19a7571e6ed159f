"""Magnitude pruning: the smallest weights go, no data is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.patterns import Pattern, Scope
from llmprune.solvers import Buffers
from llmprune.stats import LinearStats, Needs


@dataclass(frozen=True)
class Solver:
    """Saliency |W|, weights not updated. The published baseline counts over the matrix (as in arXiv:2306.11695)."""

    needs: ClassVar[Needs] = "nothing"
    scope: ClassVar[Scope] = "matrix"
    updates: ClassVar[bool] = False
    row_independent: ClassVar[bool] = True
    products: ClassVar[float] = 0
    buffers: ClassVar[Buffers] = Buffers()

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        return weight * pattern.keep(weight.abs())
