"""Causal attention in bfloat16 for CPUs on which torch's own is slow.

Without AMX, torch's fused kernel multiplies bfloat16 matrices in float32, and takes half of a small model's forward;
the plain matrix product, which oneDNN runs in bfloat16, is several times as fast. Scores are rounded to bfloat16 here,
as in transformers' eager attention, and the scaled queries are too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SCORES = 2**22
"""Scores held at once; more would no longer fit into the caches."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale · QKᵀ + causal mask) V, for some queries at a time.

    Args:
        query, key, value: (sequences, heads, length, width); there may be fewer heads of keys and values, which are
            shared then.

    Returns:
        (sequences, heads, length, width of value)
    """
    sequences, heads, length, width = query.shape
    groups = key.shape[1]
    # The queries that share a key stand below one another, so that nothing is repeated for them.
    query = (query * scale).view(sequences, groups, heads // groups, length, width)
    result = query.new_empty(*query.shape[:4], value.shape[3])
    step = max(32, min(256, SCORES // (heads * length)))
    later = query.new_full((step, step), float("-inf")).triu(1)
    for sequence in range(sequences):
        q, k, v = query[sequence], key[sequence], value[sequence]
        for start in range(0, length, step):
            end = min(start + step, length)
            scores = q[:, :, start:end].reshape(groups, -1, width) @ k[:, :end].mT
            scores.view(*q.shape[:2], end - start, end)[..., start:] += later[: end - start, : end - start]
            result[sequence, :, :, start:end] = (scores.softmax(-1) @ v[:, :end]).view(*q.shape[:2], end - start, -1)
    return result.view(sequences, heads, length, -1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's `scaled_dot_product_attention`, of which plain causal attention in bfloat16 is `causal_attention`."""
    plain = is_causal and attn_mask is None and dropout_p == 0 and query.ndim == key.ndim == value.ndim == 4
    if plain and _fit(query, key, value, enable_gqa):
        return causal_attention(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _fit(query: Tensor, key: Tensor, value: Tensor, shared: bool) -> bool:
    """Whether these are of one length and number, without gradients, and in bfloat16."""
    heads = key.shape[1] == query.shape[1] or (shared and query.shape[1] % key.shape[1] == 0)
    alike = query.shape[0] == key.shape[0] and query.shape[2:] == key.shape[2:] and key.shape[:3] == value.shape[:3]
    narrow = query.dtype == key.dtype == value.dtype == torch.bfloat16
    return heads and alike and narrow and not any(tensor.requires_grad for tensor in (query, key, value))
