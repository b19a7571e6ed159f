"""Prunes a linear of which it is known which units of its inputs go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.patterns import Columns, Pattern, Scope
from llmprune.solvers import Buffers
from llmprune.stats import LinearStats, Needs


class Untouched:
    """A way to choose columns that looks at no inputs of its own, and leaves the weights of what stays as they are."""

    needs: ClassVar[Needs] = "norms"  # to tell the error on its inputs
    scope: ClassVar[Scope] = "matrix"
    updates: ClassVar[bool] = False
    row_independent: ClassVar[bool] = False
    products: ClassVar[float] = 0
    buffers: ClassVar[Buffers] = Buffers()


@dataclass(frozen=True)
class Knowing(Untouched):
    """Units of a linear's inputs go that were chosen before; no updates.

    Args:
        gone: their numbers.
        tokens: how many were seen to reach the linear when they were chosen.
    """

    gone: frozenset[int]
    tokens: int

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        """Zero the inputs of the units that go."""
        assert isinstance(pattern, Columns)
        inputs = pattern.inputs(weight.shape[1])[sorted(self.gone)].flatten().to(weight.device)
        return weight.index_fill(1, inputs, 0.0) if len(inputs) else weight.clone()
