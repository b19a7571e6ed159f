"""Asymmetric calibration: what linears aim at, and whether the pruned model comes nearer to the dense one by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import data, pipeline
from llmprune.errors import UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import resolve
from llmprune.model.writer import REPORT, Writer
from llmprune.recipe import Recipe
from llmprune.report.card import make_card
from llmprune.report.verify import verify
from llmprune.stats import LinearStats
from tests.families import FAMILIES, make
from tests.test_resume import cut_off, digests

SAMPLES, LENGTH = 16, 32

pytestmark = pytest.mark.usefixtures("no_pages")

WRITERS = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "qwen3": {"self_attn.o_proj", "mlp.down_proj"},
    "opt": {"self_attn.out_proj", "fc2"},
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "mixtral": {"self_attn.o_proj"},
    "gemma3_text": set(),  # norms stand between its linears and the hidden states
}
"""Linears whose outputs are added to the hidden states as they are, by the families' own papers."""


def recipe(asymmetric: float | None, **changes: Any) -> dict[str, Any]:
    calibration = {"source": "builtin", "samples": SAMPLES, "length": LENGTH, "asymmetric": asymmetric}
    calibration |= changes.pop("calibration", {})
    return {"sparsity": "2:4", "method": "wanda", "reconstruct": ["cg"], "calibration": calibration, **changes}


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("kind", ["inputs", "stream"])
def test_the_target_is_the_least_squares_fit_to_what_would_be_right(kind: str, share: float) -> None:
    """With the damping as further rows of X, for which W itself would be right."""
    torch.manual_seed(0)
    weight, x, dense = torch.randn(6, 8), torch.randn(40, 8), torch.randn(40, 8)
    hidden, wanted = torch.randn(40, 6), torch.randn(40, 6)
    stream = kind == "stream"
    stats = LinearStats(8, "gram", beside=6 if stream else 8)
    lacking = wanted - hidden + (dense - x) @ weight.T if stream else dense - x
    for part in (slice(0, 15), slice(15, 40)):
        stats.add(x[part][None], lacking[part][None])
    stats.finish()
    right = wanted + dense @ weight.T - hidden if stream else dense @ weight.T
    damped = torch.cat([x, (0.01 * x.square().sum(0).mean()).sqrt() * torch.eye(8)]).double()
    best = torch.linalg.lstsq(damped, torch.cat([right, damped[40:].float() @ weight.T]).double()).solution.T
    expected = weight + share * (best - weight)
    for rows in (slice(0, 6), slice(2, 5)):
        found = stats.target(weight[rows], share, rows if stream else None).double()
        torch.testing.assert_close(found, expected[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(WRITERS))
def test_linears_that_add_to_the_hidden_states_are_found(family: str, tmp_path: Path) -> None:
    _, made = pipeline.plan(make(family, tmp_path / "model"), recipe=recipe(0.5))
    for writers, choices in zip(made.writers, made.blocks, strict=True):
        name = choices[0].linear.name.split(".self_attn")[0].split(".attn")[0]
        assert {writer.removeprefix(f"{name}.") for writer in writers} == WRITERS[family]
        aiming = {choice.linear.name for choice in choices if choice.asymmetric}
        assert aiming == set(writers) if writers else aiming == {choice.linear.name for choice in choices}


def test_what_is_written_is_the_optimum_found_with_plain_transformers(model: Path, tmp_path: Path) -> None:
    """For the masks as written, the weights that come nearest to the dense model's hidden states, by both models."""
    share, out = 0.6, tmp_path / "out"
    llmprune.prune(model, out=out, recipe=recipe(share, reconstruct=[{"name": "cg", "steps": 200}]))
    tokens = data.draw(data.documents("builtin"), Checkpoint(resolve(model), "cpu").tokenizer, SAMPLES, LENGTH, 0, "")
    dense, pruned = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (model, out))
    for number in range(3):
        for linear, stream in (("self_attn.o_proj", "input_layernorm"), ("mlp.down_proj", "post_attention_layernorm")):
            x, hidden = seen(pruned, number, (linear, stream), tokens.ids)
            x0, hidden0 = seen(dense, number, (linear, stream), tokens.ids)
            w = dense.model.layers[number].get_submodule(linear).weight.detach().double()
            found = pruned.model.layers[number].get_submodule(linear).weight.detach().double()
            right = hidden0 + x0 @ w.T - hidden
            gram = x.T @ x
            damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
            target = w + share * torch.linalg.solve(damped, (right - x @ w.T).T @ x, left=False)
            slope = (found - target) @ damped * (found != 0)
            assert slope.abs().max() < 2e-3 * (target @ damped).abs().max()
            at_first = torch.where(found != 0, w, 0.0)  # which is not the optimum by far
            assert ((at_first - target) @ damped * (found != 0)).abs().max() > 20 * slope.abs().max()


def seen(model: Any, number: int, places: tuple[str, str], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What two modules of a block are given, (tokens, features) in float64."""
    caught: dict[str, torch.Tensor] = {}
    block = model.model.layers[number]
    handles = [
        block.get_submodule(place).register_forward_pre_hook(
            lambda _, given, place=place: caught.__setitem__(place, given[0].flatten(0, -2).double())
        )
        for place in places
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return caught[places[0]], caught[places[1]]


@pytest.mark.parametrize(
    ("family", "true_sequential"),
    [*((family, True) for family in sorted(FAMILIES)), ("llama", False), ("gemma3_text", False), ("mixtral", False)],
)
def test_any_family(family: str, true_sequential: bool, tmp_path: Path) -> None:
    """Hidden states of text that was not seen come nearer to those of the dense model."""
    source = make(family, tmp_path / "model")
    chosen = {"true_sequential": true_sequential, "samples": 64}
    _, made = pipeline.plan(source, recipe=recipe(0.0))
    if all(choice.linear.expert is not None for choice in made.pruned):
        with pytest.raises(UserError, match="nothing fits them here"):
            pipeline.plan(source, recipe=recipe(0.5))
        return
    for share in (0.0, 0.5):
        llmprune.prune(source, out=tmp_path / str(share), recipe=recipe(share, calibration=chosen))
    assert verify(tmp_path / "0.5").problems == []
    assert distance(source, tmp_path / "0.5") < distance(source, tmp_path / "0.0")


def distance(dense: Path, pruned: Path) -> float:
    tokens = torch.randint(3, 60, (8, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = (
            AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=tokens, output_hidden_states=True)
            for folder in (dense, pruned)
        )
    last, wanted = other.hidden_states[-1], one.hidden_states[-1]
    return float((last - wanted).square().sum() / wanted.square().sum())


def test_the_model_comes_nearer_to_the_dense_one(model: Path, tmp_path: Path) -> None:
    away = {}
    for share in (0.0, 0.5, 1.0):
        out = tmp_path / str(share)
        llmprune.prune(model, out=out, recipe=recipe(share, method="sparsegpt", calibration={"samples": 256}))
        away[share] = distance(model, out)
    assert away[0.5] < 0.97 * away[0.0]
    assert away[1.0] < away[0.0]


@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("reconstruct", [["cg"], ["cg", {"name": "block", "steps": 4}]])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(
    reconstruct: list[Any], stop: int, model: Path, tmp_path: Path
) -> None:
    chosen = recipe(0.5, reconstruct=reconstruct)
    llmprune.prune(model, out=tmp_path / "whole", recipe=chosen)
    with cut_off(Writer, "commit_block", stop):
        llmprune.prune(model, out=tmp_path / "out", recipe=chosen)
    report = llmprune.prune(model, out=tmp_path / "out", recipe=chosen)
    assert report.resumed == stop
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("stop", [1, 2])
def test_the_dense_models_experts_are_summed_up_as_before(stop: int, tmp_path: Path) -> None:
    """Four of them a token, whose sum depends on the order."""
    model = make("mixtral", tmp_path / "model", num_local_experts=8, num_experts_per_tok=4, num_hidden_layers=4)
    llmprune.prune(model, out=tmp_path / "whole", recipe=recipe(0.5))
    with cut_off(Writer, "commit_block", stop):
        llmprune.prune(model, out=tmp_path / "out", recipe=recipe(0.5))
    assert llmprune.prune(model, out=tmp_path / "out", recipe=recipe(0.5)).resumed == stop
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"reconstruct": []}, "nothing fits them here"),
        ({"calibration": {"asymmetric": 1.5}}, r"calibration\.asymmetric must lie in \[0, 1\], not 1.5"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], told: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        llmprune.prune(model, out=tmp_path / "out", recipe=recipe(0.5, **changes))
    assert not (tmp_path / "out").exists()


def test_it_is_told_in_the_report(model: Path, tmp_path: Path) -> None:
    llmprune.prune(model, out=tmp_path / "out", recipe=recipe(0.5))
    report = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert Recipe.from_dict(report["recipe"]).calibration.asymmetric == 0.5
    assert all(linear["relative_error"] < 0.5 for linear in report["linears"])


@pytest.mark.parametrize("asked", [0.5, None])
def test_the_card_tells_of_it(asked: float | None, model: Path, tmp_path: Path) -> None:
    llmprune.prune(model, out=tmp_path / "out", recipe=recipe(asked))
    card = make_card(json.loads((tmp_path / "out" / REPORT).read_text()), [], "me/small", {}).text
    assert "- **Asymmetric calibration**: kept weights aim 50% of the way at what the dense model makes" in card


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"reconstruct": ["cg"]}, 0.5),
        ({"method": "sparsegpt", "reconstruct": ["cg", "block"]}, 0.5),
        ({"method": "sparsegpt"}, 0.0),
        ({"reconstruct": ["block"]}, 0.0),  # Wanda's weights stay as they are until then
        ({"reconstruct": ["cg"], "calibration.asymmetric": 0}, 0.0),
        ({"method": "alps", "calibration.asymmetric": 0.25}, 0.25),
        ({"quality": "fast"}, 0.0),
        ({"quality": "fast", "reconstruct": ["cg"]}, 0.5),
        ({"depth": {"drop": [1]}, "reconstruct": ["cg"]}, 0.0),
        ({"quality": "balanced"}, 0.5),
        ({"sparsity": None, "width": {"channels": "25%"}, "reconstruct": ["cg"]}, 0.0),
        ({"sparsity": None, "width": {"hidden": "25%"}, "reconstruct": ["block"]}, 0.0),
    ],
)
def test_what_is_reconstructed_aims_at_the_dense_model_by_default(
    changes: dict[str, Any], share: float, model: Path
) -> None:
    chosen = {"sparsity": "2:4", "calibration": "builtin", "samples": SAMPLES, "length": LENGTH, **changes}
    if "quality" not in chosen and chosen["sparsity"]:
        chosen.setdefault("method", "wanda")
    assert pipeline.plan(model, **chosen)[1].aims == share


def test_experts_are_reconstructed_without_that(tmp_path: Path) -> None:
    source = make("mixtral", tmp_path / "model")
    only = {"ignore": ["*.self_attn.*"], "sparsity": "2:4", "method": "wanda", "reconstruct": ["cg"]}
    _, found = pipeline.plan(source, calibration="builtin", samples=SAMPLES, length=LENGTH, **only)
    assert found.aims == 0.0  # nothing else was asked for, so that this is no mistake
