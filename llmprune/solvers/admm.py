"""ADMM: mask and weights are found together, step by step, while the mask grows to its full sparsity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.matrix import product
from llmprune.parts import by_rows
from llmprune.patterns import Pattern, Scope, keep_more
from llmprune.solvers import Buffers
from llmprune.stats import LinearStats, Needs


@dataclass(frozen=True)
class Solver:
    """Alternating directions with a mask that is chosen gradually (arXiv:2401.02938).

    Inputs are scaled to a norm of one, W to W₀ accordingly, with G their damped Gram. Each iteration takes
    Z = (W+U) ⊙ mask, U ← U + W − Z and W = (W₀G + ρ(Z−U)) (G+ρI)⁻¹, which is W₀ + ρ(Z−U−W₀) (G+ρI)⁻¹. In iteration t of
    the first `gradual` ones the mask is chosen anew from |W+U|, with the sparsity S − S(1−t/gradual)³. On the way to
    N:M it takes the lowest of those weights that the rule would prune in the end. The weights of inputs that are always
    zero go first, and stay as they are where more of them may stay.

    Args:
        damping: added to the diagonal of G.
        rho: ρ.
        iterations: all of them.
        gradual: those that choose the mask.
    """

    needs: ClassVar[Needs] = "gram"
    scope: ClassVar[Scope] = "matrix"
    updates: ClassVar[bool] = True
    row_independent: ClassVar[bool] = True
    buffers: ClassVar[Buffers] = Buffers(weights=6)

    damping: float = 0.1
    rho: float = 1.0
    iterations: int = 20
    gradual: int = 15

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], not {self.damping}")
        if not self.rho > 0:
            raise ValueError(f"rho must be above 0, not {self.rho}")
        if not 1 <= self.gradual <= self.iterations:
            raise ValueError(f"gradual must lie between 1 and iterations ({self.iterations}), not {self.gradual}")

    @property
    def products(self) -> float:
        return self.iterations

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        inverse = stats.scaled_inverse(self.damping, self.rho)
        norms, inverse_norms = stats.norms, stats.inverse_norms

        def solved(part: Tensor) -> Tensor:
            split, keep = self._split(part * norms, inverse, pattern, partial(stats.ranked, weight=part))
            return stats.with_unseen(split.mul_(inverse_norms), part, keep)

        return by_rows(solved, weight) if pattern.row_independent else solved(weight)

    def _split(
        self, dense: Tensor, inverse: Tensor, pattern: Pattern, ranked: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(rows, in) Z in the end, and its mask.

        Args:
            dense: (rows, in) W₀.
            inverse: (in, in) (G+ρI)⁻¹.
            ranked: puts dead inputs in their place in a saliency.
        """
        both, split = dense.clone(), torch.empty_like(dense)  # W+U, Z
        for step in range(1, self.iterations + 1):
            if step <= self.gradual:
                keep = keep_more(pattern, ranked(torch.abs(both, out=split)), 1 - (1 - step / self.gradual) ** 3)
            torch.mul(both, keep, out=split)
            both.sub_(split)  # U: what Z leaves out of W+U
            split.sub_(both).sub_(dense)
            both.add_(dense).add_(product(split, inverse), alpha=self.rho)
        return both.mul_(keep), keep
