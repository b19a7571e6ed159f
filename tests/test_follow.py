"""How far the pruned model's states drift from the dense one's, on a sample: against plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import pipeline
from llmprune.cost import cost
from llmprune.model.writer import REPORT, Writer
from llmprune.pipeline import draw
from llmprune.recipe import Recipe
from llmprune.report import plots
from llmprune.report.page import draw as draw_page
from llmprune.report.record import Report
from tests.families import make
from tests.test_distributed import Ranks
from tests.test_fit import FIT, relative
from tests.test_resume import cut_off

pytestmark = pytest.mark.usefixtures("no_pages")

SETTINGS: dict[str, Any] = {
    "method": "wanda",
    "sparsity": "2:4",
    "calibration": {"source": "builtin", "samples": 40, "length": 32},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=4)


def first_batch(model: Path, settings: dict[str, Any]) -> Tensor:
    """Token ids of the sample; there are more."""
    checkpoint, plan = pipeline.plan(model, recipe=settings)
    tokens = draw(checkpoint, Recipe.from_dict(settings), plan.schedule.length)
    assert plan.schedule.batch < len(tokens.ids)
    return tokens.ids[: plan.schedule.batch]


def drifts(dense: Path, pruned: Path, ids: Tensor, report: Report) -> list[float]:
    """Behind each block, by plain transformers."""
    left: list[Tensor] = []
    for path in (dense, pruned):
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for block in report.blocks:
            kept = lambda *told: left.append(told[2][0] if isinstance(told[2], tuple) else told[2])  # noqa: E731
            loaded.get_submodule(block.name).register_forward_hook(kept)
        with torch.no_grad():
            loaded(input_ids=ids, use_cache=False)
    count = len(report.blocks)
    return [relative(found, wanted) for wanted, found in zip(left[:count], left[count:], strict=True)]


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_oss", "llama", "mamba", "opt", "qwen3_next"])
def test_it_is_what_plain_transformers_finds(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "model", num_hidden_layers=3)
    report = llmprune.prune(source, out=tmp_path / "out", recipe=SETTINGS)
    wanted = drifts(source, tmp_path / "out", first_batch(source, SETTINGS), report)
    assert [block.drift for block in report.blocks] == pytest.approx(wanted, rel=1e-3)
    assert all(block.away is None for block in report.blocks)
    told = Report.read(json.loads((tmp_path / "out" / REPORT).read_text()), tmp_path / "out")
    assert [block.drift for block in told.blocks] == [block.drift for block in report.blocks]


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "sparsegpt", "reconstruct": ["cg"], "calibration": {**SETTINGS["calibration"], "asymmetric": 0.5}},
        {"permute": True},
        {"ignore": ["*.layers.1.*"], "reconstruct": [FIT]},
        {"sparsity": None, "width": {"channels": "25%"}, "method": None},
    ],
    ids=["asymmetric", "permuted", "fitted in part", "narrower"],
)
def test_it_is_told_whatever_else_is_done(changes: dict[str, Any], model: Path, tmp_path: Path) -> None:
    settings = {name: value for name, value in {**SETTINGS, **changes}.items() if value is not None}
    report = llmprune.prune(model, out=tmp_path / "out", recipe=settings)
    wanted = drifts(model, tmp_path / "out", first_batch(model, settings), report)
    assert [block.drift for block in report.blocks] == pytest.approx(wanted, rel=1e-3)


def test_blocks_that_went_are_on_the_dense_way(model: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "depth": {"drop": [1, 3]}}
    report = llmprune.prune(model, out=tmp_path / "out", recipe=settings)
    ids = first_batch(model, SETTINGS)
    with torch.no_grad():
        dense, pruned = (
            AutoModelForCausalLM.from_pretrained(path)(input_ids=ids, output_hidden_states=True).hidden_states
            for path in (model, tmp_path / "out")
        )
    assert report.blocks[0].drift == pytest.approx(relative(pruned[1], dense[2]), rel=1e-3)
    assert report.blocks[1].drift is not None


def test_a_run_that_goes_on_tells_the_same(model: Path, tmp_path: Path) -> None:
    whole = llmprune.prune(model, out=tmp_path / "whole", recipe=SETTINGS)
    with cut_off(Writer, "commit_block", 2):
        llmprune.prune(model, out=tmp_path / "out", recipe=SETTINGS)
    again = llmprune.prune(model, out=tmp_path / "out", recipe=SETTINGS)
    assert again.resumed == 2
    assert [block.drift for block in again.blocks] == [block.drift for block in whole.blocks]


def pruned(model: Path, out: Path) -> None:
    llmprune.prune(model, out=out, recipe=SETTINGS)


def test_ranks_put_their_samples_together(model: Path, tmp_path: Path) -> None:
    """Each has 20 sequences here, all of which are its sample."""
    with Ranks(tmp_path, 2, pruned, model, tmp_path / "out") as ranks:
        ranks.all_well()
    told = Report.read(json.loads((tmp_path / "out" / REPORT).read_text()), tmp_path / "out")
    checkpoint, plan = pipeline.plan(model, recipe=SETTINGS)
    ids = draw(checkpoint, Recipe.from_dict(SETTINGS), plan.schedule.length).ids
    wanted = drifts(model, tmp_path / "out", ids, told)
    assert [block.drift for block in told.blocks] == pytest.approx(wanted, rel=1e-3)


def test_without_calibration_nothing_is_told(model: Path, tmp_path: Path) -> None:
    report = llmprune.prune(model, out=tmp_path / "out", method="magnitude", sparsity="2:4")
    assert all(block.drift is None for block in report.blocks)


def test_the_report_draws_it(model: Path, tmp_path: Path) -> None:
    report = llmprune.prune(model, out=tmp_path / "out", recipe=SETTINGS)
    assert plots.away(report.blocks).data[0].y == tuple(block.drift for block in report.blocks)
    page = draw_page(tmp_path / "out").path.read_text()
    assert "Distance from the dense model over depth" in page
    assert "was not recorded" not in page


def test_the_plan_counts_it(model: Path) -> None:
    """Besides all forwards, one of a batch."""
    checkpoint, plan = pipeline.plan(model, recipe=SETTINGS)
    recipe = Recipe.from_dict(SETTINGS)
    weights = sum(choice.linear.numel for choice in plan.choices)
    batch, length = plan.schedule.batch, plan.schedule.length
    assert cost(checkpoint, plan, recipe).forwards == 2 * weights * length * (recipe.calibration.samples + batch)
