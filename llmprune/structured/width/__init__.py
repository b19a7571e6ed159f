"""Which inputs of a linear go with all their weights, one file a way to choose them; the file's name is the way's name.

A file defines a frozen dataclass `Solver` whose fields are its options in a recipe. It is given a pattern of whole
columns, and gives back the weight with zeros in those that go.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmprune import named
from llmprune.errors import UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.width import Narrow, Target, narrowed
from llmprune.patterns import Columns, Pattern
from llmprune.recipe import Experts, Recipe, Width
from llmprune.solvers import Solver
from llmprune.structured import experts

MULTIPLE = 32
"""What the channels that stay are a multiple of, where the dense width is: kernels and quantised formats want that."""


def names() -> list[str]:
    """Every way there is."""
    return named.names(sys.modules[__name__])


def load(way: str | Mapping[str, Any]) -> Solver:
    """Make the way to choose that a recipe asks for; see `named.load`."""
    made: Solver = named.load(sys.modules[__name__], "Solver", "way to choose channels and heads", way)
    return made


def columns(pattern: Pattern) -> Columns:
    """The pattern, which is one of whole columns."""
    if not isinstance(pattern, Columns):
        raise TypeError(f"whole columns are chosen here, not {pattern}")
    return pattern


def without(weight: Tensor, pattern: Pattern, scores: Tensor) -> Tensor:
    """A weight (out, in) without the units that have the lowest scores (units,), in memory of its own."""
    chosen = columns(pattern)
    stays = chosen.of_scores(scores).repeat_interleave(weight.shape[1] // chosen.units)
    return weight * stays


def narrow(checkpoint: Checkpoint, recipe: Recipe) -> Narrow | None:
    """The narrower model that a recipe asks for, None where it asks for nothing.

    Raises:
        UserError: the model has no such channels, heads or experts, or what is asked for makes no sense.
    """
    asked, sent = recipe.width, recipe.experts
    load(asked.by)
    experts.load(sent.by)
    if not asked.asks and asked.by != Width().by:
        raise UserError(
            "width.by says how channels and heads are chosen that go, and neither width.channels nor width.heads "
            "how many: say that too"
        )
    if sent.drop is None and sent.by != Experts().by:
        raise UserError("experts.by says how experts are chosen that go, and experts.drop not how many: say that too")
    if not recipe.narrows:
        return None

    def target(name: str, value: str | int | float | None, multiple: int) -> Target | None:
        return None if value is None else lambda count: _left(name, value, count, multiple)

    return narrowed(
        checkpoint,
        target("width.channels", asked.channels, MULTIPLE),
        target("width.heads", asked.heads, 1),
        target("experts.drop", sent.drop, 1),
    )


def _left(name: str, asked: str | int | float, count: int, multiple: int) -> int:
    """How many of so many stay.

    A share comes to a multiple, as far as that changes it by no more than a sixtieth of all.
    """
    if isinstance(asked, int) and not isinstance(asked, bool):
        left = count - asked
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", asked) if isinstance(asked, str) else None
        share = float(found[1]) / 100 if found else asked if isinstance(asked, float) else None
        if share is None or not 0 < share < 1:
            raise UserError(f"{name} must be how many go of each block (6), or a share of them (20%), not {asked!r}")
        step = max(1, min(multiple, 2 ** int(math.log2(max(1, count / multiple)))))
        step = math.gcd(step, count)
        left = min(max(step, round(count * (1 - share) / step) * step), count - step)
    if not 0 < left < count:
        raise UserError(f"{name}: of {count} at least one must go, and at least one must stay; {asked} go")
    return left
