"""Models with fewer experts: what is written, how they are chosen, and that nothing else changes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

import llmprune
from llmprune import pipeline
from llmprune.cli import main
from llmprune.errors import UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import resolve
from llmprune.report.record import Report
from llmprune.structured.experts import Seen, load
from tests.families import VOCABULARY, make
from tests.test_depth import interrupted, logits, states
from tests.test_depth import load as load_plain
from tests.test_distributed import Ranks
from tests.test_fit import relative
from tests.test_report_page import Parsed
from tests.test_resume import digests
from tests.test_width import _stored, _tokens

pytestmark = pytest.mark.usefixtures("no_pages")

SETTINGS: dict[str, Any] = {"calibration": "builtin", "samples": 4, "length": 32}
MIXTURES = (
    "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "qwen2_moe", "glm4_moe", "granitemoe", "olmoe",
)  # fmt: skip
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def mixture(family: str, folder: Path, **changes: Any) -> Path:
    """A model whose router chooses among eight experts where it chooses a group first, and four elsewhere."""
    return make(family, folder / "model", **({"n_routed_experts": 8} if family == "deepseek_v3" else {}), **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture("mixtral", tmp_path_factory.mktemp("mixture"))


def fused(loaded: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in loaded.named_modules() if getattr(module, "down_proj", None) is not None
            and getattr(module.down_proj, "ndim", 0) == 3]  # fmt: skip


def router_of(loaded: Any, name: str) -> Any:
    parent = loaded.get_submodule(name.rpartition(".")[0])
    return getattr(parent, "gate", None) or parent.router


class Avoided:
    """In a model by plain transformers, sends no token to some experts, whatever the router says of them."""

    def __init__(self, loaded: Any, kept: dict[str, list[int]]) -> None:
        for name, module in fused(loaded):
            router = router_of(loaded, name)
            gone = torch.ones(len(module.down_proj), dtype=torch.bool)
            gone[kept[name]] = False
            self._patch(router, gone)

    def _patch(self, router: Any, gone: Tensor) -> None:
        linear = torch.nn.functional.linear
        forward = router.forward

        def scored(*args: Any, **kwargs: Any) -> Any:
            def masked(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
                return linear(x, weight, bias).masked_fill(gone, -1e4)

            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(torch.nn.functional, "linear", masked)
                return forward(*args, **kwargs)

        router.forward = scored


@pytest.mark.parametrize("family", MIXTURES)
def test_what_is_left_does_as_if_no_token_were_sent_to_the_others(family: str, tmp_path: Path) -> None:
    source, out = mixture(family, tmp_path), tmp_path / "out"
    report = llmprune.prune(source, out=out, experts={"drop": "25%"}, **SETTINGS)
    assert llmprune.verify(out).ok
    kept = {told.name: told.kept for block in report.blocks for told in block.experts or ()}
    dense, left = load_plain(source), load_plain(out)
    assert kept.keys() == {name for name, _ in fused(dense)}
    for name, module in fused(left):
        was = dense.get_submodule(name).down_proj
        assert torch.equal(module.down_proj, was[kept[name]])
        assert len(module.down_proj) == len(was) * 3 // 4
    Avoided(dense, kept)
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(left, ids), logits(dense, ids), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        said = left.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        again = left.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(said, again)
    assert report.weights == sum(value.numel() for value in _stored(out).values())
    config = AutoConfig.from_pretrained(out)
    told = [getattr(config, name) for name in COUNTS if hasattr(config, name)]
    assert (6 if family == "deepseek_v3" else 3) in told


def unused(source: Path, number: int) -> None:
    """Change a model's files so that no token whatever is sent to an expert."""
    loaded = load_plain(source)
    for name, _ in fused(loaded):
        router_of(loaded, name).bias.data[number] = -1e4
    loaded.save_pretrained(source)


def test_without_an_expert_that_no_token_uses_nothing_changes(tmp_path: Path) -> None:
    source = mixture("gpt_oss", tmp_path)  # its router has a bias
    unused(source, 2)
    for by in ("reap", "frequency", "norm"):
        report = llmprune.prune(source, out=tmp_path / by, experts={"drop": 1, "by": by}, **SETTINGS)
        for block in report.blocks:
            (told,) = block.experts
            assert told.kept == [0, 1, 3]
            assert told.tokens[2] == 0
            assert 2 in told.few
        ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
        found, wanted = logits(load_plain(tmp_path / by), ids), logits(load_plain(source), ids)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "count"), [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts")])
def test_without_an_expert_that_no_token_can_use_nothing_changes(family: str, count: str, tmp_path: Path) -> None:
    """Routers without biases: of scores a, -a, b, -b and 0 two are above 0 for any token, and two experts are taken."""
    scaled = {"norm_topk_prob": True} if family == "qwen3_moe" else {}  # else the others get less of what it gets
    source = mixture(family, tmp_path, **{count: 5}, **scaled)
    loaded = load_plain(source)
    for name, _ in fused(loaded):
        rows = router_of(loaded, name).weight.data
        rows[1], rows[3], rows[4] = -rows[0], -rows[2], 0
    loaded.save_pretrained(source)
    report = llmprune.prune(source, out=tmp_path / "out", experts={"drop": 1}, **SETTINGS)
    for told in report.experts:
        assert (told.kept, told.tokens[4]) == ([0, 1, 2, 3], 0)
    assert len(report.experts) == len(fused(loaded))
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    found, wanted = logits(load_plain(tmp_path / "out"), ids), logits(load_plain(source), ids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # of scores that sum up to another sum
    before, after = _stored(source), _stored(tmp_path / "out")
    for key, value in after.items():
        assert torch.equal(value, before[key][: len(value)]), key


def test_scores() -> None:
    seen = Seen(torch.tensor([4.0, 0, 2]), torch.tensor([8.0, 0, 12]), torch.tensor([4.0, 0, 3]))
    assert load("reap").scores(seen).tolist() == [1, 0, 1.5]
    assert load("frequency").scores(seen).tolist() == [4, 0, 2]
    assert load("norm").scores(seen).tolist() == [8, 0, 12]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_what_is_seen_is_what_plain_transformers_shows(family: str, tmp_path: Path) -> None:
    source = mixture(family, tmp_path)
    report = llmprune.prune(source, out=tmp_path / "out", experts={"drop": 1}, **SETTINGS)
    loaded, (_, ids) = load_plain(source), _tokens(source)
    name, module = fused(loaded)[0]
    given: list[Any] = []
    module.register_forward_pre_hook(lambda _, args: given.append(args))
    logits(loaded, ids)
    hidden, chosen, weights = given[0]
    count = len(module.down_proj)
    scores, tokens = torch.zeros(count), [int((chosen == expert).sum()) for expert in range(count)]
    shares = weights / weights.sum(-1, keepdim=True)
    for expert in range(count):
        here = (chosen == expert).nonzero()
        for token, place in here.tolist():  # one token, sent to one expert with a weight of one
            alone = module(hidden[token, None], torch.tensor([[expert]]), torch.ones(1, 1))
            scores[expert] += float(alone.norm() * shares[token, place]) / len(here)
    (told,) = report.blocks[0].experts
    assert told.name == name
    assert told.tokens == tokens
    assert told.kept == sorted(scores.argsort()[1:].tolist())


def test_names_that_a_config_has_for_them_stay(tmp_path: Path) -> None:
    source = mixture("qwen3_moe", tmp_path)
    config = json.loads((source / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts", None) or config["num_experts"]
    (source / "config.json").write_text(json.dumps(config))
    llmprune.prune(source, out=tmp_path / "out", experts={"drop": 1}, **SETTINGS)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_experts"] == 3
    assert "num_local_experts" not in written


def test_it_goes_with_channels_heads_and_a_fit(model: Path, tmp_path: Path) -> None:
    more = {"width": {"channels": "25%", "heads": 1}, "reconstruct": [{"name": "block", "steps": 16}]}
    plain = llmprune.prune(model, out=tmp_path / "plain", experts={"drop": 1}, **SETTINGS)
    fitted = llmprune.prune(model, out=tmp_path / "fitted", experts={"drop": 1}, **SETTINGS, **more)
    assert fitted.widths == {
        "intermediate_size": [64, 48], "num_attention_heads": [4, 2], "num_key_value_heads": [2, 1],
        "num_local_experts": [4, 3],
    }  # fmt: skip
    assert fitted.weights < plain.weights
    assert [record.name for record in fitted.linears] == [record.name for record in plain.linears]
    assert {record.relative_error is not None for record in fitted.solved} == {True}
    assert llmprune.verify(tmp_path / "fitted").ok
    _, ids = _tokens(model)
    far = relative(states(tmp_path / "fitted", ids)[1], states(model, ids)[1])
    assert fitted.blocks[0].away == pytest.approx(far, rel=1e-2)
    assert fitted.blocks[0].away < fitted.blocks[0].away_before


def test_what_is_left_can_be_pruned(model: Path, tmp_path: Path) -> None:
    llmprune.prune(model, out=tmp_path / "few", experts={"drop": 1}, **SETTINGS)
    report = llmprune.prune(tmp_path / "few", out=tmp_path / "out", sparsity="2:4", method="wanda", **SETTINGS)
    assert report.sparsity == 0.5
    assert llmprune.verify(tmp_path / "out").ok


@pytest.mark.parametrize("more", [{}, {"width": {"channels": "25%"}}], ids=["plain", "channels"])
def test_it_goes_on_where_it_was(
    more: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"experts": {"drop": 1}, **SETTINGS, **more}
    llmprune.prune(model, out=tmp_path / "whole", **chosen)
    interrupted(model, tmp_path / "out", 1, monkeypatch, of=3, **chosen)
    report = llmprune.prune(model, out=tmp_path / "out", **chosen)
    assert report.resumed == 1
    assert all(block.experts for block in report.blocks)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def fewer_on(model: Path, out: Path) -> None:
    llmprune.prune(model, out=out, experts={"drop": 1}, **SETTINGS)


def test_ranks_agree(model: Path, tmp_path: Path) -> None:
    fewer_on(model, tmp_path / "one")
    with Ranks(tmp_path, 2, fewer_on, model, tmp_path / "two") as ranks:
        ranks.all_well()
    one, two = (json.loads((tmp_path / name / "llmprune.json").read_text()) for name in ("one", "two"))
    assert [block["experts"] for block in one["blocks"]] == [block["experts"] for block in two["blocks"]]


def test_reports_tell_of_experts(model: Path, tmp_path: Path) -> None:
    from llmprune.report import card, page, tables
    from llmprune.report.results import read_results

    out = tmp_path / "out"
    report = llmprune.prune(model, out=out, experts={"drop": 1}, **SETTINGS)
    read = Report.read(json.loads((out / "llmprune.json").read_text()), out)
    assert read.blocks == report.blocks
    drawn = Parsed(page.render(read_results(out), []).decode())
    assert "num_local_experts 3 of 4" in drawn.text
    assert "has seen no calibration" not in drawn.text
    assert f"{report.dense_weights:,}" in drawn.text
    assert f"× {report.weights / report.dense_weights:.3g}" in drawn.text
    assert drawn.data["away-data"]["data"][0]["y"] == [block.drift for block in report.blocks]
    cells = drawn.data["experts-data"]["data"]
    for place, block in enumerate(report.blocks):
        (told,) = block.experts
        for number, count in enumerate(told.tokens):
            assert cells[0]["customdata"][number][place] == count
            assert cells[0]["z"][number][place] == pytest.approx(math.log10(max(count, 1)), abs=1e-3)
            assert ((place, number) in marked(cells[1])) == (number not in told.kept)
            assert ((place, number) in marked(cells[2])) == (number in told.few)
    assert all(note.replace("\n", " ") in drawn.text for note in tables.expert_notes(report.blocks))
    made = str(card.make_card(report.to_dict(), [], "me/few", {}))
    assert "num_local_experts 3 of 4" in made
    assert "arXiv:2510.13999" in made
    told = [entry for block in report.blocks for entry in block.experts if entry.few]
    assert len(tables.expert_notes(report.blocks)) == len(told) > 0


def marked(trace: dict[str, Any]) -> set[tuple[int, int]]:
    return {(int(block), number) for block, number in zip(trace["x"], trace["y"], strict=True)}


def test_a_sparse_mixture_tells_how_many_tokens_each_expert_got(model: Path, tmp_path: Path) -> None:
    """In the first block, which is dense when it is looked at, as many as where experts go."""
    from llmprune.report import page
    from llmprune.report.results import read_results

    chosen = {"calibration": {"source": "builtin", "samples": 4, "length": 32, "true_sequential": False}}
    sparse = llmprune.prune(model, out=tmp_path / "sparse", sparsity="2:4", method="wanda", **chosen)
    fewer = llmprune.prune(model, out=tmp_path / "fewer", experts={"drop": 1}, **SETTINGS)
    assert sparse.experts[0].tokens == fewer.experts[0].tokens
    assert sparse.experts[0].few == fewer.experts[0].few
    assert [told.name for told in sparse.experts] == [told.name for told in fewer.experts]
    assert all(told.kept == [0, 1, 2, 3] for told in sparse.experts)
    drawn = Parsed(page.render(read_results(tmp_path / "sparse"), []).decode())
    assert drawn.data["experts-data"]["data"][1]["x"] == []  # none went
    part = llmprune.prune(
        model, out=tmp_path / "part", sparsity="2:4", method="wanda", ignore=["*.0.mlp.experts.0.*"], **chosen
    )
    assert [told.name for told in part.experts] == [told.name for told in sparse.experts[1:]]  # one was not counted
    without = llmprune.prune(model, out=tmp_path / "without", sparsity="2:4", method="magnitude")
    assert without.experts == []  # no data, no tokens
    assert "experts-data" not in Parsed(page.render(read_results(tmp_path / "without"), []).decode()).data


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"drop": 0}, r"experts\.drop: of 4 at least one must go"),
        ({"drop": 3}, "each token is sent to 2 experts, so that at least as many must stay, not 1"),
        ({"drop": "most"}, r"experts\.drop must be how many go .*, not 'most'"),
        ({"drop": 1, "by": "reep"}, "unknown way to choose experts 'reep': did you mean 'reap'"),
        ({"by": "norm"}, r"experts\.by says how experts are chosen that go, and experts\.drop not how many"),
        ({"dropp": 1}, "unknown experts key 'dropp': did you mean 'drop'"),
    ],
    ids=str,
)
def test_mistakes(chosen: dict[str, Any], message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        llmprune.prune(model, out=tmp_path / "out", experts=chosen, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_models_and_requests_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot have fewer experts: no number in its config"):
        pipeline.plan(make("llama", tmp_path / "llama"), experts={"drop": 1}, **SETTINGS)
    with pytest.raises(UserError, match="2 groups of experts, of which as many must go of each"):
        pipeline.plan(mixture("deepseek_v3", tmp_path), experts={"drop": 1}, **SETTINGS)
    with pytest.raises(UserError, match="sparsity does not go together with experts"):
        pipeline.plan(model, experts={"drop": 1}, sparsity="2:4", **SETTINGS)


def test_groups_lose_as_many_each(tmp_path: Path) -> None:
    source = mixture("deepseek_v3", tmp_path)
    report = llmprune.prune(source, out=tmp_path / "out", experts={"drop": 2}, **SETTINGS)
    for block in report.blocks[1:]:
        (told,) = block.experts
        assert sum(number < 4 for number in told.kept) == 3
    assert report.blocks[0].experts is None
    assert len(Checkpoint(resolve(tmp_path / "out"), "cpu").blocks) == 3


def test_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--drop-experts", "25%", "--experts-by", "frequency", "--calibration", "builtin", "--samples", "2"]
    assert main(["prune", str(model), "-o", str(tmp_path / "out"), *chosen, "--length", "32"]) == 0
    told = capsys.readouterr().out
    assert "num_local_experts 3 of 4" in told
    assert "hardly any calibration token was sent to" in told
    assert main(["plan", str(model), *chosen, "--length", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["widths"] == {"num_local_experts": [4, 3]}
