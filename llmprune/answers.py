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
        self._dense = self._through([{}], range(len(self._mine)), dense=True)[0]

    def measure(self, candidates: Sequence[Mapping[str, str]], part: Sequence[int]) -> list[float]:
        """The mean divergence of each candidate, in nats a token, the same on all ranks; infinite where it is none.

        Args:
            candidates: targets by the names of the linears that share the budget.
            part: the numbers of the sequences that are looked at.
        """
        chosen = [place for place, number in enumerate(self._mine) if number in part]
        ends = self._through(candidates, chosen)
        sums = torch.zeros(len(candidates), dtype=torch.float64)
        known: dict[int, int] = {}
        self._checkpoint.load_outer(head=True)
        for turn, place in enumerate(chosen):
            for start in range(0, len(self._dense[place]), LOSS_TOKENS):
                rows = slice(start, start + LOSS_TOKENS)
                right = self._logs(self._dense[place][rows])
                for number, end in enumerate(ends):
                    twin = known.setdefault(id(end), number)
                    if twin == number:
                        logs = self._logs(end[turn][rows])
                        sums[number] += float((right.exp() * (right - logs)).sum(dtype=torch.float64))
        self._checkpoint.unload()
        count = torch.tensor([float(sum(len(self._dense[place]) for place in chosen))], dtype=torch.float64)
        sums = torch.stack([sums[known.get(id(end), number)] for number, end in enumerate(ends)])
        distributed.total(sums, count)
        return (sums / count).nan_to_num_(torch.inf, torch.inf).tolist()

    def _logs(self, states: Tensor) -> Tensor:
        """(tokens, vocabulary) logarithms of what the model holds likely next."""
        return next(scores(self._checkpoint, self._plan.chain, states)).float().log_softmax(-1)

    def _through(
        self, candidates: Sequence[Mapping[str, str]], chosen: Sequence[int], dense: bool = False
    ) -> list[list[Tensor]]:
        """What leaves the last block, for each candidate and each of the chosen batches (tokens, hidden).

        Candidates that are alike are given one and the same list.
        """
        checkpoint = self._checkpoint
        ways = [[self._start.read(place) for place in chosen]] * len(candidates)
        for number, choices in enumerate(self._plan.blocks):
            block = checkpoint.load_block(number)
            checkpoint.prefetch((number + 1) % len(self._plan.blocks))
            pruned = [choice for choice in choices if choice.kept is None] if not dense else []
            versions: dict[Pruned, list[int]] = {}
            for place, candidate in enumerate(candidates):
                versions.setdefault(tuple(_pattern(choice, candidate) for choice in pruned), []).append(place)
            masks = _Masks(block, pruned, self._norms, checkpoint.device)
            after: dict[int, list[Tensor]] = {}
            for version, places in versions.items():
                masks.put(version)
                passed: dict[int, list[Tensor]] = {}
                for place in places:
                    if id(ways[place]) not in passed:
                        passed[id(ways[place])] = self._run(block, number, chosen, ways[place])
                    after[place] = passed[id(ways[place])]
            ways = [after[place] for place in range(len(candidates))]
            del block, masks, after
            checkpoint.unload_block(number)
            memory.give_back()
        ends = {id(way): [state.flatten(0, -2) for state in way] for way in ways}
        return [ends[id(way)] for way in ways]

    def _run(self, block: LoadedBlock, number: int, chosen: Sequence[int], states: Sequence[Tensor]) -> list[Tensor]:
        calls = self._start.calls[number]
        return [blocks.run(block.module, calls[place], state) for place, state in zip(chosen, states, strict=True)]


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
