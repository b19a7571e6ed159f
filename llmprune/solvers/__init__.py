"""The pruning methods, one file each; the file's name is the method's name.

A file defines a frozen dataclass `Solver` whose fields are the method's options in a recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from llmprune import named
from llmprune.patterns import Pattern, Scope
from llmprune.stats import LinearStats, Needs


@dataclass(frozen=True)
class Buffers:
    """The memory that solving takes besides the Gram and the dense weight, in matrices of float32.

    Attributes:
        factorising: of the Gram's size, while it is factorised; none where no Gram was collected.
        factor: of the Gram's size, while weights are changed; likewise.
        weights: of the weight's size, while they are.
    """

    factorising: int = 2
    factor: int = 1
    weights: int = 3

    def __or__(self, other: Buffers) -> Buffers:
        """Enough for either."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Buffers(*(max(pair) for pair in pairs))


class Solver(Protocol):
    """A method: it turns a dense weight, the statistics of its inputs and a pattern into a pruned weight."""

    needs: ClassVar[Needs]
    """What calibration must collect for it."""
    scope: ClassVar[Scope]
    """What an unstructured sparsity is counted over unless the recipe says otherwise: the published default."""
    updates: ClassVar[bool]
    """Whether it changes the weights that it keeps."""
    row_independent: ClassVar[bool]
    """Whether a row's result depends on that row, the statistics and the pattern alone, wherever its mask does."""

    @property
    def products(self) -> float:
        """About how many products of the weight with a matrix of the Gram's size take as long as it does."""

    buffers: ClassVar[Buffers]
    """What it takes while it solves."""

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        """Prune one linear.

        Args:
            weight: (out, in) float32; not changed.
            stats: statistics of its inputs, at least of the level `needs`.
            pattern: where zeros must stand.

        Returns:
            (out, in) float32 with exact zeros, in memory of its own.
        """


def names() -> list[str]:
    """Every method there is."""
    return named.names(sys.modules[__name__])


def load(method: str | Mapping[str, Any]) -> Solver:
    """Make the solver that a recipe asks for; see `named.load`."""
    made: Solver = named.load(sys.modules[__name__], "Solver", "method", method)
    return made
