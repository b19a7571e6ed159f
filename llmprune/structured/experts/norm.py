"""Norm: the experts stay that return most."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.structured.experts import Seen


@dataclass(frozen=True)
class Chooser:
    """Σ ‖f_j(x)‖₂ over the tokens sent to expert j, whatever the router's weights (a baseline of arXiv:2510.13999)."""

    def scores(self, seen: Seen) -> Tensor:
        """By all that they returned."""
        return seen.norms
