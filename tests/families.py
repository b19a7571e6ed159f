"""Tiny random models of many architectures, built on the spot."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 128

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA: dict[str, Any] = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
MOE: dict[str, Any] = {**GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**GQA, "tie_word_embeddings": True},
    "gemma3_text": {**GQA, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    "mixtral": {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**MOE, "decoder_sparse_step": 1, "mlp_only_layers": [1]},
    "gpt_oss": {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "opt": {**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": True},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "deepseek_v3": {
        **COMMON,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_shared_experts": 1,
    },
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": {**COMMON, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "gpt_neox": COMMON,
    "phi3": {**GQA, "original_max_position_embeddings": 64},
    "qwen3": GQA,
    "cohere2": {**GQA, "sliding_window": 8},
    "olmo2": GQA,
    "qwen3_next": {
        **MOE,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
    "mamba": {**COMMON, "state_size": 8, "time_step_rank": 4, "expand": 2},
    "qwen2": GQA,
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 16},
    "mistral": {**GQA, "sliding_window": 8},
    "gemma2": {**GQA, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "glm4_moe": {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "granitemoe": {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**GQA, "num_experts": 4, "num_experts_per_tok": 2},
    "starcoder2": GQA,
    "stablelm": GQA,
    "gptj": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    "smollm3": GQA,
}

_LONG: dict[str, Any] = {**GQA, "max_position_embeddings": 512, "head_dim": 64}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "deep": ("llama", {**_LONG, "num_hidden_layers": 24, "hidden_size": 512, "intermediate_size": 1536,
                       "num_attention_heads": 8, "num_key_value_heads": 8}),
    "wide": ("llama", {**_LONG, "num_hidden_layers": 1, "hidden_size": 1536, "intermediate_size": 5120,
                       "num_attention_heads": 24, "num_key_value_heads": 8}),
    "sparse": ("mixtral", {**_LONG, "num_hidden_layers": 2, "hidden_size": 768, "intermediate_size": 1024,
                           "num_attention_heads": 12, "num_key_value_heads": 4, "num_local_experts": 32,
                           "num_experts_per_tok": 2}),
}  # fmt: skip
"""Models that are large in one way each: a family, and what is changed of it."""


PARTS: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "layers_block_type": ["mamba", "mlp", "attention", "mlp", "mamba", "attention", "mlp"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "conv_kernel": 4,
        "chunk_size": 16,
        "max_position_embeddings": 64,
    }
}
"""Families in which a block is an attention, an MLP or the like alone."""


def make(family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny random model of the family into the folder, and return the folder."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES, **PARTS}[family] | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, value in model.named_parameters():
            # The usual tiny initial weights make every block nearly the identity, and hide mistakes.
            if value.ndim >= 2 and "embed" not in name:
                value.copy_(torch.randn(value.shape) / value.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def tokenizer() -> Any:
    """A byte-level tokenizer over the first 128 characters, without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    words = {word: number for number, word in enumerate([*special, *alphabet][:VOCABULARY])}
    made = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def temporary(family: str, **changes: Any) -> Path:
    """A tiny model in a new temporary folder."""
    return make(family, Path(tempfile.mkdtemp()) / family, **changes)
