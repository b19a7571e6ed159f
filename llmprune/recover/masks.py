"""Masks of a whole model, by parameter: where its zeros are, and what keeps them there while it is trained.

A parameter's mask has the parameter's own shape, transposed or fused as it may be; True is kept. Names are those of
`model.named_parameters()`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmprune.errors import Failure, UserError
from llmprune.model.linears import Linear, find_linears
from llmprune.model.writer import difference
from llmprune.parts import zeros

NOTABLE = 0.05
"""From this fraction of exact zeros on, a linear that nobody promises anything of is taken for a pruned one.

Dense weights hold next to none: less than one in a thousand even in float16.
"""

Masks = dict[str, Tensor]


def trained_linears(model: nn.Module) -> list[Linear]:
    """The linears of a model that llmprune can prune, whatever it is wrapped in; its output layer is none of them."""
    heads = {id(head) for head in (_output_layer(module) for module in model.modules()) if head is not None}
    names = {name for name, module in model.named_modules() if id(module) in heads}
    return [linear for linear in find_linears(model, "") if linear.module not in names]


def _output_layer(module: nn.Module) -> nn.Module | None:
    get = getattr(module, "get_output_embeddings", None)
    return get() if callable(get) else None


def masks_of(
    parameters: Mapping[str, Tensor], linears: Iterable[Linear], least: float = NOTABLE, promised: Container[str] = ()
) -> Masks:
    """Masks that keep the zeros which weights hold.

    Args:
        parameters: of the model, by name.
        linears: those that are looked at; all else is kept.
        least: the fraction of zeros from which on a linear's are kept; at 0, those of all that hold any.
        promised: names of linears whose zeros are kept however few they are.

    Returns:
        For each parameter that holds such a linear: (the parameter's shape) bool, True = kept.
    """
    masks: Masks = {}
    for linear in linears:
        parameter = parameters[linear.parameter].detach()
        weight = linear.view(parameter)
        count = zeros(weight)
        if count and (linear.name in promised or count >= least * weight.numel()):
            if linear.parameter not in masks:
                masks[linear.parameter] = torch.ones_like(parameter, dtype=torch.bool)
            linear.view(masks[linear.parameter]).copy_(weight != 0)
    return masks


class Keeper:
    """Holds the zeros of a model in training: gradients are masked as they come, weights whenever `apply` is called.

    Args:
        model: its parameters are changed in place.
        masks: by parameter; moved to where the parameters are.

    Raises:
        UserError: the model has no such parameter, or it has another shape.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in masks.items():
            if name not in parameters:
                raise UserError(f"there is a mask for {name}, but the model has no such parameter")
            if parameters[name].shape != mask.shape:
                shapes = f"{tuple(mask.shape)}, the parameter {tuple(parameters[name].shape)}"
                raise UserError(f"the mask of {name} has the shape {shapes}")
        self._parameters = {name: parameters[name] for name in masks}
        self.masks = {name: mask.to(parameters[name].device) for name, mask in masks.items()}
        self._hooks = [
            parameter.register_hook(functools.partial(_masked, self.masks[name]))  # type: ignore[no-untyped-call]
            for name, parameter in self._parameters.items()
            if parameter.requires_grad
        ]

    @torch.no_grad()
    def apply(self) -> None:
        """Put zeros where they belong, whatever a step made of them."""
        for name, parameter in self._parameters.items():
            parameter.masked_fill_(~self.masks[name], 0)

    def release(self) -> None:
        """Let gradients pass as they are again."""
        for hook in self._hooks:
            hook.remove()


def _masked(mask: Tensor, grad: Tensor) -> Tensor:
    """Not a product: what is pruned may have an infinite gradient."""
    return torch.where(mask, grad, 0)


def check_whole(model: nn.Module) -> None:
    """See that every process holds whole parameters.

    Raises:
        UserError: they are dealt to the processes, so that masks would be laid over parts of them.
    """
    from accelerate.state import AcceleratorState

    spread = str(getattr(AcceleratorState(), "distributed_type", "")) if AcceleratorState._shared_state else ""
    parted = next((name for name, value in model.named_parameters() if hasattr(value, "placements")), None)
    if parted or any(kind in spread for kind in ("FSDP", "DEEPSPEED", "MEGATRON")):
        raise UserError(
            f"zeros cannot be kept where parameters are dealt to the processes ({parted or spread.split('.')[-1]}): "
            "train with plain data parallelism (torchrun without FSDP or DeepSpeed)"
        )


def check_training(model: nn.Module, args: Any, state: Any) -> None:
    """See, when a Trainer begins, that its model and its checkpoints are such that masks can go with them.

    Raises:
        UserError: they are not; see `check_whole` too.
    """
    check_whole(model)
    if state.is_hyper_param_search and str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
        raise UserError("a search for hyperparameters has its checkpoints elsewhere: set save_strategy to 'no' for it")


def write_beside(args: Any, state: Any, name: str, parameters: Mapping[str, Tensor], tensors: Masks, said: Any) -> None:
    """Write what goes on beside a Trainer's checkpoint, in `on_save`: whole or not at all, and where that is written.

    Args:
        name: of the file.
        parameters: those that it is about, as the checkpoint has them.
        tensors: what it holds.
        said: more of it, as JSON has it.
    """
    if not args.should_save:
        return
    path = _checkpoint(args, state) / name
    draft = path.with_name(f".{name}.draft")
    told = {"said": json.dumps(said), "weights": _fingerprint(parameters)}
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, draft, told)
    draft.rename(path)


def read_beside(path: Path, parameters: Mapping[str, Tensor], said: Any) -> Masks:
    """The tensors that `write_beside` wrote, when training goes on with the same parameters and the same said.

    Raises:
        Failure: the file is broken.
        UserError: something else was said, or it lies beside other weights.
    """
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        before = json.loads(told.get("said", "null"))
    except (OSError, SafetensorError, ValueError) as error:
        raise Failure(f"{path} cannot be read: {error}; resume from another checkpoint") from None
    if not told.keys() >= {"said", "weights"}:
        raise Failure(f"{path} was written by another version of llmprune: resume from another checkpoint")
    if other := difference(before, said):
        raise UserError(f"{path} was saved with {other}: give the same to go on from there")
    if told["weights"] != _fingerprint(parameters):
        raise UserError(
            f"{path} lies beside other weights than those that training goes on with: name the checkpoint in "
            "TrainingArguments(resume_from_checkpoint=...) too, for what llmprune keeps beside it; or, where that is "
            "the one, the Trainer did not read all of its weights (it warns of missing keys)"
        )
    return tensors


def _fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """Of the first numbers of each; another training has others."""
    found = hashlib.sha256()
    for name in sorted(parameters):
        found.update(name.encode())
        found.update(parameters[name].detach().flatten()[:64].float().cpu().numpy().tobytes())
    return found.hexdigest()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}")


def resumed_from(args: Any, state: Any) -> Path | None:
    """The checkpoint that a Trainer goes on from, in `on_train_begin`; None where it begins anew.

    Raises:
        UserError: it is not where the Trainer puts its checkpoints, and not in `args.resume_from_checkpoint` either.
    """
    if not state.global_step:
        return None
    places = [_checkpoint(args, state)]
    if isinstance(asked := args.resume_from_checkpoint, str | os.PathLike):
        places.insert(0, Path(asked))
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise UserError(
            f"the checkpoint of step {state.global_step} is not in {args.output_dir}: name it in "
            "TrainingArguments(resume_from_checkpoint=...) too, for what llmprune keeps beside it"
        )
    return found
