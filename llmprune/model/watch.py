"""Shows what flows into the linears of a block while it runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from llmprune.model.blocks import replaced
from llmprune.model.linears import Linear, first_projection
from llmprune.stats import Needs

Shown = Mapping[tuple[str, ...], Callable[[], Tensor]]
"""Names of linears that are given one tensor, and how to get it."""


@dataclass(frozen=True)
class Input:
    """A tensor inside a block that one or several linears are given, so that they share its statistics.

    Attributes:
        linears: their names.
        features: its width.
        needs: the most that any solver of these linears asks for.
        beside: features of what is taken in of the dense model beside it; 0 where nothing is.
        stream: whether that is what the hidden states lack of the dense model's, to which the output of the one linear
            is added as it is; else how far its inputs are from the dense model's.
    """

    linears: tuple[str, ...]
    features: int
    needs: Needs
    beside: int = 0
    stream: bool = False


@dataclass(frozen=True)
class Stage:
    """Inputs whose statistics are collected together, and whose linears are then solved.

    Attributes:
        inputs: what is collected.
        dense: the whole block stays as it was until all of it is seen. Else a run stands still before the first linear
            that is not solved yet, and goes on through it when it is.
        again: some of it is seen more than once in a run, which therefore goes on to its end.
    """

    inputs: tuple[Input, ...]
    dense: bool = False
    again: bool = False

    @property
    def beside(self) -> bool:
        """Whether anything of the dense model is taken in."""
        return any(entry.beside for entry in self.inputs)


class Watch:
    """Is shown the inputs of some linears of a block while it runs.

    Attributes:
        linears: the linears by name.
    """

    def __init__(self, linears: Iterable[Linear]) -> None:
        self.linears = {linear.name: linear for linear in linears}

    def ready(self, inputs: Shown) -> None:
        """Take in the inputs of linears that could all be run now, before any of them is; by default nothing is."""

    def returned(self, module: str, expert: int, output: Tensor, weights: Tensor) -> None:
        """Take in what an expert of a fused module returns, before the router's weights are multiplied in.

        Args:
            output: (tokens, hidden) for the tokens that were sent to it.
            weights: (tokens,) float32, the router's, as parts of the sum over the experts of each token.
        """

    def waits(self, names: Iterable[str]) -> bool:
        """Whether any of these linears is to be shown before it is run."""
        return not self.linears.keys().isdisjoint(names)

    @contextlib.contextmanager
    def watching(self, block: nn.Module, name: str) -> Iterator[None]:
        """Watch the block's linears while something runs inside."""
        modules = dict(block.named_modules(prefix=name))
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

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.ready({(name,): lambda: inputs[0]})

        return hook


class Mark:
    """What is left of a tensor to know it again by, as long as its memory is there, without holding it.

    Two are equal when they are of the same part of the same memory.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._memory = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._form = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else None

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Mark) or self._form is None or self._form != other._form:
            return False
        return not self._memory.expired() and not other._memory.expired()  # type: ignore[no-untyped-call]

    __hash__ = None  # type: ignore[assignment]


def _run_experts(
    module: Any, path: str, watch: Watch, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run fused experts one by one, after each expert's inputs have been shown: first all up, then all down.

    Args:
        hidden: (tokens, hidden).
        top_k_index: (tokens, k) expert numbers; a number past the last expert means no expert.
        top_k_weights: (tokens, k).
    """
    up = first_projection(module)
    experts = range(module.down_proj.shape[0])
    chosen = [torch.where(top_k_index == expert) for expert in experts]

    def show(parts: Iterable[str], inputs: Callable[[int], Tensor]) -> None:
        shown = {}
        for expert in experts:
            names = tuple(name for part in parts if (name := f"{path}.{expert}.{part}") in watch.linears)
            if names:
                shown[names] = functools.partial(inputs, expert)
        if watch.waits(name for names in shown for name in names):
            watch.ready(shown)

    def given(expert: int) -> Tensor:
        return hidden[chosen[expert][0]]

    def inner(expert: int) -> Tensor:
        made = _project(module, up, expert, given(expert))
        applied: Tensor = module._apply_gate(made) if up == "gate_up_proj" else module.act_fn(made)
        return applied

    show(dict.fromkeys(("gate_proj", "up_proj", up)), given)
    held: dict[int, Tensor] = {}
    if watch.waits(f"{path}.{expert}.down_proj" for expert in experts):
        held = {expert: inner(expert) for expert in experts}
        show(("down_proj",), held.__getitem__)
    total = torch.zeros_like(hidden, dtype=torch.float32)
    for expert in experts:
        token, place = chosen[expert]
        if not len(token):
            continue
        output = _project(module, "down_proj", expert, held.pop(expert) if held else inner(expert))
        if getattr(module, "has_post_expert_norm", False):
            output = module.post_expert_norm(output)
        share = top_k_weights[token].float()
        watch.returned(path, expert, output, share.gather(1, place[:, None])[:, 0] / share.sum(1))
        total.index_add_(0, token, (output * top_k_weights[token, place, None]).float())
    return total.to(hidden.dtype)


def _project(module: Any, name: str, expert: int, inputs: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    biases = getattr(module, f"{name}_bias", None)
    bias = None if biases is None else biases[expert]
    return functional.linear(inputs, weight.T if module.is_transposed else weight, bias)
