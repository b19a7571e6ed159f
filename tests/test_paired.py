"""Differences and their noise, against brute force and against scipy's own tests."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
from scipy import stats

from llmprune.evaluate.paired import BITS, MEAN, PERPLEXITY, figure_of, holm, paired

DRAW = numpy.random.default_rng(0)


@pytest.mark.parametrize(("gained", "lost", "both"), [(0, 7, 5), (3, 9, 20), (4, 4, 2), (1, 0, 3), (0, 0, 6)])
def test_right_and_wrong_answers_by_every_way_they_could_have_fallen(gained: int, lost: int, both: int) -> None:
    """McNemar's p: of all ways in which the answers that differ could go, those at least as one-sided."""
    dense = [0] * gained + [1] * lost + [1] * both + [0, 0]
    model = [1] * gained + [0] * lost + [1] * both + [0, 0]
    found = paired(dense, model, [1.0] * len(dense))
    ways = list(itertools.product((0, 1), repeat=gained + lost))
    as_far = [way for way in ways if abs(2 * sum(way) - len(way)) >= abs(gained - lost)]
    assert found.test == "mcnemar"
    assert found.p == pytest.approx(len(as_far) / len(ways))
    assert found.difference == pytest.approx((gained - lost) / len(dense))
    gaps = numpy.subtract(model, dense)
    assert found.stderr == pytest.approx(float(stats.sem(gaps)))


def test_other_values_by_the_paired_t_test() -> None:
    dense = DRAW.normal(size=30)
    model = dense + DRAW.normal(0.1, 0.2, size=30)
    found = paired(dense, model, [1.0] * 30)
    assert found.test == "t"
    assert found.p == pytest.approx(float(stats.ttest_rel(model, dense).pvalue))
    assert found.stderr == pytest.approx(float(stats.sem(model - dense)))
    # Far less noise than two intervals by themselves would tell of.
    assert found.stderr < 0.3 * math.hypot(stats.sem(dense), stats.sem(model))


@pytest.mark.parametrize("figure", [MEAN, PERPLEXITY, BITS])
def test_figures_of_a_whole_text_by_the_bootstrap(figure: object) -> None:
    """Standard error and p of ratios, perplexities and bits agree with resampled documents."""
    weight = DRAW.integers(5, 60, size=150).astype(float)
    dense = -weight * DRAW.normal(2.0, 0.3, size=150)
    model = dense - weight * DRAW.normal(0.03, 0.15, size=150)
    found = paired(dense, model, weight, figure)  # type: ignore[arg-type]
    chosen = DRAW.integers(0, 150, size=(20000, 150))

    def value(part: numpy.ndarray, rows: numpy.ndarray) -> numpy.ndarray:
        mean = part[rows].sum(-1) / weight[rows].sum(-1)
        return {id(MEAN): mean, id(PERPLEXITY): numpy.exp(-mean), id(BITS): -mean / math.log(2)}[id(figure)]

    drawn = value(model, chosen) - value(dense, chosen)
    assert found.difference == pytest.approx(float(value(model, numpy.arange(150)) - value(dense, numpy.arange(150))))
    assert found.stderr == pytest.approx(float(drawn.std()), rel=0.05)
    beyond = float(2 * min((drawn > 0).mean(), (drawn < 0).mean()))
    assert found.p == pytest.approx(beyond, rel=0.5)


def test_p_is_what_it_says() -> None:
    """Where there is no difference, p is below 0.05 in one case of twenty."""
    below = {"mcnemar": 0, "t": 0}
    for _ in range(2000):
        right = DRAW.random((2, 60)) < 0.6
        answers = paired(right[0], right[1], [1.0] * 60)
        losses = DRAW.normal(size=(2, 12))
        values = paired(losses[0], losses[1], [1.0] * 12)
        for found in (answers, values):
            assert found.p is not None
            below[str(found.test)] += found.p < 0.05
    assert below["mcnemar"] / 2000 < 0.055  # exact, and on the safe side
    assert below["t"] / 2000 == pytest.approx(0.05, abs=0.015)


def test_the_same_is_the_same() -> None:
    values = list(DRAW.normal(size=9))
    same = paired(values, values, [1.0] * 9)
    assert (same.difference, same.stderr, same.p) == (0, 0, 1)
    assert paired([1, 0, 1], [1, 0, 1], [1.0] * 3).p == 1
    assert paired([1.0], [2.0], [1.0]).p is None
    assert paired([1.0, 2.0], [2.0, 3.0], [1.0, 1.0]).p == 0  # the same everywhere, by no chance


def test_the_kind_of_a_figure_is_found_from_its_value() -> None:
    values, weights = [-2.0, -4.0, -9.0], [1.0, 2.0, 3.0]
    for figure, told in ((MEAN, -2.5), (PERPLEXITY, math.exp(2.5)), (BITS, 2.5 / math.log(2))):
        assert figure_of(values, weights, told) is figure
    assert figure_of(values, weights, 0.123) is None
    assert figure_of([1.0], [0.0], 1.0) is None


def test_holm_by_its_definition() -> None:
    """The hypotheses that are rejected at any level are those of the step-down procedure."""
    for _ in range(50):
        values = list(DRAW.random(7) ** 3)
        adjusted = holm(values)
        for level in (0.01, 0.05, 0.2):
            rejected = set()
            for step, place in enumerate(sorted(range(7), key=lambda place: values[place])):
                if values[place] >= level / (7 - step):
                    break
                rejected.add(place)
            assert {place for place, p in enumerate(adjusted) if p < level} == rejected
    assert holm([]) == []
