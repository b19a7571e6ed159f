"""The prunable weights of a block as 2-D matrices, and what flows into them.

A `Linear` here is a view: of an `nn.Linear`, of a `Conv1D` (stored transposed), or of one expert inside the fused 3-D
parameters of a mixture of experts.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from llmprune.errors import Failure
from llmprune.model.blocks import replaced
from llmprune.stats import LinearStats, Needs

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
    up = _first_projection(module)
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


@dataclass(frozen=True)
class Input:
    """A tensor inside a block that one or several linears are given, so that they share its statistics.

    Attributes:
        linears: their names.
        features: its width.
        needs: the most that any solver of these linears asks for.
    """

    linears: tuple[str, ...]
    features: int
    needs: Needs


class Watch(ABC):
    """Is shown the inputs of some linears of a block while it runs.

    Attributes:
        linears: the linears by name.
        everything: also show experts that no token reaches, with no rows.
        last: the module that is not computed any more.
        cut: whether the rest of this batch sees zeros.
    """

    everything = False

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.linears = {linear.name: linear for linear in linears}
        self.last: str | None = None
        self.cut = False
        self._modules: dict[str, nn.Module] = {}

    @abstractmethod
    def saw(self, name: str, inputs: Tensor) -> None:
        """Take in the inputs (..., in) of one linear."""

    @contextlib.contextmanager
    def watching(self, block: nn.Module, name: str) -> Iterator[None]:
        """Watch the block's linears while something runs inside."""
        self._modules = modules = dict(block.named_modules(prefix=name))
        handles, fused = [], {}
        for linear in self.linears.values():
            if linear.expert is None:
                handles.append(modules[linear.module].register_forward_pre_hook(self._hook(linear.name)))
            else:
                fused[linear.module] = modules[linear.module]
        runners = [functools.partial(_run_experts, module, path, self) for path, module in fused.items()]
        try:
            with replaced(list(fused.values()), runners):
                yield
        finally:
            for handle in handles:
                handle.remove()
            if self.last is not None and self.last not in fused:
                del modules[self.last].forward

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.saw(name, inputs[0])

        return hook


class Survey(Watch):
    """Finds out which linears of a block are run, in which order, and which of them are given the same tensor.

    Attributes:
        groups: names of linears, one list a tensor, in the order in which they are first run; what is run more than
            once is by itself.
        again: whether any linear is run more than once.
    """

    everything = True

    def __init__(self, linears: Sequence[Linear]) -> None:
        super().__init__(linears)
        self.groups: list[list[str]] = []
        self.again = False
        self._tensors: list[Tensor] = []

    def saw(self, name: str, inputs: Tensor) -> None:
        """Take in the inputs of one linear."""
        for group in self.groups:
            if name in group:  # perhaps on another tensor this time: it shares its statistics with nobody
                self.again = True
                group.remove(name)
                self.groups.append([name])
                self._tensors.append(inputs.new_empty(0))
                return
        for group, tensor in zip(self.groups, self._tensors, strict=True):
            if _same(tensor, inputs):
                group.append(name)
                return
        self.groups.append([name])
        self._tensors.append(inputs)


class Capture(Watch):
    """Collects the statistics of a block's linears while it runs.

    What the block returns is not to be used: from the second batch on, the module whose inputs are seen last gives
    zeros instead of being computed, because nothing after it is of interest. It is known from a batch in which all
    were seen, experts that no token reached among them.

    Attributes:
        stats: linear's name to its statistics, which all linears of an `Input` share.
    """

    def __init__(self, inputs: Sequence[Input], linears: Sequence[Linear], device: torch.device) -> None:
        """Watch for the given inputs.

        Args:
            linears: all that the inputs name, and perhaps others.
        """
        names = {name for entry in inputs for name in entry.linears}
        super().__init__([linear for linear in linears if linear.name in names])
        self.everything = True
        self.stats: dict[str, LinearStats] = {}
        self._leader: dict[str, str] = {}
        for entry in inputs:
            self.stats.update(dict.fromkeys(entry.linears, LinearStats(entry.features, entry.needs, device)))
            self._leader.update(dict.fromkeys(entry.linears, entry.linears[0]))
        self._order: list[str] = []
        self._current: dict[str, Tensor] = {}

    def next_batch(self) -> None:
        """Tell that a batch is through, and that the tensors seen in it are gone."""
        self._current.clear()
        whole = self.linears.keys() <= set(self._order)
        if self.last is None and whole and self._order.count(self._order[-1]) == 1:
            linear = self.linears[self._order[-1]]
            if (module := self._modules.get(linear.module)) is not None:
                self.last, self.everything = linear.module, False
                if linear.expert is None:
                    module.forward = functools.partial(self._zeros, linear.shape[0])
        self._order.clear()
        self.cut = False

    def finish(self) -> None:
        """Make all statistics ready for solving; the tensors seen are let go."""
        self._current.clear()
        for stats in {id(value): value for value in self.stats.values()}.values():
            stats.finish()

    def saw(self, name: str, inputs: Tensor) -> None:
        """Take in the inputs (..., in) of one linear."""
        if self.last is None:
            self._order.append(name)
        elif self.cut and not name.startswith(f"{self.last}."):
            raise Failure(f"{name} is run after {self.last} only at times: the model changes its course by its data")
        leader = self._leader[name]
        if leader == name:
            self._current[name] = inputs
            self.stats[name].add(inputs)
        elif leader not in self._current or not _same(self._current[leader], inputs):
            raise Failure(f"{name} no longer shares its input with {leader}: the model changes its course by its data")

    def _zeros(self, features: int, inputs: Tensor) -> Tensor:
        self.cut = True
        return inputs.new_zeros(*inputs.shape[:-1], features)


def _same(first: Tensor, second: Tensor) -> bool:
    return first is second or (
        first.numel() > 0
        and first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first.dtype == second.dtype
    )


def _run_experts(
    module: Any, path: str, watch: Watch, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run fused experts one by one, showing each expert's inputs.

    Args:
        hidden: (tokens, hidden).
        top_k_index: (tokens, k) expert numbers; a number past the last expert means no expert.
        top_k_weights: (tokens, k).
    """
    total = torch.zeros_like(hidden, dtype=torch.float32)
    up = _first_projection(module)
    for expert in range(module.down_proj.shape[0]):
        before = [name for part in ("gate_proj", "up_proj", up) if (name := f"{path}.{expert}.{part}") in watch.linears]
        after = [name for name in (f"{path}.{expert}.down_proj",) if name in watch.linears]
        token, place = torch.where(top_k_index == expert)
        if not (watch.everything or len(token)) or (watch.last == path and not before + after):
            continue
        inputs = hidden[token]
        for name in dict.fromkeys(before):
            watch.saw(name, inputs)
        if watch.last == path and not after:
            watch.cut = True
            continue
        inner = _project(module, up, expert, inputs)
        inner = module._apply_gate(inner) if up == "gate_up_proj" else module.act_fn(inner)
        for name in after:
            watch.saw(name, inner)
        if watch.last == path:
            watch.cut = True
            continue
        output = _project(module, "down_proj", expert, inner)
        if getattr(module, "has_post_expert_norm", False):
            output = module.post_expert_norm(output)
        total.index_add_(0, token, (output * top_k_weights[token, place, None]).float())
    return total.to(hidden.dtype)


def _first_projection(module: Any) -> str:
    return "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"


def _project(module: Any, name: str, expert: int, inputs: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    biases = getattr(module, f"{name}_bias", None)
    bias = None if biases is None else biases[expert]
    return functional.linear(inputs, weight.T if module.is_transposed else weight, bias)
