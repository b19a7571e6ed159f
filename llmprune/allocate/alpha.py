"""AlphaPruning: blocks whose weights have a light-tailed spectrum are pruned more; no data is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor

from llmprune.allocate import Needs
from llmprune.allocation import Fitted, Known, Seen, Sparsities


@dataclass(frozen=True)
class Allocator(Fitted):
    """Sparsity by the power law of the spectrum (AlphaPruning, NeurIPS 2024), one sparsity for all linears of a block.

    The exponent of the eigenvalues of WWᵀ is estimated for each linear, see `exponent`; its mean over a block is mapped
    to [1−`spread`, 1+`spread`] over the blocks, and a block's sparsity is that times a common value, which is chosen to
    meet the budget.

    Args:
        spread: ε.
        bins: of the histogram on whose peak the tail begins.
    """

    needs: ClassVar[Needs] = "weights"

    spread: float = 0.3
    bins: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread must lie in [0, 1), not {self.spread}")
        if self.bins < 1:
            raise ValueError(f"bins must be at least 1, not {self.bins}")

    def look(self, block: Sequence[Seen]) -> Sequence[Any]:
        return [exponent(linear.weight.to(linear.device, torch.float32), self.bins) for linear in block]

    def allocate(self, linears: Sequence[Known], sparsity: float) -> Mapping[str, str]:
        found: dict[int, list[float]] = {}
        for linear in linears:
            if linear.evidence is not None:
                found.setdefault(linear.block, []).append(linear.evidence)
        means = {block: sum(values) / len(values) for block, values in found.items()}
        low, high = min(means.values(), default=0.0), max(means.values(), default=0.0)

        def place(block: int) -> float:
            """Where a block is between the lowest and the highest; in the middle where there is nothing to tell."""
            return (means[block] - low) / (high - low) if block in means and high > low else 0.5

        times = numpy.array([1 + self.spread * (2 * place(linear.block) - 1) for linear in linears])

        def wish(level: float) -> Sparsities:
            wished: Sparsities = level * times
            return wished

        return self.fit(linears, sparsity, wish, 0.0, 1 / (1 - self.spread))


def exponent(weight: Tensor, bins: int) -> float | None:
    """Hill's estimate of the exponent α of a power law p(λ) ~ λ^−α in the tail of the eigenvalues of WWᵀ.

    α = 1 + k / Σ ln(λ_i / λ_min) over the k eigenvalues from λ_min on; λ_min is where their histogram over log λ has
    its peak. Eigenvalues that are zero but for rounding are left out.

    Args:
        weight: (out, in) float32.
        bins: of the histogram, between the smallest and the largest eigenvalue.

    Returns:
        None where there are not two different eigenvalues.
    """
    singular = torch.linalg.svdvals(weight).double().cpu().numpy()
    singular = singular[singular > singular.max() * max(weight.shape) * torch.finfo(torch.float32).eps]
    logs = 2 * numpy.log(singular)
    if len(logs) < 2 or logs.max() - logs.min() < 1e-9:
        return None
    heights, edges = numpy.histogram(logs, bins)
    peak = edges[int(heights.argmax())]
    tail = logs[logs >= peak - 1e-12]
    above = float((tail - tail.min()).sum())
    return 1 + len(tail) / above if above > 0 else None
