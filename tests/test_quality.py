"""Presets are the recipes that they stand for, and a plan tells what a run costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llmprune
from llmprune import pipeline
from llmprune.cli import main
from llmprune.cost import cost, rate
from llmprune.errors import UserError
from llmprune.quality import QUALITIES
from llmprune.recipe import Recipe, assemble
from tests.families import make
from tests.test_resume import digests

CALIBRATION = {"source": "builtin", "samples": 8, "length": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=2)


@pytest.mark.parametrize("quality", QUALITIES)
def test_a_preset_is_the_recipe_that_it_stands_for(quality: str, model: Path, tmp_path: Path) -> None:
    calibration = {**CALIBRATION, "asymmetric": QUALITIES[quality]["calibration.asymmetric"]}
    spelled = {name: QUALITIES[quality][name] for name in ("method", "permute", "refine", "reconstruct")}
    llmprune.prune(model, out=tmp_path / "long", sparsity="2:4", calibration=calibration, **spelled)
    llmprune.prune(model, out=tmp_path / "short", sparsity="2:4", calibration=CALIBRATION, quality=quality)
    assert digests(tmp_path / "short") == digests(tmp_path / "long")
    told = [json.loads((tmp_path / name / "llmprune.json").read_text())["recipe"] for name in ("short", "long")]
    assert told[0] == told[1]
    assert Recipe.from_dict(told[0]).method == QUALITIES[quality]["method"]


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"method": "ria"}, "method", "ria"),
        ({"calibration.asymmetric": 0.25}, "asymmetric", 0.25),
        ({"calibration": {"source": "builtin", "asymmetric": 0.25}}, "asymmetric", 0.25),
        ({"calibration": {"source": "builtin"}}, "asymmetric", 0.5),
        ({"samples": 4}, "asymmetric", 0.5),
        ({"reconstruct": []}, "reconstruct", ()),
    ],
)
def test_what_is_said_besides_goes_before_it(changes: dict[str, Any], key: str, value: Any) -> None:
    made = assemble(None, {"quality": "balanced", **changes})
    assert getattr(made if key != "asymmetric" else made.calibration, key) == value
    assert assemble({"method": "magnitude"}, {"quality": "balanced"}).method == "wanda"


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(UserError, match="unknown quality 'bset': did you mean 'best'"):
        assemble(None, {"quality": "bset"})


def test_the_command_line_takes_it_and_the_plan_tells_its_cost(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--sparsity", "2:4", "--calibration", "builtin", "--samples", "8", "--length", "32"]
    known = {}
    for quality in QUALITIES:
        assert main(["plan", str(model), "--quality", quality, *common, "--json"]) == 0
        known[quality] = json.loads(capsys.readouterr().out)["operations"]
    assert sum(known["fast"].values()) < sum(known["balanced"].values()) < sum(known["best"].values())
    assert [quality for quality, parts in known.items() if parts["fitting"]] == ["best"]
    assert main(["plan", str(model), "--quality", "best", *common]) == 0
    assert "operations (" in capsys.readouterr().out
    assert main(["plan", str(model), "--method", "magnitude", *common]) == 0
    assert "operations (" not in capsys.readouterr().out


def test_forwards_and_grams_are_counted_by_their_shapes(model: Path) -> None:
    recipe = assemble(None, {"sparsity": "2:4", "method": "sparsegpt", "calibration": CALIBRATION})
    checkpoint, made = pipeline.plan(model, recipe=recipe)
    tokens, weights = 8 * 32, sum(choice.linear.numel for choice in made.pruned)
    widths = {choice.linear.name: choice.linear.shape[1] for choice in made.pruned}
    shared = sum(width**2 for name, width in widths.items() if not name.endswith(("k_proj", "v_proj", "up_proj")))
    found = cost(checkpoint, made, recipe)
    sample = 32 * made.schedule.batch  # of which it is seen how far the model drifts
    assert found.forwards == 2 * (tokens + sample) * weights
    assert found.statistics == tokens * shared
    twice = assemble(recipe, {"calibration.true_sequential": False})
    assert cost(*pipeline.plan(model, recipe=twice), twice).forwards == 2 * (2 * tokens + sample) * weights
    beside = assemble(recipe, {"calibration.asymmetric": 0.5})
    assert cost(*pipeline.plan(model, recipe=beside), beside).forwards == 2 * 2 * tokens * weights
    more = assemble(recipe, {"calibration.samples": 16})
    assert cost(*pipeline.plan(model, recipe=more), more).statistics == 2 * found.statistics
    assert found.seconds(found.total / 3) == pytest.approx(3)
    assert 1e8 < rate(checkpoint) < 1e16


def test_experts_see_the_tokens_that_choose_them(tmp_path: Path) -> None:
    source = make("mixtral", tmp_path / "model", num_local_experts=8, num_experts_per_tok=2)
    recipe = assemble(None, {"sparsity": "2:4", "method": "sparsegpt", "calibration": CALIBRATION})
    checkpoint, made = pipeline.plan(source, recipe=recipe)
    inside = sum(choice.linear.numel for choice in made.pruned if choice.linear.expert is not None)
    outside = sum(choice.linear.numel for choice in made.pruned if choice.linear.expert is None)
    assert inside
    tokens = 8 * 32 + made.schedule.batch * 32
    assert cost(checkpoint, made, recipe).forwards == pytest.approx(2 * tokens * (outside + inside * 2 / 8))
