"""RIA: weights are ranked by their share of their row and column, times the norm of what flows through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.patterns import Pattern, Scope
from llmprune.solvers import Buffers
from llmprune.stats import LinearStats, Needs


@dataclass(frozen=True)
class Solver:
    """Relative importance and activations, weights not updated (ICLR 2024, "Plug-and-Play").

    Saliency (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · ‖X_j‖₂^exponent, so that no input and no output is cut off.

    Args:
        exponent: of the input's norm; 0 does without data.
    """

    needs: ClassVar[Needs] = "norms"
    scope: ClassVar[Scope] = "matrix"
    updates: ClassVar[bool] = False
    row_independent: ClassVar[bool] = False
    products: ClassVar[float] = 0
    buffers: ClassVar[Buffers] = Buffers()

    exponent: float = 0.5

    def __post_init__(self) -> None:
        if not self.exponent >= 0:
            raise ValueError(f"exponent must be at least 0, not {self.exponent}")

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        size = weight.abs()
        shares = [torch.where(total > 0, 1 / total, 0.0) for total in (size.sum(0), size.sum(1, keepdim=True))]
        saliency = size * (shares[0] + shares[1]) * stats.norms.pow(self.exponent)
        return weight * pattern.keep(stats.ranked(saliency, weight))
