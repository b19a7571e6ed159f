"""Which inputs of a linear go with all their weights, one file a way to choose them; the file's name is the way's name.

A file defines a frozen dataclass `Solver`, as the methods do. It is given a pattern of whole columns, which sums a
saliency over all that goes together, and gives back the weight with zeros in what goes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from llmprune import named
from llmprune.errors import UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.cuts import width_step
from llmprune.model.width import Narrow, narrowed
from llmprune.model.widths import Target, Unit, channel_units, head_units, heads_that_can_go, products
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

    if asked.ranks:
        way = load(asked.by)
        if not isinstance(way, Foreseeing):
            raise UserError(
                "width.ranking global compares units of all blocks with each other, which "
                f"{named.name_of(asked.by)} does not: take width.by taylor (--narrow-by taylor)"
            )
        return narrow(checkpoint, replace(recipe, width=stand_in(checkpoint, recipe)))

    def target(name: str, value: str | int | float | None, multiple: int) -> Target | None:
        least = min(multiple, width_step(checkpoint))
        return None if value is None else lambda count: _left(name, value, count, multiple, least)

    channels, key = asked.channels, "width.channels"
    if asked.params is not None or asked.flops is not None:
        name, budget = _budget(asked)
        key = f"width.{name}"
        channels = _within(checkpoint, key, budget, asked.heads)
    return narrowed(
        checkpoint,
        target(key, channels, MULTIPLE),
        target("width.heads", asked.heads, 1),
        target("experts.drop", sent.drop, 1),
    )


def _budget(width: Width) -> tuple[str, str | float]:
    """What a budget is of, and the part of it that may stay."""
    return next((key, value) for key in ("params", "flops") if (value := getattr(width, key)) is not None)


def ranking_of(width: Width) -> str:
    """Until when units go that are ranked, in words; empty where none are."""
    if not width.ranks:
        return ""
    key, asked = _budget(width)
    return f"{asked} of {'the weights' if key == 'params' else 'the products of a token'} are left"


def stand_in(checkpoint: Checkpoint, recipe: Recipe) -> Width:
    """Widths of which some of each kind go, for plans that are made before it is known how many.

    Raises:
        UserError: the model cannot lose some of each, or no budget can be met.
    """
    found = within(checkpoint, recipe.width)
    share = next((share for share, _ in found if share is not None), 0.001)
    return Width(channels=share, heads=heads_that_can_go(checkpoint)[0], by=recipe.width.by)


def within(checkpoint: Checkpoint, width: Width) -> list[tuple[float | None, int]]:
    """For each number of heads that may go the smallest share of channels that brings the model within the budget.

    Raises:
        UserError: nothing does, or heads cannot go.
    """
    key, asked = _budget(width)
    counts = heads_that_can_go(checkpoint)
    if not counts:
        raise UserError("width.ranking global chooses between channels and heads, and this model's heads cannot go")
    found: list[tuple[float | None, int]] = []
    least = 1.0
    for heads in (0, *counts):
        share, part = _reach(checkpoint, f"width.{key}", asked, heads or None)
        least = min(least, part)
        if share != 1:
            found.append((share, heads))
        if share is None:  # more heads would only lose more
            break
    if not found:
        raise UserError(
            f"width.{key}: channels and heads bring the model to {least:.1%} at the least, and {asked} may stay"
        )
    return found


def ranked(checkpoint: Checkpoint, recipe: Recipe, whole: Narrow, saliencies: Mapping[str, Tensor]) -> Width:
    """How many channels and heads go, by what the model loses with them over all blocks.

    Args:
        whole: a narrower model that has cuts of both kinds.
        saliencies: (units,) by the names of the cuts, of all that could go.

    Returns:
        Of all widths within the budget those whose saliencies that go have the smallest sum.
    """
    kinds: dict[str, list[Tensor]] = {"channels": [], "heads": []}
    for block in whole.cuts:
        for name, cuts in block.items():
            kinds[cuts.pattern.what].append(saliencies[name].double().sort().values)
    best: tuple[float, float | None, int] | None = None
    for share, heads in within(checkpoint, recipe.width):
        lost = sum(float(sums[:heads].sum()) for sums in kinds["heads"])
        if share is not None:
            for sums in kinds["channels"]:
                left = _left("width.channels", share, len(sums), MULTIPLE, width_step(checkpoint))
                lost += float(sums[: len(sums) - left].sum())
        if best is None or lost < best[0]:
            best = lost, share, heads
    assert best is not None
    return Width(channels=best[1], heads=best[2] or None, by=recipe.width.by)


def _within(checkpoint: Checkpoint, key: str, asked: str | float, heads: str | int | float | None) -> float | None:
    """The smallest share of channels whose loss brings a model within a budget; None where it is within already.

    Args:
        key: what the budget is of.
        asked: the part of it that may stay.
        heads: those that go besides.

    Raises:
        UserError: no such share, or there are not enough channels.
    """
    share, least = _reach(checkpoint, key, asked, heads)
    if share == 1:
        raise UserError(f"{key}: channels alone bring the model to {least:.1%} at the least, and {asked} may stay")
    return share


def _reach(
    checkpoint: Checkpoint, key: str, asked: str | float, heads: str | int | float | None
) -> tuple[float | None, float]:
    """As `_within`, 1 where there are not enough channels; and the part that is left then."""
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
    if heads is not None and left <= allowed * total:
        return None, left / total
    units = channel_units(checkpoint)
    for share in (step / 1000 for step in range(1, 1000)):
        gone = sum(
            (unit.count - _left(key, share, unit.count, MULTIPLE, width_step(checkpoint))) * worth(unit)
            for unit in units
        )
        if left - gone <= allowed * total:
            return share, (left - gone) / total
    return 1.0, ((left - gone) if units else left) / total


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
