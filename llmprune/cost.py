"""What a run costs: the operations that its parts take, and about how long that is on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from llmprune import distributed
from llmprune.model.checkpoint import Checkpoint
from llmprune.plan import Plan
from llmprune.recipe import Recipe
from llmprune.stats import product

_SIZE = 1024


@dataclass(frozen=True)
class Cost:
    """Floating point operations, of all ranks.

    What is not a product of matrices is not counted, nor is an evaluation: a time that comes of it is the least.

    Attributes:
        forwards: taking the calibration text through the blocks, the pruned ones and where needed the dense ones.
        statistics: Grams, and what the dense model is compared by.
        solving: the methods and what follows them on each linear.
        fitting: whole blocks, forwards and backwards.
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


def cost(plan: Plan, recipe: Recipe) -> Cost:
    """The cost of a plan."""
    if not plan.needs_data:
        return Cost()
    tokens = float(recipe.calibration.samples * plan.schedule.length)
    forwards = statistics = solving = fitting = 0.0
    for choices, stages in zip(plan.blocks, plan.schedule.stages, strict=True):
        through = 2 * tokens * sum(choice.linear.numel for choice in choices if choice.linear.expert is None)
        again = any(stage.dense for stage in stages) or plan.fit is not None
        forwards += through * (1 + again + plan.follows_dense)
        chosen = {choice.linear.name: choice for choice in choices}
        for entry in (entry for stage in stages for entry in stage.inputs):
            width = entry.features
            gram = entry.needs == "gram"
            statistics += tokens * width * (gram * width + 2 * entry.aside * width + 4 * entry.stream)
            rows = {name: chosen[name].linear.shape[0] for name in entry.linears}
            solving += gram * float(width) ** 3
            solving += sum(chosen[name].products * 2.0 * rows[name] * width**2 for name in rows)
        if plan.fit is not None:
            share = plan.schedule.batch / max(recipe.calibration.samples, 1)
            fitting += through * (3 * share * plan.fit.steps + 2)
    return Cost(forwards, statistics, solving, fitting)


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
