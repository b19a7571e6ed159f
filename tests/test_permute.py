"""Channel permutation: what may change places is found in any family, and N:M groups of it lose less."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import pipeline
from llmprune.errors import Failure, UserError
from llmprune.model import blocks
from llmprune.model.channels import Channels, by_chance, find_channels
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.linears import find_linears
from llmprune.model.source import resolve
from llmprune.model.writer import REPORT, Writer
from llmprune.patterns import NM, parse
from llmprune.permute import _deal_again, best_order, deal, kept
from llmprune.report.card import make_card
from llmprune.report.tables import plan_table
from llmprune.report.verify import verify
from tests.families import FAMILIES, make
from tests.test_resume import cut_off, digests

MLP, HEADS = {"mlp.down_proj"}, {"self_attn.o_proj"}
EXPERTS = {f"mlp.experts.{number}.down_proj" for number in range(4)}

pytestmark = pytest.mark.usefixtures("no_pages")

KNOWN: dict[str, set[str]] = {
    "llama": MLP | HEADS,
    "qwen3": MLP | HEADS,
    "gemma3_text": MLP | HEADS,
    "phi3": MLP,  # gate and up in one; its values stand in one matrix with queries and keys of another width
    "opt": {"fc2", "self_attn.out_proj"},
    "gpt2": {"mlp.c_proj", "attn.c_proj"},
    "falcon": {"mlp.dense_4h_to_h"},
    "bloom": {"mlp.dense_4h_to_h"},
    "starcoder2": {"mlp.c_proj"} | HEADS,
    "mixtral": EXPERTS | HEADS,
    "gpt_oss": EXPERTS | HEADS,  # gate and up in turn, with biases
    "qwen2_moe": EXPERTS | HEADS | {"mlp.shared_expert.down_proj"},
    "mamba": set(),  # a convolution with weights of its own for each channel stands between
}
"""Which linears' inputs may change places in the first block, by the families' own papers."""


def recipe(**changes: Any) -> dict[str, Any]:
    calibration = {"source": "builtin", "samples": 16, "length": 32}
    return {"sparsity": "2:4", "method": "wanda", "calibration": calibration, "permute": True, **changes}


def study(path: Path, each: Callable[[int, nn.Module, str, Callable[[], Tensor]], None]) -> None:
    """Look at the first block of each kind while it is loaded, all its biases by chance."""
    checkpoint = Checkpoint(resolve(str(path)), "cpu", "float32")

    def look(number: int, run: Callable[[], Any]) -> Any:
        name = checkpoint.blocks[number]
        block = checkpoint.block(name)
        for key, value in block.named_parameters():
            if key.endswith("bias"):
                value.data.normal_(generator=torch.Generator().manual_seed(len(key)))
        each(number, block, name, lambda: blocks.hidden_of(run()))
        return run()

    blocks.probe(checkpoint, look)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_block_returns_the_same_when_channels_change_places(family: str, tmp_path: Path) -> None:
    """Float64, so that nothing but the order of sums is left."""
    seen: dict[int, set[str]] = {}

    def each(number: int, block: nn.Module, name: str, run: Callable[[], Tensor]) -> None:
        linears = find_linears(block, name)
        found = find_channels(block, name, linears, run)
        seen[number] = {channels.linear.removeprefix(f"{name}.") for channels in found}
        before = run().clone()
        state = block.state_dict(prefix=f"{name}.")
        old = {key: value.clone() for key, value in state.items()}
        named = {linear.name: linear for linear in linears}
        for channels in found:
            channels.rearrange(by_chance(channels, seed=1), named, state)
        torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
        moved = {key for key, value in state.items() if not torch.equal(value, old[key])}
        assert moved == set().union(*(channels.parameters(named, state) for channels in found))

    study(make(family, tmp_path / "model"), each)
    if family in KNOWN:
        assert seen[0] == KNOWN[family]


def test_heads_stay_where_they_are(model: Path) -> None:
    """Four heads of eight channels, two of which share the values of a group: rows move within a group's values."""

    def each(number: int, block: nn.Module, name: str, run: Callable[[], Tensor]) -> None:
        found = {one.linear: one for one in find_channels(block, name, find_linears(block, name), run)}
        heads = found[f"{name}.self_attn.o_proj"]
        channels = torch.arange(32).view(2, 2, 8).transpose(1, 2).reshape(16, 2)
        assert torch.equal(heads.units, channels)
        assert torch.equal(heads.orbits, torch.arange(2).repeat_interleave(8))
        assert [maker for maker, _ in heads.makers] == [f"{name}.self_attn.v_proj"]
        assert torch.equal(heads.makers[0][1], torch.arange(16))

    study(model, each)


class _Gated(nn.Module):
    """A block whose last linear is given more than channels that may change places.

    The scale of each channel is the same in this block, which says nothing of the next.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down, self.other = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, hidden: Tensor) -> Tensor:
        made = self.up(hidden).relu()
        if self.kind == "scaled":
            made = made * self.scale
        if self.kind == "seen elsewhere":
            return hidden + self.down(made) + made[..., :8]
        if self.kind == "read twice":
            return hidden + self.down(made) + self.down(made * 2)
        if self.kind == "mixed":
            made = made + self.other(hidden).roll(1, -1) * made.sum(-1, keepdim=True)
        return hidden + self.down(made)


@pytest.mark.parametrize(
    ("kind", "movable"),
    [("plain", True), ("scaled", False), ("seen elsewhere", False), ("read twice", False), ("mixed", False)],
)
def test_what_cannot_be_folded_is_left_alone(kind: str, movable: bool) -> None:
    torch.manual_seed(0)
    block, hidden = _Gated(kind), torch.randn(1, 19, 8)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    assert bool(find_channels(block, "block", find_linears(block, "block"), lambda: block(hidden))) == movable
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_a_trial_that_fails_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.planning.find_channels", lambda *_: [][0])
    with pytest.raises(UserError, match=r"permute: a trial of model.layers.0 .* IndexError: .*--set permute=false"):
        pipeline.plan(model, recipe=recipe(permute="auto"))


def test_auto_moves_what_it_can(model: Path, tmp_path: Path) -> None:
    assert pipeline.plan(model, recipe=recipe(permute="auto"))[1].moved
    assert not pipeline.plan(model, recipe=recipe(permute="auto", sparsity="50%"))[1].channels[0]
    with pytest.raises(UserError, match="permute must be true, false or auto, not 'some'"):
        pipeline.plan(model, recipe=recipe(permute="some"))


def test_only_what_can_come_into_other_groups_is_said_to_move(model: Path) -> None:
    """Heads of eight channels hold one group of eight, and none of sixteen."""
    for pattern, heads in (("2:4", True), ("4:8", False), ("8:16", False)):
        moved = pipeline.plan(model, recipe=recipe(sparsity=pattern))[1].moved
        assert any(name.endswith("o_proj") for name in moved) == heads
        assert any(name.endswith("down_proj") for name in moved)
    with pytest.raises(UserError, match="permute has nothing to do"):
        pipeline.plan(model, recipe=recipe(sparsity="8:16", ignore=["*.mlp.*"]))


def test_inputs_that_are_not_finite_are_told(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for linear in (loaded.model.layers[1].mlp.gate_proj, loaded.model.layers[1].mlp.up_proj):
            linear.weight.mul_(1e25)
        loaded.model.layers[1].mlp.down_proj.weight.zero_()
    loaded.save_pretrained(broken)
    with pytest.raises(Failure, match=r"inputs of model.layers.1.mlp.down_proj hold NaN or infinite values; try"):
        llmprune.prune(broken, out=tmp_path / "out", recipe=recipe())


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (2, 8)])
def test_an_order_keeps_no_less_and_near_the_most(n: int, m: int) -> None:
    """Against all ways to divide two groups' channels."""
    for seed in range(8):
        scores = torch.rand(5, 2 * m, generator=torch.Generator().manual_seed(seed)).pow(4)
        order = deal(scores, n, m)
        assert sorted(order.tolist()) == list(range(2 * m))
        assert kept(scores, order, n, m) >= kept(scores, torch.arange(2 * m), n, m)
        most = 0.0
        for first in itertools.combinations(range(2 * m), m):
            rest = [channel for channel in range(2 * m) if channel not in first]
            most = max(most, kept(scores, torch.tensor([*first, *rest]), n, m))
        assert kept(scores, order, n, m) > 0.97 * most


def test_one_of_each_group_is_dealt_out_in_the_best_way() -> None:
    for seed in range(10):
        scores = torch.rand(6, 16, generator=torch.Generator().manual_seed(seed)).pow(3)
        found = torch.arange(16).view(4, 4).clone()
        _deal_again(scores, found, torch.arange(4), 2)
        most = 0.0
        for order in itertools.permutations(range(4)):
            other = torch.arange(16).view(4, 4).clone()
            other[:, 0] = other[list(order), 0]
            most = max(most, kept(scores, other.flatten(), 2, 4))
        assert kept(scores, found.flatten(), 2, 4) == pytest.approx(most)


def test_groups_that_fit_are_found_again() -> None:
    """Each group has two channels that matter and two that don't; by chance some groups have four."""
    scores = torch.rand(12, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    scores[:, 2::4] = scores[:, 3::4] = 0.0
    mixed = scores[:, torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    assert kept(mixed, torch.arange(64), 2, 4) < 0.95 * float(scores.sum())
    assert kept(mixed, deal(mixed, 2, 4), 2, 4) == pytest.approx(float(scores.sum()), rel=1e-5)


def test_only_whole_groups_change_places() -> None:
    """Orbits of six channels hold no whole groups of four."""
    channels = Channels("x", torch.arange(12)[:, None], torch.arange(2).repeat_interleave(6), ())
    weight = torch.rand(4, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(best_order(weight, None, channels, NM(2, 4)), torch.arange(12))
    assert not torch.equal(best_order(weight, None, channels, NM(1, 3)), torch.arange(12))


def test_the_size_of_inputs_counts() -> None:
    channels = Channels("x", torch.arange(8)[:, None], torch.zeros(8, dtype=torch.long), ())
    weight = torch.ones(3, 8)
    order = best_order(weight, torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 1.0, 1.0, 1.0]), channels, NM(2, 4))
    assert (order[:4] < 4).sum() == 2  # two of the large ones in each group


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_what_is_written_is_the_model_in_another_order(method: str, model: Path, tmp_path: Path) -> None:
    """Gate and up stay dense here, so that their rows tell the order."""
    ignore = ["*.gate_proj", "*.up_proj", "*.self_attn.*"]
    llmprune.prune(model, out=tmp_path / "out", recipe=recipe(method=method, ignore=ignore))
    assert verify(tmp_path / "out").problems == []
    dense, written = (
        dict(AutoModelForCausalLM.from_pretrained(path).state_dict()) for path in (model, tmp_path / "out")
    )
    for number in range(3):
        mlp = f"model.layers.{number}.mlp"
        gate, moved = (state[f"{mlp}.gate_proj.weight"] for state in (dense, written))
        order = torch.tensor([next(old for old, row in enumerate(gate) if torch.equal(row, each)) for each in moved])
        assert not torch.equal(order, torch.arange(64))
        assert torch.equal(written[f"{mlp}.up_proj.weight"], dense[f"{mlp}.up_proj.weight"][order])
        before, after = dense[f"{mlp}.down_proj.weight"][:, order], written[f"{mlp}.down_proj.weight"]
        assert torch.equal(after, torch.where(after != 0, before, 0.0))
        assert parse("2:4").holds(after)
        if method == "magnitude":
            unmoved = dense[f"{mlp}.down_proj.weight"].square()
            assert float(after.square().sum()) > kept(unmoved, torch.arange(64), 2, 4)


def error(report: llmprune.Report, part: str) -> float:
    return sum(linear.relative_error or 0.0 for linear in report.pruned if linear.name.endswith(part))


def test_less_is_lost(model: Path, tmp_path: Path) -> None:
    plain, permuted = (
        llmprune.prune(model, out=tmp_path / str(permute), recipe=recipe(permute=permute)) for permute in (False, True)
    )
    assert error(permuted, "down_proj") < 0.97 * error(plain, "down_proj")
    assert error(permuted, "o_proj") < 0.97 * error(plain, "o_proj")


@pytest.mark.parametrize("family", ["opt", "gpt2", "mixtral", "gpt_oss", "phi3", "bloom"])
def test_any_family(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "model")
    plain, permuted = (
        llmprune.prune(source, out=tmp_path / str(permute), recipe=recipe(permute=permute)) for permute in (False, True)
    )
    assert verify(tmp_path / "True").problems == []
    errors = [sum(linear.relative_error or 0.0 for linear in report.pruned) for report in (plain, permuted)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("reconstruct", [[], ["cg"], [{"name": "block", "steps": 4}]])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(
    reconstruct: list[Any], stop: int, model: Path, tmp_path: Path
) -> None:
    chosen = recipe(reconstruct=reconstruct)
    if reconstruct == ["cg"]:
        chosen["calibration"] |= {"asymmetric": 0.5}
    llmprune.prune(model, out=tmp_path / "whole", recipe=chosen)
    with cut_off(Writer, "commit_block", stop):
        llmprune.prune(model, out=tmp_path / "out", recipe=chosen)
    assert llmprune.prune(model, out=tmp_path / "out", recipe=chosen).resumed == stop
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("llama", {"sparsity": "50%"}, "permute has nothing to do: only N:M patterns"),
        ("llama", {"ignore": ["*.o_proj", "*.down_proj"]}, "permute has nothing to do: no channels of this model"),
        ("mamba", {}, "permute has nothing to do: no channels of this model"),
    ],
)
def test_nothing_to_permute_is_told(family: str, changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        llmprune.prune(make(family, tmp_path / "model"), out=tmp_path / "out", recipe=recipe(**changes))
    assert not (tmp_path / "out").exists()


def test_it_is_told(model: Path, tmp_path: Path) -> None:
    chosen = recipe(ignore=["*.2.mlp.down_proj"])
    _, made = pipeline.plan(model, recipe=chosen)
    moved = {name for name in made.moved if name.endswith("down_proj")}
    assert moved == {f"model.layers.{number}.mlp.down_proj" for number in range(2)}
    assert {linear["name"] for linear in made.to_dict()["linears"] if linear["permuted"]} == made.moved
    console = Console(width=200)
    with console.capture() as shown:
        console.print(plan_table(made, every=False))
    assert "2:4, permuted" in shown.get()
    report = llmprune.prune(model, out=tmp_path / "out", recipe=chosen)
    assert {linear.name for linear in report.pruned if linear.permuted} == made.moved
    assert all("permute" in block.seconds for block in report.blocks)
    card = make_card(json.loads((tmp_path / "out" / REPORT).read_text()), [], "me/small", {}).text
    assert (
        "- **Channel permutation**: for N:M groups that lose less, the inputs of 5 linears have changed places" in card
    )


def test_weights_that_are_left_alone_stay_equal(model: Path, tmp_path: Path) -> None:
    llmprune.prune(model, out=tmp_path / "out", recipe=recipe(ignore=["*.gate_proj"]))
    source, written = (
        {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}
        for folder in (model, tmp_path / "out")
    )
    for key, value in source.items():
        if "proj" not in key:
            assert torch.equal(written[key], value)
