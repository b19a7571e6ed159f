"""A model without its weights: config, module on the meta device, and where the decoder and its blocks are in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import accelerate
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmprune.errors import UserError, first_line
from llmprune.model.quiet import quiet

if TYPE_CHECKING:
    from llmprune.model.source import Source


def load_config(source: Source) -> Any:
    """The config of any model.

    Raises:
        UserError: there is none, it cannot be used, or it takes code that comes with it and is not trusted.
    """
    if not (source.folder / "config.json").is_file():
        raise UserError(f"no config.json in {source.folder}: a model folder holds config.json and *.safetensors")
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trusted)
    except Exception as error:  # what is wrong in a config surfaces in many kinds, depending on the family
        if not source.trusted and "trust_remote_code" in str(error):
            raise UserError(
                f"{source.name} brings code of its own (auto_map in config.json), which is not run unless asked: "
                "read it, then give --trust-remote-code"
            ) from None
        raise UserError(f"{source.name}: config.json cannot be used: {first_line(error)}") from None


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of a model.

    Raises:
        UserError: there is none, it cannot be used, or it is code that is not trusted.
    """
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trusted)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not source.trusted and "trust_remote_code" in str(error):
            raise UserError(
                f"the tokenizer of {source.name} is code of its own, which is not run unless asked: read it, then give "
                "--trust-remote-code"
            ) from None
        raise UserError(f"{source.name} has no tokenizer that can be loaded: {error}") from None


def read_config(source: Source) -> Any:
    """The config of a model that can be pruned.

    Raises:
        UserError: as `load_config`; or it belongs to a quantised model or to no causal LM.
    """
    config = load_config(source)
    if quantised := getattr(config, "quantization_config", None):
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise UserError(f"{source.name} is quantised ({kind}); prune the unquantised model, and quantise afterwards")
    own = source.trusted and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not own and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{source.name} is a {config.model_type!r} model, and transformers has no causal LM for that")
    return config


def longest(config: Any) -> int | None:
    """The longest sequence that a model takes, None where its config does not say."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
    return next((value for name in names if isinstance(value := getattr(text, name, None), int)), None)


def make_skeleton(config: Any, dtype: torch.dtype, trusted: bool = False) -> Any:
    """The model with all its parameters on the meta device; code that comes with it is run if it is trusted."""
    # Buffers stay real: rotary tables are computed at construction and stored in no file.
    with accelerate.init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted)


def decoder_prefix(model: Any) -> str:
    """The name of the decoder inside the model, with a trailing dot; empty when the model is its own decoder."""
    decoder = model.get_decoder()
    return next((f"{name}." if name else "" for name, module in model.named_modules() if module is decoder), "")


def find_blocks(model: Any) -> list[str]:
    """Names of the decoder's blocks, in order.

    They are the outermost modules that transformers marks as not to be split over devices; where a family marks none,
    the one list of modules that has as many entries as the config counts layers.

    Raises:
        UserError: no such list, or several.
    """
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UserError(f"{kind} is an encoder-decoder; only decoders are pruned")
    decoder = model.get_decoder()
    names = {module: name for name, module in model.named_modules()}
    marked = set(model._no_split_modules or ())
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks: dict[str, list[str]] = {}
    for name, module in decoder.named_modules(prefix=names[decoder]):
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(stack + ".") for stack in stacks):
            continue
        if all(type(child).__name__ in marked for child in module) or (not marked and len(module) == layers):
            stacks[name] = [f"{name}.{place}" for place in range(len(module))]
    if len(stacks) != 1:
        found = f"several stacks of blocks ({', '.join(stacks)})" if stacks else "no stack of decoder blocks"
        raise UserError(f"{kind} cannot be walked block by block: {found}")
    return next(iter(stacks.values()))


def pick_device(asked: str) -> torch.device:
    """The torch device to run on; `auto` takes a GPU where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {asked!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
