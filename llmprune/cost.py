"""What a run costs: the operations that its parts take, and about how long that is on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmprune import distributed
from llmprune.allocate import Improver
from llmprune.budget import SAMPLE
from llmprune.matrix import product
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.linears import Linear
from llmprune.model.widths import experts_per_token
from llmprune.plan import Plan
from llmprune.recipe import Recipe

_SIZE = 1024


@dataclass(frozen=True)
class Cost:
    """Floating point operations, of all ranks.

    What is not a product of matrices is not counted, nor is an evaluation: a time that comes of it is the least.

    Attributes:
        forwards: taking the calibration text through the blocks, the pruned ones and where needed the dense ones.
        statistics: Grams, and what the dense model is compared by.
        solving: the methods and what follows them on each linear.
        fitting: whole blocks, forwards and backwards, and those after them.
    """

    forwards: float = 0.0
    statistics: float = 0.0
    solving: float = 0.0
    fitting: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.forwards + self.statistics + self.solving + self.fitting

    def seconds(self, rate: float) -> float:
        """How long it takes at a rate in operations a second on each rank."""
        return self.total / rate / distributed.size()


def cost(checkpoint: Checkpoint, plan: Plan, recipe: Recipe) -> Cost:
    """The cost of a plan."""
    if not plan.needs_data:
        return Cost()
    drawn = float(recipe.calibration.samples * plan.schedule.length)
    looks = plan.budget is not None and plan.budget.allocator.needs == "norms"
    tokens = drawn if plan.calibrates or looks else 0.0
    forwards = statistics = solving = fitting = passing = 0.0
    weighed: list[float] = []  # operations of one way through each block
    for number, (choices, stages) in enumerate(zip(plan.blocks, plan.schedule.stages, strict=True)):
        chosen = {choice.linear.name: choice for choice in choices}
        reach = _reach(checkpoint, [choice.linear for choice in choices])
        once = sum(2 * reach[choice.linear.name] * choice.linear.numel for choice in choices)
        through = tokens * once
        runs = 1 + any(stage.dense for stage in stages)
        beside = runs if any(stage.beside for stage in stages) else plan.fit is not None
        forwards += through * (runs + beside + (plan.fit is not None) + bool(plan.permuted(number)))
        passing += once
        for entry in (entry for stage in stages for entry in stage.inputs):
            width, gram = entry.features, entry.needs == "gram"
            taken = gram * width + 2 * entry.beside * (2 if entry.stream else 1)
            statistics += tokens * reach[entry.linears[0]] * width * taken
            solving += gram * float(width) ** 3
            solving += sum(chosen[name].products * 2.0 * chosen[name].linear.numel * width for name in entry.linears)
        weighed.append(through)
    if plan.fit is not None:
        part = plan.schedule.batch / recipe.calibration.samples  # of the text that a step sees
        for number, through in enumerate(weighed):
            if not any(choice.fitted for choice in plan.blocks[number]):
                continue
            often = part * plan.fit.steps_of(number)
            fitting += through * (3 * often + 2)
            if plan.fit.ahead and number + 1 < len(weighed):  # there and back, and for what it should come to
                fitting += weighed[number + 1] * (3 * often + 4)
    if plan.budget is not None and plan.budget.targets is None and isinstance(plan.budget.allocator, Improver):
        forwards += passing * plan.budget.allocator.looked_at * min(tokens, plan.budget.allocator.tokens)
    if plan.shortening is not None and plan.shortening.given is None:
        asked = plan.shortening
        whole = passing * asked.total / len(plan.blocks)
        looked_at = asked.chooser.looked_at(asked.total, asked.count)
        forwards += whole * looked_at * min(drawn, asked.chooser.tokens)
    if plan.foresight is not None:  # there, and for the way back once more and as much for the gradient
        forwards += 3 * passing * min(drawn, plan.foresight.tokens)
    wider = 1.0 if plan.slimming is None else plan.slimming.width / plan.slimming.kept  # the dense model's blocks are
    if plan.slimming is not None:  # all of the text goes through it to choose them
        forwards += passing * wider * drawn
    if plan.calibrates:  # the dense model's states go beside, or a sample of them, and through what went
        sample = float(SAMPLE * plan.schedule.batch * plan.schedule.length)
        followed = tokens if plan.follows_dense else min(tokens, sample)
        gone = plan.shortening.count / len(plan.blocks) if plan.shortening is not None else 0.0
        forwards += passing * wider * followed * (gone + (not plan.follows_dense))
    return Cost(forwards, statistics, solving, fitting)


def _reach(checkpoint: Checkpoint, linears: Sequence[Linear]) -> dict[str, float]:
    """The fraction of the tokens that reaches each linear: of experts those that a token chooses, of all there are."""
    at_once = experts_per_token(checkpoint.config.get_text_config())
    experts: dict[str, set[int]] = {}
    for linear in linears:
        if linear.expert is not None:
            experts.setdefault(linear.module, set()).add(linear.expert)
    return {
        linear.name: 1.0 if linear.expert is None else min(1.0, at_once / len(experts[linear.module]))
        for linear in linears
    }


def rate(checkpoint: Checkpoint) -> float:
    """Operations a second of a product in float32 on the device that the blocks run on, as measured now."""
    matrix = torch.ones(_SIZE, _SIZE, device=checkpoint.device)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        product(matrix, matrix)
        if checkpoint.device.type == "cuda":
            torch.cuda.synchronize(checkpoint.device)
        best = min(best, time.perf_counter() - began)
    return 2 * float(_SIZE) ** 3 / best
