"""Refinement of masks, one file each: from the mask of any method to a better one with the same pattern."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from llmprune import named
from llmprune.patterns import Pattern
from llmprune.stats import LinearStats, Needs


class Refiner(Protocol):
    """Exchanges kept weights for pruned ones; each row keeps as many as it had."""

    needs: ClassVar[Needs]
    """What calibration must collect for it."""
    room: ClassVar[int]
    """Bytes that it takes at the most, besides masks and weights of the linear's size."""

    @property
    def products(self) -> float:
        """About how many products of the weight with a matrix of the Gram's size take as long as it does."""

    def refine(self, weight: Tensor, keep: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        """Refine the mask of one linear.

        Args:
            weight: (out, in) float32, the dense weight; not changed.
            keep: (out, in) bool, True = kept; not changed.
            stats: statistics of its inputs, at least of the level `needs`.
            pattern: what the mask keeps to.

        Returns:
            (out, in) bool.
        """


def load(chosen: str | Mapping[str, Any]) -> Refiner:
    """Make the refinement that a recipe asks for; see `named.load`."""
    made: Refiner = named.load(sys.modules[__name__], "Refiner", "refinement", chosen)
    return made
