"""Which sparsity to try next, when the highest is looked for that keeps a promise.

Quality is taken to fall as the sparsity rises, so that a place that holds and one above it that does not have between
them the place where the promise breaks. How much of the promise is spent grows about exponentially with the sparsity:
that place is guessed on a logarithmic scale from the two places nearest to it, and the next to try is the guess, or as
near to it as it may be if at most `SLACK` more are to be tried than halving would need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmprune.errors import UserError
from llmprune.patterns import Unstructured, parse

SLACK = 2
"""How many points a search may need beyond those that halving needs; guesses that are good save more."""

GROWTH = math.log(10) / 0.2
"""How fast what is spent is taken to grow with the sparsity while one point is known: tenfold in 20 %."""

LEAST = 1e-2
"""What is spent counts as no less than this when a place is guessed: below it is noise, and may be negative."""


@dataclass(frozen=True)
class Grid:
    """The sparsities that a search may choose: multiples of a step, told by their number.

    Attributes:
        low, high: the first and the last.
        step: the fraction of zeros from one to the next.
    """

    low: int
    high: int
    step: float

    @classmethod
    def read(cls, between: Sequence[str | float], resolution: str | float) -> Grid:
        """The multiples of the resolution that lie between two sparsities.

        Raises:
            UserError: there are none, or something is no sparsity.
        """
        if len(between) != 2:
            raise UserError(
                f"a search looks between two sparsities, such as 10%,90%, not {', '.join(map(str, between))}"
            )
        low, high = (_fraction(entry, "--between") for entry in between)
        step = _fraction(resolution, "--resolution")
        if step < 1e-4:
            raise UserError(f"a resolution of {resolution} is finer than any model can tell: 0.01% is the finest")
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if first > last:
            raise UserError(f"no multiple of {resolution} lies between {between[0]} and {between[1]} (--between)")
        return cls(first, last, step)

    def pattern(self, number: int) -> Unstructured:
        """The sparsity of a number."""
        return Unstructured(round(number * self.step, 10))

    def place(self, sparsity: float) -> float:
        """Where a sparsity lies among the numbers."""
        place = sparsity / self.step
        return round(place) if math.isclose(place, round(place), abs_tol=1e-6) else place


def bracket(known: Mapping[float, float]) -> tuple[float | None, float | None]:
    """The highest place that holds, and the lowest above it that does not; None for either where there is none.

    Args:
        known: places, and what is spent there: at most 1 holds.
    """
    best = max((place for place, value in known.items() if value <= 1), default=None)
    above = (place for place, value in known.items() if value > 1 and (best is None or place > best))
    return best, min(above, default=None)


def next_place(known: Mapping[float, float], grid: Grid) -> int | None:
    """The place to measure next; None where the answer is known.

    It depends on nothing but what is known, so that a search that was cut off goes on as it would have.

    Args:
        known: places of the grid, or between them, and what is spent there: at most 1 holds.
    """
    best, worst = bracket(known)
    first = grid.low if best is None else math.floor(best) + 1
    last = grid.high if worst is None else math.ceil(worst) - 1
    if first > last:
        return None
    most = _halvings(grid.high - grid.low + 1) + SLACK
    left = max(_halvings(last - first + 1), most - len(known))
    reach = (1 << left - 1) - 1  # so many places can be told apart by the points that are left after this one
    guess = _guess(known, best, worst, GROWTH * grid.step)
    number = (first + last) // 2 if guess is None else round(min(max(guess, first), last))
    return max(first, last - reach, min(last, first + reach, number))


def _halvings(places: int) -> int:
    """How many points halving needs to find which of so many places is the last that holds, or that none does."""
    return math.ceil(math.log2(places + 1))


def _guess(known: Mapping[float, float], best: float | None, worst: float | None, growth: float) -> float | None:
    """Where all is spent, by a straight line through the logarithms at two places; None where nothing tells."""
    logs = {place: math.log(max(value, LEAST)) for place, value in known.items()}
    if best is not None and worst is not None:
        ends = [best, worst]
    else:  # all are on one side: the two that are nearest to the place
        ends = sorted(logs)[:2] if best is None else sorted(logs)[-2:]
    if not ends:
        return None
    nearest = ends[0] if best is None else ends[-1]
    slope = (logs[ends[-1]] - logs[ends[0]]) / (ends[-1] - ends[0]) if len(ends) == 2 else growth
    return nearest - logs[nearest] / slope if slope > 0 else None


def _fraction(text: str | float, option: str) -> float:
    found = parse(text)
    if not isinstance(found, Unstructured):
        raise UserError(f"{option} {text}: a search is for an unstructured sparsity, and of {text} there is only one")
    return found.sparsity
