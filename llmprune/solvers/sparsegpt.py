"""SparseGPT: columns are pruned one after the other, and the columns to the right make up for each error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.patterns import Pattern, Scope
from llmprune.solvers import Buffers
from llmprune.stats import LinearStats, Needs

RUN = 32
"""Columns whose errors are carried on one by one."""


@dataclass(frozen=True)
class Solver:
    """Optimal brain surgery column by column with a shared inverse Hessian (arXiv:2301.00774).

    With U the upper Cholesky factor of (XᵀX + λI)⁻¹, the saliency is (W_ij / U_jj)². An unstructured mask is chosen
    for `block_size` columns at a time, an N:M mask for M columns at a time, both on the weights as updated so far.
    The weights of inputs that are always zero go first, and stay as they are where more of them may stay.

    Args:
        damping: λ as a fraction of the mean diagonal of XᵀX.
        block_size: columns per block.
    """

    needs: ClassVar[Needs] = "gram"
    scope: ClassVar[Scope] = "matrix"
    updates: ClassVar[bool] = True
    row_independent: ClassVar[bool] = True
    products: ClassVar[float] = 2
    buffers: ClassVar[Buffers] = Buffers()

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
        # Where an input is always zero U_jj is 1, and nothing has to make up for its weights.
        ranked = upper.diagonal().masked_fill(stats.dead, torch.inf)[:, None]
        width = max(pattern.group, self.block_size // pattern.group * pattern.group)
        for start in range(0, len(columns), width):
            end = min(start + width, len(columns))
            own = upper[start:end, start:end].contiguous()
            errors = self._block(columns[start:end], own, ranked[start:end], pattern, start)
            columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
        return columns.T.contiguous()

    def _block(self, block: Tensor, upper: Tensor, ranked: Tensor, pattern: Pattern, before: int) -> Tensor:
        """Prune one block of columns in place.

        Each error is carried on to the columns of its own short run at once, to the rest of the block by one matrix
        product a run.

        Args:
            block: (columns, out).
            upper: (columns, columns), the part of U that belongs to it.
            ranked: (columns, 1), what the weights are divided by for their saliency.
            before: columns that stand before the block.

        Returns:
            (columns, out): what has to be made up for by the columns after the block, for each column's error.
        """
        width = len(block)
        scale = upper.diagonal()[:, None]
        pruned, errors = torch.empty_like(block), torch.empty_like(block)
        together = pattern.group if pattern.group > 1 else width
        run = max(pattern.group, RUN // pattern.group * pattern.group)
        rows, parts, lines = block.unbind(), errors.unbind(), upper.unbind()
        for start in range(0, width, run):
            end = min(start + run, width)
            for j in range(start, end):
                if j % together == 0:
                    ahead = slice(j, j + together)
                    keep = pattern.keep((block[ahead] / ranked[ahead]).square_().T, before=before + j).T
                    torch.div(~keep, scale[ahead], out=pruned[ahead])
                torch.mul(rows[j], pruned[j], out=parts[j])
                block[j + 1 : end].addr_(lines[j][j + 1 : end], parts[j], alpha=-1)
            block[end:].addmm_(upper[start:end, end:].T, errors[start:end], alpha=-1)
        block.masked_fill_(pruned != 0, 0.0)
        return errors
