"""Taylor: those units go whose gates the model's loss feels the least, by its gradient through all blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.patterns import Columns, Pattern, Scope
from llmprune.solvers import Buffers
from llmprune.stats import LinearStats, Needs


@dataclass(frozen=True)
class Solver:
    """A unit's saliency is Σ_s (∂L_s/∂g)² over sequences s, for a gate g = 1 that it is multiplied by; no updates.

    L_s is the mean loss of the dense model on the next tokens of s. It is the first-order Taylor expansion of what the
    loss changes by when the unit goes, squared as in arXiv:1906.10771; for heads arXiv:1905.10650 has such gates. One
    block is in memory at a time, there and back.

    Args:
        tokens: calibration tokens that are looked at, in whole sequences.
    """

    needs: ClassVar[Needs] = "norms"  # to tell the error on its inputs
    scope: ClassVar[Scope] = "matrix"
    updates: ClassVar[bool] = False
    row_independent: ClassVar[bool] = False
    products: ClassVar[float] = 0
    buffers: ClassVar[Buffers] = Buffers()

    tokens: int = 8192

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {self.tokens}")

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        """Not by one linear alone: see `knowing`."""
        raise RuntimeError("the units are chosen before the first block is pruned")

    def saliency(self, slopes: Tensor) -> Tensor:
        """(units,) what one sequence adds, by (units,) the slopes of its loss along the gates."""
        return slopes.square()

    def knowing(self, gone: frozenset[int], tokens: int) -> Knowing:
        """What prunes a linear of which it is known which units go."""
        return Knowing(gone, tokens)


@dataclass(frozen=True)
class Knowing:
    """Units of a linear's inputs go that were chosen before; no updates.

    Args:
        gone: their numbers.
        tokens: how many were seen to reach the linear when they were chosen.
    """

    needs: ClassVar[Needs] = Solver.needs
    scope: ClassVar[Scope] = Solver.scope
    updates: ClassVar[bool] = Solver.updates
    row_independent: ClassVar[bool] = Solver.row_independent
    products: ClassVar[float] = Solver.products
    buffers: ClassVar[Buffers] = Solver.buffers

    gone: frozenset[int]
    tokens: int

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        """Zero the inputs of the units that go."""
        assert isinstance(pattern, Columns)
        inputs = pattern.inputs(weight.shape[1])[sorted(self.gone)].flatten().to(weight.device)
        return weight.index_fill(1, inputs, 0.0) if len(inputs) else weight.clone()
