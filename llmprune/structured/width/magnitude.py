"""Magnitude: units are ranked by the sizes of their weights alone."""

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
    """A unit's score is Σ|W_ij| over all rows i and its inputs j; weights are not updated."""

    needs: ClassVar[Needs] = "nothing"
    scope: ClassVar[Scope] = "matrix"
    updates: ClassVar[bool] = False
    row_independent: ClassVar[bool] = False
    products: ClassVar[float] = 0
    buffers: ClassVar[Buffers] = Buffers()

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        return without(weight, pattern, weight.abs().sum(0).view(columns(pattern).units, -1).sum(1))
