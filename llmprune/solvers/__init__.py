"""The pruning methods, one file each; the file's name is the method's name.

A file defines a frozen dataclass `Solver` whose fields are the method's options in a recipe.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Protocol

from torch import Tensor

from llmprune.errors import UserError, unknown
from llmprune.patterns import Pattern, Scope
from llmprune.recipe import build
from llmprune.stats import LinearStats, Needs


class Solver(Protocol):
    """A method: it turns a dense weight, the statistics of its inputs and a pattern into a pruned weight."""

    needs: ClassVar[Needs]
    """What calibration must collect for it."""
    scope: ClassVar[Scope]
    """What an unstructured sparsity is counted over unless the recipe says otherwise: the published default."""

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        """Prune one linear.

        Args:
            weight: (out, in) float32; not changed.
            stats: statistics of its inputs, at least of the level `needs`.
            pattern: where zeros must stand.

        Returns:
            (out, in) float32 with exact zeros, in memory of its own.
        """


def names() -> list[str]:
    """Every method there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(method: str | Mapping[str, Any]) -> Solver:
    """Make the solver that a recipe asks for: a name, or a mapping of `name` and the method's options.

    Raises:
        UserError: an unknown method or option (the answer names the nearest one), or a value that is out of range.
    """
    options = {"name": method} if isinstance(method, str) else dict(method)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"method {method!r} has no name; known: {', '.join(names())}")
    if name not in names():
        raise unknown("method", name, names())
    solver: type[Solver] = importlib.import_module(f"{__name__}.{name}").Solver
    if options and not fields(solver):  # type: ignore[arg-type]
        raise UserError(f"method {name} has no options, but {next(iter(options))!r} was given")
    try:
        return build(solver, options, f"method {name}")
    except ValueError as error:
        raise UserError(f"method {name}: {error}") from None
