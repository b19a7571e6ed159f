"""Wanda: units are ranked by the sizes of their weights times the norms of what flows through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.patterns import Pattern, Scope
from llmprune.solvers import Buffers
from llmprune.stats import LinearStats, Needs
from llmprune.structured.width import columns, without


@dataclass(frozen=True)
class Solver:
    """A unit's score is Σ|W_ij|·‖X_j‖₂ over all rows and its inputs, weights not updated (Wanda-sp of 2312.11983)."""

    needs: ClassVar[Needs] = "norms"
    scope: ClassVar[Scope] = "matrix"
    updates: ClassVar[bool] = False
    row_independent: ClassVar[bool] = False
    products: ClassVar[float] = 0
    buffers: ClassVar[Buffers] = Buffers()

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        inputs = weight.abs().sum(0) * stats.norms
        return without(weight, pattern, inputs.view(columns(pattern).units, -1).sum(1))
