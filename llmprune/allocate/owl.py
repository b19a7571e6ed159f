"""OWL: blocks with many outliers among their saliencies stay denser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy

from llmprune.allocate import Needs
from llmprune.allocation import Fitted, Known, Seen, Sparsities


@dataclass(frozen=True)
class Allocator(Fitted):
    """Outlier-weighed layerwise sparsity (arXiv:2310.05175), one sparsity for all linears of a block.

    The share D of a block's saliencies |W_ij|·‖X_j‖₂ that exceed `multiple` times their mean, all linears of the block
    taken together, is mapped to [0, 2·`spread`] over the blocks; a block's sparsity is that much below a common value,
    which is chosen to meet the budget.

    Args:
        multiple: M, what counts as an outlier.
        spread: λ, half of how far the sparsest block may be from the densest.
    """

    needs: ClassVar[Needs] = "norms"

    multiple: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.multiple > 0:
            raise ValueError(f"multiple must be above 0, not {self.multiple}")
        if not 0 <= self.spread <= 0.5:
            raise ValueError(f"spread must lie in [0, 0.5], not {self.spread}")

    def look(self, block: Sequence[Seen]) -> Sequence[Any]:
        seen = [linear for linear in block if linear.norms is not None]
        count = sum(linear.weight.numel() for linear in seen)
        total = sum(float(rows.double().sum()) for linear in seen for rows in linear.saliency())
        limit = self.multiple * total / max(count, 1)
        outliers = sum(int((rows > limit).sum()) for linear in seen for rows in linear.saliency())
        return [outliers / max(count, 1)] * len(block)

    def allocate(self, linears: Sequence[Known], sparsity: float) -> Mapping[str, str]:
        shares = numpy.array([linear.evidence for linear in linears])
        below = shares - shares.min()
        below *= 2 * self.spread / (below.max() or 1.0)

        def wish(level: float) -> Sparsities:
            wished: Sparsities = level - below
            return wished

        return self.fit(linears, sparsity, wish, -1.0, 2.0 + 2 * self.spread)
