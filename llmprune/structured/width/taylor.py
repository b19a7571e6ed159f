"""Taylor: those units go whose gates the model's loss feels the least, by its gradient through all blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.patterns import Pattern
from llmprune.stats import LinearStats
from llmprune.structured.knowing import Untouched


@dataclass(frozen=True)
class Solver(Untouched):
    """A unit's saliency is Σ_s (∂L_s/∂g)² over sequences s, for a gate g = 1 that it is multiplied by; no updates.

    L_s is the mean loss of the dense model on the next tokens of s. It is the first-order Taylor expansion of what the
    loss changes by when the unit goes, squared as in arXiv:1906.10771; for heads arXiv:1905.10650 has such gates. One
    block is in memory at a time, there and back.

    Args:
        tokens: calibration tokens that are looked at, in whole sequences.
    """

    tokens: int = 8192

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {self.tokens}")

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        """Not by one linear alone: see `Foreseeing`."""
        raise RuntimeError("the units are chosen before the first block is pruned")

    def saliency(self, slopes: Tensor) -> Tensor:
        """(units,) what one sequence adds, by (units,) the slopes of its loss along the gates."""
        return slopes.square()
