"""Chooses what goes of all blocks by the dense model's gradient, one block in memory at a time, there and back."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmprune import data, distributed, memory
from llmprune.budget import LOSS_TOKENS
from llmprune.errors import Failure
from llmprune.evaluate.stream import scores
from llmprune.model import blocks
from llmprune.model.activations import Activations, Call
from llmprune.model.backward import Numbers, Run
from llmprune.model.checkpoint import Checkpoint, LoadedBlock
from llmprune.model.cpu import widens
from llmprune.model.cuts import Cuts
from llmprune.model.linears import find_linears
from llmprune.model.watch import Shown, Watch
from llmprune.model.width import Narrow
from llmprune.parts import not_finite
from llmprune.plan import Plan
from llmprune.progress import Progress
from llmprune.recipe import format_size
from llmprune.structured.width import Foreseeing


def foresee(
    checkpoint: Checkpoint,
    plan: Plan,
    tokens: data.Tokens | None,
    progress: Progress,
    folder: Path | None = None,
    settle: Callable[[Mapping[str, Tensor]], Narrow] | None = None,
) -> dict[str, dict[str, Any]]:
    """What goes, by the names of the linears whose inputs are concerned; the same on every rank.

    The hidden states in front of all blocks lie in files without a name meanwhile.

    Args:
        plan: it says how many go, and on how many of the calibration tokens they are chosen.
        tokens: the calibration tokens.
        folder: where the files are to be.
        settle: the narrower model by the saliencies (units,) of all that could go; by default that of the plan.

    Returns:
        For each linear that has fewer inputs there the numbers of its `units` that go, and the `tokens` that reached
        it.

    Raises:
        Failure: there is no room for the files; or the dense model returns NaN or infinite values, or its gradient has
            some.
    """
    narrow, asked = plan.narrow, plan.foresight
    assert narrow is not None
    assert asked is not None
    assert tokens is not None
    count = data.sequences(asked.tokens, *tokens.ids.shape)
    ids = [tokens.ids[place, None] for place in distributed.mine(range(count))]
    _check_room(checkpoint, sum(map(torch.numel, ids)), folder)

    def files() -> Activations:
        return Activations(0, checkpoint.device, "disk", folder)

    start = blocks.start(checkpoint, plan.chain, ids, "disk", folder)
    states = [start]
    for number in progress.over(range(len(checkpoint.blocks)), "there: what goes into each block"):
        block = checkpoint.load_block(number)
        checkpoint.prefetch(number + 1)
        passed = files()
        for batch, call in enumerate(start.calls[number]):
            output = blocks.run(block.module, call, states[-1].read(batch))
            blocks.check_output(checkpoint, number, batch, output)
            passed.add(output)
        states.append(passed)
        del block
        checkpoint.unload_block(number)
        memory.give_back()
    numbers = Numbers(checkpoint.dtype, widens(checkpoint.device, checkpoint.dtype))
    gradients = _from_the_end(checkpoint, plan, ids, states.pop(), files(), numbers)
    found: dict[str, tuple[Tensor, int]] = {}
    for number in progress.over(range(len(checkpoint.blocks) - 1, -1, -1), "and back: what the loss feels of it"):
        block = checkpoint.load_block(number)
        if number:
            checkpoint.prefetch(number - 1)
        felt = _Felt(block, narrow.cuts[number], asked)
        felt.back(numbers, start.calls[number], states.pop(), gradients, ids)
        for name, saliencies in felt.finish().items():
            if not_finite(saliencies):
                raise Failure(
                    f"the gradient of {checkpoint.source.name}'s loss holds NaN or infinite values in {name}, in "
                    f"{str(checkpoint.dtype).removeprefix('torch.')}; try --dtype float32, or another --narrow-by"
                )
            found[name] = saliencies, felt.tokens[name]
        del block, felt
        checkpoint.unload_block(number)
        memory.give_back()
    known = distributed.share(found)
    if settle is not None:
        narrow = settle({name: saliencies for name, (saliencies, _) in known.items()})
    gone = {}
    for cuts in narrow.cuts:
        for name, cut in cuts.items():
            stays = cut.pattern.of_scores(known[name][0])
            gone[name] = {"units": (~stays).nonzero()[:, 0].tolist(), "tokens": known[name][1]}
    return gone


def _check_room(checkpoint: Checkpoint, tokens: int, folder: Path | None) -> None:
    """See that the disk has room for what goes into each block, and for a gradient, on all ranks of this machine."""
    place = folder if folder is not None and folder.is_dir() else Path(tempfile.gettempdir())
    states = (len(checkpoint.blocks) + 1) * checkpoint.dtype.itemsize + 4
    needed = tokens * checkpoint.hidden_size * states * distributed.local_size()
    free = shutil.disk_usage(place).free
    if needed > free:
        raise Failure(
            f"what goes into each block takes {format_size(needed)} in {place} while units are chosen, and "
            f"{format_size(free)} are free: make room there, or look at fewer tokens "
            "(--set 'width.by={name: taylor, tokens: 2048}')"
        )


def _from_the_end(
    checkpoint: Checkpoint,
    plan: Plan,
    ids: Sequence[Tensor],
    states: Activations,
    gradients: Activations,
    numbers: Numbers,
) -> Activations:
    """The gradient of each sequence's summed loss by what leaves the last block, batch by batch, in `gradients`."""
    checkpoint.load_outer(head=True)
    for batch, tokens in enumerate(ids):
        behind = states.read(batch)
        found = torch.zeros_like(numbers.cast(behind))
        following = tokens[0, 1:].to(checkpoint.device)  # what comes after the last one is not known
        for begin in range(0, len(following), LOSS_TOKENS):
            rows = slice(begin, min(begin + LOSS_TOKENS, len(following)))
            part = behind[0, rows].detach().clone().requires_grad_()
            with torch.enable_grad():
                logits = torch.cat(list(scores(checkpoint, plan.chain, part))).float()
                loss = nn.functional.cross_entropy(logits, following[rows], reduction="sum")
            (slope,) = torch.autograd.grad(loss, part)
            found[0, rows] = slope.to(found.dtype)
            del logits, loss
        gradients.add(found)
    checkpoint.unload()
    return gradients


class _Felt(Watch):
    """What the loss feels of the units of a block's cuts.

    Attributes:
        tokens: by the names of the linears, how many reached them; over all ranks once that is finished.
    """

    def __init__(self, block: LoadedBlock, cuts: Mapping[str, Cuts], asked: Foreseeing) -> None:
        """Nothing is felt yet."""
        super().__init__(linear for linear in find_linears(block.module, block.name) if linear.name in cuts)
        self._block, self._cuts, self._asked = block, cuts, asked
        self._given: list[tuple[str, Tensor]] = []
        self._sums = {name: torch.zeros(one.pattern.units, dtype=torch.float64) for name, one in cuts.items()}
        self.tokens = dict.fromkeys(cuts, 0)

    def ready(self, inputs: Shown) -> None:
        """Take note of what linears are given."""
        for names, tensor in inputs.items():
            self._given += [(name, tensor()) for name in names]

    def back(
        self,
        numbers: Numbers,
        calls: Sequence[Call],
        states: Activations,
        gradients: Activations,
        ids: Sequence[Tensor],
    ) -> None:
        """Take the gradient of every batch, a sequence each, from behind the block to in front of it.

        Args:
            calls: what the block is called with.
            states: (1, length, hidden) what goes into it.
            gradients: of what leaves it; those of what goes into it take their place.
        """
        run = Run(self._block.module, numbers)
        with self.watching(self._block.module, self._block.name):
            for batch, call in enumerate(calls):
                given = numbers.cast(states.read(batch)).detach().clone().requires_grad_()
                with torch.enable_grad():
                    left = run(call, given)
                wanted = [(name, value) for name, value in self._given if value.requires_grad]
                self._given = []
                behind = gradients.read(batch)
                slopes = torch.autograd.grad(left, [given, *(value for _, value in wanted)], behind, allow_unused=True)
                assert slopes[0] is not None
                gradients.write(batch, slopes[0])
                self._take(wanted, slopes[1:], max(1, ids[batch].numel() - 1))

    def _take(self, given: Sequence[tuple[str, Tensor]], slopes: Sequence[Tensor | None], losses: int) -> None:
        """Add up what one sequence says.

        Args:
            given: what linears were given, (..., in).
            slopes: the gradients of the summed loss by that, likewise; None where it does not depend on it.
            losses: how many losses are in that sum.
        """
        along: dict[str, Tensor] = {}
        for (name, value), slope in zip(given, slopes, strict=True):
            self.tokens[name] += value.shape[:-1].numel()
            if slope is not None:
                each = (value.detach().float() * slope.float()).flatten(0, -2).sum(0).cpu().double()
                along[name] = along[name] + each if name in along else each
        for name, each in along.items():
            units = self._cuts[name].pattern.inputs(len(each))
            self._sums[name] += self._asked.saliency(each[units].sum(1) / losses)

    def finish(self) -> dict[str, Tensor]:
        """(units,) saliencies by the names of the linears, over all ranks.

        Of a linear that no token reached, an expert's, they are the sums of its weights' magnitudes.
        """
        found = {}
        for name, sums in self._sums.items():
            count = torch.tensor([self.tokens[name]])
            distributed.total(sums, count)
            self.tokens[name] = int(count)
            if not self.tokens[name]:
                linear = self.linears[name]
                weight = linear.view(self._block.state[linear.parameter]).float().abs().sum(0).double()
                sums = weight[self._cuts[name].pattern.inputs(len(weight))].sum(1)
            found[name] = sums
        return found
