"""Greedy: one block after the other goes, each time that without which the model answers best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from llmprune.errors import unknown
from llmprune.evolution import PART, leading
from llmprune.progress import Progress
from llmprune.structured.depth import Score, Whole


@dataclass(frozen=True)
class Chooser:
    """One-by-one removal, scored by KL(dense ‖ shorter) or by perplexity (as Shortened LLaMA, arXiv:2402.02834).

    Each block that is left is tried on a quarter of the text, those that come off best on all of it.

    Args:
        score: `kl` or `perplexity`.
        tokens: calibration tokens that are looked at, in whole sequences.
    """

    score: str = "kl"
    tokens: int = 4096

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise unknown("score", self.score, get_args(Score))
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {self.tokens}")

    def choose(self, whole: Whole, count: int, progress: Progress) -> frozenset[int]:
        """Those that can go."""
        score: Score = "kl" if self.score == "kl" else "perplexity"
        without: frozenset[int] = frozenset()
        for turn in progress.over(range(count), "choosing blocks to do without"):
            young = [without | {number} for number in range(whole.blocks) if number not in without]
            part = range(whole.sequences)[turn % min(PART, whole.sequences) :: PART]
            young = leading(young, whole.measure(young, part, score))
            if len(young) > 1:
                young = leading(young, whole.measure(young, range(whole.sequences), score))
            without = young[0]
        return without

    def looked_at(self, blocks: int, count: int) -> float:
        """What is alike goes together: half of the way, about."""
        return sum(left / 2 * 2 / PART for left in range(blocks, blocks - count, -1))
