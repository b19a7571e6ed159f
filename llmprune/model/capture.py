"""Takes batches through a block, and collects on the way what its linears are given.

A block is one call. So that its linears can be solved in the order in which they run, each on inputs that have passed
those before it, the call of each batch stands still before a linear that is not solved yet, and goes on when it is:
every call is a greenlet, all in one thread. Where memory is short some calls are given up instead, and made anew for
the next stage, with the same result to the bit.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.nn import functional

from llmprune import memory
from llmprune.errors import Failure
from llmprune.model import blocks
from llmprune.model.activations import Activations, Call
from llmprune.model.linears import Linear
from llmprune.model.watch import Mark, Shown, Stage, Watch
from llmprune.stats import LinearStats

_ASIDE = "the model changes its course by its data; --set calibration.asymmetric=0 helps"
_COURSE = "the model changes its course by its data; --set calibration.true_sequential=false may help"


class _Way(Watch):
    """All batches on their way through one block, from stage to stage; `finish` takes a batch the rest of the way."""

    def __init__(self, linears: Iterable[Linear], stages: Sequence[Stage], held: int, writers: Sequence[str]) -> None:
        """Nothing runs yet; see `Capture`."""
        entries = [entry for stage in stages for entry in stage.inputs]
        self._leaders = {name: entry.linears[0] for entry in entries for name in entry.linears}
        # Experts are always run one by one, so that a block that is read again from OUT gives the same to the bit.
        super().__init__(linear for linear in linears if linear.name in self._leaders or linear.expert is not None)
        self._held, self._writers = held, writers
        self._dense = any(stage.dense for stage in stages)
        self._waiting = set(self._leaders)
        self._stage = Stage(())
        self._open: set[str] = set()  # the linears whose inputs are being collected
        self._steps: dict[int, greenlet] = {}
        self._outputs: dict[int, Tensor] = {}
        self._streams: dict[int, Tensor] = {}
        self._marks: list[dict[str, Mark]] = []
        self._batch = 0

    @contextlib.contextmanager
    def _running(
        self, block: nn.Module, name: str, calls: Sequence[Call], activations: Activations | None
    ) -> Iterator[None]:
        def run(batch: int) -> Tensor:
            assert activations is not None
            hidden = activations.read(batch)
            if self._writers:
                self._streams[batch] = hidden
            return blocks.run(block, calls[batch], hidden)

        def written(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            stream = self._streams[self._batch]
            self._streams[self._batch] = stream + output.view_as(stream)

        self._run = run
        self._marks = [{} for _ in calls] if activations is not None else []
        modules = dict(block.named_modules(prefix=name))
        with self.watching(block, name), contextlib.ExitStack() as hooks:
            for writer in self._writers:
                hooks.callback(modules[writer].register_forward_hook(written).remove)
            try:
                yield
            finally:
                for batch in list(self._steps):
                    self._give_up(batch)
                del self._run  # it knows of this object, which would stay until the cycle is found

    @abstractmethod
    def _take(self, name: str, inputs: Tensor) -> None:
        """Take what the leader of an input is given, once for all that share it."""

    def finish(self, batch: int) -> Tensor:
        """What the block returns for a batch, when the linears of all stages are solved."""
        self._settle(Stage(()))
        self._advance(batch)
        output = self._outputs.pop(batch, None)
        self._give_up(batch)
        if output is None:
            raise RuntimeError(f"the linears {', '.join(sorted(self._waiting))} are not solved yet")
        return output

    def waits(self, names: Iterable[str]) -> bool:
        """Whether any of these linears is still to be solved."""
        return not self._waiting.isdisjoint(names)

    def ready(self, inputs: Shown) -> None:
        """Take in the inputs of linears that belong to the stage, and stand still before one that is not solved."""
        while True:
            marks = self._marks[self._batch]
            for names, tensor in inputs.items():
                wanted = [name for name in names if name in self._open or self._solved(name)]
                if wanted:
                    self._see(wanted, tensor(), marks)
            if not self._stands(inputs, marks):
                return
            parent = getcurrent().parent
            assert parent is not None
            parent.switch()

    def _see(self, names: Sequence[str], inputs: Tensor, marks: dict[str, Mark]) -> None:
        mark = Mark(inputs)
        for name in names:
            leader = self._leaders[name]
            if name in self._open and name == leader:
                self._take(name, inputs)
            elif leader not in marks:
                raise Failure(f"{name} was passed over when its inputs were collected, and is run now: {_COURSE}")
            elif name != leader and marks[leader] != mark:
                raise Failure(f"{name} no longer shares its input with {leader}: {_COURSE}")
            if name == leader:
                marks[name] = mark

    def _solved(self, name: str) -> bool:
        """Whether a linear is solved, and what it is given must have been seen in this batch."""
        return name in self._leaders and name not in self._waiting and not self._dense

    def _stands(self, inputs: Shown, marks: dict[str, Mark]) -> bool:
        if not self._dense:
            return any(name in self._waiting for names in inputs for name in names)
        # Nothing more is of interest in this run, which will be given up.
        return bool(self._open) and not self._stage.again and all(self._leaders[name] in marks for name in self._open)

    def _begin(self, stage: Stage) -> None:
        """Go over to a stage, and collect what its linears are given."""
        self._settle(stage)
        self._open = {name for entry in stage.inputs for name in entry.linears}

    def _settle(self, stage: Stage) -> None:
        """Go over to a stage; the linears of the one before are solved by now."""
        self._waiting.difference_update(name for entry in self._stage.inputs for name in entry.linears)
        self._stage = stage

    def _advance(self, batch: int) -> None:
        """Let the call of a batch go on, until it stands still again or is through."""
        self._batch = batch
        step = self._steps.get(batch)
        if step is None:
            step = self._steps[batch] = greenlet(self._run)
            step.gr_context = contextvars.copy_context()
            result = step.switch(batch)
        elif not step.dead:
            result = step.switch()
        else:
            return
        if step.dead:
            self._outputs[batch] = result

    def _give_up(self, batch: int) -> None:
        self._outputs.pop(batch, None)
        self._streams.pop(batch, None)
        step = self._steps.pop(batch)
        if not step.dead:
            step.throw()


class Capture(_Way):
    """The way of the pruned model, and beside it that of the dense one where some statistics look at that.

    `collect` is called stage by stage, and the linears of each stage are solved before the next call.
    """

    def __init__(
        self, linears: Iterable[Linear], stages: Sequence[Stage], held: int, writers: Sequence[str] = ()
    ) -> None:
        """Nothing runs yet.

        Args:
            linears: those of the block that are pruned.
            stages: what will be collected; none where all linears are solved already.
            held: how many batches may stand still at a time.
            writers: linears whose outputs are added to the hidden states as they are.
        """
        beside = any(stage.beside for stage in stages)
        super().__init__(linears, stages, held, writers if beside else ())
        self._stats: dict[str, LinearStats] = {}
        self._beside = _Beside(linears, stages, held, writers) if beside else None

    @property
    def goes_beside(self) -> bool:
        """Whether the dense model goes through the block beside the pruned one."""
        return self._beside is not None

    @contextlib.contextmanager
    def running(
        self,
        block: nn.Module,
        name: str,
        calls: Sequence[Call],
        activations: Activations | None,
        dense: Activations | None = None,
    ) -> Iterator[None]:
        """Inside, batches can be run through a block; without activations there are none.

        Args:
            block, name: the block, as it is before anything of it is pruned, and its full name.
            calls: what it is called with, batch by batch.
            dense: the dense model's activations, where it goes beside.
        """
        with contextlib.ExitStack() as ways:
            if self._beside is not None:
                ways.enter_context(self._beside.running(copy.deepcopy(block), name, calls, dense))
            ways.enter_context(self._running(block, name, calls, activations))
            yield

    def collect(self, stage: Stage, device: torch.device) -> dict[str, LinearStats]:
        """Take all batches to the inputs of a stage.

        Returns:
            Their statistics over all ranks' batches, by the names of the linears, which share those of their `Input`.
        """
        for entry in stage.inputs:
            stats = LinearStats(entry.features, entry.needs, device, entry.beside)
            self._stats.update(dict.fromkeys(entry.linears, stats))
        ways: list[_Way] = [self] if self._beside is None else [self._beside, self]
        for way in ways:
            way._begin(stage)
        for batch in range(len(self._marks)):
            for way in ways:
                way._advance(batch)
                if stage.dense or batch >= self._held:
                    way._give_up(batch)
            memory.ease()
        for way in ways:
            way._open = set()
        found, self._stats = self._stats, {}
        for one in {id(value): value for value in found.values()}.values():
            one.finish()
        return found

    def finish_dense(self, batch: int) -> Tensor:
        """What the dense block returns for a batch of the dense model, where it goes beside."""
        assert self._beside is not None
        return self._beside.finish(batch)

    def _take(self, name: str, inputs: Tensor) -> None:
        lacking = None if self._beside is None else self._beside.lacks(name, inputs, self._streams.get(self._batch))
        self._stats[name].add(inputs, lacking)


class _Beside(_Way):
    """The dense model's way: it stands still where that of the pruned model does, and goes first."""

    def __init__(self, linears: Iterable[Linear], stages: Sequence[Stage], held: int, writers: Sequence[str]) -> None:
        super().__init__(linears, stages, held, writers)
        inputs = [entry for stage in stages for entry in stage.inputs if entry.beside]
        self._wanted = {entry.linears[0]: entry.stream for entry in inputs}
        self._given: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
        self._weights: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def running(
        self, block: nn.Module, name: str, calls: Sequence[Call], activations: Activations | None
    ) -> Iterator[None]:
        parameters = dict(block.named_parameters(prefix=name))
        chosen = (linear for linear in self.linears.values() if self._wanted.get(linear.name))
        self._weights = {linear.name: linear.view(parameters[linear.parameter]) for linear in chosen}
        with self._running(block, name, calls, activations):
            yield

    def lacks(self, name: str, inputs: Tensor, stream: Tensor | None) -> Tensor | None:
        """What a linear of the pruned model lacks, in this batch; where it is run again, each time in turn.

        Args:
            inputs: (..., in) what it is given.
            stream: the hidden states that its output will be added to.

        Returns:
            (..., in) of its inputs; or (..., out) of the hidden states with its output, if it stayed dense. None where
            nobody asked for it.
        """
        if name not in self._wanted:
            return None
        if not self._given.get(name):
            raise Failure(f"{name} is not run as often in the dense model as in the pruned one: {_ASIDE}")
        dense, ahead = self._given[name].pop(0)
        apart = dense - inputs
        if ahead is None:
            return apart
        assert stream is not None
        changed = functional.linear(apart, self._weights[name])
        return changed + (ahead - stream).view_as(changed)

    def _take(self, name: str, inputs: Tensor) -> None:
        if name in self._wanted:
            stream = self._streams[self._batch] if self._wanted[name] else None
            self._given.setdefault(name, []).append((inputs, stream))
