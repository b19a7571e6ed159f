"""Whole blocks fitted to the dense model: any family, what is told of it, after a crash, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import distributed, pipeline
from llmprune.cost import cost
from llmprune.errors import UserError
from llmprune.model.activations import HIDDEN, Activations, Call
from llmprune.model.checkpoint import LoadedBlock
from llmprune.model.linears import find_linears
from llmprune.model.writer import PAGE, REPORT
from llmprune.patterns import parse
from llmprune.pipeline import draw
from llmprune.recipe import Recipe
from llmprune.reconstruct.block import Reconstructor
from llmprune.report.card import make_card
from llmprune.report.tables import fit_notes
from llmprune.report.verify import verify
from tests.families import FAMILIES, make
from tests.test_resume import cut_off, digests

pytestmark = pytest.mark.usefixtures("no_pages")

FIT = {"name": "block", "steps": 24, "first": 2, "rate": 0.02}


def recipe(reconstruct: list[Any], **changes: Any) -> dict[str, Any]:
    calibration = {"source": "builtin", "samples": 64, "length": 32}
    return {"method": "wanda", "sparsity": "2:4", "calibration": calibration, "reconstruct": reconstruct, **changes}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_block_comes_nearer_to_the_dense_one(family: str, tmp_path: Path) -> None:
    report = llmprune.prune(make(family, tmp_path / "model"), out=tmp_path / "out", recipe=recipe([FIT]))
    for block in report.blocks:
        assert block.away is not None
        assert block.away_before is not None
        assert block.away < block.away_before
    assert verify(tmp_path / "out").problems == []
    for linear in report.pruned:
        assert linear.sparsity == pytest.approx(0.5, abs=0.01)


def test_a_block_of_which_nothing_is_pruned_stays_as_it_is(model: Path, tmp_path: Path) -> None:
    report = llmprune.prune(model, out=tmp_path / "out", recipe=recipe(["cg", FIT], ignore=["model.layers.0.*"]))
    assert report.blocks[0].away is None
    assert report.blocks[1].away is not None
    dense, fitted = (
        dict(AutoModelForCausalLM.from_pretrained(path).state_dict()) for path in (model, tmp_path / "out")
    )
    assert all(torch.equal(fitted[name], value) for name, value in dense.items() if ".layers.0." in name)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Padding is embedded as zeros, and stays there; a distance beyond 1 counts by its logarithm."""
    each = ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).nan_to_num_(0.0).square()
    return float(torch.where(each > 1, 1 + each.log(), each).mean())


def test_what_is_told_is_what_plain_transformers_finds(model: Path, tmp_path: Path) -> None:
    """And the mask is the method's own, and nothing but the pruned weights has changed."""
    report = llmprune.prune(model, out=tmp_path / "out", recipe=recipe(["cg", FIT]))
    llmprune.prune(model, out=tmp_path / "plain", recipe=recipe(["cg"]))
    dense, fitted, plain = (
        AutoModelForCausalLM.from_pretrained(path) for path in (model, tmp_path / "out", tmp_path / "plain")
    )
    checkpoint, plan = pipeline.plan(model, recipe=recipe(["cg", FIT]))
    tokens = draw(checkpoint, Recipe.from_dict(recipe(["cg", FIT])), plan.schedule.length).ids
    with torch.no_grad():
        wanted, found, before = (
            each(input_ids=tokens, output_hidden_states=True).hidden_states for each in (dense, fitted, plain)
        )
    for number, block in enumerate(report.blocks[:-1], 1):  # the last ones have passed the norm
        away = relative(found[number], wanted[number])
        assert block.away == pytest.approx(away, rel=1e-3)
        assert away < relative(before[number], wanted[number])
    weights = [dict(each.state_dict()) for each in (dense, fitted, plain)]
    pruned = {f"{linear.name}.weight" for linear in report.pruned}
    first = {name for name in pruned if ".layers.0." in name}
    for name, value in weights[1].items():
        if name in pruned:
            assert parse("2:4").holds(value)
        else:
            assert torch.equal(value, weights[0][name])
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in first)
    assert all(torch.equal(weights[1][name] == 0, weights[2][name] == 0) for name in first if "self_attn.q" in name)


@pytest.mark.parametrize(("family", "most"), [("llama", 0.98), ("mixtral", 0.98), ("qwen3", 0.98), ("gpt_neox", 1.0)])
def test_looking_ahead_serves_the_next_block(family: str, most: float, tmp_path: Path) -> None:
    """The distance behind the second block, dense and run by plain transformers, when the first one was fitted."""
    source = make(family, tmp_path / "model", num_hidden_layers=3)
    dense = AutoModelForCausalLM.from_pretrained(source)
    later = {name: value for name, value in dense.state_dict().items() if re.search(r"\.1\.", name)}
    assert later
    checkpoint, plan = pipeline.plan(source, recipe=recipe([FIT]))
    tokens = draw(checkpoint, Recipe.from_dict(recipe([FIT])), plan.schedule.length).ids
    away = {}
    for ahead in (0.0, 1.0):
        report = llmprune.prune(source, out=tmp_path / str(ahead), recipe=recipe([{**FIT, "ahead": ahead}]))
        assert all(block.away is not None for block in report.blocks)
        fitted = AutoModelForCausalLM.from_pretrained(tmp_path / str(ahead))
        fitted.load_state_dict(later, strict=False)
        with torch.no_grad():
            wanted, found = (
                each(input_ids=tokens, output_hidden_states=True).hidden_states[2] for each in (dense, fitted)
            )
        away[ahead] = relative(found, wanted)
    assert away[1.0] < most * away[0.0]


def test_what_does_not_help_is_left_as_it_was(model: Path, tmp_path: Path) -> None:
    report = llmprune.prune(model, out=tmp_path / "out", recipe=recipe([{**FIT, "rate": 1000.0}]))
    assert all(block.away == block.away_before for block in report.blocks)
    llmprune.prune(model, out=tmp_path / "plain", recipe=recipe([]))
    assert digests(tmp_path / "out").keys() == digests(tmp_path / "plain").keys()
    for path in (tmp_path / "out").glob("*.safetensors"):
        other = load_file(tmp_path / "plain" / path.name)
        assert all(torch.equal(value, other[name]) for name, value in load_file(path).items())


def test_a_linear_without_weights_does_not_keep_the_others_from_it(model: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(model, tmp_path / "zero"))
    (shard,) = place.glob("*.safetensors")
    weights = load_file(shard)
    weights["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(weights, shard, metadata={"format": "pt"})
    report = llmprune.prune(place, out=tmp_path / "out", recipe=recipe([FIT]))
    block = report.blocks[1]
    assert block.away is not None
    assert block.away_before is not None
    assert block.away < 0.9 * block.away_before
    assert fit_notes(report.blocks) == []
    only = recipe([FIT], ignore=["re:.*(?<!layers.1.self_attn.o_proj)"])
    alone = llmprune.prune(place, out=tmp_path / "alone", recipe=only)
    assert alone.blocks[1].away == alone.blocks[1].away_before
    assert "model.layers.1: fitted to the dense model without coming nearer" in fit_notes(alone.blocks)[0]


class Rarely(torch.nn.Module):
    """A block of which one linear is called for some batches alone."""

    def __init__(self) -> None:
        super().__init__()
        self.often, self.seldom = (torch.nn.Linear(16, 16, bias=False) for _ in range(2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        moved: Tensor = hidden_states + self.often(hidden_states)
        return moved + self.seldom(hidden_states) if bool(hidden_states[0, 0, 0] > 0) else moved


def test_an_expert_that_a_batch_does_not_reach_is_fitted_by_the_others() -> None:
    torch.manual_seed(0)
    dense, module = Rarely(), Rarely()
    linears = find_linears(module, "block")
    for linear in linears:
        pattern = parse("2:4")
        values = dense.get_submodule(linear.name.removeprefix("block.")).weight.detach()
        module.get_submodule(linear.name.removeprefix("block.")).weight.data.copy_(values * pattern.keep(values.abs()))
    block = LoadedBlock("block", module, {f"block.{name}": value for name, value in module.state_dict().items()})
    states = torch.randn(6, 1, 32, 4) @ torch.randn(4, 16)  # so that there is much to gain
    states[:, 0, 0, 0] = torch.tensor([-1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
    weights = {name: value.clone() for name, value in block.state.items()}
    given, wanted = Activations(0, torch.device("cpu")), Activations(0, torch.device("cpu"))
    with torch.no_grad():
        for batch in states:
            given.add(batch)
            wanted.add(dense(batch))
        calls = [Call((HIDDEN,), {})] * len(states)
        before, after = Reconstructor(steps=18, ahead=0).fit(1, block, linears, calls, given, wanted)
    assert after < 0.9 * before
    for name, value in block.state.items():
        assert torch.equal(value != 0, weights[name] != 0)
        assert not torch.equal(value, weights[name])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(family: str, stop: int, tmp_path: Path) -> None:
    source = make(family, tmp_path / "model")
    llmprune.prune(source, out=tmp_path / "whole", recipe=recipe(["cg", FIT]))
    with cut_off(Reconstructor, "fit", stop):
        llmprune.prune(source, out=tmp_path / "out", recipe=recipe(["cg", FIT]))
    report = llmprune.prune(source, out=tmp_path / "out", recipe=recipe(["cg", FIT]))
    assert report.resumed == stop
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_first_block_takes_more_steps(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    step = torch.optim.Adam.step
    fit = Reconstructor.fit

    def counted(self: Reconstructor, *given: Any) -> Any:
        taken.append(0)
        return fit(self, *given)

    def stepped(self: torch.optim.Adam, *given: Any) -> Any:
        taken[-1] += 1
        return step(self, *given)

    monkeypatch.setattr(Reconstructor, "fit", counted)
    monkeypatch.setattr(torch.optim.Adam, "step", stepped)
    llmprune.prune(model, out=tmp_path / "out", recipe=recipe([{"name": "block", "steps": 3, "first": 5}]))
    assert taken == [15, 3, 3]


def test_the_plan_counts_blocks_that_are_fitted(model: Path) -> None:
    def fitting(ignore: list[str], **options: Any) -> float:
        asked = recipe([{**FIT, "first": 1, **options}], ignore=ignore)
        return cost(*pipeline.plan(model, recipe=asked), Recipe.from_dict(asked)).fitting

    def others(number: int) -> list[str]:
        return [f"model.layers.{each}.*" for each in range(3) if each != number]

    assert fitting([], ahead=0) == pytest.approx(sum(fitting(others(number), ahead=0) for number in range(3)))
    assert fitting(others(2)) == fitting(others(2), ahead=0)  # there is none behind the last block
    assert fitting(others(0)) > 1.9 * fitting(others(0), ahead=0)
    assert fitting(others(0), first=4) > 3 * fitting(others(0))


def test_magnitude_needs_the_text_too(model: Path, tmp_path: Path) -> None:
    report = llmprune.prune(model, out=tmp_path / "out", recipe=recipe([FIT], method="magnitude"))
    assert report.calibration is not None
    assert all(block.away is not None and block.away < block.away_before for block in report.blocks)  # type: ignore[operator]


def test_activations_on_the_disk_make_no_difference(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llmprune.prune(model, out=tmp_path / "host", recipe=recipe([FIT]))
    start = pipeline.blocks.start
    monkeypatch.setattr(pipeline.blocks, "start", lambda *given: start(*given[:3], "disk", given[4]))
    llmprune.prune(model, out=tmp_path / "disk", recipe=recipe([FIT]))
    assert digests(tmp_path / "host") == digests(tmp_path / "disk")


@pytest.mark.parametrize(
    ("reconstruct", "told"),
    [
        (["block", "cg"], "block works on whole blocks and comes last, after cg"),
        ([{"name": "block", "steps": 0}], "steps must be at least 1"),
        ([{"name": "block", "first": 0}], "first must be at least 1"),
        ([{"name": "block", "rate": 0}], "rate must be above 0"),
        ([{"name": "block", "ahead": 1.5}], r"ahead must lie in \[0, 1\]"),
        (["blocks"], "did you mean 'block'"),
    ],
)
def test_mistakes_are_named(reconstruct: list[Any], told: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        llmprune.prune(model, out=tmp_path / "out", recipe=recipe(reconstruct))
    assert not (tmp_path / "out").exists()


def test_more_than_one_process_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(UserError, match="block runs in one process only"):
        pipeline.plan(model, recipe=recipe(["block"]))


def test_page_and_card_tell_of_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    report = llmprune.prune(model, out=tmp_path / "out", recipe=recipe(["cg", FIT], refine=["swaps"]))
    shown = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert report.page_problem is None
    assert "Distance from the dense model over depth" in shown
    assert "was not recorded" not in shown
    card = make_card(json.loads((tmp_path / "out" / REPORT).read_text()), [], "me/small", {}).text
    assert "- **Mask refined by**: `swaps` [arXiv:2512.10922]" in card
    assert "- **Reconstructed by**: `cg` [arXiv:2512.13886]" in card
    assert "- **Reconstructed by**: `block` [arXiv:2510.14444]" in card
