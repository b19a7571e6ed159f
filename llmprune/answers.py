"""How near a pruned model's answers come to the dense model's, for many allocations at once.

Candidates go through the model together, one block in memory at a time. Of a block there are as many versions as the
candidates have allocations of it; those that were alike up to there share their way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmprune import data, distributed, memory
from llmprune.allocation import Seen, target
from llmprune.budget import LOSS_TOKENS
from llmprune.evaluate.stream import scores
from llmprune.model import blocks
from llmprune.model.checkpoint import Checkpoint, LoadedBlock
from llmprune.patterns import NM, Unstructured
from llmprune.plan import Choice, Plan

Pruned = tuple[Unstructured | NM | None, ...]
"""What each linear of a block gets; None where it stays dense."""


class Answers:
    """Measures allocations by KL(dense ‖ pruned) of the next token, by masks alone.

    A linear of a candidate loses the weights of least |W_ij|·‖X_j‖₂, with X the dense model's inputs, and those that it
    keeps stay as they are.

    Attributes:
        sequences: of text, over all ranks.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, tokens: data.Tokens, count: int, norms: Mapping[str, Tensor]
    ) -> None:
        """Embed the text, and take it through the dense model.

        Args:
            tokens: the calibration tokens.
            count: how many of them to look at, in whole sequences.
            norms: of the linears' inputs, (in,) by name; none for those that no token reached.
        """
        self._checkpoint, self._plan, self._norms = checkpoint, plan, norms
        self.sequences = min(len(tokens.ids), -(-count // tokens.ids.shape[1]))
        self._mine = distributed.mine(range(self.sequences))
        self._start = blocks.start(checkpoint, plan.chain, [tokens.ids[place, None] for place in self._mine])
        self._dense = self._through([{}], range(len(self._mine)), dense=True)[0][0]

    def measure(self, candidates: Sequence[Mapping[str, str]], part: Sequence[int]) -> list[float]:
        """The mean divergence of each candidate, in nats a token, the same on all ranks; infinite where it is none.

        Args:
            candidates: targets by the names of the linears that share the budget.
            part: the numbers of the sequences that are looked at.
        """
        chosen = [place for place, number in enumerate(self._mine) if number in part]
        ways, which = self._through(candidates, chosen)
        sums = torch.zeros(len(ways), dtype=torch.float64)
        self._checkpoint.load_outer(head=True)
        for turn, place in enumerate(chosen):
            for start in range(0, len(self._dense[place]), LOSS_TOKENS):
                rows = slice(start, start + LOSS_TOKENS)
                right = self._logs(self._dense[place][rows])
                for way, states in enumerate(ways):
                    logs = self._logs(states[turn][rows])
                    sums[way] += float((right.exp() * (right - logs)).sum(dtype=torch.float64))
        self._checkpoint.unload()
        count = torch.tensor(float(sum(len(self._dense[place]) for place in chosen)), dtype=torch.float64)
        distributed.total(sums, count)
        return (sums / count).nan_to_num_(torch.inf, torch.inf)[which].tolist()

    def _logs(self, states: Tensor) -> Tensor:
        """(tokens, vocabulary) logarithms of what the model holds likely next."""
        return next(scores(self._checkpoint, self._plan.chain, states)).float().log_softmax(-1)

    def _through(
        self, candidates: Sequence[Mapping[str, str]], chosen: Sequence[int], dense: bool = False
    ) -> tuple[list[list[Tensor]], list[int]]:
        """Take some batches through the model as the candidates prune it.

        Args:
            chosen: the batches.
            dense: nothing is pruned.

        Returns:
            What leaves the last block on each way that some candidates have in common, (tokens, hidden) of each batch;
            and for each candidate which way is its own.
        """
        checkpoint = self._checkpoint
        ways = [[self._start.read(place) for place in chosen]]
        which = [0] * len(candidates)
        for number, choices in enumerate(self._plan.blocks):
            block = checkpoint.load_block(number)
            checkpoint.prefetch((number + 1) % len(self._plan.blocks))
            pruned = [choice for choice in choices if choice.kept is None] if not dense else []
            versions = [tuple(_pattern(choice, candidate) for choice in pruned) for candidate in candidates]
            calls = [self._start.calls[number][place] for place in chosen]
            masks = _Masks(block, pruned, self._norms, checkpoint.device)
            after: dict[tuple[Pruned, int], list[Tensor]] = {}
            for version in dict.fromkeys(versions):
                masks.put(version)
                for way in {way for other, way in zip(versions, which, strict=True) if other == version}:
                    steps = zip(calls, ways[way], strict=True)
                    after[version, way] = [blocks.run(block.module, call, states) for call, states in steps]
            places = {key: place for place, key in enumerate(after)}
            which = [places[key] for key in zip(versions, which, strict=True)]
            ways = list(after.values())
            del block, masks
            checkpoint.unload_block(number)
            memory.give_back()
        return [[states.flatten(0, -2) for states in way] for way in ways], which


def _pattern(choice: Choice, candidate: Mapping[str, str]) -> Unstructured | NM | None:
    """What a candidate makes of a linear."""
    return target(candidate[choice.linear.name], choice.pattern.scope) if choice.allocated else choice.pattern


class _Masks:
    """Puts versions of a block's linears into the block, one after the other."""

    def __init__(
        self, block: LoadedBlock, choices: Sequence[Choice], norms: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self._block, self._choices, self._norms, self._device = block, choices, norms, device
        self._views = [choice.linear.view(block.state[choice.linear.parameter]) for choice in choices]
        self._dense = [view.clone() for view in self._views]
        self._now: list[Unstructured | NM | None] = [None] * len(choices)

    def put(self, version: Pruned) -> None:
        """Make the linears what they are in a version."""
        changed = set()
        for place, (choice, pattern) in enumerate(zip(self._choices, version, strict=True)):
            if pattern != self._now[place]:
                self._now[place] = pattern
                self._views[place].copy_(self._masked(place, choice.linear.name, pattern))
                changed.add(choice.linear.parameter)
        self._block.refresh(changed)

    def _masked(self, place: int, name: str, pattern: Unstructured | NM | None) -> Tensor:
        weight = self._dense[place]
        if pattern is None:
            return weight
        saliency = torch.cat(list(Seen(weight, self._norms.get(name), self._device).saliency()))
        return weight * pattern.keep(saliency).to(weight.device)
