"""Our causal attention against the formula in float64, and which calls it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmprune.model import attention, cpu
from llmprune.model.attention import causal_attention
from llmprune.model.cpu import quick

CPU = torch.device("cpu")


def made(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def textbook(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One query at a time, over the keys up to its own place."""
    query, key, value = query.double(), key.double(), value.double()
    result = query.new_zeros(*query.shape[:3], value.shape[3])
    for sequence in range(query.shape[0]):
        for head in range(query.shape[1]):
            of = head * key.shape[1] // query.shape[1]
            for place in range(query.shape[2]):
                scores = key[sequence, of, : place + 1] @ query[sequence, head, place] * scale
                result[sequence, head, place] = scores.softmax(0) @ value[sequence, of, : place + 1]
    return result


@pytest.mark.parametrize(
    ("sequences", "heads", "shared", "length", "width", "value_width"),
    [(1, 1, 1, 1, 4, 4), (2, 4, 2, 33, 16, 16), (1, 3, 3, 300, 64, 64), (2, 6, 1, 40, 24, 8), (1, 2, 1, 257, 32, 32)],
)
def test_equals_the_formula(
    sequences: int, heads: int, shared: int, length: int, width: int, value_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = made(sequences, heads, length, width, seed=0)
    key = made(sequences, heads // shared, length, width, seed=1)
    value = made(sequences, heads // shared, length, value_width, seed=2)
    exact = textbook(query, key, value, 0.3)
    for scores in (attention.SCORES, 1):  # in large steps and in the smallest
        monkeypatch.setattr(attention, "SCORES", scores)
        got = causal_attention(query, key, value, 0.3)
        assert got.dtype == torch.bfloat16
        assert float((got.double() - exact).norm() / exact.norm()) < 0.01


def test_is_about_as_exact_as_torchs_own() -> None:
    query, key, value = (made(2, 4, 512, 64, seed=seed) for seed in range(3))
    exact = functional.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True)

    def off(result: Tensor) -> float:
        return float((result.double() - exact).norm() / exact.norm())

    theirs = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert off(causal_attention(query, key, value, 0.125)) < 3 * off(theirs)


class TestWhichCalls:
    @pytest.fixture(autouse=True)
    def _where_it_pays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu, "_halves", lambda: "products")

    @pytest.mark.parametrize("keywords", [False, True])
    @pytest.mark.parametrize("scale", [None, 0.5])
    def test_plain_causal_attention_is_taken(self, keywords: bool, scale: float | None) -> None:
        query, key, value = made(1, 4, 50, 16, seed=0), made(1, 2, 50, 16, seed=1), made(1, 2, 50, 16, seed=2)
        with quick(CPU, torch.bfloat16):
            if keywords:
                got = functional.scaled_dot_product_attention(
                    query=query, key=key, value=value, is_causal=True, scale=scale, enable_gqa=True
                )
            else:
                key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
                got = functional.scaled_dot_product_attention(query, key, value, None, 0.0, True, scale=scale)
        assert torch.equal(got, causal_attention(query, key, value, scale or 0.25))

    @pytest.mark.parametrize(
        "case",
        [
            "mask",
            "not causal",
            "float32",
            "shorter",
            "three dimensions",
            "gradient",
            "one key for all",
            "one head for all",
        ],
    )
    def test_everything_else_is_torchs(self, case: str) -> None:
        query, key, value = (made(1, 4, 50, 16, seed=seed) for seed in range(3))
        options: dict[str, object] = {"is_causal": case not in ("mask", "not causal")}
        if case == "mask":
            options["attn_mask"] = torch.ones(50, 50, dtype=torch.bool).tril(3)
        elif case == "float32":
            query, key, value = query.float(), key.float(), value.float()
        elif case == "shorter":
            query = query[:, :, :7]
        elif case == "three dimensions":
            query, key, value = query[0], key[0], value[0]
        elif case == "gradient":
            query = query.requires_grad_()
        elif case == "one key for all":
            query = query.repeat(3, 1, 1, 1)
        elif case == "one head for all":
            key = key[:, :1]
        theirs = functional.scaled_dot_product_attention(query, key, value, **options)
        with quick(CPU, torch.bfloat16):
            got = functional.scaled_dot_product_attention(query, key, value, **options)
        assert torch.equal(got, theirs)

    def test_other_dtypes_and_devices_are_left_alone(self) -> None:
        query, key, value = (made(1, 2, 20, 8, seed=seed) for seed in range(3))
        theirs = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        for device, dtype in ((CPU, torch.float32), (CPU, torch.float16), (torch.device("cuda"), torch.bfloat16)):
            with quick(device, dtype):
                assert torch.equal(functional.scaled_dot_product_attention(query, key, value, is_causal=True), theirs)

    def test_what_must_be_exact_is_torchs(self) -> None:
        query, key, value = (made(1, 2, 20, 8, seed=seed) for seed in range(3))
        theirs = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        with quick(CPU, torch.bfloat16, exact=True):
            assert torch.equal(functional.scaled_dot_product_attention(query, key, value, is_causal=True), theirs)
