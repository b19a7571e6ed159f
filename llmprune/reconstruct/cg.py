"""CG: the kept weights that are best for the linear's own output, by conjugate gradients on the shared Gram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.conjugate import conjugate
from llmprune.parts import AT_ONCE, by_rows
from llmprune.stats import LinearStats, Needs


@dataclass(frozen=True)
class Reconstructor:
    """Minimises ‖(Ŵ−W)X‖² + λ‖Ŵ−W‖² over the kept weights; all rows share the Gram, each has a support of its own.

    Args:
        steps: of conjugate gradients. The optimum for the mask (as of OPTIMA, arXiv:2512.13886) is their limit.
        damping: λ as a fraction of the mean diagonal of XᵀX over live inputs.
    """

    needs: ClassVar[Needs] = "gram"
    room: ClassVar[int] = 8 * 4 * AT_ONCE

    steps: int = 20
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not 0 <= self.damping <= 1:
            raise ValueError(f"damping must lie in [0, 1], not {self.damping}")

    @property
    def products(self) -> float:
        return self.steps + 1

    def reconstruct(self, weight: Tensor, start: Tensor, keep: Tensor, stats: LinearStats) -> Tensor:
        damping = self.damping * stats.scale
        return by_rows(lambda w, s, k: conjugate(stats.gram, w, s, k, self.steps, damping), weight, start, keep)
