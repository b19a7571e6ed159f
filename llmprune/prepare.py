"""What comes before the first block: the plan, and what is found out of the dense model.

A model may lose blocks and hidden channels, and channels and heads whose number is ranked; sparsities may be allocated.
Each is found out on the dense model, kept in the journal as soon as it is known, and planned for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune import data, dense, distributed
from llmprune.budget import CHOOSE, PRUNE, Peak, Room, room
from llmprune.errors import UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.cpu import quick
from llmprune.model.depth import shortened
from llmprune.model.hidden import slimmer, way_to_slim
from llmprune.model.source import Source, resolve
from llmprune.model.width import Narrow
from llmprune.model.writer import Writer
from llmprune.plan import Plan, Slimming, allocated, foreseen
from llmprune.planning import make_plan
from llmprune.progress import Clock, Progress
from llmprune.recipe import Experts, Recipe, Width, parse_size
from llmprune.structured.counts import channels_left, needless, ranked
from llmprune.structured.depth import Shortening, read_shortening
from llmprune.structured.energy import choose_hidden
from llmprune.structured.shorten import choose
from llmprune.structured.slopes import foresee
from llmprune.structured.width import narrow as narrow_by


def find(model: str | Path, recipe: Recipe, shown: Progress) -> Source:
    """The files of the model that a recipe is for, downloaded or converted where they have to be."""
    cap = parse_size(recipe.max_memory) if recipe.max_memory is not None else None
    with distributed.first():  # who downloads or converts the model, and tells what is wrong with the request
        trusted = recipe.trust_remote_code
        return resolve(model, recipe.dtype, trust_remote_code=trusted, most=cap, progress=shown)


class Found:
    """What is found out before the first block, by its name in the journal's header."""

    def __init__(self, writer: Writer, fingerprint: Mapping[str, Any], clock: Clock, resumed: bool) -> None:
        """Take over what an unfinished run had found out.

        Args:
            resumed: whether the writer goes on with such a run.
        """
        self.writer, self.resumed = writer, resumed
        self.clock, self._fingerprint, self._begun = clock, fingerprint, resumed

    def get(self, name: str) -> Any:
        """What was found out; None where it was not."""
        return self.writer.found.get(name)

    def out(self, name: str, phase: str, checkpoint: Checkpoint, look: Callable[[], Any]) -> Any:
        """The same on every rank: what is known already, or what `look` returns, which is kept at once.

        Args:
            phase: what the clock calls it.
            checkpoint: what is run meanwhile.
        """
        known = distributed.share(self.get(name))
        if known is not None:
            self.writer.found[name] = known
            return known
        with self.clock(phase), quick(checkpoint.device, checkpoint.dtype):
            self.writer.found[name] = look()
        self._begin()
        return self.get(name)

    def batch(self, phase: str, size: int) -> None:
        """Keep the sequences per forward that the run begins with in a phase; those of an earlier process stay."""
        self.writer.found["batches"] = {phase: size, **(self.get("batches") or {})}
        self._begun = self.resumed  # else the header is to tell it too

    def begin(self) -> None:
        """Begin the run in OUT, unless that is done."""
        if not self._begun:
            self._begin()

    def _begin(self) -> None:
        self.writer.begin(self._fingerprint)
        self._begun = True


def settle(
    whole: Checkpoint,
    checkpoint: Checkpoint,
    plan: Plan,
    recipe: Recipe,
    tokens: data.Tokens | None,
    found: Found,
    shown: Progress,
) -> tuple[Checkpoint, Plan]:
    """Find out all that the plan leaves open, and begin the run, or take up the one that is gone on with.

    Args:
        whole: the dense model.
        checkpoint, plan: of what is pruned, as `first_plan` gives them.
        tokens: the calibration tokens.

    Returns:
        What is pruned, and its plan.
    """
    out, kept, hidden = found.writer.out, None, None
    if plan.shortening is not None:
        kept = found.out("kept", "choose", whole, lambda: list(choose(whole, plan, tokens, shown)))
    if plan.slimming is not None:
        found.batch(CHOOSE, plan.slimming.batch)
        hidden = found.out("hidden", "choose", whole, lambda: _choose_hidden(whole, kept, plan, tokens, shown, out))
    if kept is not None or hidden is not None:
        with found.clock("plan"), shown.waiting("planning"):
            checkpoint, plan = _smaller(whole, plan, recipe, kept, hidden)
    gone = None
    if plan.ranked:
        ranking = found.out(
            "ranking", "choose", checkpoint, lambda: _rank(whole, checkpoint, plan, recipe, tokens, shown, out)
        )
        gone = ranking["gone"]
        with found.clock("plan"), shown.waiting("planning"):
            plan = _anew(whole, checkpoint, replace(recipe, width=Width(**ranking["width"])), plan)
    if plan.needs_data:
        found.batch(PRUNE, plan.schedule.batch)
    found.writer.lay_out(plan.written(checkpoint))
    if found.resumed:
        found.writer.recover(shown)
    if plan.budget is not None and plan.budget.targets is None:
        look = lambda: dense.look(checkpoint, plan, tokens, shown, out)  # noqa: E731
        plan = allocated(plan, found.out("allocation", "allocate", checkpoint, look))
    if plan.foresight is not None:
        if gone is None:
            gone = found.out("gone", "choose", checkpoint, lambda: foresee(checkpoint, plan, tokens, shown, out))
        plan = foreseen(plan, gone)
    found.begin()
    return checkpoint, plan


def _choose_hidden(
    whole: Checkpoint, kept: Sequence[int] | None, plan: Plan, tokens: data.Tokens | None, shown: Progress, out: Path
) -> list[int]:
    """The numbers of the hidden channels that stay, by what goes through the blocks that stay."""
    assert tokens is not None
    return list(choose_hidden(whole if kept is None else shortened(whole, kept), plan, tokens, shown, out))


def _rank(
    whole: Checkpoint,
    checkpoint: Checkpoint,
    plan: Plan,
    recipe: Recipe,
    tokens: data.Tokens | None,
    shown: Progress,
    out: Path,
) -> dict[str, Any]:
    """How many channels and heads go, as keys of `Width`, and which; see `foresee`."""
    width = Width()

    def narrower(saliencies: Mapping[str, Tensor]) -> Narrow:
        nonlocal width
        assert plan.narrow is not None
        width = ranked(checkpoint, recipe, whole, plan.narrow, saliencies)
        made = narrow_by(checkpoint, replace(recipe, width=width))
        assert made is not None
        return made

    gone = foresee(checkpoint, plan, tokens, shown, out, narrower)
    return {"width": {name: getattr(width, name) for name in ("channels", "heads", "by")}, "gone": gone}


def first_plan(
    source: Source, recipe: Recipe, batches: Mapping[str, int] | None = None
) -> tuple[Checkpoint, Checkpoint, Plan]:
    """The model, what is to be pruned of it, and the plan.

    Where blocks or hidden channels go that are still to be chosen, others stand for them: mistakes are found before any
    work.

    Args:
        batches: of the run that is gone on with, see `Room`.
    """
    with distributed.first():
        checkpoint = Checkpoint(source, distributed.local_device(recipe.device), recipe.dtype)
        shortening = read_shortening(recipe.depth.drop, recipe.depth.by, len(checkpoint.blocks))
        left = None if recipe.width.hidden is None else channels_left(checkpoint, recipe.width.hidden)
    had = room(checkpoint, parse_size(recipe.max_memory) if recipe.max_memory is not None else None)
    had = replace(had, batches=batches or {})
    if shortening is None and left is None:
        return checkpoint, checkpoint, _planned(checkpoint, recipe, had)
    first, small = _for_choosing(checkpoint, recipe, had, shortening, left is not None)
    if left is not None:
        laid_out = first.schedule.batch, first.schedule.place
        way = 0 if small is not None else distributed.share(way_to_slim(checkpoint, range(left)))
        slimming = Slimming(checkpoint.hidden_size, left, checkpoint.weights, *laid_out, way)
        first = replace(first, slimming=slimming)
    stand_ins = None if shortening is None else shortening.kept, None if left is None else range(left)
    try:
        smaller, made = _smaller(checkpoint, first, recipe, *stand_ins)
    except UserError as error:  # what holds neither has to be told of the larger
        raise (error if small is None or error.least is None or error.least > (small.least or 0) else small) from None
    if small is not None:
        raise small
    if recipe.width.budget is not None and made.narrow is None:
        raise needless(recipe)
    return checkpoint, smaller, replace(made, shortening=shortening)


def _for_choosing(
    checkpoint: Checkpoint, recipe: Recipe, had: Room, shortening: Shortening | None, passes: bool
) -> tuple[Plan, UserError | None]:
    """The plan for the dense model, of which nothing is pruned while what goes is chosen.

    Returns:
        Where memory is too small, the plan for more of it, and that mistake: what comes afterwards may need still more.
    """
    plain = replace(recipe.calibration, asymmetric=0.0)  # what is done to linears is planned for those that are left
    choosing = replace(
        recipe,
        sparsity=None,
        allocation="uniform",
        width=Width(),
        experts=Experts(),
        permute=False,
        refine=(),
        reconstruct=(),
        calibration=plain,
    )
    try:
        return _planned(checkpoint, choosing, had, shortening, passes), None
    except UserError as error:
        if error.least is None or distributed.size() > 1:
            raise
        made = _planned(checkpoint, choosing, replace(had, host=sys.maxsize), shortening, passes)
        return replace(made, room=had), error


def _planned(
    checkpoint: Checkpoint,
    recipe: Recipe,
    had: Room,
    shortening: Shortening | None = None,
    passes: bool = False,
    whole: Checkpoint | None = None,
) -> Plan:
    """The plan, the same on every rank.

    Args:
        passes: whether the calibration text goes through the dense model before.
        whole: the dense model, where that is another.
    """
    with distributed.first():
        made = make_plan(checkpoint, recipe, had, shortening, narrow_by(checkpoint, recipe, whole), passes)
    # each rank may find others
    schedule, channels, abreast = distributed.share((made.schedule, made.channels, made.abreast))
    return replace(made, schedule=schedule, channels=channels, abreast=abreast)


def _smaller(
    whole: Checkpoint, plan: Plan, recipe: Recipe, kept: Sequence[int] | None, hidden: Sequence[int] | None
) -> tuple[Checkpoint, Plan]:
    """The model without some of its blocks and hidden channels, and the plan for it.

    Args:
        kept: the numbers of the blocks that stay; None for all.
        hidden: likewise of the hidden channels.
    """
    with distributed.first():
        checkpoint = whole if kept is None else shortened(whole, kept)
        if hidden is not None:
            assert plan.slimming is not None
            checkpoint = slimmer(checkpoint, hidden, plan.slimming.way)
    return checkpoint, _anew(whole, checkpoint, recipe, plan)


def _anew(whole: Checkpoint, checkpoint: Checkpoint, recipe: Recipe, plan: Plan) -> Plan:
    """The plan for what a model has become, of which that is no part by which it was found out."""
    made = _planned(checkpoint, recipe, replace(plan.room, base=plan.schedule.base), whole=whole)
    phases = dict(made.schedule.memory)
    for phase in {CHOOSE, "evaluate"} & plan.schedule.memory.keys():  # the dense model is evaluated too
        phases[phase] = phases.get(phase, Peak()) | plan.schedule.memory[phase]
    schedule = replace(made.schedule, memory=phases)
    return replace(made, schedule=schedule, slimming=plan.slimming, abreast=plan.abreast)
