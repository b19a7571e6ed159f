"""Models with narrower blocks: what is written, how channels and heads are chosen, and that all else goes on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmprune
from llmprune import pipeline
from llmprune.cli import main
from llmprune.errors import Interrupted, UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.linears import Linear, find_linears
from llmprune.model.source import resolve
from llmprune.model.width import narrowed
from llmprune.model.widths import products
from llmprune.patterns import Columns
from llmprune.recipe import Recipe
from llmprune.report.record import Report
from llmprune.stats import LinearStats
from llmprune.structured import counts, width
from llmprune.structured.width.osscar import Solver as Osscar
from llmprune.structured.width.osscar import _Left
from tests.families import FAMILIES, VOCABULARY, make
from tests.test_depth import interrupted, load, logits, states
from tests.test_distributed import Ranks
from tests.test_evolve import uneven
from tests.test_fit import relative
from tests.test_resume import digests

pytestmark = pytest.mark.usefixtures("no_pages")

SETTINGS: dict[str, Any] = {"calibration": "builtin", "samples": 4, "length": 32}
REPAIR: dict[str, Any] = {"reconstruct": [{"name": "block", "steps": 32}], **SETTINGS}

NO_CHANNELS = {"bloom", "mamba"}
NO_HEADS = {"opt", "gpt2", "bloom", "falcon", "gpt_neox", "olmo2", "mamba", "olmoe", "stablelm", "gptj"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven(tmp_path_factory.mktemp("uneven"), tie_word_embeddings=False)


def readers(source: Path) -> dict[str, tuple[Linear, bool]]:
    """The linears whose inputs are channels of an MLP, or heads of an attention, by name; whether these are heads."""
    checkpoint = Checkpoint(resolve(source), "cpu")
    ends = ("down_proj", "o_proj", "fc2", "c_proj", "dense_4h_to_h", "out_proj", "dense", "fc_out")
    found = {}
    for name in checkpoint.blocks:
        for linear in find_linears(checkpoint.block(name), name):
            last = linear.name.rsplit(".", 1)[-1]
            heads = last == "o_proj"
            if last in ends and (heads or any(part in linear.name for part in ("mlp", "experts", "fc2"))):
                found[linear.name] = linear, heads
    return found


def without(source: Path, left: dict[bool, tuple[int, int]]) -> Any:
    """The dense model by plain transformers, in which no linear looks at the units with the smallest weights.

    Args:
        left: of heads, or of channels, how many units stay, and how many there are where that is not each input.
    """
    loaded = load(source)
    parameters = dict(loaded.named_parameters())
    for linear, heads in readers(source).values():
        if heads in left:
            kept, units = left[heads]
            weight = linear.view(parameters[linear.parameter].data)
            units = units or weight.shape[1]
            scores = weight.abs().sum(0).view(units, -1).sum(1)
            gone = scores.argsort()[: units - (kept if left[heads][1] else weight.shape[1] * kept // 100)]
            weight.view(len(weight), units, -1)[:, gone] = 0
    return loaded


def written_as(source: Path, out: Path, left: dict[bool, tuple[int, int]]) -> None:
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    made = load(out)
    torch.testing.assert_close(logits(made, ids), logits(without(source, left), ids), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        said = made.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        again = made.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(said, again)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NO_CHANNELS))
def test_fewer_channels(family: str, tmp_path: Path) -> None:
    source, out = make(family, tmp_path / "model"), tmp_path / "out"
    report = llmprune.prune(source, out=out, width={"channels": "25%", "by": "magnitude"})
    assert llmprune.verify(out).ok
    assert report.weights == sum(value.numel() for value in _stored(out).values()) < report.dense_weights
    written_as(source, out, {False: (75, 0)})
    config = json.loads((out / "config.json").read_text())
    for name, (was, now) in report.widths.items():
        assert config.get("text_config", config)[name] == now == was * 3 // 4


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NO_HEADS))
def test_fewer_heads(family: str, tmp_path: Path) -> None:
    source, out = make(family, tmp_path / "model"), tmp_path / "out"
    report = llmprune.prune(source, out=out, width={"heads": 1, "by": "magnitude"})
    assert llmprune.verify(out).ok
    groups = 4 if family == "deepseek_v3" else 2
    assert report.widths == {
        "num_attention_heads": [4, 3 if groups == 4 else 2],
        "num_key_value_heads": [groups, groups - 1],
    }
    written_as(source, out, {True: (groups - 1, groups)})


def _stored(out: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(resolve(out), "cpu")
    return checkpoint.read(checkpoint.index)


@pytest.mark.parametrize("family", sorted(NO_CHANNELS))
def test_channels_that_no_number_tells_of(family: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot have "):
        llmprune.prune(make(family, tmp_path / "model"), out=tmp_path / "out", width={"channels": "25%"}, **SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", sorted(NO_HEADS))
def test_heads_that_cannot_go(family: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot (have|be made narrower without)") as told:
        llmprune.prune(make(family, tmp_path / "model"), out=tmp_path / "out", width={"heads": 1}, **SETTINGS)
    assert "can go" not in str(told.value)  # no other number is named
    assert not (tmp_path / "out").exists()


def test_a_block_that_does_something_else_is_found_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    narrowed(Checkpoint(resolve(model), "cpu"), lambda count: count - 8, None)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) * self.up_proj.out_features)
    with pytest.raises(UserError, match=r"cannot be made narrower .*model\.layers\.0 returns something else"):
        narrowed(Checkpoint(resolve(model), "cpu"), lambda count: count - 8, None)


# -- how they are chosen ----------------------------------------------------------------------------------------------


def linear(inputs: int = 12, rows: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, LinearStats]:
    """A weight, its inputs with much in common, and their statistics."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(400, inputs, generator=chance) @ torch.randn(inputs, inputs, generator=chance) + 0.5
    stats = LinearStats(inputs, "gram")
    stats.add(x)
    stats.finish()
    return torch.randn(rows, inputs, generator=chance), x, stats


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "flap"])
def test_scores(name: str, each: int) -> None:
    weight, x, stats = linear()
    own = {
        "magnitude": weight.abs().sum(0),
        "wanda": (weight.abs() * x.square().sum(0).sqrt()).sum(0),
        "flap": x.var(0, correction=0) * weight.square().sum(0),
    }[name]
    scores = own.view(-1, each).sum(1)
    kept = len(scores) - 2
    found = width.load(name).solve(weight, stats, Columns(kept, len(scores)))
    stays = scores.argsort()[2:]
    wanted = torch.zeros_like(weight).view(len(weight), -1, each)
    wanted[:, stays] = weight.view(len(weight), -1, each)[:, stays]
    assert torch.equal(found, wanted.flatten(1))


def best(weight: Tensor, gram: Tensor, kept: list[int], damping: float) -> tuple[Tensor, float]:
    """The best weights for some inputs in closed form, in float64, and what is lost then."""
    gram, weight = gram.double(), weight.double()
    gram = gram + damping * gram.diagonal().diag()
    found = torch.zeros_like(weight)
    found[:, kept] = torch.linalg.solve(gram[kept][:, kept], (weight @ gram[:, kept]).T).T
    change = found - weight
    return found, float(((change @ gram) * change).sum())


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_osscar_finds_the_best_there_is(seed: int, each: int) -> None:
    weight, _, stats = linear(seed=seed)
    pattern = Columns(12 // each * 2 // 3, 12 // each)
    found = Osscar(rounds=1000).solve(weight, stats, pattern)
    kept = (found != 0).any(0).nonzero()[:, 0].tolist()
    assert len(kept) == pattern.kept * each
    wanted, loss = best(weight, stats.gram, kept, 0.01)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-3, atol=1e-4)
    units = pattern.inputs(12).tolist()
    losses = [
        best(weight, stats.gram, sorted(itertools.chain(*chosen)), 0.01)[1]
        for chosen in itertools.combinations(units, pattern.kept)
    ]
    assert loss <= min(losses) * 1.02  # an exchange of one for another does not reach every set
    dropped = (
        stats.relative_error(weight, width.load(name).solve(weight, stats, pattern)) for name in ("wanda", "flap")
    )
    own = stats.relative_error(weight, found)
    assert all(own is not None and other is not None and own < other for other in dropped)


@pytest.mark.parametrize("each", [1, 2])
def test_what_is_left_follows_by_updates(each: int) -> None:
    weight, _, stats = linear()
    gram = stats.gram + 0.01 * stats.gram.diagonal().diag()
    units = torch.arange(12).view(-1, each)
    left = _Left(weight, torch.linalg.inv(gram), units)

    def check(gone: list[int]) -> float:
        kept = [number for number in range(12) if number // each not in gone]
        wanted, loss = best(weight, stats.gram, kept, 0.01)
        torch.testing.assert_close(left.weight, wanted.float(), rtol=1e-3, atol=1e-3)
        inverse = torch.linalg.inv(gram[kept][:, kept])
        torch.testing.assert_close(left.inverse[kept][:, kept], inverse, rtol=1e-3, atol=1e-5)
        return loss

    nothing = check([])
    for unit, cost in enumerate(left.costs().tolist()):
        kept = [number for number in range(12) if number // each != unit]
        assert cost == pytest.approx(best(weight, stats.gram, kept, 0.01)[1] - nothing, rel=1e-3)
    left.remove(torch.tensor([0, 3]))
    before = check([0, 3])
    assert left.costs()[[0, 3]].isinf().all()
    if left.exchange(gram, weight):
        gone = (~left.stays).nonzero()[:, 0].tolist()
        assert check(gone) < before
    while left.exchange(gram, weight):
        pass
    gone = (~left.stays).nonzero()[:, 0].tolist()
    loss = check(gone)
    for back, other in itertools.product(gone, set(range(12 // each)) - set(gone)):  # no exchange is better
        changed = [*(set(gone) - {back}), other]
        kept = [number for number in range(12) if number // each not in changed]
        assert best(weight, stats.gram, kept, 0.01)[1] > loss * 0.999


def test_inputs_that_are_always_zero_go_first() -> None:
    weight, x, _ = linear()
    x[:, [2, 7]] = 0
    stats = LinearStats(12, "gram")
    stats.add(x)
    stats.finish()
    found = Osscar().solve(weight, stats, Columns(10, 12))
    assert (found == 0).all(0).nonzero()[:, 0].tolist() == [2, 7]
    torch.testing.assert_close(found[:, 0], weight[:, 0], rtol=1e-2, atol=1e-2)


def test_columns() -> None:
    pattern = Columns(2, 3, "heads")
    assert str(pattern) == "2 of 3 heads"
    saliency = torch.tensor([[1.0, 1, 5, 0, 2, 2], [0, 0, 5, 0, 2, 2]])
    assert pattern.keep(saliency).tolist() == [[False, False, True, True, True, True]] * 2
    assert pattern.count((2, 6)) == 4
    pruned = saliency * pattern.keep(saliency)
    assert pattern.holds(pruned)
    assert not pattern.holds(saliency)
    assert pattern.staying(pruned).tolist() == [False, True, True]
    assert pattern.staying(torch.zeros(2, 6)).sum() == 2  # as many as should be, whatever is zero
    with pytest.raises(ValueError, match="7 inputs are no 3 whole heads"):
        pattern.keep(torch.zeros(2, 7))


@pytest.mark.parametrize(
    ("asked", "count", "left"),
    [("20%", 1536, 1216), (0.2, 11008, 8800), ("25%", 64, 48), (100, 1536, 1436), ("99%", 64, 2), ("0.1%", 1000, 992)],
)
def test_how_many_stay(asked: Any, count: int, left: int) -> None:
    assert counts.left("channels", asked, count, counts.step_of(count, 1)) == left


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("allowed", ["90%", 0.8])
@pytest.mark.parametrize("key", ["params", "flops"])
def test_budgets(key: str, allowed: Any, family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "model")
    recipe = Recipe.from_dict({"width": {key: allowed}})
    whole = Checkpoint(resolve(source), "cpu")
    made = width.narrow(whole, recipe).checkpoint

    def size(checkpoint: Checkpoint) -> float:
        if key == "params":
            return sum(info.numel for info in checkpoint.index.values())
        config = checkpoint.config
        linears = [linear for name in checkpoint.blocks for linear in find_linears(checkpoint.block(name), name)]
        part = {True: 1.0, False: 2 / 4}  # of four experts a token is sent to two
        head = config.vocab_size * config.hidden_size
        return sum(linear.numel * part[linear.expert is None] for linear in linears) + head

    share = 0.9 if allowed == "90%" else allowed
    assert size(made) <= share * size(whole)
    if family != "qwen3_moe":  # it has two widths
        assert size(one_step_wider(whole, made)) > share * size(whole)


def one_step_wider(whole: Checkpoint, made: Checkpoint) -> Checkpoint:
    """The model in which one more step of channels stays."""
    kept = {was: now for was, now in zip(*(_widths(one) for one in (whole, made)), strict=True) if was != now}
    return narrowed(whole, lambda count: min(count - 1, kept.get(count, count) + 4)).checkpoint


def _widths(checkpoint: Checkpoint) -> list[int]:
    names = ("intermediate_size", "moe_intermediate_size", "n_inner")
    return [getattr(checkpoint.config, name, None) or 4 * checkpoint.hidden_size for name in names]


def test_a_budget_counts_heads_that_go_besides(model: Path) -> None:
    whole = Checkpoint(resolve(model), "cpu")
    total = sum(info.numel for info in whole.index.values())
    for heads in (None, 1):
        made = width.narrow(whole, Recipe.from_dict({"width": {"params": "75%", "heads": heads}}))
        assert sum(info.numel for info in made.checkpoint.index.values()) <= 0.75 * total
    with pytest.raises(
        UserError, match=r"width\.params: channels alone bring the model to .* at the least, and 5% may"
    ):
        width.narrow(whole, Recipe.from_dict({"width": {"params": "5%"}}))
    with pytest.raises(UserError, match=r"width\.flops must be the share that may stay \(80%\), not 'half'"):
        width.narrow(whole, Recipe.from_dict({"width": {"flops": "half"}}))
    with pytest.raises(UserError, match=r"width\.channels and width\.params both say how many channels go"):
        Recipe.from_dict({"width": {"channels": 1, "params": "80%"}})


@pytest.mark.parametrize("key", ["params", "flops"])
@pytest.mark.parametrize("ranking", ["local", "global"])
def test_a_budget_is_a_share_of_the_dense_model_whatever_else_goes(key: str, ranking: str, tmp_path: Path) -> None:
    """Blocks, hidden channels and experts that go as well are part of what goes."""
    source = make("mixtral", tmp_path / "model", num_hidden_layers=4)
    asked = {"ranking": ranking, "by": "taylor"} if ranking == "global" else {}
    others = {"depth": {"drop": [1]}, "experts": {"drop": 1}}

    def left(share: float, **more: Any) -> Checkpoint:
        checkpoint, made = pipeline.plan(source, width={key: share, **asked}, **{**more, **SETTINGS})
        return made.written(checkpoint)

    def size(checkpoint: Checkpoint) -> float:
        return checkpoint.weights if key == "params" else products(checkpoint)

    dense = size(Checkpoint(resolve(source), "cpu"))
    for more in ({"depth": others["depth"]}, others):
        made = left(0.4, **more)
        assert 0.3 * dense < size(made) <= 0.4 * dense
        assert len(made.blocks) == 3
    if ranking == "local":
        with pytest.raises(UserError, match=rf"width\.{key}: 0\.9 may stay, and what goes besides is enough for that"):
            left(0.9, depth=others["depth"])
        made = left(0.9, **others)  # experts go, and no channel
        assert made.config.intermediate_size == Checkpoint(resolve(source), "cpu").config.intermediate_size
    else:
        with pytest.raises(UserError, match=rf"width\.{key}: 0\.9 may stay, and what goes besides is enough"):
            left(0.9, **others)


def test_a_budget_counts_hidden_channels_and_heads_that_go_besides(model: Path) -> None:
    dense = Checkpoint(resolve(model), "cpu").weights
    checkpoint, made = pipeline.plan(model, width={"params": "50%", "hidden": 8, "heads": 1}, **SETTINGS)
    left = made.written(checkpoint)
    assert 0.42 * dense < left.weights <= 0.5 * dense
    assert left.hidden_size == Checkpoint(resolve(model), "cpu").hidden_size - 8


def test_heads_that_the_config_cannot_say_are_told_with_those_that_it_can(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "model", num_attention_heads=8, num_key_value_heads=8)
    with pytest.raises(UserError, match=r"of its 8 heads with keys and values 4, 6 or 7 can go"):
        pipeline.plan(source, width={"heads": 1}, **SETTINGS)


@pytest.mark.parametrize(("asked", "count", "left"), [("20%", 3, 2), ("50%", 4, 2), (1, 2, 1), ("90%", 8, 1)])
def test_how_many_heads_stay(asked: Any, count: int, left: int) -> None:
    assert counts.left("heads", asked, count) == left


# -- whole runs -------------------------------------------------------------------------------------------------------

BOTH: dict[str, Any] = {"channels": "25%", "heads": 1}


def test_what_stays_makes_up_for_what_went(model: Path, tmp_path: Path) -> None:
    plain = llmprune.prune(model, out=tmp_path / "plain", width={**BOTH, "by": "wanda"}, **SETTINGS)
    rebuilt = llmprune.prune(model, out=tmp_path / "rebuilt", width=BOTH, **SETTINGS)
    fitted = llmprune.prune(model, out=tmp_path / "out", width=BOTH, **REPAIR)
    first = [record.name for record in plain.solved][:2]  # whose inputs hang on what came before the least
    for one, other in zip(plain.solved, rebuilt.solved, strict=True):
        assert one.kept == other.kept
        if one.name in first:
            assert other.relative_error < one.relative_error
    _, ids = _tokens(model)
    dense = states(model, ids)
    far = [relative(states(tmp_path / name, ids)[-1], dense[-1]) for name in ("plain", "rebuilt", "out")]
    assert far[2] < far[1] < far[0]
    for place, record in enumerate(fitted.blocks):
        assert record.away == pytest.approx(
            relative(states(tmp_path / "out", ids)[place + 1], dense[place + 1]), rel=1e-2
        )
        assert record.away < record.away_before


def _tokens(model: Path) -> tuple[Any, Tensor]:
    recipe = Recipe.from_dict({"calibration": {"source": "builtin", "samples": 4, "length": 32}})
    checkpoint = Checkpoint(resolve(model), "cpu")
    return checkpoint, pipeline.draw(checkpoint, recipe, 32).ids


def test_cg_follows_a_choice_that_changes_nothing(model: Path, tmp_path: Path) -> None:
    chosen = {"width": {"channels": "25%", "by": "flap"}, **SETTINGS}
    report = llmprune.prune(model, out=tmp_path / "out", reconstruct=["cg"], **chosen)
    for record in report.solved:
        assert record.course["cg"] < record.course["flap"]
    aimed = llmprune.prune(
        model, out=tmp_path / "aimed", reconstruct=["cg"], **chosen, **{"calibration.asymmetric": 0.5}
    )
    assert digests(tmp_path / "aimed") != digests(tmp_path / "out")
    assert aimed.weights == report.weights


@pytest.mark.parametrize("family", ["mixtral", "gemma3_text", "gpt_oss", "qwen3_next"])
def test_best_goes_with_narrower_and_fewer_blocks(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "model", **({"num_hidden_layers": 3} if family != "qwen3_next" else {}))
    more = {} if family == "qwen3_next" else {"depth": {"drop": [1]}}
    report = llmprune.prune(source, out=tmp_path / "out", width=BOTH, quality="best", **SETTINGS, **more)
    assert llmprune.verify(tmp_path / "out").ok
    assert report.sparsity == 0
    assert report.weights == sum(value.numel() for value in _stored(tmp_path / "out").values())
    for record in report.blocks:
        assert record.away <= record.away_before
    loaded = load(tmp_path / "out")
    assert logits(loaded, torch.tensor([[3, 4, 5]])).isfinite().all()


def test_the_narrower_model_is_pruned_as_any_other(model: Path, tmp_path: Path) -> None:
    llmprune.prune(model, out=tmp_path / "narrow", width=BOTH, **SETTINGS)
    report = llmprune.prune(tmp_path / "narrow", out=tmp_path / "out", sparsity="2:4", method="wanda", **SETTINGS)
    assert report.sparsity == 0.5
    assert llmprune.verify(tmp_path / "out").ok


@pytest.mark.parametrize("more", [{}, {"reconstruct": [{"name": "block", "steps": 4}]}], ids=["plain", "fitted"])
@pytest.mark.parametrize("stopped", [1, 2])
def test_it_goes_on_where_it_was(
    stopped: int, more: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"width": BOTH, **SETTINGS, **more}
    llmprune.prune(model, out=tmp_path / "whole", **chosen)
    interrupted(model, tmp_path / "out", stopped, monkeypatch, of=3, **chosen)
    with pytest.raises(UserError, match=r"holds an unfinished run with another recipe\.width"):
        llmprune.prune(model, out=tmp_path / "out", **{**chosen, "width": {"channels": "50%"}})
    report = llmprune.prune(model, out=tmp_path / "out", **chosen)
    assert report.resumed == stopped
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def narrowed_on(model: Path, out: Path) -> None:
    llmprune.prune(model, out=out, width=BOTH, **SETTINGS)


def test_ranks_agree(model: Path, tmp_path: Path) -> None:
    narrowed_on(model, tmp_path / "one")
    with Ranks(tmp_path, 2, narrowed_on, model, tmp_path / "two") as ranks:
        ranks.all_well()
    one, two = _stored(tmp_path / "one"), _stored(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, value in one.items():  # the same units, fitted to sums in another order
        torch.testing.assert_close(two[key], value, rtol=1e-2, atol=1e-3)


def test_the_plan_counts_what_is_made_beside(model: Path) -> None:
    _, narrow = pipeline.plan(model, width=BOTH, **SETTINGS)
    _, dense = pipeline.plan(model, depth={"drop": [0]}, **SETTINGS)
    made, plain = (plan.schedule.memory["write"].host - plan.schedule.base for plan in (narrow, dense))
    assert made > plain
    told = narrow.to_dict()
    assert told["widths"] == {
        "intermediate_size": [64, 48], "num_attention_heads": [4, 2], "num_key_value_heads": [2, 1]
    }  # fmt: skip
    assert {entry["pattern"] for entry in told["linears"] if entry["pattern"]} == {"48 of 64 channels", "1 of 2 heads"}


def test_reports_tell_how_narrow_it_is(model: Path, tmp_path: Path) -> None:
    from llmprune.report import card, page
    from llmprune.report.results import read_results

    out = tmp_path / "out"
    report = llmprune.prune(model, out=out, width={"channels": "25%"}, **SETTINGS)
    read = Report.read(json.loads((out / "llmprune.json").read_text()), out)
    assert read.smaller == report.smaller == "intermediate_size 48 of 64"
    drawn = page.render(read_results(out), []).decode()
    assert "ntermediate_size 48 of 64" in drawn
    assert "narrower: 48 of 64 channels" in drawn
    made = str(card.make_card(report.to_dict(), [], "me/narrow", {}))
    assert "it has intermediate_size 48 of 64, and" in made
    assert "OSSCAR" in made or "osscar" in made
    assert "zeros are stored" not in made


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"channels": 0}, r"width\.channels: of 64 at least one must go"),
        ({"channels": 64}, r"width\.channels: of 64 .* at least one must stay"),
        ({"heads": 2}, r"width\.heads: of 2 .* at least one must stay"),
        ({"channels": "a few"}, r"width\.channels must be how many go .*, not 'a few'"),
        ({"channels": "120%"}, r"width\.channels must be how many go .*, not '120%'"),
        ({"channels": True}, r"width\.channels must be .*, not True"),
        ({"channels": "20%", "by": "oscar"}, "unknown way to choose channels and heads 'oscar': did you mean 'osscar'"),
        ({"channels": "20%", "by": {"name": "osscar", "damping": 0}}, r"damping must lie in \(0, 1\], not 0"),
        ({"channels": "20%", "by": {"name": "osscar", "rounds": 0}}, "rounds must be at least 1, not 0"),
        ({"channels": "20%", "by": {"name": "osscar", "exchanges": -1}}, "exchanges must not be below 0, not -1"),
        ({"by": "flap"}, r"width\.by says how channels and heads are chosen that go, and neither"),
        ({"chanels": 1}, "unknown width key 'chanels': did you mean 'channels'"),
    ],
    ids=str,
)
def test_mistakes(chosen: dict[str, Any], message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        llmprune.prune(model, out=tmp_path / "out", width=chosen, **SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sparsity", "2:4"),
        ("ignore", ["*.o_proj"]),
        ("rules", [{"match": "*", "sparsity": "50%"}]),
        ("scope", "row"),
        ("allocation", "owl"),
        ("permute", True),
        ("refine", "swaps"),
    ],
)
def test_what_does_not_go_together(key: str, value: Any, model: Path) -> None:
    with pytest.raises(UserError, match=f"{key} does not go together with width"):
        pipeline.plan(model, width=BOTH, **SETTINGS, **{key: value})


def test_the_default_sparsity_is_none() -> None:
    assert Recipe.from_dict({"width": {"heads": 1}}).settled().sparsity is None
    assert Recipe.from_dict({"width": {"by": "flap"}}).settled().sparsity == "50%"


def test_an_older_run_without_width_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted):
        llmprune.prune(model, out=tmp_path / "out", method="magnitude")
    header = json.loads((tmp_path / "out" / "llmprune.journal.jsonl").read_text().splitlines()[0])
    assert "width" not in header["fingerprint"]["recipe"]


def test_the_command_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out, few = tmp_path / "out", ["--calibration", "builtin", "--samples", "2", "--length", "32"]
    chosen = ["--drop-channels", "25%", "--drop-heads", "1", "--narrow-by", "wanda", *few]
    assert main(["plan", str(model), *chosen]) == 0
    told = capsys.readouterr().out
    assert "intermediate_size 48 of 64, num_attention_heads 2 of 4" in told
    assert "48 of 64 channels" in told
    assert main(["prune", str(model), "-o", str(out), *chosen]) == 0
    told = capsys.readouterr().out
    assert "narrower: 48 of 64 channels" in told
    assert main(["prune", str(model), "-o", str(tmp_path / "two"), *chosen, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["widths"]["intermediate_size"] == [64, 48]
    assert main(["plan", str(model), "--drop-channels", "99"]) == 2
    assert "width.channels: of 64" in capsys.readouterr().err


@pytest.mark.parametrize("more", [{"width": BOTH}, {"experts": {"drop": 1}}], ids=["width", "experts"])
def test_it_goes_on_with_more_ranks(more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make("mixtral", tmp_path / "model")
    interrupted(source, tmp_path / "out", 1, monkeypatch, of=3, **SETTINGS, **more)
    with Ranks(tmp_path, 2, smaller_on, source, tmp_path / "out", more) as ranks:
        ranks.all_well()
    report = Report.read(json.loads((tmp_path / "out" / "llmprune.json").read_text()), tmp_path / "out")
    assert (report.resumed, report.ranks) == (1, 2)
    assert llmprune.verify(tmp_path / "out").ok


def smaller_on(model: Path, out: Path, more: dict[str, Any]) -> None:
    llmprune.prune(model, out=out, **SETTINGS, **more)


def test_shared_experts_of_several(tmp_path: Path) -> None:
    source = make("deepseek_v3", tmp_path / "model", n_shared_experts=2)
    report = llmprune.prune(source, out=tmp_path / "out", width={"channels": "25%"}, **SETTINGS)
    assert report.widths["moe_intermediate_size"] == [16, 12]
    assert llmprune.verify(tmp_path / "out").ok


@pytest.mark.parametrize("bias", [-1.0, 1.0])
def test_a_bias_of_the_router_does_not_matter(bias: float, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = make("deepseek_v3", tmp_path / "model", n_routed_experts=8)
    file = source / "model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if key.endswith("e_score_correction_bias")]:
        tensors[key] = torch.full_like(tensors[key], bias)
    save_file(tensors, file, metadata={"format": "pt"})
    report = llmprune.prune(source, out=tmp_path / "out", experts={"drop": 2}, **SETTINGS)
    assert report.widths == {"n_routed_experts": [8, 6]}


def test_routers_that_nearly_tie_do_not_matter(tmp_path: Path) -> None:
    for seed in range(3):
        source = make(
            "gpt_oss", tmp_path / f"{seed}", torch.bfloat16, seed, num_local_experts=32, num_experts_per_tok=4
        )
        narrowed(Checkpoint(resolve(source), "cpu"), heads=lambda count: count - 1)


def test_widths_that_kernels_do_not_take(tmp_path: Path) -> None:
    source = make("mixtral", tmp_path / "model", torch.bfloat16)
    with pytest.raises(UserError, match="kernels for experts take widths that are a multiple of 8, and 60 is none"):
        pipeline.plan(source, width={"channels": 4}, **SETTINGS)
    assert pipeline.plan(source, width={"channels": "10%"}, **SETTINGS)[1].to_dict()["widths"] == {
        "intermediate_size": [64, 56]
    }


def test_widths_of_nothing_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "granitemoeshared", FAMILIES["granitemoe"])
    source = make("granitemoeshared", tmp_path / "model", shared_intermediate_size=0)
    assert pipeline.plan(source, width={"channels": "25%"}, **SETTINGS)[1].to_dict()["widths"] == {
        "intermediate_size": [64, 48]
    }


def test_inputs_that_never_came_keep_their_weights(tmp_path: Path) -> None:
    weight, x, _ = linear()
    x[:, :6] = 0
    stats = LinearStats(12, "gram")
    stats.add(x)
    stats.finish()
    found = Osscar().solve(weight, stats, Columns(8, 12))
    dead = [place for place in range(6) if bool((found[:, place] != 0).any())]
    assert len(dead) == 2
    assert torch.equal(found[:, dead], weight[:, dead])
