"""Chooses the blocks that a model does without, on what the dense model makes of calibration text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune import data, distributed, memory
from llmprune.answers import Answers, Shortened, check_finite
from llmprune.model import blocks
from llmprune.model.blocks import Chain
from llmprune.model.checkpoint import Checkpoint
from llmprune.plan import Plan
from llmprune.progress import Progress
from llmprune.structured.depth import Score


def choose(checkpoint: Checkpoint, plan: Plan, tokens: data.Tokens | None, progress: Progress) -> tuple[int, ...]:
    """The numbers of the blocks that stay, the same on every rank.

    Args:
        plan: it says how many go, and how they are chosen.
        tokens: the calibration tokens, where the blocks are not given.
    """
    asked = plan.shortening
    assert asked is not None
    gone = asked.given
    if gone is None:
        assert tokens is not None
        whole = _Whole(checkpoint, plan.chain, tokens, asked.chooser.tokens, plan.abreast)
        gone = asked.chooser.choose(whole, asked.count, progress)
    kept = tuple(number for number in range(len(checkpoint.blocks)) if number not in gone)
    return distributed.share(kept)


class _Whole:
    """The dense model on calibration text."""

    def __init__(self, checkpoint: Checkpoint, chain: Chain, tokens: data.Tokens, count: int, at_once: int) -> None:
        """Nothing is run yet.

        Args:
            count: tokens that are looked at, in whole sequences.
            at_once: how many shorter models may go through the blocks together on all of them.
        """
        self._checkpoint, self._chain, self._tokens = checkpoint, chain, tokens
        self._count, self._at_once = count, at_once
        self._answers: Answers | None = None
        self.blocks = len(checkpoint.blocks)
        self.sequences = data.sequences(count, *tokens.ids.shape)

    def influence(self) -> Tensor:
        """In one way through the blocks."""
        checkpoint = self._checkpoint
        ids = [self._tokens.ids[place, None] for place in distributed.mine(range(self.sequences))]
        activations = blocks.start(checkpoint, self._chain, ids)
        sums = torch.zeros(self.blocks + 1, dtype=torch.float64)
        sums[-1] = sum(part.numel() for part in ids)
        for number in range(self.blocks):
            block = checkpoint.load_block(number)
            checkpoint.prefetch(number + 1)
            for batch, call in enumerate(activations.calls[number]):
                given = activations.read(batch)
                found = blocks.run(block.module, call, given)
                alike = torch.cosine_similarity(given.float(), found.float(), dim=-1)
                sums[number] += float(alike.sum(dtype=torch.float64))
                activations.write(batch, found)
            del block
            checkpoint.unload_block(number)
            memory.give_back()
        distributed.total(sums)
        check_finite(checkpoint, sums)
        return 1 - sums[:-1] / sums[-1]

    def measure(self, without: Sequence[frozenset[int]], part: Sequence[int], score: Score = "kl") -> list[float]:
        """As many at a time as memory was planned for."""
        if self._answers is None:
            self._answers = Answers(self._checkpoint, self._chain, self._tokens, self._count)
        ranks = distributed.size()
        planned = -(-self.sequences // ranks)  # on the rank that has the most of them
        here = max(sum(number % ranks == rank for number in part) for rank in range(ranks))
        most = max(1, self._at_once * planned // max(1, here))
        found: list[float] = []
        for start in range(0, len(without), most):
            found += self._answers.measure(Shortened(without[start : start + most]), part, score)
        return found
