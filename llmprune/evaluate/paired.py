"""Whether two models differ by more than noise, told from what both say of the same documents.

Two models that answer the same questions agree on most of them, and how much one figure differs from the other is known
far better than either of them: what counts is the spread of the differences, document by document, not that of the
answers. Three kinds of figures are known, by how they come from the values of single documents x and their weights w
(words or bytes of a page; 1 for a question), with the mean m = Σx / Σw: the mean itself (accuracies), exp(-m) (the
perplexity of log likelihoods) and -m / log 2 (bits).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
from scipy import stats

LEVEL = 0.05
"""A difference is beyond noise where its p, adjusted for the number of differences looked at, is below this."""


@dataclass(frozen=True)
class Figure:
    """A kind of figure: how it follows from the mean of the documents' values, and the slope of that."""

    value: Callable[[float], float]
    slope: Callable[[float], float]


def _perplexity(mean: float) -> float:
    return math.exp(min(-mean, 700.0))


MEAN = Figure(lambda mean: mean, lambda mean: 1.0)
PERPLEXITY = Figure(_perplexity, lambda mean: -_perplexity(mean))
BITS = Figure(lambda mean: -mean / math.log(2), lambda mean: -1 / math.log(2))


@dataclass(frozen=True)
class Paired:
    """A difference and its noise.

    Attributes:
        difference: the model's figure less the dense one's.
        stderr: its standard error from the paired differences, for perplexities and the like by linearising; None for
            one document.
        documents: how many there are.
        p: how often a difference as large as this one comes about by chance where there is none; None for one document.
        test: `mcnemar` or `t`.
    """

    difference: float
    stderr: float | None
    documents: int
    p: float | None
    test: str | None


def figure_of(values: Sequence[float], weights: Sequence[float], told: float) -> Figure | None:
    """The kind of a figure: the one that gives what was told for it; None where none does."""
    total = float(numpy.sum(weights))
    if total <= 0:
        return None
    mean = float(numpy.sum(values)) / total
    kinds = (kind for kind in (MEAN, PERPLEXITY, BITS) if math.isclose(kind.value(mean), told, rel_tol=1e-6))
    return next(kinds, None)


def paired(dense: Sequence[float], model: Sequence[float], weights: Sequence[float], figure: Figure = MEAN) -> Paired:
    """Compare two models over the same documents.

    Values that are all 0 or 1 are compared by the exact McNemar test: of the documents on which the two differ, as many
    should go one way as the other (a binomial test). All other values are compared by the paired t-test on the mean of
    the differences, with weights on their ratio Σd / Σw, whose spread is that of d - w Σd / Σw. For perplexities and
    bits too it is the mean log likelihoods that are tested. Both tests take the documents for independent.

    Args:
        dense, model: a value for each document, in one order.
        weights: of the documents.
        figure: what the values are made into.
    """
    before, after, weight = (numpy.asarray(part, dtype=numpy.float64) for part in (dense, model, weights))
    count, total = len(weight), float(weight.sum())
    means = float(before.sum()) / total, float(after.sum()) / total
    difference = figure.value(means[1]) - figure.value(means[0])
    if count < 2:
        return Paired(difference, None, count, None, None)

    def error(rest: numpy.ndarray) -> float:
        return float(rest.std(ddof=1)) / math.sqrt(count) / (total / count)

    spread = [figure.slope(mean) * (part - mean * weight) for mean, part in zip(means, (before, after), strict=True)]
    stderr = error(spread[1] - spread[0])
    if numpy.isin(before, (0, 1)).all() and numpy.isin(after, (0, 1)).all() and (weight == 1).all():
        gained, lost = int((after > before).sum()), int((after < before).sum())
        p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
        return Paired(difference, stderr, count, p, "mcnemar")
    gap = after - before
    mean = float(gap.sum()) / total
    noise = error(gap - mean * weight)
    p = float(2 * stats.t.sf(abs(mean) / noise, count - 1)) if noise > 0 else float(mean == 0)
    return Paired(difference, stderr, count, p, "t")


def holm(values: Sequence[float]) -> list[float]:
    """Each p adjusted for their number by Holm's method, which holds however they hang together."""
    adjusted = [0.0] * len(values)
    highest = 0.0
    for done, place in enumerate(sorted(range(len(values)), key=lambda place: values[place])):
        highest = max(highest, min(1.0, (len(values) - done) * values[place]))
        adjusted[place] = highest
    return adjusted
