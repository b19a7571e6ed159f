"""REAP: the experts stay that add most to a token that is sent to them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.structured.experts import Seen


@dataclass(frozen=True)
class Chooser:
    """The mean of g_j(x)·‖f_j(x)‖₂ over the tokens sent to expert j (arXiv:2510.13999).

    g are the router's weights of a token's experts as parts of their sum. An expert that no token reached has 0.
    """

    def scores(self, seen: Seen) -> Tensor:
        """By what was added, however often."""
        return seen.weighted / seen.tokens.clamp(min=1)
