"""SparseGPT: columns are pruned one after the other, and the columns to the right make up for each error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.patterns import Pattern, Scope
from llmprune.stats import LinearStats, Needs


@dataclass(frozen=True)
class Solver:
    """Optimal brain surgery column by column with a shared inverse Hessian (arXiv:2301.00774).

    With U the upper Cholesky factor of (XᵀX + λI)⁻¹, the saliency is (W_ij / U_jj)². An unstructured mask is chosen
    for `block_size` columns at a time, an N:M mask for M columns at a time, both on the weights as updated so far.
    Inputs that are always zero lose their weights.

    Args:
        damping: λ as a fraction of the mean diagonal of XᵀX.
        block_size: columns per block.
    """

    needs: ClassVar[Needs] = "gram"
    scope: ClassVar[Scope] = "matrix"

    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], not {self.damping}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {self.block_size}")

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        upper = stats.inverse_factor(self.damping)  # (in, in)
        columns = weight.T.clone(memory_format=torch.contiguous_format)  # (in, out): a column is a contiguous row here
        columns[stats.dead] = 0
        scale = upper.diagonal()[:, None]
        width = max(pattern.group, self.block_size // pattern.group * pattern.group)
        for start in range(0, len(columns), width):
            end = min(start + width, len(columns))
            block, local = columns[start:end], upper[start:end, start:end].contiguous()
            chosen_together = pattern.group if pattern.group > 1 else end - start
            keep = torch.empty_like(block, dtype=torch.bool)
            errors = torch.empty_like(block)
            for j in range(end - start):
                if j % chosen_together == 0:
                    ahead = slice(j, j + chosen_together)
                    saliency = (block[ahead] / scale[start:end][ahead]).square()
                    keep[ahead] = pattern.keep(saliency.T, before=start + j).T
                torch.div(block[j].masked_fill(keep[j], 0.0), local[j, j], out=errors[j])
                block[j:].addr_(local[j, j:], errors[j], alpha=-1)
            block.masked_fill_(~keep, 0.0)
            columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
        return columns.T.contiguous()
