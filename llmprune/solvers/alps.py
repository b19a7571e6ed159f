"""ALPS: alternating directions whose penalty follows the support, and conjugate gradients on the support in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.conjugate import conjugate
from llmprune.matrix import product
from llmprune.parts import some_rows
from llmprune.patterns import Pattern, Scope
from llmprune.solvers import Buffers
from llmprune.stats import LinearStats, Needs, damped_inverse

CHECK = 3
"""Iterations from one look at the support to the next."""
STEPS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""By what ρ is multiplied where the support has changed by more than a part of what it keeps."""
LARGEST = 1e6
"""ρ is not raised above this."""
RESTARTS = 4

_USUAL = 60
"""Iterations after which the support stands still, as a rule; with inverses each takes as long as two products."""


@dataclass(frozen=True)
class Solver:
    """Operator splitting on the support itself (arXiv:2406.07831).

    Inputs are scaled to a norm of one, W to W₀ accordingly, with G their damped Gram. Each iteration takes
    B = (W₀G − V + ρD)(G+ρI)⁻¹, which is W₀ + ρ(D − V/ρ − W₀)(G+ρI)⁻¹, D = the largest of B + V/ρ by the pattern, and
    V ← V + ρ(B−D). Every third one ρ is raised, the more the more the support has changed; it ends when the support
    stands still, and where it has never moved it begins anew with ρ/5. Then the kept weights are reconstructed by
    conjugate gradients. The paper has (G+ρI)⁻¹ for every ρ from one eigendecomposition; a Cholesky inverse for each ρ
    is the same, and takes less time. The weights of inputs that are always zero go first, and stay as they are where
    more of them may stay.

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
    buffers: ClassVar[Buffers] = Buffers(factor=3, weights=7)

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

    @property
    def products(self) -> float:
        return 2 * min(self.iterations, _USUAL) + self.steps

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        gram = stats.scaled_gram(self.damping)
        scaled = weight * stats.norms
        found, keep = self._split(scaled, gram, pattern, partial(stats.ranked, weight=weight))
        for part, target, kept in zip(*map(some_rows, (found, scaled, keep)), strict=True):
            part.copy_(conjugate(gram, target, part, kept, self.steps))
        return stats.with_unseen(found.mul_(stats.inverse_norms), weight, keep)

    def _split(
        self, weight: Tensor, gram: Tensor, pattern: Pattern, ranked: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(out, in) D in the end, and its mask. V is kept as U = V/ρ; `ranked` puts dead inputs in their place."""
        rho = self.rho
        first = seen = pattern.keep(ranked(weight.abs()))
        kept, restarts = max(1, int(first.count_nonzero())), 0
        sparse, dual = weight * first, torch.zeros_like(weight)
        for begun in range(0, self.iterations, CHECK):
            inverse = damped_inverse(gram, rho)
            for _ in range(min(CHECK, self.iterations - begun)):
                sparse.sub_(dual).sub_(weight)
                dual.add_(weight).add_(product(sparse, inverse), alpha=rho)  # B + V/ρ, in the place of V/ρ
                keep = pattern.keep(ranked(torch.abs(dual, out=sparse)))
                torch.mul(dual, keep, out=sparse)
                dual.sub_(sparse)
            del inverse  # before the next one is made
            changed = int((keep ^ seen).count_nonzero()) / kept
            if changed > 0:
                raised = min(LARGEST, rho * next(factor for least, factor in STEPS if changed > least))
                dual.mul_(rho / raised)
                rho, seen = raised, keep
            elif restarts < RESTARTS and torch.equal(keep, first):
                restarts, rho = restarts + 1, rho / 5
                torch.mul(weight, first, out=sparse)
                dual.zero_()
            else:
                break
        return sparse, keep
