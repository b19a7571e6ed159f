"""What follows a method: refinements of its mask, reconstructions of what it kept, and a fit of the whole block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmprune import distributed, named, reconstruct, refine
from llmprune.errors import UserError
from llmprune.recipe import Recipe
from llmprune.reconstruct import Reconstructor
from llmprune.reconstruct.block import Reconstructor as BlockReconstructor
from llmprune.refine import Refiner
from llmprune.solvers import Solver
from llmprune.stats import LEVELS, Needs


@dataclass(frozen=True)
class After:
    """What follows the method: on each linear one after the other, by name, and then on the whole block."""

    refiners: tuple[tuple[str, Refiner], ...] = ()
    reconstructors: tuple[tuple[str, Reconstructor], ...] = ()
    block: BlockReconstructor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of those on each linear, in order."""
        return tuple(name for name, _ in (*self.refiners, *self.reconstructors))

    @property
    def needs(self) -> Needs:
        """The most that any of them must know of the inputs."""
        last = (self.block,) if self.block is not None else ()
        return max((step.needs for step in (*self._steps, *last)), key=LEVELS.index, default="nothing")

    @property
    def room(self) -> int:
        """Bytes that those on each linear take at the most, besides masks and weights of its size."""
        return max((step.room for step in self._steps), default=0)

    @property
    def products(self) -> float:
        """About how many products of a weight with a matrix of the Gram's size take as long as they do."""
        return sum(step.products for step in self._steps)

    @property
    def _steps(self) -> list[Refiner | Reconstructor]:
        return [*(step for _, step in self.refiners), *(step for _, step in self.reconstructors)]


def read_after(recipe: Recipe, methods: Mapping[str, Solver]) -> After:
    """What follows the methods of a recipe.

    Args:
        methods: those that it follows, by name.

    Raises:
        UserError: an unknown name or option, or something that cannot follow.
    """
    refiners = tuple((named.name_of(entry), refine.load(entry)) for entry in recipe.refine)
    reconstructors = tuple((named.name_of(entry), reconstruct.load(entry)) for entry in recipe.reconstruct)
    block = None
    for place, (name, step) in enumerate(reconstructors, 1):
        if isinstance(step, BlockReconstructor):
            block = step
            if place < len(reconstructors):
                last = reconstructors[-1][0]
                raise UserError(f"reconstruct: {name} works on whole blocks and comes last, after {last}")
            if distributed.size() > 1:
                raise UserError(
                    f"reconstruct: {name} runs in one process only: leave it out, or start without torchrun"
                )
    each = reconstructors if block is None else reconstructors[:-1]
    updating = next((name for name, solver in methods.items() if solver.updates), None)
    if refiners and not each and updating is not None:
        last = "" if block is None else f",{reconstructors[-1][0]}"
        raise UserError(
            f"refine: {refiners[0][0]} chooses other weights to keep than {updating}, which fitted those that it kept "
            f"to its own mask: add a reconstruction of each linear (--reconstruct cg{last}), or take a method that "
            "leaves the weights as they are, such as wanda"
        )
    return After(refiners, each, block)
