"""Runs a block so that gradients go back through it, in numbers that the machine at hand is quick at."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.model import blocks
from llmprune.model.activations import Call


@dataclass(frozen=True)
class Numbers:
    """What is computed in.

    Attributes:
        dtype: of the block's weights as they are run.
        wide: whether that is done in float32, on a CPU that has no products in it.
    """

    dtype: torch.dtype
    wide: bool

    def cast(self, value: Any) -> Any:
        """Tensors as they are computed with, wherever they are."""
        if isinstance(value, Tensor):
            return value.float() if self.wide and value.dtype == self.dtype else value
        if isinstance(value, Call):
            return Call(self.cast(value.args), self.cast(value.kwargs))
        if isinstance(value, list | tuple):
            return type(value)(self.cast(item) for item in value)
        if isinstance(value, Mapping):
            return {key: self.cast(item) for key, item in value.items()}
        return value

    def fitted(self, value: Tensor) -> Tensor:
        """A weight that is fitted in float32."""
        return value if self.wide else value.to(self.dtype)


class Run:
    """A block as it is, in the dtype that is computed in; gradients go through it to what it is given."""

    def __init__(self, module: nn.Module, numbers: Numbers, without: Collection[str] = ()) -> None:
        """Take in the block.

        Args:
            without: names of weights that are given at each call.
        """
        self._module, self._numbers = module, numbers
        state = module.state_dict()
        self._weights = {name: numbers.cast(value) for name, value in state.items() if name not in without}

    def __call__(self, call: Call, given: Tensor, fitted: Mapping[str, Tensor] = MappingProxyType({})) -> Tensor:
        """What the block returns for a batch, with weights that are being fitted by their names in it."""
        cast = self._numbers.cast
        weights = {**self._weights, **{name: self._numbers.fitted(value) for name, value in fitted.items()}}
        return blocks.run(self._module, cast(call), cast(given), weights)
