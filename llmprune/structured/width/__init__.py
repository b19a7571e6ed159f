"""Which inputs of a linear go with all their weights, one file a way to choose them; the file's name is the way's name.

A file defines a frozen dataclass `Solver`, as the methods do. It is given a pattern of whole columns, which sums a
saliency over all that goes together, and gives back the weight with zeros in what goes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from llmprune import named
from llmprune.errors import UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.cuts import width_step
from llmprune.model.width import Narrow, narrowed
from llmprune.model.widths import Target, Unit, channel_units, head_units, products
from llmprune.recipe import Experts, Recipe, Width, share_of
from llmprune.solvers import Solver
from llmprune.structured import experts

MULTIPLE = 32
"""What the channels that stay are a multiple of, where the dense width is: kernels and quantised formats want that."""


@runtime_checkable
class Foreseeing(Protocol):
    """A way to choose the units of all blocks before the first is pruned, by what the dense model's loss feels of them.

    It is a `Solver` that does not solve; `Knowing` does so for all of them.
    """

    tokens: int
    """Calibration tokens that are looked at, in whole sequences."""

    def saliency(self, slopes: Tensor) -> Tensor:
        """(units,) what one sequence adds to the saliencies.

        Args:
            slopes: (units,) float64, those of the sequence's mean loss along gates that the units are multiplied by.
        """


def names() -> list[str]:
    """Every way there is."""
    return named.names(sys.modules[__name__])


def load(way: str | Mapping[str, Any]) -> Solver:
    """Make the way to choose that a recipe asks for; see `named.load`."""
    made: Solver = named.load(sys.modules[__name__], "Solver", "way to choose channels and heads", way)
    return made


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
    if not asked.asks and sent.drop is None:
        return None

    def target(name: str, value: str | int | float | None, multiple: int) -> Target | None:
        least = min(multiple, width_step(checkpoint))
        return None if value is None else lambda count: _left(name, value, count, multiple, least)

    channels, key = asked.channels, "width.channels"
    for key_, budget in (("params", asked.params), ("flops", asked.flops)):
        if budget is not None:
            channels, key = _within(checkpoint, f"width.{key_}", budget, asked.heads), f"width.{key_}"
    return narrowed(
        checkpoint,
        target(key, channels, MULTIPLE),
        target("width.heads", asked.heads, 1),
        target("experts.drop", sent.drop, 1),
    )


def _within(checkpoint: Checkpoint, key: str, asked: str | float, heads: str | int | float | None) -> float:
    """The smallest share of channels whose loss brings a model within a budget.

    Args:
        key: what the budget is of.
        asked: the part of it that may stay.
        heads: those that go besides.

    Raises:
        UserError: no such share, or there are not enough channels.
    """
    allowed = share_of(asked)
    if allowed is None:
        raise UserError(f"{key} must be the share that may stay (80%), not {asked!r}")
    by_products = key == "width.flops"

    def worth(unit: Unit) -> float:
        return unit.products if by_products else unit.weights

    total = products(checkpoint) if by_products else checkpoint.weights
    left = float(total)
    if heads is not None:
        left -= sum(
            (unit.count - _left("width.heads", heads, unit.count, 1)) * worth(unit) for unit in head_units(checkpoint)
        )
    units = channel_units(checkpoint)
    for share in (step / 1000 for step in range(1, 1000)):
        gone = sum(
            (unit.count - _left(key, share, unit.count, MULTIPLE, width_step(checkpoint))) * worth(unit)
            for unit in units
        )
        if left - gone <= allowed * total:
            return share
    least = (left - gone) / total if units else 1.0
    raise UserError(f"{key}: channels alone bring the model to {least:.1%} at the least, and {asked} may stay")


def _left(name: str, asked: str | int | float, count: int, multiple: int, least: int = 1) -> int:
    """How many of so many stay.

    A share comes to a multiple, as far as that changes it by no more than a sixtieth of all, but to one of `least`.
    """
    if isinstance(asked, int) and not isinstance(asked, bool):
        left = count - asked
    else:
        share = share_of(asked)
        if share is None:
            raise UserError(f"{name} must be how many go of each block (6), or a share of them (20%), not {asked!r}")
        step = math.gcd(count, min(multiple, max(least, 2 ** int(math.log2(max(1, count / multiple))))))
        left = min(max(step, round(count * (1 - share) / step) * step), count - step)
    if not 0 < left < count:
        raise UserError(f"{name}: of {count} at least one must go, and at least one must stay; {asked} go")
    return left
