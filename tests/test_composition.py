"""Every method with every pattern, refinement and reconstruction on a tiny model: valid, or refused with a reason."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import llmprune
from llmprune import allocate, named, reconstruct, refine, solvers
from llmprune.errors import UserError
from llmprune.patterns import parse
from tests.families import make
from tests.test_pipeline import weights

pytestmark = pytest.mark.usefixtures("no_pages")

METHODS = solvers.names()
REFINERS = ["", *named.names(refine)]
RECONSTRUCTORS = ["", *named.names(reconstruct)]
ALLOCATIONS = [name for name in allocate.names() if name != "file"]
PATTERNS = [("50%", "row"), ("50%", "matrix"), ("2:4", "row"), ("4:8", "row")]
FEW = {"name": "evolve", "generations": 2, "offspring": 4}
MIXED = {"name": "global", "patterns": ["2:4", "4:8", "dense"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("sparsity", "scope"), PATTERNS)
def test_the_whole_grid(method: str, sparsity: str, scope: str, model: Path, tmp_path: Path) -> None:
    for turn, (refiner, reconstructor) in enumerate(itertools.product(REFINERS, RECONSTRUCTORS)):
        number = turn + METHODS.index(method)
        allocation = ALLOCATIONS[number % len(ALLOCATIONS)] if "%" in sparsity else "uniform"
        mixed, permuted = sparsity == "4:8" and number % 2 == 1, "%" not in sparsity and number % 3 == 0
        updates = solvers.load(method).updates
        aims = (updates or reconstructor == "cg") and number // 2 % 2
        recipe = {
            "allocation": MIXED if mixed else FEW if allocation == "evolve" else allocation,
            "method": method,
            "sparsity": "40%" if mixed else sparsity,
            "scope": scope,
            "permute": permuted,
            "refine": [refiner] if refiner else [],
            "reconstruct": {"": [], "block": [{"name": "block", "steps": 6}]}.get(reconstructor, [reconstructor]),
            "calibration": {"source": "builtin", "samples": 16, "length": 32, "asymmetric": aims / 2},
        }
        out = tmp_path / f"{refiner}-{reconstructor}"
        if refiner and reconstructor != "cg" and updates:
            anew = f"cg,{reconstructor}" if reconstructor else "cg"
            with pytest.raises(UserError, match=rf"add a reconstruction of each linear \(--reconstruct {anew}\)"):
                llmprune.prune(model, out=out, recipe=recipe)
            assert not out.exists()
            continue
        report = llmprune.prune(model, out=out, recipe=recipe)
        written = weights(out)
        course = [step for step in (method, refiner, reconstructor) if step and step != "block"]
        for block in report.blocks:
            assert (block.away is None) == (reconstructor != "block")
            if block.away is not None and block.away_before is not None:
                assert block.away < block.away_before
        numbers = [linear.shape[0] * linear.shape[1] for linear in report.linears]
        nearest = max(numbers) / sum(numbers) / 4  # of a mix, half of what the largest linear makes as 2:4 or dense
        assert report.sparsity == pytest.approx(0.4 if mixed else 0.5, abs=nearest if mixed else 5e-4)
        assert any(linear.permuted for linear in report.pruned) == permuted
        if refiner:  # it changes masks, and with them the error
            assert any(linear.course and linear.course[refiner] != linear.course[method] for linear in report.pruned)
        for linear in report.pruned:
            pattern = parse(linear.pattern or "", scope)  # type: ignore[arg-type]
            assert pattern.holds(written[f"{linear.name}.weight"])
            if allocation == "uniform":
                assert linear.pattern in (MIXED["patterns"] if mixed else [sparsity])
            if len(course) == 1:
                assert linear.course is None
                continue
            assert linear.course is not None
            assert list(linear.course) == course
            errors = list(linear.course.values())
            assert linear.relative_error == errors[-1]
            if "swaps" in course and not updates:
                assert errors[1] < errors[0]
            if reconstructor == "cg" and method != "alps":  # which ends with a reconstruction of its own
                assert errors[-1] < errors[-2]
            if reconstructor == "cg" and updates:
                # Each row has the better of both; without them, ALPS has come as near, to what is damped otherwise.
                assert errors[-1] <= (1 + 1e-6 if refiner else 1.005) * errors[0]
            if refiner != "dsnot" or reconstructor == "cg" or updates:
                assert errors[-1] < 1.05 * errors[0]


@pytest.mark.parametrize("allocation", [name for name in ALLOCATIONS if name != "uniform"])
def test_an_allocation_of_one_pattern_is_refused(allocation: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"allocation\.patterns"):
        llmprune.prune(model, out=tmp_path / "out", sparsity="2:4", allocation=allocation, calibration="builtin")
    assert not (tmp_path / "out").exists()
