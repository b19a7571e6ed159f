"""How many channels, heads and hidden channels go: a number or a share of them, or what a budget asks."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from llmprune.errors import UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.cuts import width_step
from llmprune.model.width import Narrow, untried
from llmprune.model.widths import Unit, channel_units, head_units, heads_that_can_go, products
from llmprune.recipe import Recipe, Width, share_of

MULTIPLE = 32
"""What the channels that stay are a multiple of, where the dense width is: kernels and quantised formats want that."""


def left(name: str, asked: str | int | float, count: int, step: int = 1) -> int:
    """How many of so many stay.

    Args:
        name: the recipe's key.
        asked: how many go, or a share of them.
        step: what stays of a share comes to a multiple of this.

    Raises:
        UserError: what is asked for makes no sense.
    """
    if isinstance(asked, int) and not isinstance(asked, bool):
        stay = count - asked
    else:
        share = share_of(asked)
        if share is None:
            raise UserError(f"{name} must be how many go (6), or a share of them (20%), not {asked!r}")
        stay = min(max(step, round(count * (1 - share) / step) * step), count - step)
    if not 0 < stay < count:
        raise UserError(f"{name}: of {count:,} at least one must go, and at least one must stay; {asked} go")
    return stay


def step_of(count: int, least: int) -> int:
    """What the channels of an MLP that stay of so many are a multiple of, where a share of them is asked.

    It is what suits kernels, as far as that changes the share by no more than a sixtieth of all.

    Args:
        least: what any kernel wants; see `width_step`.
    """
    return math.gcd(count, min(MULTIPLE, max(least, 2 ** int(math.log2(max(1, count / MULTIPLE))))))


def channels_left(checkpoint: Checkpoint, asked: str | int | float) -> int:
    """How many hidden channels stay; of a share what both kernels and the number of heads go into, if the width is.

    Raises:
        UserError: what is asked for makes no sense.
    """
    heads = getattr(checkpoint.config.get_text_config(), "num_attention_heads", None)
    even = math.lcm(heads if isinstance(heads, int) else 1, width_step(checkpoint))
    return left("width.hidden", asked, checkpoint.hidden_size, math.gcd(checkpoint.hidden_size, even))


class _Budget:
    """What may stay of a model's weights, or of the products of a token, and what units are worth there."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, whole: Checkpoint) -> None:
        """Weigh the units.

        Args:
            checkpoint: what becomes narrower, perhaps without some of its blocks and hidden channels.
            whole: the dense model, of which a share may stay.

        Raises:
            UserError: no such budget.
        """
        width, fewer = recipe.width, checkpoint
        assert width.budget is not None
        name, self.asked = width.budget
        self.key, share = f"width.{name}", share_of(self.asked)
        if share is None:
            raise UserError(f"{self.key} must be the share that may stay (80%), not {self.asked!r}")
        if (gone := recipe.experts.drop) is not None:
            fewer = untried(checkpoint, experts=lambda count: left("experts.drop", gone, count))
        self._products = name == "flops"
        self._total, self._own = self._size(whole), self._size(fewer)
        self._allowed, self._least = share * self._total, width_step(checkpoint)
        self._channels = channel_units(fewer)
        self._heads = head_units(fewer) if width.heads is not None or width.ranks else []

    @property
    def met(self) -> bool:
        """Whether what goes besides is enough."""
        return self._own <= self._allowed

    def _size(self, checkpoint: Checkpoint) -> float:
        return products(checkpoint) if self._products else float(checkpoint.weights)

    def channels(self, heads: str | int | float | None = None) -> tuple[float, float]:
        """The share of channels that has to go besides some heads, and the part of the model that is left then.

        The share is 0 where none has to go, and 1 where all are not enough.
        """
        part = self._own
        if heads is not None:
            part -= sum(
                self._worth(unit) * (unit.count - left("width.heads", heads, unit.count)) for unit in self._heads
            )
        least = part
        for share in (step / 1000 for step in range(1000)):
            least = part - (self._gone(share) if share else 0.0)
            if least <= self._allowed:
                return share, least / self._total
        return 1.0, least / self._total

    def _gone(self, share: float) -> float:
        return sum(
            self._worth(unit) * (unit.count - left(self.key, share, unit.count, step_of(unit.count, self._least)))
            for unit in self._channels
        )

    def _worth(self, unit: Unit) -> float:
        return unit.products if self._products else unit.weights


def needless(recipe: Recipe) -> UserError:
    """What is wrong with a budget for which nothing has to go."""
    assert recipe.width.budget is not None
    key, asked = recipe.width.budget
    return UserError(f"width.{key}: {asked} may stay, and what goes besides is enough for that: leave it out")


def channels_within(checkpoint: Checkpoint, recipe: Recipe, whole: Checkpoint) -> float | None:
    """The smallest share of channels whose loss brings a model within a budget; None where what else goes does.

    Args:
        checkpoint, whole: what becomes narrower, and the dense model.

    Raises:
        UserError: no such budget, or there are not enough channels.
    """
    budget = _Budget(checkpoint, recipe, whole)
    share, part = budget.channels(recipe.width.heads)
    if share == 1:
        told = f"channels alone bring the model to {part:.1%} at the least"
        raise UserError(f"{budget.key}: {told}, and {budget.asked} may stay")
    return share or None


# -- a ranking over both kinds ----------------------------------------------------------------------------------------


def ranking_of(width: Width) -> str:
    """Until when units go that are ranked, in words; empty where none are."""
    if not width.ranks or width.budget is None:
        return ""
    key, asked = width.budget
    return f"{asked} of {'the weights' if key == 'params' else 'the products of a token'} are left"


def stand_in(checkpoint: Checkpoint, recipe: Recipe, whole: Checkpoint) -> Width:
    """Widths of which some of each kind go, for plans that are made before it is known how many.

    Raises:
        UserError: the model cannot lose some of each, or no budget can be met.
    """
    found = _within(checkpoint, recipe, whole)
    share = next((one.channels for one in found if one.channels is not None), 0.001)
    return Width(channels=share, heads=heads_that_can_go(checkpoint)[0], by=recipe.width.by)


def ranked(
    checkpoint: Checkpoint, recipe: Recipe, whole: Checkpoint, narrower: Narrow, saliencies: Mapping[str, Tensor]
) -> Width:
    """How many channels and heads go, by what the model loses with them over all blocks.

    Args:
        narrower: a model that has cuts of both kinds.
        saliencies: (units,) by the names of the cuts, of all that could go.

    Returns:
        Of all widths within the budget those whose saliencies that go have the smallest sum.
    """
    least = width_step(checkpoint)
    kinds: dict[str, list[Tensor]] = {"channels": [], "heads": []}
    for block in narrower.cuts:
        for name, cuts in block.items():
            kinds[cuts.pattern.what].append(saliencies[name].double().sort().values)

    def lost(one: Width) -> float:
        gone = 0.0
        if one.channels is not None:
            for each in kinds["channels"]:
                stay = left("width.channels", one.channels, len(each), step_of(len(each), least))
                gone += float(each[: len(each) - stay].sum())
        if one.heads is not None:
            for each in kinds["heads"]:
                gone += float(each[: len(each) - left("width.heads", one.heads, len(each))].sum())
        return gone

    return min(_within(checkpoint, recipe, whole), key=lost)


def _within(checkpoint: Checkpoint, recipe: Recipe, whole: Checkpoint) -> list[Width]:
    """For each number of heads that may go the fewest channels that bring the model within the budget.

    Raises:
        UserError: nothing does, or heads cannot go.
    """
    counts, budget = heads_that_can_go(checkpoint), _Budget(checkpoint, recipe, whole)
    if not counts:
        raise UserError("width.ranking global chooses between channels and heads, and this model's heads cannot go")
    if budget.met:
        raise needless(recipe)
    found, least = [], 1.0
    for heads in (None, *counts):
        share, part = budget.channels(heads)
        least = min(least, part)
        if share < 1:
            found.append(Width(channels=share or None, heads=heads, by=recipe.width.by))
        if share == 0:  # more heads would only lose more
            break
    if not found:
        raise UserError(
            f"{budget.key}: channels and heads bring the model to {least:.1%} at the least, and {budget.asked} may stay"
        )
    return found
