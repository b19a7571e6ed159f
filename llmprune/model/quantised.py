"""Quantised checkpoints: which can be made plain again, and how.

Where a weight is numbers times scales (FP8, MXFP4), that is one tensor after the other. What takes a package of its own
(bitsandbytes, compressed-tensors) is loaded by transformers, the whole model at once. Other methods are refused.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from llmprune import memory
from llmprune.errors import Failure, UserError
from llmprune.model.index import TensorInfo, read_index, read_tensors
from llmprune.model.skeleton import load_config, make_skeleton
from llmprune.progress import Progress
from llmprune.recipe import DTYPES

if TYPE_CHECKING:
    from llmprune.model.source import Source

BY_TENSOR = ("fp8", "mxfp8", "mxfp4")
"""Methods that are undone tensor by tensor."""

BY_MODEL = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}
"""Methods that transformers undoes, on the whole model, and the module that it needs for that."""

SHARD = 2**30
"""Bytes of a file that is written, and so of what is in memory; a larger tensor is a file by itself."""

AT_ONCE = 2**24
"""Elements that are held in float32 while a tensor is made plain, where its blocks are not larger."""

_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
_UNUSED = ("activation_scale", "input_scale")
"""Scales of activations, which are not quantised any more."""


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are quantised.

    Attributes:
        method: as its config names it.
        settings: the config's section about it.
        original: the Hub name of the model that it was made from, where the config tells.
    """

    method: str
    settings: Mapping[str, Any]
    original: str | None = None


def quantisation(folder: Path) -> Quantisation | None:
    """What config.json says of a quantisation; None where it says nothing, or cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        parts = [config, config.get("text_config") or {}]
        found = (part.get(key) for part in parts for key in ("quantization_config", "compression_config"))
        settings = next((value for value in found if isinstance(value, dict) and value), None)
    except (OSError, ValueError, AttributeError):
        return None
    if settings is None:
        return None
    bits = any(settings.get(key) for key in ("load_in_4bit", "load_in_8bit"))
    method = str(settings.get("quant_method") or ("bitsandbytes" if bits else "unknown")).lower()
    told = str(config.get("_name_or_path") or "")
    return Quantisation(method, settings, told if re.fullmatch(r"[\w.-]+/[\w.-]+", told) else None)


def check(found: Quantisation, name: str) -> None:
    """See that a quantisation can be undone here.

    Raises:
        UserError: it cannot, or a package for it is missing.
    """
    if found.method in BY_TENSOR:
        return
    if found.method not in BY_MODEL:
        original = f" ({found.original})" if found.original else ""
        raise UserError(
            f"{name} is quantised with {found.method}, which cannot be undone here: prune the unquantised model "
            f"that it was made from{original}, and quantise afterwards"
        )
    if importlib.util.find_spec(BY_MODEL[found.method]) is None:
        raise UserError(
            f"{name} is quantised with {found.method}, and a package is missing that can undo it: "
            "pip install 'llmprune[quantised]', or prune the unquantised model"
        )


def plain_config(folder: Path, dtype: str) -> dict[str, Any]:
    """The config of a checkpoint once its weights are plain.

    Args:
        dtype: of what was quantised; `auto` is what the config names, or bfloat16 where it names none.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if dtype == "auto":
        told = config.get("dtype") or config.get("torch_dtype")
        dtype = told if told in DTYPES[1:] else "bfloat16"
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            for key in ("quantization_config", "compression_config", "torch_dtype"):
                part.pop(key, None)
            if part is config or "dtype" in part:
                part["dtype"] = dtype
    return config


def dequantise(folder: Path, into: Path, found: Quantisation, dtype: str, progress: Progress) -> None:
    """Write the plain weights of a quantised checkpoint, tensor by tensor; others are kept as they are.

    Raises:
        UserError: a weight is quantised in a way that is not known here.
        Failure: a scale is missing, or does not fit its weight.
    """
    index = read_index(folder)
    parts = _parts(index, found)
    blocks = found.settings.get("weight_block_size")
    wanted = getattr(torch, dtype)
    sizes = _sizes(index, parts, wanted)
    shards: list[list[str]] = [[]]
    room = SHARD
    for key in sorted(parts, key=lambda key: (index[parts[key][0]].file, index[parts[key][0]].offset)):
        if shards[-1] and sizes[key] > room:
            shards.append([])
            room = SHARD
        shards[-1].append(key)
        room -= sizes[key]
    weight_map = {}
    for number, keys in enumerate(progress.over(shards, f"dequantising {found.method}"), 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for key in keys:
            made_of = read_tensors({part: index[part] for part in parts[key]})
            tensors[key] = _plain(key, [made_of[part] for part in parts[key]], blocks, wanted)
            del made_of
        save_file(tensors, into / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(keys, name))
        del tensors
        memory.give_back()
    write_index(into, weight_map)


def plain_size(folder: Path, found: Quantisation, dtype: str) -> int:
    """Bytes that `dequantise` writes."""
    index = read_index(folder)
    return sum(_sizes(index, _parts(index, found), getattr(torch, dtype)).values())


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """Write the index of a checkpoint: key to the name of its file."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict(weight_map)}))


def _parts(index: Mapping[str, TensorInfo], found: Quantisation) -> dict[str, tuple[str, ...]]:
    """Each tensor of the plain checkpoint, and what it is made of: itself, or values and their scales."""
    parts: dict[str, tuple[str, ...]] = {}
    for key, info in index.items():
        base, _, end = key.rpartition("_")
        if found.method == "mxfp4" and end in ("blocks", "scales") and f"{base}_blocks" in index:
            if end == "blocks":
                parts[base] = (key, f"{base}_scales")
            continue
        if key.removesuffix("_scale_inv") != key and key.removesuffix("_scale_inv") in index:
            continue
        if key.rpartition(".")[2] in _UNUSED and f"{key.rpartition('.')[0]}.weight" in index:
            continue
        if info.dtype in (torch.int8, torch.uint8) and len(info.shape) > 1:
            kind = str(info.dtype).removeprefix("torch.")
            raise UserError(f"{key} is packed into {kind}, which is not read here: prune the unquantised model")
        parts[key] = (key, f"{key}_scale_inv") if info.dtype in _EIGHT_BITS else (key,)
    for key, keys in parts.items():
        if keys[-1] not in index:
            raise Failure(f"{keys[-1]} is missing, without which {key} means nothing: download the model again")
    return parts


def _sizes(index: Mapping[str, TensorInfo], parts: Mapping[str, tuple[str, ...]], dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each tensor of the plain checkpoint."""
    made = {}
    for key, (first, *scales) in parts.items():
        packed = 2 if scales and index[first].dtype not in _EIGHT_BITS else 1  # two numbers in a byte
        made[key] = index[first].numel * packed * dtype.itemsize if scales else index[first].nbytes
    return made


def _plain(key: str, parts: list[Tensor], blocks: Any, dtype: torch.dtype) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    values, scales = parts
    if values.dtype not in _EIGHT_BITS:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        made: Tensor = convert_moe_packed_tensors(values, scales, dtype=dtype)
        return made.contiguous()
    exponents = scales.dtype == torch.uint8
    scales = torch.exp2(scales.float() - 127) if exponents else scales.float()
    try:
        return _scaled(values, scales, blocks, dtype)
    except ValueError as error:
        raise Failure(f"{key} cannot be dequantised: {error}") from None


def _scaled(values: Tensor, scales: Tensor, blocks: Any, dtype: torch.dtype) -> Tensor:
    """Values times the scale of the block that each lies in, blocks at the lower and right edge being smaller.

    Args:
        values: (rows, columns), or (experts, rows, columns).
        scales: a scalar, or (blocks downward, blocks across), for each expert.
        blocks: (rows, columns) of a block, as the config says; where that does not fit, the scales divide evenly.
    """
    if scales.numel() == 1:
        return values.float().mul_(scales.reshape(())).to(dtype)
    if values.ndim == 3:
        made = torch.empty(values.shape, dtype=dtype)
        scales = scales if scales.ndim == 3 else scales.reshape(-1, 1, 1)
        for expert, (part, scale) in enumerate(zip(values, scales, strict=True)):
            made[expert] = _scaled(part, scale, blocks, dtype)
        return made
    if scales.ndim == 1:
        scales = scales[:, None]
    sizes = []
    for axis, (size, count) in enumerate(zip(values.shape, scales.shape, strict=True)):
        told = blocks[axis] if isinstance(blocks, list | tuple) and len(blocks) == 2 else 0
        if told and -(-size // told) == count:
            sizes.append(int(told))
        elif size % count == 0:
            sizes.append(size // count)
        else:
            raise ValueError(f"{tuple(scales.shape)} scales do not fit the shape {tuple(values.shape)}")
    rows, columns = sizes
    wide = scales.repeat_interleave(columns, 1)[:, : values.shape[1]]
    made = torch.empty(values.shape, dtype=dtype)
    step = (
        max(1, AT_ONCE // (rows * values.shape[1])) * rows
    )  # a few blocks at a time, so that little is held in float32
    for start in range(0, values.shape[0], step):
        part = values[start : start + step].float()
        scale = wide[start // rows : (start + step) // rows].repeat_interleave(rows, 0)
        made[start : start + step] = part.mul_(scale[: len(part)])
    return made


def dequantise_model(source: Source, into: Path, found: Quantisation, dtype: str) -> None:
    """Let transformers load a quantised model as a whole, undo its quantisation, and save it."""
    wanted, options = getattr(torch, dtype), {}
    if found.method == "compressed-tensors":
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=wanted, device_map="cpu", trust_remote_code=source.trusted, **options
    )
    if getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize(wanted)
    model.to(wanted).save_pretrained(into)


def model_sizes(source: Source, dtype: str) -> tuple[int, int]:
    """Bytes of a model whose weights are plain: on the disk, and in memory at the peak of `dequantise_model`."""
    config = load_config(source)
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    model = make_skeleton(config, getattr(torch, dtype), source.trusted)
    plain = sum(parameter.numel() for parameter in model.parameters()) * getattr(torch, dtype).itemsize
    return plain, plain + sum(info.nbytes for info in read_index(source.folder).values())
