"""Factorisations by plain products: against LAPACK in float64, and the same bits on any number of threads."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from llmprune import matrix
from llmprune.matrix import inverse, inverse_factor, is_definite
from tests.test_stats import inputs

SIZES = [1, 2, 63, 64, 65, 255, 256, 257, 300, 576, 800]


def definite(size: int, dtype: torch.dtype = torch.float32, damping: float = 0.01) -> Tensor:
    x = inputs(size // 2 + 1, size).double()
    gram = x.T @ x
    return (gram / gram.diagonal().mean() + damping * torch.eye(size)).to(dtype)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that has LAPACK's routines of its own."""
    monkeypatch.setattr(matrix, "_here", lambda _: False)


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    close = 2e-4 if dtype == torch.float32 else 1e-12
    assert found.dtype == dtype
    assert float((found.double() - expected).norm() / expected.norm()) < close


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_and_inverses_are_those_of_lapack(size: int, dtype: torch.dtype) -> None:
    gram = definite(size, dtype)
    factor = torch.linalg.cholesky(gram.double())
    found = inverse_factor(gram.clone())
    assert found is not None
    assert torch.equal(found, found.tril())
    near(found, torch.linalg.inv(factor).tril(), dtype)
    whole = inverse(gram.clone())
    assert whole is not None
    assert whole.is_contiguous()
    assert torch.equal(whole, whole.T)
    near(whole, torch.linalg.inv(gram.double()), dtype)
    assert is_definite(gram.clone())


@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_rows_and_columns_in_reverse(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.randn(size, size)
    for at_once in (1, 7, 2**20):
        monkeypatch.setattr(matrix, "_SWAPPED", at_once)
        assert torch.equal(matrix.reverse(given.clone()), given.flip(0, 1))
        assert torch.equal(matrix.reverse(given.T.clone().T), given.flip(0, 1))


@pytest.mark.usefixtures("elsewhere")
def test_other_devices_use_their_own() -> None:
    test_a_factor_and_inverses_are_those_of_lapack(300, torch.float32)
    test_what_is_not_positive_definite(300, 299)


@pytest.mark.parametrize(
    ("size", "place"), [(1, 0), (64, 63), (300, 0), (300, 255), (300, 256), (300, 299), (600, 599)]
)
def test_what_is_not_positive_definite(size: int, place: int) -> None:
    """By an eigenvalue of its own, and by one that comes of the other rows."""
    alone, together = torch.eye(size), torch.eye(size)
    alone[place, place] = -1e-3
    together[place, 0] = together[0, place] = 1.1
    for broken in (alone,) if place == 0 else (alone, together):
        assert inverse_factor(broken.clone()) is None
        assert inverse(broken.clone()) is None
        assert not is_definite(broken.clone())
    assert is_definite(torch.eye(size))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_inverse(value: float) -> None:
    for row, column in ((0, 0), (70, 70), (70, 3), (290, 260)):
        broken = torch.eye(300)
        broken[row, column] = broken[column, row] = value
        for found in (inverse_factor(broken.clone()), inverse(broken.clone())):
            assert found is None or not bool(torch.isfinite(found).all())


def bits(threads: int) -> list[str]:
    """What so many threads make of the same matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [ask(definite(size)) for size in (160, 576, 1536) for ask in (inverse_factor, inverse)]
    finally:
        torch.set_num_threads(before)
    return [hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in found if one is not None]


def test_the_same_bits_on_any_number_of_threads() -> None:
    alone = bits(1)
    assert len(alone) == 6
    for threads in (2, 3, 4):
        assert bits(threads) == alone
