"""Large tensors looked at part by part: counting and comparing them whole would take several times their memory."""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = 2**21
"""Elements that are looked at together, few enough for the caches; counting takes eight bytes of memory for each."""


def some_rows(matrix: Tensor) -> tuple[Tensor, ...]:
    """A matrix in parts of some rows each, a multiple of eight."""
    return torch.split(matrix, max(1, AT_ONCE // matrix.shape[-1] // 8) * 8)


def zeros(matrix: Tensor) -> int:
    """How many zeros a matrix holds."""
    return sum(rows.numel() - int(rows.count_nonzero()) for rows in some_rows(matrix))


def not_finite(tensor: Tensor) -> int:
    """How many NaN and infinite values a tensor of any shape holds."""
    parts = torch.split(tensor.flatten(), AT_ONCE)
    return sum(part.numel() - int(torch.isfinite(part).count_nonzero()) for part in parts)
