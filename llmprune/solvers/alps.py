"""ALPS: alternating directions whose penalty follows the support, and conjugate gradients on the support in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.conjugate import conjugate
from llmprune.patterns import Pattern, Scope
from llmprune.stats import LinearStats, Needs, damped_inverse, product

CHECK = 3
"""Iterations from one look at the support to the next."""
STEPS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""By what ρ is multiplied where the support has changed by more than a part of what it keeps."""
LARGEST = 1e6
"""ρ is not raised above this."""
RESTARTS = 4


@dataclass(frozen=True)
class Solver:
    """Operator splitting on the support itself (arXiv:2406.07831).

    Inputs are scaled to a norm of one, W to W₀ accordingly, with G their damped Gram. Each iteration takes
    B = (W₀G − V + ρD)(G+ρI)⁻¹, D = the largest of B + V/ρ by the pattern, and V ← V + ρ(B−D). Every third one ρ is
    raised, the more the more the support has changed; it ends when the support stands still, and where it has never
    moved it begins anew with ρ/5. Then the kept weights are reconstructed by conjugate gradients. The paper has
    (G+ρI)⁻¹ for every ρ from one eigendecomposition; a Cholesky inverse for each ρ is the same, and takes less time.

    Args:
        damping: added to the diagonal of G.
        rho: ρ to begin with.
        iterations: at the most.
        steps: of conjugate gradients.
    """

    needs: ClassVar[Needs] = "gram"
    scope: ClassVar[Scope] = "matrix"
    updates: ClassVar[bool] = True
    row_independent: ClassVar[bool] = False

    damping: float = 0.01
    rho: float = 0.1
    iterations: int = 300
    steps: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], not {self.damping}")
        if not self.rho > 0:
            raise ValueError(f"rho must be above 0, not {self.rho}")
        for name in ("iterations", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        gram, norms = stats.scaled_gram(self.damping)
        scaled = weight * norms
        start = self._split(scaled, gram, pattern)
        found = conjugate(gram, scaled, start, start != 0, self.steps)
        return found.mul_(torch.where(norms > 0, 1 / norms, 0.0))

    def _split(self, weight: Tensor, gram: Tensor, pattern: Pattern) -> Tensor:
        """(out, in) D in the end."""
        pulled, rho = product(weight, gram), self.rho
        first = keep = pattern.keep(weight.abs())
        kept = max(1, int(keep.sum()))
        sparse, dual, inverse = weight * keep, torch.zeros_like(weight), damped_inverse(gram, rho)
        restarts = 0
        for iteration in range(1, self.iterations + 1):
            free = product(sparse.mul_(rho).sub_(dual).add_(pulled), inverse)
            both = torch.add(free, dual, alpha=1 / rho)
            now = pattern.keep(both.abs())
            sparse = both * now
            dual.add_(free.sub_(sparse), alpha=rho)
            if iteration % CHECK == 0:
                changed = int((now ^ keep).sum()) / kept
                still, keep = changed == 0, now
                if still and restarts < RESTARTS and torch.equal(now, first):
                    restarts, rho = restarts + 1, rho / 5
                    sparse, dual, keep = weight * first, torch.zeros_like(weight), first
                elif still:
                    break
                else:
                    rho = min(LARGEST, rho * next(factor for least, factor in STEPS if changed > least))
                inverse = damped_inverse(gram, rho)
        return sparse
