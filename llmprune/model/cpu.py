"""Half precision on CPUs: products and attention in the way that is quick on the CPU at hand.

x86 CPUs come in three kinds. With AMX, torch is quick as it is. With AVX512-BF16 alone, plain products in bfloat16 are
quick and torch's fused attention is not: see `attention`. All others (most laptops, desktops, and many servers) have no
product in half precision at all, and what torch does instead takes several times as long as a product in float32.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from llmprune.matrix import HALVES, has_onednn, product
from llmprune.model.attention import attend

AT_ONCE = 2**22
"""Weights that are turned into float32 at once."""


def quick(device: torch.device, dtype: torch.dtype, exact: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Inside, operations in half precision that this CPU is slow at are computed in other ways; all others are torch's.

    Args:
        exact: only in ways that round no more than torch does.
    """
    kind = products(device, dtype)
    if kind == "float32":
        return _Quick({functional.linear: _linear, torch.addmm: _addmm})
    if kind == "attention" and not exact:
        return _Quick({functional.scaled_dot_product_attention: attend})
    return contextlib.nullcontext()


def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype are computed in float32 here, and rounded."""
    if device.type != "cpu" or dtype not in HALVES:
        return False
    kind = _halves()
    return kind == "none" or (kind == "products" and dtype == torch.float16)


def products(device: torch.device, dtype: torch.dtype) -> str:
    """How products of this dtype are computed here: what is computed on another kind of CPU differs by more than sums.

    Returns:
        `torch` where that is left to it, else `float32`, or `attention` where that alone is computed otherwise.
    """
    if widens(device, dtype):
        return "float32"
    return "attention" if device.type == "cpu" and dtype == torch.bfloat16 and _halves() == "products" else "torch"


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X Wᵀ + b in float32, rounded once to the dtype of the inputs.

    Args:
        inputs: (..., in).
        weight: (out, in), of which some rows at a time are held in float32.
        bias: (out,).

    Returns:
        (..., out)
    """
    features, x = len(weight), inputs.reshape(-1, inputs.shape[-1]).float()
    result = inputs.new_empty(len(x), features)
    step = max(1, AT_ONCE // max(1, weight.shape[1]))
    for start in range(0, features, step):
        rows = slice(start, start + step)
        part = product(x, weight[rows].float())
        result[:, rows] = part if bias is None else part.add_(bias[rows])
    return result.view(*inputs.shape[:-1], features)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor:
    """b + A B of two matrices, as the `Conv1D` of transformers computes it."""
    if scales or input.shape != mat2.shape[1:] or not _fits(mat1, mat2, input):
        return torch.addmm(input, mat1, mat2, **scales)
    return linear(mat1, mat2.T, input)


def _fits(*tensors: Tensor | None) -> bool:
    """Whether these are of one half precision, on the CPU, and without gradients."""
    there = [tensor for tensor in tensors if tensor is not None]
    dtype = there[0].dtype
    return dtype in HALVES and not any(
        tensor.dtype != dtype or tensor.device.type != "cpu" or tensor.requires_grad for tensor in there
    )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.ndim == 2 and input.numel() and _fits(input, weight, bias):
        return linear(input, weight, bias)
    return functional.linear(input, weight, bias)


class _Quick(TorchFunctionMode):
    """Lets other functions answer for some of torch's."""

    def __init__(self, instead: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._instead = instead

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._instead.get(func, func)(*args, **(kwargs or {}))


@functools.cache
def _halves() -> Literal["all", "products", "none"]:
    """What torch is quick at in bfloat16 on this CPU; other makes than x86 are left to torch."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not has_onednn():
        return "all"
    if getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)():
        return "all"
    return "products" if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() else "none"
