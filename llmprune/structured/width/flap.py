"""FLAP: units are ranked by how much what flows through them fluctuates around its mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.patterns import Pattern, Scope
from llmprune.solvers import Buffers
from llmprune.stats import LinearStats, Needs


@dataclass(frozen=True)
class Solver:
    """A unit's saliency is Σ Var(X_j)·‖W_:j‖₂² over its inputs, weights not updated (WIFV of FLAP, arXiv:2312.11983).

    The published method puts what goes on average through the pruned inputs into a bias, which most models have no
    place for; that part is left out.
    """

    needs: ClassVar[Needs] = "norms"
    scope: ClassVar[Scope] = "matrix"
    updates: ClassVar[bool] = False
    row_independent: ClassVar[bool] = False
    products: ClassVar[float] = 0
    buffers: ClassVar[Buffers] = Buffers()

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        return weight * pattern.keep(weight.square() * stats.variances)
