"""The pruning methods, one file each; the file's name is the method's name.

A file defines a frozen dataclass `Solver` whose fields are the method's options in a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from llmprune import named
from llmprune.patterns import Pattern, Scope
from llmprune.stats import LinearStats, Needs


class Solver(Protocol):
    """A method: it turns a dense weight, the statistics of its inputs and a pattern into a pruned weight."""

    needs: ClassVar[Needs]
    """What calibration must collect for it."""
    scope: ClassVar[Scope]
    """What an unstructured sparsity is counted over unless the recipe says otherwise: the published default."""

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
    return named.names(__path__)


def load(method: str | Mapping[str, Any]) -> Solver:
    """Make the solver that a recipe asks for: a name, or a mapping of `name` and the method's options.

    Raises:
        UserError: an unknown method or option (the answer names the nearest one), or a value that is out of range.
    """
    solver: Solver = named.load(__name__, __path__, "method", method, "Solver")
    return solver
