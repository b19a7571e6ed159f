"""Which experts of a mixture go, one file a way to choose them; the file's name is the way's name.

A file defines a frozen dataclass `Chooser` whose fields are its options in a recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from llmprune import named


@dataclass(frozen=True)
class Seen:
    """What the calibration text showed of the experts of a block, (experts,) float64 each, over all tokens sent to one.

    Attributes:
        tokens: how many there were.
        norms: Σ ‖f_j(x)‖₂ of what it made of them.
        weighted: Σ g_j(x)·‖f_j(x)‖₂, with the router's weights of a token's experts as parts of their sum.
    """

    tokens: Tensor
    norms: Tensor
    weighted: Tensor


class Chooser(Protocol):
    """It ranks experts."""

    def scores(self, seen: Seen) -> Tensor:
        """(experts,) the higher the more worth keeping."""


def names() -> list[str]:
    """Every way there is."""
    return named.names(sys.modules[__name__])


def load(way: str | Mapping[str, Any]) -> Chooser:
    """Make the chooser that a recipe asks for; see `named.load`."""
    made: Chooser = named.load(sys.modules[__name__], "Chooser", "way to choose experts", way)
    return made
