"""An elitist search in the manner of EvoPress (arXiv:2410.14649): offspring of the best so far compete on text."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from llmprune.progress import Progress

T = TypeVar("T")

PART = 4
"""Offspring compete on one of so many parts of the text, and one of so many goes on."""


def evolved(
    first: T,
    offspring: Callable[[T], Sequence[T]],
    measure: Callable[[Sequence[T], Sequence[int]], Sequence[float]],
    sequences: int,
    generations: int,
    chance: random.Random,
    progress: Progress,
    title: str,
) -> T:
    """What is never worse than the first by what is measured on all of the text.

    Offspring compete on a quarter of the text, the best quarter of them on all of it, and one that is better than its
    parent there takes its place.

    Args:
        offspring: others than a parent, made of it.
        measure: how bad some are, on the sequences of these numbers.
        sequences: how many there are.
        chance: draws the parts of the text; the offspring may draw from it too.
    """
    best = first
    least = measure([best], range(sequences))[0]
    for _ in progress.over(range(generations), title):
        young = offspring(best)
        if not young:
            break
        part = sorted(chance.sample(range(sequences), quarter(sequences)))
        finalists = leading(young, measure(young, part))
        for value, one in zip(measure(finalists, range(sequences)), finalists, strict=True):
            if value < least:
                best, least = one, value
    return best


def leading(young: Sequence[T], values: Sequence[float]) -> list[T]:
    """The quarter of some that has the least values, the best first."""
    ranked = sorted(range(len(young)), key=values.__getitem__)
    return [young[place] for place in ranked[: quarter(len(young))]]


def quarter(count: int) -> int:
    """A quarter of a number, rounded up."""
    return -(-count // PART)
