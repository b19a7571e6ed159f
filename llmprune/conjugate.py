"""Least squares on a support: many rows at once, each with zeros of its own, by conjugate gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.matrix import product

_FLAT = 1e-6
"""A direction whose curvature is less than this part of the greatest so far is flat but for rounding: no step there."""


def conjugate(gram: Tensor, target: Tensor, start: Tensor, keep: Tensor, steps: int, damping: float = 0.0) -> Tensor:
    """Minimise tr((Ŵ−T)(G+λI)(Ŵ−T)ᵀ) over Ŵ whose weights outside of `keep` are zero.

    Preconditioned by the diagonal of G; each row has step sizes of its own, and is exact after as many steps as it has
    weights, but for rounding. A step costs one product of (rows, in) with G.

    Args:
        gram: (in, in) G, symmetric and positive semidefinite.
        target: (rows, in) T.
        start: (rows, in) where to begin; what it has outside of `keep` counts as zero.
        keep: (rows, in) bool.
        damping: λ, in the units of G.

    Returns:
        (rows, in) with exact zeros outside of `keep`.
    """
    diagonal = gram.diagonal() + damping
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    weight = torch.where(keep, start, 0.0)
    away = target - weight
    residual = product(away, gram).add_(away, alpha=damping).mul_(keep)
    del away
    ahead = residual * inverse
    size = (residual * ahead).sum(1, keepdim=True)
    extent, steepest = size, torch.zeros_like(size)
    for step in range(steps):
        through = product(ahead, gram).add_(ahead, alpha=damping).mul_(keep)
        slope = (ahead * through).sum(1, keepdim=True) / extent
        steepest = torch.maximum(steepest, slope)
        length = torch.where(slope > _FLAT * steepest, size / (slope * extent), 0.0)
        weight.addcmul_(ahead, length)
        if step == steps - 1:
            break
        residual.addcmul_(through, length, value=-1)
        before, size = size, (residual.square() * inverse).sum(1, keepdim=True)
        onward = torch.where(before > 0, size / before, 0.0)
        extent = size + onward.square() * extent
        ahead.mul_(onward).addcmul_(residual, inverse.expand_as(residual))
    return weight
