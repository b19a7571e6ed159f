"""Products of float32 matrices, and what they make of positive definite ones: the same bits on any number of threads.

LAPACK's factorisations are others in their last bits when it has other numbers of threads, and half as fast as plain
products on AMD's CPUs. So a CPU factorises here by plain products with few inner terms, whose sums nobody cuts up.
"""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)

_WIDTHS = (256, 64)
"""Rows that are eliminated at a time, by products; within these so many; and the last ones one by one."""

_TILE = 1024
"""Rows of a product at a time."""

_SWAPPED = 2**18
"""Elements that change places at a time."""


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T; in float32 on a CPU by oneDNN, which is twice as fast there as torch's own choice on AMD's."""
    if a.dtype == torch.float32 and a.device.type == "cpu" and has_onednn():
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return result
    return a @ b.T


def is_definite(matrix: Tensor) -> bool:
    """Whether a symmetric (n, n) float32 or float64 matrix is positive definite; it is overwritten."""
    return _eliminate(matrix, _WIDTHS, invert=False) if _here(matrix) else _cholesky(matrix)


def inverse_factor(matrix: Tensor) -> Tensor | None:
    """L⁻¹ of A = LLᵀ, lower triangular, or None where A is not positive definite.

    Args:
        matrix: (n, n) A, float32 or float64 and contiguous; it is overwritten, on a CPU by the result.
    """
    if _here(matrix):
        return matrix.tril_() if _eliminate(matrix, _WIDTHS, invert=True) else None
    if not _cholesky(matrix):
        return None
    found = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device).mT
    torch.linalg.solve_triangular(matrix.mT, found, upper=False, out=found)
    return found


def inverse(matrix: Tensor) -> Tensor | None:
    """A⁻¹, symmetric and contiguous, or None where A is not positive definite.

    Args:
        matrix: (n, n) A, float32 or float64 and contiguous; it is overwritten, on a CPU by the result.
    """
    if _here(matrix):
        return _square(matrix) if _eliminate(matrix, _WIDTHS, invert=True) else None
    return torch.cholesky_inverse(matrix.mT).mT if _cholesky(matrix) else None


def reverse(matrix: Tensor) -> Tensor:
    """JAJ: rows and columns in the reverse order, in the place of an (n, n) A that is contiguous, or was turned."""
    flat = (matrix if matrix.is_contiguous() else matrix.mT).view(-1)
    half = len(flat) // 2
    for start in range(0, half, _SWAPPED):
        end = min(start + _SWAPPED, half)
        head, tail = flat[start:end], flat[len(flat) - end : len(flat) - start]
        before = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(before)
    return matrix


def _here(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu"


def _cholesky(matrix: Tensor) -> bool:
    """Put Lᵀ with A = LLᵀ in the place of A, by LAPACK or the like; whether A is positive definite."""
    lower = matrix.mT  # in the order of LAPACK, columns one after the other, so that no copy is made
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return int(info) == 0


def _eliminate(matrix: Tensor, widths: tuple[int, ...], *, invert: bool) -> bool:
    """Put L⁻¹ with A = LLᵀ in the place of A, on and below the diagonal; whether A is positive definite.

    A few rows at a time: below them, A becomes what is left of it once they are eliminated, and at their left, where
    nothing of A is needed any more, L⁻¹ comes about: what the same elimination makes of the identity.

    Args:
        matrix: (n, n) A; what lies above the diagonal is left as anything.
        widths: see `_WIDTHS`.
        invert: whether L⁻¹ is wanted; otherwise whatever is left in place of it is of no use.
    """
    if not widths:
        return _one_by_one(matrix)
    size, width = len(matrix), widths[0]
    for start in range(0, size, width):
        end = min(start + width, size)
        corner, under = matrix[start:end, start:end], matrix[end:, start:end]
        if not _eliminate(corner, widths[1:], invert=True):
            return False
        own = corner.tril()
        below = torch.zeros_like(under, memory_format=torch.contiguous_format)  # of L
        _add(below, under.contiguous(), own)
        for left in range(end, size, width):
            part = below[left - end :]
            _add(matrix[left:, left : left + width], part, part[:width], -1)
        if invert:
            for left in range(0, start, width):
                before = matrix[start:end, left : left + width]
                before.copy_(product(own, before.T.contiguous()))
                _add(matrix[end:, left : left + width], below, before.T.contiguous(), -1)
            corner.copy_(own)
            _add(under.zero_(), below, own.T.contiguous(), -1)
    return True


def _add(to: Tensor, a: Tensor, b: Tensor, sign: int = 1) -> None:
    """Add or subtract a @ b.T, in tiles of few shapes: oneDNN keeps the code that it makes for each shape."""
    for rows, some in zip(torch.split(to, _TILE), torch.split(a, _TILE), strict=True):
        rows.add_(product(some, b), alpha=sign)


def _one_by_one(matrix: Tensor) -> bool:
    """The same for a few rows, in float64: of the identity at the right of A the elimination makes L⁻¹."""
    size = len(matrix)
    both = numpy.concatenate([matrix.double().numpy(), numpy.eye(size)], axis=1)
    with numpy.errstate(over="ignore", invalid="ignore"):  # callers see to what is not finite
        for place in range(size):
            some = both[place:, place : place + size + 1]  # all else is done with, or still zero
            row = some[0]
            if not 0 < row[0] < numpy.inf:
                return False
            row /= row[0] ** 0.5
            some[1:] -= row[1 : size - place, None] * row
    matrix.copy_(torch.from_numpy(both[:, size:]))
    return True


def _square(lower: Tensor) -> Tensor:
    """XᵀX of a lower triangular (n, n) X, above whose diagonal there may be anything, in the place of X."""
    size, width = len(lower), _WIDTHS[0]
    for start in range(0, size, width):
        end = min(start + width, size)
        rows = lower[start:end, :end]
        rows[:, start:].tril_()
        columns = rows.T.clone(memory_format=torch.contiguous_format)
        rows.zero_()
        for left in range(0, end, width):
            part = columns[left:]
            _add(lower[left:end, left : left + width], part, part[:width])
    for start in range(0, size, width):
        end = min(start + width, size)
        corner = lower[start:end, start:end].tril()
        lower[start:end, start:end] = corner + corner.tril(-1).T
        lower[start:end, end:] = lower[end:, start:end].T
    return lower
