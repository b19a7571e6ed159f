"""Large tensors looked at part by part: counting and comparing them whole would take several times their memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

AT_ONCE = 2**21
"""Elements that are looked at together, few enough for the caches; counting takes eight bytes of memory for each."""


def some_rows(matrix: Tensor, elements: int = AT_ONCE) -> tuple[Tensor, ...]:
    """A matrix in parts of some rows each, a multiple of eight, with not many more elements than said."""
    return torch.split(matrix, max(1, elements // matrix.shape[-1] // 8) * 8)


def by_rows(work: Callable[..., Tensor], *matrices: Tensor, rows: int | None = None) -> Tensor:
    """What `work` makes of some rows of (rows, width) matrices at a time, put together.

    All parts and their sum at the same time, as `torch.cat` would have them, are never held.

    Args:
        work: of one part of each matrix; returns as many rows.
        rows: of a part; as many as `some_rows` takes by default.
    """
    parts = zip(*(some_rows(matrix) if rows is None else torch.split(matrix, rows) for matrix in matrices), strict=True)
    result = None
    start = 0
    for part in parts:
        made = work(*part)
        if result is None:
            result = made.new_empty((len(matrices[0]), *made.shape[1:]))
        result[start : start + len(made)] = made
        start += len(made)
    assert result is not None
    return result


def zeros(matrix: Tensor) -> int:
    """How many zeros a matrix holds."""
    return sum(rows.numel() - int(rows.count_nonzero()) for rows in some_rows(matrix))


def not_finite(tensor: Tensor) -> int:
    """How many NaN and infinite values a tensor of any shape holds; quick where it holds none."""
    parts = (part for part in torch.split(tensor.flatten(), AT_ONCE) if not _sums_up(part))
    return sum(part.numel() - int(torch.isfinite(part).count_nonzero()) for part in parts)


def _sums_up(part: Tensor) -> bool:
    """Whether the sum is finite: then all values are. The other way round it need not be so."""
    if not part.is_floating_point() or part.dtype.itemsize == 1:  # of which torch makes no sums
        return False
    return math.isfinite(part.sum().item())
