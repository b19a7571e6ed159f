"""How near a changed model's answers come to the dense model's, for many changes of it at once.

Candidates go through the model together, one block in memory at a time. Of a block there are as many versions as the
candidates make of it; those that were alike up to there share their way.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from llmprune import data, distributed, memory
from llmprune.allocation import Seen, target
from llmprune.budget import LOSS_TOKENS
from llmprune.errors import Failure
from llmprune.evaluate.stream import scores
from llmprune.model import blocks
from llmprune.model.blocks import Chain
from llmprune.model.checkpoint import Checkpoint, LoadedBlock
from llmprune.patterns import NM, Columns, Unstructured
from llmprune.plan import Choice, Plan
from llmprune.structured.depth import Score

SKIPPED: Final = "skipped"
"""The version of a block that is passed over."""


class Candidates(Protocol):
    """Changes of a model that are measured together."""

    def __len__(self) -> int: ...

    def versions(self, number: int) -> Sequence[Hashable]:
        """What each makes of a block; equal things where they make the same of it."""

    def enter(self, number: int, block: LoadedBlock) -> None:
        """A block is loaded, as it is in the dense model."""

    def put(self, version: Hashable) -> None:
        """Make a version of the block that was entered."""

    def leave(self) -> None:
        """Let go of the block."""


class Shortened:
    """The model without some of its blocks."""

    def __init__(self, without: Sequence[frozenset[int]]) -> None:
        """Take in what each candidate leaves out."""
        self._without = without

    def __len__(self) -> int:
        return len(self._without)

    def versions(self, number: int) -> Sequence[Hashable]:
        """As it is, or passed over."""
        return [SKIPPED if number in left else None for left in self._without]

    def enter(self, number: int, block: LoadedBlock) -> None:
        """It stays as it is."""

    def put(self, version: Hashable) -> None:
        """It stays as it is."""

    def leave(self) -> None:
        """Nothing was held."""


class Answers:
    """Measures candidates on calibration text, on each rank by its share of the sequences.

    Attributes:
        sequences: of text, over all ranks.
    """

    def __init__(self, checkpoint: Checkpoint, chain: Chain, tokens: data.Tokens, count: int) -> None:
        """Embed the text, and take it through the dense model.

        Args:
            tokens: the calibration tokens.
            count: how many of them to look at, in whole sequences.
        """
        self._checkpoint, self._chain = checkpoint, chain
        self.sequences = data.sequences(count, *tokens.ids.shape)
        self._mine = distributed.mine(range(self.sequences))
        self._tokens = [tokens.ids[place] for place in self._mine]
        self._start = blocks.start(checkpoint, chain, [ids[None] for ids in self._tokens])
        self._dense = self._through(Shortened([frozenset()]), range(len(self._mine)))[0][0]
        ends = torch.zeros(1, dtype=torch.float64)
        for states in self._dense:
            ends += float(states.double().abs().sum())
        distributed.total(ends)
        check_finite(checkpoint, ends)

    def measure(self, candidates: Candidates, part: Sequence[int], score: Score = "kl") -> list[float]:
        """The mean over the tokens for each candidate, the same on all ranks; infinite where it is none.

        Args:
            part: the numbers of the sequences that are looked at.
        """
        chosen = [place for place, number in enumerate(self._mine) if number in part]
        ways, which = self._through(candidates, chosen)
        sums = torch.zeros(len(ways), dtype=torch.float64)
        self._checkpoint.load_outer(head=True)
        seen = 0
        for turn, place in enumerate(chosen):
            ids = self._tokens[place].to(self._checkpoint.device)
            asked = len(ids) - (score == "perplexity")  # what follows the last token is not known
            seen += asked
            for start in range(0, asked, LOSS_TOKENS):
                rows = slice(start, min(start + LOSS_TOKENS, asked))
                right = self._logs(self._dense[place][rows]) if score == "kl" else None
                for way, states in enumerate(ways):
                    logs = self._logs(states[turn][rows])
                    if right is not None:
                        sums[way] += float((right.exp() * (right - logs)).sum(dtype=torch.float64))
                    else:
                        after = ids[rows.start + 1 : rows.stop + 1, None]
                        sums[way] -= float(logs.gather(1, after).sum(dtype=torch.float64))
        self._checkpoint.unload()
        count = torch.tensor(float(seen), dtype=torch.float64)
        distributed.total(sums, count)
        return (sums / count).nan_to_num_(torch.inf, torch.inf)[which].tolist()

    def _logs(self, states: Tensor) -> Tensor:
        """(tokens, vocabulary) logarithms of what the model holds likely next."""
        return next(scores(self._checkpoint, self._chain, states)).float().log_softmax(-1)

    def _through(self, candidates: Candidates, chosen: Sequence[int]) -> tuple[list[list[Tensor]], list[int]]:
        """Take some batches through the model as the candidates change it.

        Args:
            chosen: the batches.

        Returns:
            What leaves the last block on each way that some candidates have in common, (tokens, hidden) of each batch;
            and for each candidate which way is its own.
        """
        checkpoint = self._checkpoint
        ways = [[self._start.read(place) for place in chosen]]
        which = [0] * len(candidates)
        for number in range(len(checkpoint.blocks)):
            versions = candidates.versions(number)
            block = checkpoint.load_block(number)
            checkpoint.prefetch((number + 1) % len(checkpoint.blocks))
            candidates.enter(number, block)
            calls = [self._start.calls[number][place] for place in chosen]
            after: dict[tuple[Hashable, int], list[Tensor]] = {}
            for version in dict.fromkeys(versions):
                if version != SKIPPED:
                    candidates.put(version)
                for way in {way for other, way in zip(versions, which, strict=True) if other == version}:
                    if version == SKIPPED:
                        after[version, way] = ways[way]
                        continue
                    steps = zip(calls, ways[way], strict=True)
                    after[version, way] = [blocks.run(block.module, call, states) for call, states in steps]
            places = {key: place for place, key in enumerate(after)}
            which = [places[key] for key in zip(versions, which, strict=True)]
            ways = list(after.values())
            candidates.leave()
            del block
            checkpoint.unload_block(number)
            memory.give_back()
        return [[states.flatten(0, -2) for states in way] for way in ways], which


def check_finite(checkpoint: Checkpoint, seen: Tensor) -> None:
    """See that what is told of the dense model, the same on all ranks, is a number.

    Raises:
        Failure: it is none.
    """
    if not bool(torch.isfinite(seen).all()):
        raise Failure(
            f"{checkpoint.source.name} returns NaN or infinite activations while it is dense, in "
            f"{str(checkpoint.dtype).removeprefix('torch.')}; try --dtype float32, and check the checkpoint"
        )


Pruned = tuple[Unstructured | NM | None, ...]
"""What each linear of a block gets; None where it stays dense."""


class Allocated:
    """The model as allocations prune it, by masks alone.

    A linear of a candidate loses the weights of least |W_ij|·‖X_j‖₂, with X the dense model's inputs, and those that it
    keeps stay as they are.
    """

    def __init__(
        self,
        plan: Plan,
        norms: Mapping[str, Tensor],
        device: torch.device,
        targets: Sequence[Mapping[str, str]],
    ) -> None:
        """Take in the allocations.

        Args:
            norms: of the linears' inputs, (in,) by name; none for those that no token reached.
            device: where the blocks are run.
            targets: of each candidate, by the names of the linears that share the budget.
        """
        self._plan, self._norms, self._device, self._targets = plan, norms, device, targets
        self._masks: _Masks | None = None

    def __len__(self) -> int:
        return len(self._targets)

    def versions(self, number: int) -> Sequence[Hashable]:
        """What each of its linears gets."""
        pruned = self._pruned(number)
        return [tuple(_pattern(choice, targets) for choice in pruned) for targets in self._targets]

    def enter(self, number: int, block: LoadedBlock) -> None:
        """Keep its dense weights."""
        self._masks = _Masks(block, self._pruned(number), self._norms, self._device)

    def put(self, version: Hashable) -> None:
        """Mask its linears."""
        assert self._masks is not None
        assert isinstance(version, tuple)
        self._masks.put(version)

    def leave(self) -> None:
        """Let go of its dense weights."""
        self._masks = None

    def _pruned(self, number: int) -> list[Choice]:
        return [choice for choice in self._plan.blocks[number] if choice.kept is None]


def _pattern(choice: Choice, candidate: Mapping[str, str]) -> Unstructured | NM | None:
    """What a candidate makes of a linear."""
    if choice.allocated:
        return target(candidate[choice.linear.name], choice.pattern.scope)
    assert not isinstance(choice.pattern, Columns), "narrower blocks have nothing to allocate"
    return choice.pattern


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
