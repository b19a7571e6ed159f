"""How a sparsity is divided among the linears, one file an allocation; the file's name is the allocation's name.

A file defines a frozen dataclass `Allocator` whose fields are the allocation's options in a recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from llmprune import named
from llmprune.allocation import Known, Seen
from llmprune.progress import Progress

Measure = Callable[[Sequence[Mapping[str, str]], Sequence[int]], list[float]]
"""How far the model is from the dense one with each of some targets, on the sequences of these numbers."""

Needs = Literal["nothing", "weights", "norms"]

PLAN_FILES = (".yaml", ".yml")
"""What the name of a plan file ends in."""


class Allocator(Protocol):
    """It looks at the dense linears, one block after the other, and then decides how sparse each is to be."""

    needs: ClassVar[Needs]
    """What it is shown: `nothing`, and `look` is not called; the `weights`; or the `norms` of the inputs as well."""

    def look(self, block: Sequence[Seen]) -> Sequence[Any]:
        """What is to be remembered of each linear of a block: little, and of a kind that pickles."""

    def allocate(self, linears: Sequence[Known], sparsity: float) -> Mapping[str, str]:
        """The target of each linear by its name, see `allocation`.

        Args:
            linears: all that share the budget, in order.
            sparsity: the fraction of zeros that is asked over all their weights.

        Raises:
            UserError: that cannot be.
        """


@runtime_checkable
class Improver(Allocator, Protocol):
    """It then betters what it has decided, by how the model answers."""

    tokens: int
    """Calibration tokens that are measured on."""

    def together(self, mine: int, sequences: int) -> int:
        """The most sequences that go through the model at a time on one rank, those of all targets together.

        Args:
            mine, sequences: how many that rank has, and all have.
        """

    @property
    def looked_at(self) -> float:
        """How often so many tokens go through the model, about."""

    def improve(
        self,
        linears: Sequence[Known],
        sparsity: float,
        targets: Mapping[str, str],
        measure: Measure,
        sequences: int,
        progress: Progress,
    ) -> Mapping[str, str]:
        """Better targets, the same on every rank.

        Args:
            sequences: how many there are to measure on.
        """


def names() -> list[str]:
    """Every allocation there is."""
    return named.names(sys.modules[__name__])


def load(allocation: str | Mapping[str, Any]) -> Allocator:
    """Make the allocator that a recipe asks for: a name, a mapping of `name` and options, or a plan file.

    Raises:
        UserError: an unknown allocation or option, or a value that is out of range.
    """
    if isinstance(allocation, str) and allocation.endswith(PLAN_FILES):
        allocation = {"name": "file", "path": allocation}
    allocator: Allocator = named.load(sys.modules[__name__], "Allocator", "allocation", allocation)
    return allocator
