"""Which parameters a method trains, and how they get back into the dtype of the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import Failure
from llmprune.model.linears import Linear
from llmprune.parts import not_finite
from llmprune.recover.adapters import attach
from llmprune.recover.masks import Masks
from llmprune.recover.options import Training


def choose(model: Any, linears: list[Linear], masks: Masks, training: Training) -> set[str]:
    """Set what is trained, and put adapters where the method has any.

    Returns:
        The names of all parameters that will change, as they are called without adapters; tied ones by all their names.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if training.method == "full":
        outer = set() if training.embeddings else _embeddings(model)
        names = {name for name, value in parameters.items() if id(value) not in outer and value.is_floating_point()}
    else:
        names = _norms_and_biases(model)
    for name, value in parameters.items():
        value.requires_grad_(name in names)
    if training.method == "lora":
        matrices = list(dict.fromkeys(linear.parameter for linear in linears))
        attach(model, matrices, masks, training.rank, training.scale)
        names |= set(matrices)
    return names


def _embeddings(model: Any) -> set[int]:
    """The parameters of the embeddings, of positions too, and of the output layer."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    modules += [
        module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None
    ]
    return {id(value) for module in modules for value in module.parameters()}


def _norms_and_biases(model: nn.Module) -> set[str]:
    """Norms are known by their modules' names, as every family calls them so."""
    names = set()
    for path, module in model.named_modules():
        norm = "norm" in type(module).__name__.lower() or "norm" in path.rpartition(".")[2].lower()
        for leaf, value in module.named_parameters(recurse=False):
            if (norm and value.ndim == 1) or leaf == "bias" or leaf.endswith("_bias"):
                names.add(f"{path}.{leaf}" if path else leaf)
    return names


@torch.no_grad()
def round_to(model: nn.Module, names: set[str], dtypes: Mapping[str, torch.dtype], masks: Masks) -> int:
    """Round what was trained to the dtypes of the files, in place, so that what is measured is what is written.

    A kept weight that became zero, by itself or by rounding, becomes the smallest normal number of its dtype, with its
    sign: the mask stays what it was.

    Returns:
        How many such there were.

    Raises:
        Failure: a weight is NaN or infinite.
    """
    raised = 0
    tied = {id(model.get_parameter(name)): name for name in names if name in dtypes}  # the name that the files know
    for name in sorted(tied.values()):
        value = model.get_parameter(name)
        if not_finite(value):
            raise Failure(f"training has broken down: {name} holds NaN or infinite values; take a lower --rate")
        dtype = dtypes[name]
        rounded = value.to(dtype)
        if not_finite(rounded):
            raise Failure(f"{name} has grown beyond what {dtype} holds; take a lower --rate")
        if (mask := masks.get(name)) is not None:
            lost = (rounded == 0) & mask.to(rounded.device)
            if count := int(lost.count_nonzero()):
                least = torch.finfo(dtype).smallest_normal
                rounded = torch.where(lost, torch.where(value < 0, -least, least).to(dtype), rounded)
                raised += count
        value.copy_(rounded)
    return raised


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by every name that it has."""
    return dict(model.named_parameters(remove_duplicate=False))
