"""Which blocks a model does without, one file a way to choose them; the file's name is the way's name.

A file defines a frozen dataclass `Chooser` whose fields are its options in a recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from llmprune import named
from llmprune.errors import UserError
from llmprune.progress import Progress
from llmprune.recipe import Depth, share_of

Score = Literal["kl", "perplexity"]
"""What answers are judged by, both in nats a token: KL(dense ‖ shorter), or how unlikely the next token is held."""


class Whole(Protocol):
    """The dense model on some calibration text, as a chooser sees it.

    Attributes:
        blocks: how many it has.
        sequences: of the text.
    """

    blocks: int
    sequences: int

    def influence(self) -> Tensor:
        """(blocks,) 1 − the mean over the tokens of cos(x_i, x_{i+1}), of what goes into a block and what leaves it."""

    def measure(self, without: Sequence[frozenset[int]], part: Sequence[int], score: Score = "kl") -> list[float]:
        """How bad the model's answers are without some blocks, in nats a token on the sequences of these numbers."""


class Chooser(Protocol):
    """It chooses blocks to do without."""

    tokens: int
    """Calibration tokens that are looked at, in whole sequences."""

    def choose(self, whole: Whole, count: int, progress: Progress) -> frozenset[int]:
        """The numbers of so many blocks, the same on every rank."""

    def looked_at(self, blocks: int, count: int) -> float:
        """How often so many tokens go through the model, about."""


def names() -> list[str]:
    """Every way there is."""
    return named.names(sys.modules[__name__])


def load(way: str | Mapping[str, Any]) -> Chooser:
    """Make the chooser that a recipe asks for: a name, or a mapping of `name` and options.

    Raises:
        UserError: an unknown name or option, or a value that is out of range.
    """
    chooser: Chooser = named.load(sys.modules[__name__], "Chooser", "way to choose blocks", way)
    return chooser


@dataclass(frozen=True)
class Shortening:
    """What a recipe asks for.

    Attributes:
        total: how many blocks the model has.
        count: how many of them go.
        given: their numbers, where the recipe names them.
        by: the name of the way to choose them.
        chooser: that way with its options.
    """

    total: int
    count: int
    given: frozenset[int] | None
    by: str
    chooser: Chooser

    @property
    def kept(self) -> tuple[int, ...]:
        """The blocks that stay; where it is not known yet which go, those in the middle stand for them.

        Others then have another place, as they will: the last ones would tell nothing about that.
        """
        first = (self.total - self.count) // 2
        gone = range(first, first + self.count) if self.given is None else self.given
        return tuple(number for number in range(self.total) if number not in gone)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        given = None if self.given is None else sorted(self.given)
        return {"left": self.total - self.count, "of": self.total, "by": self.by, "dropped": given}


def read_shortening(drop: Any, by: str | Mapping[str, Any], total: int) -> Shortening | None:
    """What a recipe's `depth` asks for, None where it asks for nothing.

    Args:
        drop: a number of blocks, a share of them such as `20%`, or a list of their numbers.
        by: the way to choose them, a name or a mapping of `name` and options.
        total: how many blocks the model has.

    Raises:
        UserError: there are no such blocks, or none would be left.
    """
    chooser, given = load(by), None
    if drop is None:
        if by != Depth().by:
            raise UserError("depth.by says how blocks are chosen that go, and depth.drop not how many: say that too")
        return None
    if isinstance(drop, list):
        numbers = [number for number in drop if isinstance(number, int) and not isinstance(number, bool)]
        if len(numbers) < len(drop) or not all(0 <= number < total for number in numbers):
            raise UserError(f"depth.drop: blocks are numbers from 0 to {total - 1}, not {drop!r}")
        given = frozenset(numbers)
        if not given or len(given) < len(drop):
            raise UserError(f"depth.drop: {'it names a block twice' if drop else 'it names no block'}")
        count = len(given)
    else:
        count = _count(drop, total)
    if not 0 < count < total:
        raise UserError(f"depth.drop is {count} of {total} blocks: at least one must go, and at least one must stay")
    return Shortening(total, count, given, "given" if given is not None else named.name_of(by), chooser)


def _count(drop: Any, total: int) -> int:
    if isinstance(drop, int) and not isinstance(drop, bool):
        return drop
    share = share_of(drop)
    if share is None:
        raise UserError(
            "depth.drop must be a number of blocks (6), a share of them (20%), or a list of their numbers, not "
            f"{drop!r}"
        )
    return max(1, round(share * total))
