"""Reconstruction of the weights that are kept, one file each: the mask stays, the error falls."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from llmprune import named
from llmprune.stats import LinearStats, Needs


class Reconstructor(Protocol):
    """Chooses the kept weights of a linear anew."""

    needs: ClassVar[Needs]
    """What calibration must collect for it."""
    room: ClassVar[int]
    """Bytes that it takes at the most, besides masks and weights of the linear's size."""

    @property
    def products(self) -> float:
        """About how many products of the weight with a matrix of the Gram's size take as long as it does."""

    def reconstruct(self, weight: Tensor, start: Tensor, keep: Tensor, stats: LinearStats) -> Tensor:
        """Reconstruct one linear.

        Args:
            weight: (out, in) float32, the dense weight; not changed.
            start: (out, in) the pruned weight so far; not changed.
            keep: (out, in) bool, True = kept.
            stats: statistics of its inputs, at least of the level `needs`.

        Returns:
            (out, in) float32 with exact zeros outside of `keep`.
        """


def load(chosen: str | Mapping[str, Any]) -> Reconstructor:
    """Make the reconstruction that a recipe asks for; see `named.load`."""
    made: Reconstructor = named.load(sys.modules[__name__], "Reconstructor", "reconstruction", chosen)
    return made
