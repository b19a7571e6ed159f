"""Influence: the blocks go that change the direction of the hidden states least."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.progress import Progress
from llmprune.structured.depth import Whole


@dataclass(frozen=True)
class Chooser:
    """ShortGPT's block influence, 1 − E cos(x_i, x_{i+1}) (arXiv:2403.03853): those with the least go, all at once.

    Args:
        tokens: calibration tokens that are looked at, in whole sequences.
    """

    tokens: int = 16384

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {self.tokens}")

    def choose(self, whole: Whole, count: int, progress: Progress) -> frozenset[int]:
        """Those of the least influence; of equal ones the first."""
        with progress.waiting("looking at what each block does"):
            return frozenset(whole.influence().argsort(stable=True)[:count].tolist())

    def looked_at(self, blocks: int, count: int) -> float:
        """Once."""
        return 1.0
