"""The prunable weights of a block as 2-D matrices.

A `Linear` here is a view: of an `nn.Linear`, of a `Conv1D` (stored transposed), or of one expert inside the fused 3-D
parameters of a mixture of experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROUTERS = {"gate", "router", "router_gate", "shared_expert_gate", "shared_experts_gate"}
"""Names of linears, or of their parents, that choose between experts: tiny, decisive, and left alone."""


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a block.

    Attributes:
        name: full name in the model; `...experts.3.gate_proj` for one expert's part of a fused parameter.
        parameter: full name of the parameter that holds it.
        module: full name of the module that is given the inputs.
        shape: (out_features, in_features).
        expert: its place in a fused parameter.
        transposed: the parameter is stored as (in, out).
        rows: the part of the fused parameter's output rows that is this linear, as (start, end).
    """

    name: str
    parameter: str
    module: str
    shape: tuple[int, int]
    expert: int | None = None
    transposed: bool = False
    rows: tuple[int, int] | None = None

    def view(self, parameter: Tensor) -> Tensor:
        """The (out, in) matrix inside the parameter; writing to it writes to the parameter."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        matrix = matrix.T if self.transposed else matrix
        return matrix if self.rows is None else matrix[self.rows[0] : self.rows[1]]

    @property
    def bias_parameter(self) -> str:
        """Full name of the parameter that holds its bias, where it has one."""
        return self.parameter.removesuffix(".weight") + (".bias" if self.expert is None else "_bias")

    def bias(self, state: Mapping[str, Tensor]) -> Tensor | None:
        """The (out,) bias among parameters by their full names, None where there is none; a view, as `view` is."""
        stored = state.get(self.bias_parameter)
        if stored is None or self.expert is None:
            return stored
        return stored[self.expert] if self.rows is None else stored[self.expert][self.rows[0] : self.rows[1]]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


def find_linears(block: nn.Module, name: str) -> list[Linear]:
    """Every matrix of the block that can be pruned; routers are left out."""
    found: list[Linear] = []
    for path, module in block.named_modules(prefix=name):
        if isinstance(module, nn.Linear | Conv1D):
            if ROUTERS.intersection(path.split(".")[-2:]):
                continue
            transposed = isinstance(module, Conv1D)
            rows, columns = module.weight.shape[::-1] if transposed else module.weight.shape
            found.append(Linear(path, f"{path}.weight", path, (rows, columns), transposed=transposed))
        elif is_fused(module):
            found.extend(_experts(module, path))
    return found


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of all its experts in 3-D parameters that transformers lets us run."""
    down = getattr(module, "down_proj", None)
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and getattr(down, "ndim", 0) == 3


def _experts(module: Any, path: str) -> Iterator[Linear]:
    up = first_projection(module)
    transposed = bool(module.is_transposed)
    for expert in range(module.down_proj.shape[0]):
        for parameter in (up, "down_proj"):
            stored = getattr(module, parameter).shape[1:]
            rows, columns = stored[::-1] if transposed else stored
            # Where gate and up are interleaved (gpt_oss), the two stay one matrix.
            split = parameter == "gate_up_proj" and getattr(module, "is_concatenated", not transposed)
            parts = (("gate_proj", (0, rows // 2)), ("up_proj", (rows // 2, rows))) if split else ((parameter, None),)
            for part, span in parts:
                count = rows if span is None else span[1] - span[0]
                name = f"{path}.{expert}.{part}"
                yield Linear(name, f"{path}.{parameter}", path, (count, columns), expert, transposed, span)


def first_projection(module: Any) -> str:
    """The name of the parameter that an expert's inputs meet first."""
    return "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
