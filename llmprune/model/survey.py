"""Finds out how a block runs: what its linears share, in which order they come, and what a run holds on the way."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmprune.model.linears import Linear
from llmprune.model.watch import Mark, Shown, Watch


class Survey(Watch):
    """Finds out which linears of a block are run, in which order, and which of them are given the same tensor.

    Attributes:
        moments: names of linears, in the order in which they are first run: for each moment at which some could be run,
            one list for each tensor that is there. What is run more than once is by itself.
        again: whether any linear is run more than once.
        held: the most that a run holds of what it has made, whenever linears could be run.
        writers: names of linears whose outputs are added to the block's hidden states as they are.
    """

    def __init__(self, linears: Iterable[Linear], length: int) -> None:
        """Nothing is seen yet.

        Args:
            length: of the sequence that will be run.
        """
        super().__init__(linears)
        self.moments: list[list[list[str]]] = []
        self.again = False
        self.held = Held()
        self._marks: dict[str, Mark] = {}
        self._made = _Made(length)

    @contextlib.contextmanager
    def watching(self, block: nn.Module, name: str) -> Iterator[None]:
        """Watch the block's linears, and what is made, while something runs inside."""
        modules = dict(block.named_modules(prefix=name))
        with super().watching(block, name), self._made, contextlib.ExitStack() as hooks:
            for linear in self.linears.values():
                if linear.expert is None:
                    tell = functools.partial(self._made.came, linear.name)
                    hooks.callback(modules[linear.module].register_forward_hook(tell).remove)
            yield

    @property
    def writers(self) -> tuple[str, ...]:
        """See above; what shares its input with others, or is run more than once, is none."""
        alone = [group[0] for group in self._groups() if len(group) == 1]
        return () if self.again else tuple(name for name in self._made.writers if name in alone)

    def ready(self, inputs: Shown) -> None:
        """Take in the inputs of linears that could all be run now."""
        self.held |= self._made.held()
        moment: list[list[str]] = []
        for names, tensor in inputs.items():
            mark = Mark(tensor())
            for name in names:
                if name in self._marks:  # perhaps on another tensor this time: it shares its statistics with nobody
                    self.again = True
                    group = next(group for group in self._groups() if name in group)
                    if len(group) > 1:
                        group.remove(name)
                        moment.append([name])
                    continue
                known = next((group for group in self._groups(moment) if self._marks[group[0]] == mark), None)
                moment.append([name]) if known is None else known.append(name)
                self._marks[name] = mark
        if moment:
            self.moments.append(moment)

    def _groups(self, latest: Sequence[list[str]] = ()) -> list[list[str]]:
        return [*latest, *(group for moment in self.moments for group in moment)]


@dataclass(frozen=True)
class Held:
    """Bytes that one sequence holds: for each token, and for each pair of tokens."""

    token: float = 0.0
    pair: float = 0.0

    def __or__(self, other: Held) -> Held:
        return Held(max(self.token, other.token), max(self.pair, other.pair))

    def size(self, length: int) -> int:
        """Bytes of a sequence of this length."""
        return int(length * (self.token + length * self.pair))


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows the tensors that were made inside, as long as anything holds them."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length = length
        self._found: dict[int, tuple[StorageWeakRef, int, bool]] = {}
        self._outputs: dict[int, tuple[StorageWeakRef, str]] = {}
        self._streams: dict[int, StorageWeakRef] = {}
        self.writers: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        if func in _SUMS and not kwargs and len(args) == 2 and all(isinstance(part, Tensor) for part in args):
            for stream, added in (args, args[::-1]):
                self._sum(stream, added, output)
        for tensor in _tensors(output):
            memory = tensor.untyped_storage()
            if memory._cdata not in given:  # else a view of what was there
                pairs = sum(size == self._length for size in tensor.shape) > 1
                self._found[memory._cdata] = StorageWeakRef(memory), memory.nbytes(), pairs  # type: ignore[no-untyped-call]
        return output

    def came(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Take in what a linear has made."""
        memory = output.untyped_storage()
        self._outputs[memory._cdata] = StorageWeakRef(memory), name  # type: ignore[no-untyped-call]

    def _sum(self, stream: Tensor, added: Tensor, total: Tensor) -> None:
        """See whether a linear's output was added to the hidden states: those that came from outside, or their like."""
        known = self._outputs.get(added.untyped_storage()._cdata)
        if known is None or _gone(known[0]) or stream.shape != added.shape or added.ndim < 2:
            return
        memory = stream.untyped_storage()
        inside, before = self._found.get(memory._cdata), self._streams.get(memory._cdata)
        if (inside is None or _gone(inside[0])) or (before is not None and not _gone(before)):
            self.writers.append(known[1])
            memory = total.untyped_storage()
            self._streams[memory._cdata] = StorageWeakRef(memory)  # type: ignore[no-untyped-call]

    def held(self) -> Held:
        """What is still there of it; what grows with neither counts as if it did with the tokens."""
        there = [(size, pairs) for memory, size, pairs in self._found.values() if not _gone(memory)]
        token, pair = (sum(size for size, pairs in there if pairs == kind) for kind in (False, True))
        return Held(token / self._length, pair / self._length**2)


_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


def _gone(memory: StorageWeakRef) -> bool:
    return bool(memory.expired())  # type: ignore[no-untyped-call]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
