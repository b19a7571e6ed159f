"""Low-rank adapters that never leave the mask, so that merging them is exact (MaskLoRA, PERP, arXiv:2312.15230)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Adapter(nn.Module):
    """The weight W + M ∘ (B A) · scale, for one parameter (…, rows, columns); fused experts have a B and an A each.

    B is zero and A uniform in ±1/√columns in the beginning, so that training starts from the weight as it is.

    Args:
        weight: the parameter, (…, rows, columns), on the device where the adapter goes.
        mask: bool, of its shape, True = kept; None keeps all.
        rank: columns of B and rows of A.
        scale: what the product counts.
    """

    mask: Tensor | None

    def __init__(self, weight: Tensor, mask: Tensor | None, rank: int, scale: float) -> None:
        super().__init__()
        *experts, rows, columns = weight.shape
        self.up = nn.Parameter(torch.zeros((*experts, rows, rank), device=weight.device))
        self.down = nn.Parameter(torch.empty((*experts, rank, columns), device=weight.device))
        nn.init.uniform_(self.down, -1 / math.sqrt(columns), 1 / math.sqrt(columns))
        self.scale = scale
        # Not in the state dict: the zeros of the weight beside it say the same.
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight to compute with; in the adapter's own precision, so that what is merged is what was trained."""
        with torch.autocast(weight.device.type, enabled=False):
            change = (self.up @ self.down) * self.scale
            if self.mask is not None:
                change = torch.where(self.mask, change, 0)
            return weight + change


def attach(
    model: nn.Module, parameters: Iterable[str], masks: Mapping[str, Tensor], rank: int, scale: float
) -> list[nn.Parameter]:
    """Give each of these parameters an adapter; the weights themselves are no longer trained.

    Returns:
        What is trained instead.
    """
    trained: list[nn.Parameter] = []
    for name in parameters:
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        weight = owner.get_parameter(leaf).requires_grad_(False)
        adapter = Adapter(weight, masks.get(name), rank, scale)
        parametrize.register_parametrization(owner, leaf, adapter)
        trained += [adapter.up, adapter.down]
    return trained


def merge(model: nn.Module) -> None:
    """Put what the adapters make into the weights themselves, and take the adapters off."""
    with torch.no_grad():
        for module in list(model.modules()):
            if parametrize.is_parametrized(module):
                held = module.parametrizations
                assert isinstance(held, nn.ModuleDict)
                for leaf in list(held):
                    parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
