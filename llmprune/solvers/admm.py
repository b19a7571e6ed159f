"""ADMM: mask and weights are found together, step by step, while the mask grows to its full sparsity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.patterns import Pattern, Scope, keep_more
from llmprune.stats import LinearStats, Needs, damped_inverse, product

_AT_ONCE = 2**22
"""Weights that are solved for at once, where rows do not depend on each other."""


@dataclass(frozen=True)
class Solver:
    """Alternating directions with a mask that is chosen gradually (arXiv:2401.02938).

    Inputs are scaled to a norm of one, W to W₀ accordingly, with G their Gram. Each iteration takes Z = (W+U) ⊙ mask,
    U ← U + W − Z and W = (W₀G + ρ(Z−U)) (G+ρI)⁻¹. In iteration t of the first `gradual` ones the mask is chosen anew
    from |W+U|, with the sparsity S − S(1−t/gradual)³. On the way to N:M it takes the lowest of those weights that the
    rule would prune in the end. Inputs that are always zero lose their weights.

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

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        gram, norms = stats.scaled_gram(self.damping)
        inverse = damped_inverse(gram, self.rho)
        rows = max(1, _AT_ONCE // weight.shape[1]) if pattern.row_independent else len(weight)
        parts = [self._solved(part * norms, gram, inverse, pattern) for part in torch.split(weight, rows)]
        return torch.cat(parts).mul_(torch.where(norms > 0, 1 / norms, 0.0))

    def _solved(self, weight: Tensor, gram: Tensor, inverse: Tensor, pattern: Pattern) -> Tensor:
        pulled = product(weight, gram)
        dual = torch.zeros_like(weight)
        keep = torch.ones_like(weight, dtype=torch.bool)
        for step in range(1, self.iterations + 1):
            both = weight + dual
            if step <= self.gradual:
                keep = keep_more(pattern, both.abs(), 1 - (1 - step / self.gradual) ** 3)
            split = both * keep
            dual = both.sub_(split)
            weight = product(split.sub_(dual).mul_(self.rho).add_(pulled), inverse)
        return torch.where(keep, weight + dual, 0.0)
