"""Frequency: the experts stay that most tokens are sent to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.structured.experts import Seen


@dataclass(frozen=True)
class Chooser:
    """How many tokens of the calibration text were sent to an expert."""

    def scores(self, seen: Seen) -> Tensor:
        """By how often they were needed."""
        return seen.tokens
