"""SparseGPT: columns are pruned one after the other, and the columns to the right make up for each error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.patterns import Pattern, Scope, Unstructured
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
        upper, dead = stats.inverse_factor(self.damping), stats.dead  # (in, in), (in,)
        columns = weight.T.clone(memory_format=torch.contiguous_format)  # (in, out): a column is a contiguous row here
        whole = not bool(dead.any())
        if not whole and isinstance(pattern, Unstructured):  # the others are pruned as if these were not there
            first, pattern = pattern.divided(weight.shape[0], weight.shape[1], int(dead.count_nonzero()))
            columns[dead] *= first.keep(columns[dead].abs().T).T
        width = max(pattern.group, self.block_size // pattern.group * pattern.group)
        for start in range(0, len(columns), width):
            end = min(start + width, len(columns))
            before, lost = (start, None) if whole else (int((~dead[:start]).count_nonzero()), dead[start:end])
            errors = self._block(columns[start:end], upper[start:end, start:end].contiguous(), pattern, before, lost)
            columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
        return columns.T.contiguous()

    def _block(self, block: Tensor, upper: Tensor, pattern: Pattern, before: int, dead: Tensor | None) -> Tensor:
        """Prune one block of columns in place.

        Each error is carried on to the columns of its own short run at once, to the rest of the block by one matrix
        product a run.

        Args:
            block: (columns, out).
            upper: (columns, columns), the part of U that belongs to it.
            before: columns of live inputs that stand before the block.
            dead: (columns,) bool, whose inputs are always zero; None where none is.

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
                    saliency = (block[ahead] / scale[ahead]).square_()
                    keep = _kept(saliency, block[ahead], pattern, before, None if dead is None else dead[ahead])
                    torch.div(~keep, scale[ahead], out=pruned[ahead])
                torch.mul(rows[j], pruned[j], out=parts[j])
                block[j + 1 : end].addr_(lines[j][j + 1 : end], parts[j], alpha=-1)
            block[end:].addmm_(upper[start:end, end:].T, errors[start:end], alpha=-1)
        block.masked_fill_(pruned != 0, 0.0)
        return errors


def _kept(saliency: Tensor, block: Tensor, pattern: Pattern, before: int, dead: Tensor | None) -> Tensor:
    """(columns, out) bool, what stays of some columns whose mask is chosen together; see `Solver._block`."""
    if dead is None:
        return pattern.keep(saliency.T, before=before).T
    if pattern.group > 1:
        return pattern.keep(torch.where(dead[:, None], -1 / block.abs(), saliency).T).T
    keep = torch.ones_like(block, dtype=torch.bool)  # which of the others stay has been decided before
    keep[~dead] = pattern.keep(saliency[~dead].T, before=before).T
    return keep
