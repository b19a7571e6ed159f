"""Products in half precision by way of float32, and which calls go that way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmprune.model import cpu
from llmprune.model.cpu import linear, quick, widens

CPU = torch.device("cpu")


def made(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without products in half precision."""
    monkeypatch.setattr(cpu, "_halves", lambda: "none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("at_once", [cpu.AT_ONCE, 1, 100])
def test_is_the_product_rounded_once(
    dtype: torch.dtype, bias: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "AT_ONCE", at_once)
    x, w = made(2, 7, 48, seed=0, dtype=dtype), made(33, 48, seed=1, dtype=dtype)
    b = made(33, seed=2, dtype=dtype) if bias else None
    exact = x.double() @ w.double().T + (b.double() if b is not None else 0)
    got = linear(x, w, b)
    assert got.dtype == dtype
    assert got.shape == (2, 7, 33)
    # Half a unit in the last place, and what float32 sums are off by.
    unit = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
    assert bool(((got.double() - exact).abs() <= 0.5 * unit + 1e-5).all())


@pytest.mark.parametrize("exact", [False, True])
def test_linears_are_taken_in_whatever_form_they_are_called(slow: None, exact: bool) -> None:
    x, w, b = made(3, 20, 16, seed=0), made(24, 16, seed=1), made(24, seed=2)
    module = torch.nn.Linear(16, 24, dtype=torch.bfloat16).requires_grad_(False)
    module.weight.copy_(w)
    assert module.bias is not None
    module.bias.copy_(b)
    with quick(CPU, torch.bfloat16, exact):
        assert torch.equal(module(x), linear(x, w, b))
        assert torch.equal(functional.linear(x, w), linear(x, w))
        assert torch.equal(functional.linear(input=x, weight=w, bias=b), linear(x, w, b))
        assert torch.equal(torch.addmm(b, x[0], w.T), linear(x[0], w, b))


@pytest.mark.parametrize("case", ["float32", "gradient", "scaled", "a matrix added", "no rows"])
def test_everything_else_is_torchs(slow: None, case: str) -> None:
    x, w, b = made(20, 16, seed=0), made(24, 16, seed=1), made(24, seed=2)
    call = lambda: functional.linear(x, w, b)  # noqa: E731
    if case == "float32":
        x, w, b = x.float(), w.float(), b.float()
    elif case == "gradient":
        w.requires_grad_()
    elif case == "scaled":
        call = lambda: torch.addmm(b, x, w.T, alpha=2)  # noqa: E731
    elif case == "a matrix added":
        call = lambda: torch.addmm(made(20, 24, seed=3), x, w.T)  # noqa: E731
    elif case == "no rows":
        x = x[:0]
    theirs = call()
    with quick(CPU, torch.bfloat16):
        got = call()
    assert torch.equal(got, theirs)
    assert got.requires_grad == theirs.requires_grad


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [("none", torch.bfloat16, True), ("none", torch.float16, True), ("none", torch.float32, False),
     ("products", torch.bfloat16, False), ("products", torch.float16, True), ("all", torch.bfloat16, False)],
)  # fmt: skip
def test_where_products_are_widened(
    kind: str, dtype: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_halves", lambda: kind)
    assert widens(CPU, dtype) == expected
    assert not widens(torch.device("cuda"), dtype)
