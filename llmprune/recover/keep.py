"""A callback for any Trainer: zeros stay zeros."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from llmprune.errors import UserError
from llmprune.recover.masks import (
    NOTABLE,
    Keeper,
    check_training,
    masks_of,
    read_beside,
    resumed_from,
    trained_linears,
    write_beside,
)

FILE = "llmprune_masks.safetensors"
"""Holds the masks in each of the Trainer's checkpoints."""


class KeepZeros(TrainerCallback):  # type: ignore[misc]
    """Keeps the zeros of a sparse model while transformers' Trainer, or one that is built on it, trains it.

    Gradients are masked before the optimiser sees them, and weights after each of its steps, so that neither momentum
    nor weight decay nor a Trainer that goes on from a checkpoint of somebody else's brings a zero back. Masks are kept
    in each checkpoint, and taken from there on resuming: a kept weight that happens to be zero then stays a kept one.
    `Trainer(..., callbacks=[KeepZeros()])`

    Adapters of peft may be trained beside the zeros, but fill them when they are merged into the weights, of which a
    warning tells: those of `recover(method="lora")` do not.

    Args:
        masks: {parameter name: (the parameter's shape) bool, True = kept}; by default the zeros that the model holds
            when training begins, of the linears that llmprune can prune, where they make up at least `least` of one,
            and not all of it.
        least: see there, a fraction.

    Raises:
        UserError: when training begins: no zeros, masks of another model or of another training's checkpoint, or
            parameters that are dealt to processes (FSDP, DeepSpeed).
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None, least: float = NOTABLE) -> None:
        self.masks = dict(masks) if masks is not None else None
        self._least = least
        self._keeper: Keeper | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the masks, and begin to keep them."""
        model = kwargs["model"]
        check_training(model, args, state)
        if getattr(model, "peft_config", None):
            warnings.warn(
                "these adapters fill the zeros of the weights that they are merged into: leave them apart, or train "
                "those of `llmprune recover --method lora`, which keep them",
                stacklevel=2,
            )
        parameters = dict(model.named_parameters())
        found = resumed_from(args, state)
        if found is not None and (found / FILE).is_file():
            self.masks = read_beside(found / FILE, parameters, None)
        elif self.masks is None:
            # One that is nothing but zeros is no pruned one, but an adapter that is to grow.
            linears = [
                linear
                for linear in trained_linears(model)
                if linear.parameter in parameters and bool(linear.view(parameters[linear.parameter].detach()).any())
            ]
            self.masks = masks_of(parameters, linears, self._least)
            if not self.masks:
                raise UserError(
                    f"there are no zeros to keep: no linear of this {type(model).__name__} is zero to "
                    f"{self._least:.0%} or more (KeepZeros(masks) or KeepZeros(least=0.01) says what to keep)"
                )
        self._keeper = Keeper(model, self.masks)
        self._keeper.apply()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put back zeros that the step moved."""
        assert self._keeper is not None
        self._keeper.apply()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the masks in the Trainer's checkpoint."""
        assert self._keeper is not None
        write_beside(args, state, FILE, dict(kwargs["model"].named_parameters()), self._keeper.masks, None)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the gradients."""
        if self._keeper is not None:
            self._keeper.apply()
            self._keeper.release()
