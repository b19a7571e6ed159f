"""Reconstructions against the closed form of least squares on a support."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmprune import reconstruct, solvers
from llmprune.conjugate import conjugate
from llmprune.errors import UserError
from llmprune.patterns import parse
from tests.test_solvers import collected, correlated, relative_error


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


def best(target: Tensor, gram: Tensor, keep: Tensor, damping: float = 0.0) -> Tensor:
    """Row by row (G_SS + λI)⁻¹ ((G + λI) t)_S in float64."""
    damped = gram.double() + damping * torch.eye(len(gram), dtype=torch.float64)
    result = torch.zeros_like(target, dtype=torch.float64)
    for row, kept in enumerate(keep):
        places = kept.nonzero()[:, 0]
        wanted = damped[places] @ target[row].double()
        result[row, places] = torch.linalg.solve(damped[places][:, places], wanted)
    return result


@pytest.mark.parametrize("damping", [0.0, 3.0])
def test_as_many_steps_as_weights_reach_the_optimum(damping: float) -> None:
    target, x = torch.randn(10, 24), correlated(400, 24, decay=0.3)
    gram, keep = x.T @ x, torch.rand(10, 24) < 0.5
    found = conjugate(gram, target, target, keep, 40, damping)
    torch.testing.assert_close(found.double(), best(target, gram, keep, damping), rtol=1e-3, atol=1e-4)
    assert torch.equal(found != 0, keep)


@pytest.mark.parametrize("decay", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("tokens", [10, 500])
def test_each_step_lowers_the_error(tokens: int, decay: float) -> None:
    target, x = torch.randn(16, 64), correlated(tokens, 64, decay=decay)
    keep = torch.rand(16, 64) < 0.4
    losses = [relative_error(x, target, target * keep)]
    for steps in range(1, 12):
        losses.append(relative_error(x, target, conjugate(x.T @ x, target, target, keep, steps)))
    assert all(after <= before * (1 + 1e-4) + 1e-9 for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_more_steps_than_there_is_to_gain_do_no_harm(size: float) -> None:
    """Fewer tokens than weights: the error is soon nothing but rounding, and stays that."""
    target, x = torch.randn(16, 64), correlated(10, 64) * size
    keep = torch.rand(16, 64) < 0.5
    found = conjugate(x.T @ x, target, target, keep, 300)
    assert bool(found.isfinite().all())
    assert relative_error(x, target, found) < 1e-6
    again = conjugate(x.T @ x, target, found, keep, 300)
    assert relative_error(x, target, again) < 1e-6
    assert float(found.abs().max()) < 100


def test_where_it_starts_makes_no_difference_in_the_end() -> None:
    target, x = torch.randn(6, 16), correlated(300, 16, decay=0.3)
    gram, keep = x.T @ x, torch.rand(6, 16) < 0.5
    one, other = (conjugate(gram, target, start, keep, 40) for start in (target, torch.randn(6, 16)))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sparsity", ["50%", "70%", "2:4"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_cg_after_any_method(method: str, sparsity: str) -> None:
    weight, x = torch.randn(32, 64), correlated(400, 64)
    pattern, stats = parse(sparsity), collected(x)
    pruned = solvers.load(method).solve(weight, stats, pattern)
    given = pruned.clone()
    found = reconstruct.load("cg").reconstruct(weight, pruned, pruned != 0, stats)
    assert torch.equal(found != 0, pruned != 0)
    assert torch.equal(pruned, given)
    assert relative_error(x, weight, found) < relative_error(x, weight, pruned)
    damping = 0.01 * float(x.square().sum(0).mean())
    optimum = best(weight, x.T @ x, pruned != 0, damping).float()
    assert relative_error(x, weight, found) < 1.05 * relative_error(x, weight, optimum)


def test_the_defaults_of_cg() -> None:
    assert reconstruct.load("cg") == reconstruct.load({"name": "cg", "steps": 20, "damping": 0.01})


def test_rows_can_be_solved_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(20, 32), correlated(300, 32)
    stats, keep, cg = collected(x), torch.rand(20, 32) < 0.5, reconstruct.load("cg")
    together = cg.reconstruct(weight, weight, keep, stats)
    monkeypatch.setattr("llmprune.parts.AT_ONCE", 32 * 8)
    torch.testing.assert_close(cg.reconstruct(weight, weight, keep, stats), together, rtol=1e-4, atol=1e-5)


def test_dead_inputs_keep_their_weights() -> None:
    weight, x = torch.randn(8, 32), correlated(6, 32)
    x[:, ::4] = 0
    keep = torch.rand(8, 32) < 0.5
    found = reconstruct.load({"name": "cg", "damping": 0.0}).reconstruct(weight, weight, keep, collected(x))
    assert torch.equal(found[:, ::4], (weight * keep)[:, ::4])
    assert bool(found.isfinite().all())


def test_no_inputs_at_all_change_nothing() -> None:
    weight, keep = torch.randn(8, 32), torch.rand(8, 32) < 0.5
    found = reconstruct.load("cg").reconstruct(weight, weight, keep, collected(torch.zeros(3, 32)))
    torch.testing.assert_close(found, weight * keep)


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ("gc", "did you mean 'cg'"),
        ({"name": "cg", "steps": 0}, "steps must be at least 1"),
        ({"name": "cg", "damping": 2}, r"damping must lie in \[0, 1\]"),
    ],
)
def test_mistakes_are_named(chosen: str | dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        reconstruct.load(chosen)
