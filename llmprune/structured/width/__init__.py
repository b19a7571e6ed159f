"""Which inputs of a linear go with all their weights, one file a way to choose them; the file's name is the way's name.

A file defines a frozen dataclass `Solver`, as the methods do. It is given a pattern of whole columns, which sums a
saliency over all that goes together, and gives back the weight with zeros in what goes.
"""

from __future__ import annotations

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
from llmprune.model.widths import Target
from llmprune.recipe import Experts, Recipe, Width
from llmprune.solvers import Solver
from llmprune.structured import counts, experts
from llmprune.structured.counts import left, step_of


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


def narrow(checkpoint: Checkpoint, recipe: Recipe, whole: Checkpoint | None = None) -> Narrow | None:
    """The narrower model that a recipe asks for, None where it asks for nothing.

    Args:
        checkpoint: what becomes narrower.
        whole: the dense model, which that is where it has all of its blocks and hidden channels.

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
        if not isinstance(load(asked.by), Foreseeing):
            raise UserError(
                "width.ranking global compares units of all blocks with each other, which "
                f"{named.name_of(asked.by)} does not: take width.by taylor (--narrow-by taylor)"
            )
        return narrow(checkpoint, replace(recipe, width=counts.stand_in(checkpoint, recipe, whole or checkpoint)))

    def target(name: str, value: str | int | float | None, step: Target = lambda _: 1) -> Target | None:
        return None if value is None else lambda count: left(name, value, count, step(count))

    channels, key = asked.channels, "width.channels"
    if asked.budget is not None:
        channels, key = counts.channels_within(checkpoint, recipe, whole or checkpoint), f"width.{asked.budget[0]}"
        if channels is None and asked.heads is None and sent.drop is None:
            return None
    return narrowed(
        checkpoint,
        target(key, channels, lambda count: step_of(count, width_step(checkpoint))),
        target("width.heads", asked.heads),
        target("experts.drop", sent.drop),
    )
