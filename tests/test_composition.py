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
PATTERNS = [("50%", "row"), ("50%", "matrix"), ("2:4", "row")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("sparsity", "scope"), PATTERNS)
def test_the_whole_grid(method: str, sparsity: str, scope: str, model: Path, tmp_path: Path) -> None:
    for turn, (refiner, reconstructor) in enumerate(itertools.product(REFINERS, RECONSTRUCTORS)):
        allocation = ALLOCATIONS[(turn + METHODS.index(method)) % len(ALLOCATIONS)] if "%" in sparsity else "uniform"
        few = {"name": "evolve", "generations": 2, "offspring": 4}
        recipe = {
            "allocation": few if allocation == "evolve" else allocation,
            "method": method,
            "sparsity": sparsity,
            "scope": scope,
            "refine": [refiner] if refiner else [],
            "reconstruct": {"": [], "block": [{"name": "block", "steps": 6}]}.get(reconstructor, [reconstructor]),
            "calibration": {"source": "builtin", "samples": 16, "length": 32},
        }
        out = tmp_path / f"{refiner}-{reconstructor}"
        if refiner and reconstructor != "cg" and solvers.load(method).updates:
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
        assert report.sparsity == pytest.approx(0.5, abs=0.005)
        for linear in report.pruned:
            pattern = parse(linear.pattern or "", scope)  # type: ignore[arg-type]
            assert pattern.holds(written[f"{linear.name}.weight"])
            if allocation == "uniform":
                assert linear.pattern == sparsity
            if len(course) == 1:
                assert linear.course is None
                continue
            assert linear.course is not None
            assert list(linear.course) == course
            errors = list(linear.course.values())
            assert linear.relative_error == errors[-1]
            if "swaps" in course and not solvers.load(method).updates:
                assert errors[1] < errors[0]
            if reconstructor == "cg" and method != "alps":  # which ends with a reconstruction of its own
                assert errors[-1] < errors[-2]
            if refiner != "dsnot" or reconstructor == "cg" or solvers.load(method).updates:
                assert errors[-1] < 1.05 * errors[0]


@pytest.mark.parametrize("allocation", [name for name in ALLOCATIONS if name != "uniform"])
def test_an_allocation_of_one_pattern_is_refused(allocation: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"allocation\.patterns"):
        llmprune.prune(model, out=tmp_path / "out", sparsity="2:4", allocation=allocation, calibration="builtin")
    assert not (tmp_path / "out").exists()
