"""Refinements against brute force and against their formulas in plain loops; their effect on any method's mask."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from llmprune import reconstruct, refine, solvers
from llmprune.after import After, read_after
from llmprune.errors import UserError
from llmprune.patterns import parse
from llmprune.recipe import Recipe
from llmprune.solve import _followed
from llmprune.stats import LinearStats
from tests.test_solvers import collected, correlated, relative_error

PATTERNS = [("50%", "row"), ("50%", "matrix"), ("70%", "row"), ("2:4", "row"), ("4:8", "row"), ("1:4", "row")]


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


def error(weight: Tensor, keep: Tensor, x: Tensor) -> list[float]:
    return ((weight * ~keep).double() @ x.double().T).square().sum(1).tolist()


def brute_force(weight: Tensor, keep: Tensor, x: Tensor, group: int, steps: int) -> Tensor:
    """Each row's best swap, tried one by one, as often as it makes the row's error fall."""
    keep = keep.clone()
    for row in range(len(weight)):
        for _ in range(steps):
            now = error(weight[row : row + 1], keep[row : row + 1], x)[0]
            best, found = now * (1 - 1e-6), None
            for out in keep[row].nonzero()[:, 0].tolist():
                for back in (~keep[row]).nonzero()[:, 0].tolist():
                    if group > 1 and out // group != back // group:
                        continue
                    tried = keep[row].clone()
                    tried[out], tried[back] = False, True
                    loss = error(weight[row : row + 1], tried[None], x)[0]
                    if loss < best:
                        best, found = loss, tried
            if found is None:
                break
            keep[row] = found
    return keep


@pytest.mark.parametrize(("sparsity", "scope"), PATTERNS)
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_swaps_are_those_of_brute_force(sparsity: str, scope: str, steps: int) -> None:
    weight, x = torch.randn(5, 16), correlated(80, 16)
    pattern, stats = parse(sparsity, scope), collected(x)  # type: ignore[arg-type]
    keep = solvers.load("wanda").solve(weight, stats, pattern) != 0
    swaps = refine.load({"name": "swaps", "steps": steps, "candidates": None})
    assert torch.equal(swaps.refine(weight, keep, stats, pattern), brute_force(weight, keep, x, pattern.group, steps))


@pytest.mark.parametrize(("sparsity", "scope"), PATTERNS)
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("candidates", [4, None])
def test_swaps_lower_the_error_of_every_row_and_keep_the_pattern(
    sparsity: str, scope: str, method: str, candidates: int | None
) -> None:
    weight, x = torch.randn(24, 64), correlated(300, 64)
    pattern, stats = parse(sparsity, scope), collected(x)  # type: ignore[arg-type]
    keep = solvers.load(method).solve(weight, stats, pattern) != 0
    given = weight.clone(), keep.clone()
    losses = [error(weight, keep, x)]
    for steps in (1, 2, 5, 100):
        better = refine.load({"name": "swaps", "steps": steps, "candidates": candidates}).refine(
            weight, keep, stats, pattern
        )
        assert torch.equal(better.sum(1), keep.sum(1))
        assert pattern.holds(weight * better)
        losses.append(error(weight, better, x))
    assert torch.equal(weight, given[0])
    assert torch.equal(keep, given[1])
    for before, after in itertools.pairwise(losses):
        assert all(later <= sooner * (1 + 1e-5) for sooner, later in zip(before, after, strict=True))
    assert sum(losses[-1]) < 0.9 * sum(losses[0])


def gains(weight: Tensor, keep: Tensor, x: Tensor, group: int = 1) -> Tensor:
    """(rows,) by how much the best of all swaps lowers the error of each row, in float64."""
    gram, found = x.double().T @ x.double(), []
    for row, kept in zip(weight.double(), keep, strict=True):
        lost = row * ~kept
        outs, backs = kept.nonzero(), (~kept).nonzero()[:, 0]
        tried = lost.repeat(len(outs), len(backs), 1)
        tried.scatter_(2, outs[:, None].expand(-1, len(backs), 1), row[outs][:, None].expand(-1, len(backs), 1))
        tried.scatter_(2, backs[None, :, None].expand(len(outs), -1, 1), 0.0)
        losses = ((tried @ gram) * tried).sum(2)
        if group > 1:
            losses.masked_fill_(outs // group != backs // group, torch.inf)
        found.append(lost @ gram @ lost - losses.min())
    return torch.stack(found)


@pytest.mark.parametrize("sparsity", ["50%", "75%", "20%"])
@pytest.mark.parametrize("chosen", [{}, {"candidates": 3}, {"candidates": 200}, {"candidates": None}])
def test_no_pair_of_any_row_is_left_that_helps(
    sparsity: str, chosen: dict[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = torch.randn(12, 128), correlated(600, 128)
    pattern, stats = parse(sparsity, "row"), collected(x)
    first = solvers.load("wanda").solve(weight, stats, pattern) != 0
    monkeypatch.setattr("llmprune.refine.swaps.AT_ONCE", 128 * 100)  # all pairs of a row are looked at in parts
    keep = refine.load({"name": "swaps", "steps": 10**6, **chosen}).refine(weight, first, stats, pattern)
    least = 2e-6 * torch.tensor(error(weight, first, x))
    assert bool((gains(weight, first, x) > least).all())
    assert bool((gains(weight, keep, x) <= least).all())


@pytest.mark.parametrize(("sparsity", "scope"), PATTERNS)
@pytest.mark.parametrize("method", solvers.names())
def test_swaps_change_the_mask_of_a_row_where_there_is_something_to_gain(
    method: str, sparsity: str, scope: str
) -> None:
    weight, x = torch.randn(16, 64), correlated(300, 64)
    pattern, stats = parse(sparsity, scope), collected(x)  # type: ignore[arg-type]
    keep = solvers.load(method).solve(weight, stats, pattern) != 0
    better = refine.load("swaps").refine(weight, keep, stats, pattern)
    gain, lost = gains(weight, keep, x, pattern.group), torch.tensor(error(weight, keep, x))
    sure = (gain > 1e-5 * lost) | (gain < 0)
    assert torch.equal((better != keep).any(1)[sure], (gain > 0)[sure])
    assert bool((gain > 1e-5 * lost).any())


@pytest.mark.parametrize("candidates", [4, 32, None])
def test_no_row_has_more_swaps_than_steps(candidates: int | None) -> None:
    weight, x = torch.randn(24, 128), correlated(600, 128)
    pattern, stats = parse("50%"), collected(x)
    keep = solvers.load("magnitude").solve(weight, stats, pattern) != 0
    for steps in (1, 3, 9):
        better = refine.load({"name": "swaps", "steps": steps, "candidates": candidates}).refine(
            weight, keep, stats, pattern
        )
        assert (better & ~keep).sum(1).max() == steps


def test_swaps_of_many_rows_are_those_of_each_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(40, 32), correlated(200, 32)
    pattern, stats = parse("50%"), collected(x)
    keep = solvers.load("wanda").solve(weight, stats, pattern) != 0
    swaps = refine.load("swaps")
    together = swaps.refine(weight, keep, stats, pattern)
    assert torch.equal(
        torch.cat([swaps.refine(w[None], k[None], stats, pattern) for w, k in zip(weight, keep, strict=True)]), together
    )
    monkeypatch.setattr("llmprune.refine.swaps.AT_ONCE", 32 * 32 * 7)
    assert torch.equal(swaps.refine(weight, keep, stats, pattern), together)


def textbook_dsnot(
    weight: Tensor, keep: Tensor, x: Tensor, group: int, cycles: int, threshold: float, power: float
) -> Tensor:
    """Row by row, place by place (arXiv:2310.08915), in float64."""
    keep = keep.clone()
    mean, norm = x.double().mean(0).tolist(), x.double().square().sum(0).sqrt().tolist()
    variance = x.double().var(0, unbiased=False).tolist()
    for row, values in enumerate(weight.double().tolist()):
        places = range(len(values))
        lost = sum(values[j] * mean[j] for j in places if not keep[row, j])
        sign = math.copysign(1, lost)
        for _ in range(cycles):
            if abs(lost) <= threshold or math.copysign(1, lost) != sign:
                break
            toward = [sign * values[j] * mean[j] for j in places]
            backs = [j for j in places if not keep[row, j] and toward[j] > 0]
            outs = [j for j in places if keep[row, j] and toward[j] < 0]
            if group > 1:
                backs = [j for j in backs if any(o // group == j // group for o in outs)]
            if not backs or not outs:
                break
            back = max(backs, key=lambda j: toward[j] / variance[j] ** power)
            if group > 1:
                outs = [o for o in outs if o // group == back // group]
            out = min(outs, key=lambda j: abs(values[j]) * norm[j])
            keep[row, back], keep[row, out] = True, False
            lost += values[out] * mean[out] - values[back] * mean[back]
    return keep


@pytest.mark.parametrize(("sparsity", "scope"), PATTERNS)
@pytest.mark.parametrize(("cycles", "threshold", "power"), [(50, 0.1, 1.0), (1, 0.0, 1.0), (50, 0.0, 0.5)])
def test_dsnot_is_that_of_the_paper(sparsity: str, scope: str, cycles: int, threshold: float, power: float) -> None:
    weight, x = torch.randn(12, 32), correlated(200, 32) + torch.randn(32)
    pattern, stats = parse(sparsity, scope), collected(x)  # type: ignore[arg-type]
    keep = solvers.load("magnitude").solve(weight, stats, pattern) != 0
    dsnot = refine.load({"name": "dsnot", "cycles": cycles, "threshold": threshold, "power": power})
    better = dsnot.refine(weight, keep, stats, pattern)
    assert torch.equal(better, textbook_dsnot(weight, keep, x, pattern.group, cycles, threshold, power))
    assert not torch.equal(better, keep)
    assert torch.equal(better.sum(1), keep.sum(1))
    assert pattern.holds(weight * better)


def test_the_defaults_of_dsnot_are_published_ones() -> None:
    assert refine.load("dsnot") == refine.load({"name": "dsnot", "cycles": 50, "threshold": 0.1, "power": 1.0})


def test_dsnot_brings_the_mean_of_the_output_back() -> None:
    weight, x = torch.randn(64, 64), correlated(400, 64) + 2 * torch.randn(64)
    pattern, stats = parse("60%"), collected(x)
    keep = solvers.load("wanda").solve(weight, stats, pattern) != 0
    better = refine.load("dsnot").refine(weight, keep, stats, pattern)

    def away(mask: Tensor) -> float:
        return float((x @ (weight * ~mask).T).mean(0).abs().mean())

    assert away(better) < 0.5 * away(keep)


@pytest.mark.parametrize(("sparsity", "scope"), PATTERNS)
@pytest.mark.parametrize("method", solvers.names())
def test_dsnot_changes_any_mask_and_brings_the_mean_nearer(method: str, sparsity: str, scope: str) -> None:
    weight, x = torch.randn(32, 64), correlated(400, 64) + 2 * torch.randn(64)
    pattern, stats = parse(sparsity, scope), collected(x)  # type: ignore[arg-type]
    keep = solvers.load(method).solve(weight, stats, pattern) != 0
    better = refine.load("dsnot").refine(weight, keep, stats, pattern)
    before, after = (float((x @ (weight * ~mask).T).mean(0).abs().sum()) for mask in (keep, better))
    assert bool((better != keep).any())
    assert after < before


@pytest.mark.parametrize("name", ["swaps", "dsnot"])
def test_dead_inputs_and_few_tokens(name: str) -> None:
    weight, x = torch.randn(8, 32), correlated(5, 32)
    x[:, ::5] = 0
    pattern, stats = parse("50%"), collected(x)
    keep = solvers.load("wanda").solve(weight, stats, pattern) != 0
    better = refine.load(name).refine(weight, keep, stats, pattern)
    assert torch.equal(better.sum(1), keep.sum(1))
    assert not bool(better[:, ::5].any())  # what no input reaches stays pruned


def test_norms_are_enough_for_dsnot() -> None:
    weight, x = torch.randn(8, 32), correlated(60, 32) + torch.randn(32)
    stats = LinearStats(32, "norms")
    stats.add(x)
    stats.finish()
    pattern = parse("50%")
    keep = solvers.load("wanda").solve(weight, stats, pattern) != 0
    dsnot = refine.load("dsnot")
    assert torch.equal(dsnot.refine(weight, keep, stats, pattern), dsnot.refine(weight, keep, collected(x), pattern))


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ("swap", "did you mean 'swaps'"),
        ({"name": "swaps", "step": 3}, "steps"),
        ({"name": "swaps", "steps": 0}, "steps must be at least 1"),
        ({"name": "swaps", "candidates": 0}, "candidates must be at least 1"),
        ({"name": "dsnot", "cycles": 0}, "cycles must be at least 1"),
        ({"name": "dsnot", "threshold": -1}, "threshold must be at least 0"),
    ],
)
def test_mistakes_are_named(chosen: str | dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        refine.load(chosen)


def test_swaps_after_magnitude_beat_wanda() -> None:
    weight, x = torch.randn(48, 96), correlated(500, 96, decay=0.7)
    pattern, stats = parse("50%"), collected(x)
    first = solvers.load("magnitude").solve(weight, stats, parse("50%", "row")) != 0
    better = refine.load("swaps").refine(weight, first, stats, pattern)
    wanda = solvers.load("wanda").solve(weight, stats, pattern)
    assert relative_error(x, weight, weight * better) < relative_error(x, weight, wanda)


@pytest.mark.parametrize("refiner", ["swaps", "dsnot"])
@pytest.mark.parametrize("method", ["sparsegpt", "admm", "alps"])
@pytest.mark.parametrize(("steps", "told"), [([], "--reconstruct cg)"), (["block"], "--reconstruct cg,block)")])
def test_weights_that_were_fitted_to_another_mask_must_be_chosen_anew(
    refiner: str, method: str, steps: list[str], told: str
) -> None:
    methods = {method: solvers.load(method)}
    with pytest.raises(UserError) as caught:
        read_after(Recipe.from_dict({"refine": [refiner], "reconstruct": steps}), methods)
    assert told in str(caught.value)
    read_after(Recipe.from_dict({"refine": [refiner], "reconstruct": ["cg", *steps]}), methods)
    read_after(Recipe.from_dict({"refine": [refiner], "reconstruct": steps}), {"wanda": solvers.load("wanda")})


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
@pytest.mark.parametrize("method", ["sparsegpt", "admm", "alps"])
def test_each_row_has_the_better_of_what_the_method_made_and_the_refined_mask(method: str, sparsity: str) -> None:
    weight, x = torch.randn(48, 64), correlated(400, 64)
    pattern, stats, swaps, cg = parse(sparsity), collected(x), refine.load("swaps"), reconstruct.load("cg")
    after = After((("swaps", swaps),), (("cg", cg),))
    first, between, last = (one.clone() for one in _followed(weight, stats, pattern, solvers.load(method), after))
    keep = swaps.refine(weight, first != 0, stats, pattern)
    anew = cg.reconstruct(weight, between, keep, stats)
    worse = stats.row_losses(weight, anew) > stats.row_losses(weight, first)
    assert torch.equal(last, torch.where(worse[:, None], first, anew))
    assert bool(((last != 0) != (first != 0)).any())
    assert float(stats.row_losses(weight, last).sum()) < float(stats.row_losses(weight, first).sum())
