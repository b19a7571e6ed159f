"""Global: one threshold over the saliencies of the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy
import torch

from llmprune.allocate import Needs
from llmprune.allocation import Fitted, Known, Seen, Sparsities

OCTAVES, FINE = 64, 16
"""The histogram goes from 2^−64 to 1 in steps of 2^(1/16)."""


@dataclass(frozen=True)
class Allocator(Fitted):
    """One threshold over all linears on each weight's share of its linear's output energy.

    The share is (|W_ij|·‖X_j‖₂)² / Σ_ij (|W_ij|·‖X_j‖₂)², Wanda's saliency squared over its sum in the linear. Inputs
    taken for uncorrelated, a linear's relative error is the sum of the shares that it loses, so that one threshold
    makes the sum of all linears' relative errors the smallest for that many zeros. A linear gets the sparsity that the
    threshold gives it; which of its weights go is left to the method. Shares are counted in a histogram whose steps
    are 2^(1/16) wide, and taken as even inside a step.

    `most` is lower here than elsewhere: without a bound some linears would lose nearly everything.
    """

    needs: ClassVar[Needs] = "norms"

    most: float = 0.95

    def look(self, block: Sequence[Seen]) -> Sequence[Any]:
        return [histogram(linear) for linear in block]

    def allocate(self, linears: Sequence[Known], sparsity: float) -> Mapping[str, str]:
        counts = numpy.stack([linear.evidence for linear in linears])  # (linears, steps)
        sizes = numpy.array([linear.numel for linear in linears], dtype=float)

        def wish(level: float) -> Sparsities:
            whole = min(int(level), counts.shape[1] - 1)
            below: Sparsities = (counts[:, :whole].sum(1, dtype=float) + (level - whole) * counts[:, whole]) / sizes
            return below

        return self.fit(linears, sparsity, wish, 0.0, float(counts.shape[1]))


def histogram(linear: Seen) -> numpy.ndarray[Any, numpy.dtype[numpy.uint32]]:
    """(steps,) how many weights of a linear have their share of its output energy in each step."""
    total = sum(float(rows.double().square().sum()) for rows in linear.saliency())
    counts = torch.zeros(OCTAVES * FINE, dtype=torch.int64, device=linear.device)
    for rows in linear.saliency():
        logs = rows.double().square().div_(total or 1.0).log2_().float()
        steps = ((logs + OCTAVES) * FINE).floor_().clamp_(0, OCTAVES * FINE - 1).flatten().long()
        counts += torch.bincount(steps, minlength=len(counts))
    return counts.cpu().numpy().astype(numpy.uint32)
