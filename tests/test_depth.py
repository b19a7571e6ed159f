"""Models with fewer blocks: what is written, how blocks are chosen, and that all else goes on as with any model."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import llmprune
from llmprune import data, dense, memory, pipeline, prepare
from llmprune.cli import main
from llmprune.cost import cost
from llmprune.errors import Failure, Interrupted, UserError
from llmprune.evaluate.perplexity import perplexity
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.depth import shortened
from llmprune.model.index import read_index
from llmprune.model.quiet import quiet
from llmprune.model.source import resolve
from llmprune.progress import Silent
from llmprune.recipe import Recipe, assemble, parse_size
from llmprune.report.record import Report
from llmprune.structured import depth, shorten
from tests.families import FAMILIES, PARTS, VOCABULARY, make, tokenizer
from tests.test_distributed import Ranks
from tests.test_evolve import uneven
from tests.test_fit import relative
from tests.test_resume import digests

pytestmark = pytest.mark.usefixtures("no_pages")

BLOCKS = 6
SETTINGS: dict[str, Any] = {"calibration": "builtin", "samples": 4, "length": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven(tmp_path_factory.mktemp("uneven"), tie_word_embeddings=False, num_hidden_layers=BLOCKS)


def load(folder: Path) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def without(folder: Path, gone: Sequence[int]) -> Any:
    """The model by plain transformers, in which some blocks give back what they are given."""
    loaded = load(folder)
    names = Checkpoint(resolve(folder), "cpu").blocks
    for number in gone:
        block = loaded.get_submodule(names[number])
        tuples = isinstance(_output_of(loaded, block), tuple)

        def passing(*args: Any, _tuples: bool = tuples, **kwargs: Any) -> Any:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            return (hidden,) if _tuples else hidden

        block.forward = passing
    return loaded


def _output_of(loaded: Any, block: torch.nn.Module) -> Any:
    seen: list[Any] = []
    hook = block.register_forward_hook(lambda *told: seen.append(told[2]))
    with torch.no_grad():
        loaded(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    hook.remove()
    return seen[0]


def logits(loaded: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return loaded(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("gone", [[1], [0]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_does_as_before(family: str, gone: list[int], tmp_path: Path) -> None:
    source, out = make(family, tmp_path / "model"), tmp_path / "out"
    report = llmprune.prune(source, out=out, depth={"drop": gone})
    assert report.kept_blocks == [number for number in range(3) if number not in gone]
    assert not report.pruned
    assert llmprune.verify(out).ok
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    written = load(out)
    torch.testing.assert_close(logits(written, ids), logits(without(source, gone), ids), rtol=1e-4, atol=1e-4)
    config = json.loads((out / "config.json").read_text())
    assert (config.get("num_hidden_layers") or config.get("n_layer")) == 2
    assert all(len(value) != 3 for name, value in config.items() if name.endswith("layer_types"))
    if written.config.get_text_config().__dict__.get("layer_types") == ["linear_attention"] * 2:
        return  # transformers has no cache for a model without any attention of the other kind
    with torch.no_grad():  # with a cache, which blocks have by their number
        said = written.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        again = written.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(said, again)


@pytest.mark.parametrize(
    ("gone", "left"),
    [
        ([1, 3], ["mamba", "attention", "mamba", "attention", "mlp"]),
        ([2], ["mamba", "mlp", "mlp", "mamba", "attention", "mlp"]),
        ([0, 5, 6], ["mlp", "attention", "mlp", "mamba"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", sorted(PARTS))
def test_an_attention_or_an_mlp_alone(family: str, gone: list[int], left: list[str], tmp_path: Path) -> None:
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    source, out = make(family, tmp_path / "model"), tmp_path / "out"
    report = llmprune.prune(source, out=out, depth={"drop": gone}, sparsity="2:4", method="wanda", **SETTINGS)
    assert llmprune.verify(out).ok
    assert report.kept_blocks == [number for number in range(7) if number not in gone]
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    config = json.loads((out / "config.json").read_text())
    assert [names.get(kind, kind) for kind in config["layers_block_type"]] == left
    llmprune.prune(source, out=tmp_path / "plain", depth={"drop": gone})
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    wanted = logits(without(source, gone), ids)
    torch.testing.assert_close(logits(load(tmp_path / "plain"), ids), wanted, rtol=1e-4, atol=1e-4)


def test_tensors_are_those_of_the_blocks_that_stay(model: Path, tmp_path: Path) -> None:
    report = llmprune.prune(model, out=tmp_path / "out", depth={"drop": [0, 3, 5]})
    dense, left = (Checkpoint(resolve(path), "cpu") for path in (model, tmp_path / "out"))
    assert len(left.blocks) == 3
    for place, number in enumerate((1, 2, 4)):
        one, other = dense.read(dense.block_keys[number]), left.read(left.block_keys[place])
        assert len(one) == len(other)
        for key, value in one.items():
            assert torch.equal(value, other[key.replace(f".{number}.", f".{place}.", 1)])
    assert left.read(left.outer_keys).keys() == dense.read(dense.outer_keys).keys()
    assert report.weights == sum(info.numel for info in read_index(tmp_path / "out").values())
    assert report.dense_weights == sum(info.numel for info in read_index(model).values())


def test_keys_that_no_module_asks_for_go_and_move_with_their_block(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = make("llama", tmp_path / "model")
    file = source / "model.safetensors"
    tensors = load_file(file)
    more = {f"model.layers.{number}.rotary.freq": torch.full((2,), float(number)) for number in range(4)}
    save_file({**tensors, **more}, file, metadata={"format": "pt"})
    llmprune.prune(source, out=tmp_path / "out", depth={"drop": [0]})
    index = read_index(tmp_path / "out")
    found = {key: Checkpoint(resolve(tmp_path / "out"), "cpu").read([key])[key] for key in index if "freq" in key}
    # the fourth follows the last block, and goes on doing so
    assert {key.split(".")[2]: float(value[0]) for key, value in found.items()} == {"0": 1.0, "1": 2.0, "2": 3.0}


# -- how they are chosen ----------------------------------------------------------------------------------------------


def looking(model: Path, **changes: Any) -> tuple[Any, Tensor]:
    """The dense model as a chooser sees it, and the tokens."""
    checkpoint, plan = pipeline.plan(model, **SETTINGS, depth={"drop": 1, **changes})
    whole = Checkpoint(resolve(model), "cpu")
    tokens = data.draw(data.documents("builtin"), checkpoint.tokenizer, 4, 32, 0, "builtin")
    return shorten._Whole(whole, plan.chain, tokens, 4 * 32, plan.abreast), tokens.ids


def test_influence_is_what_it_is_by_plain_transformers(model: Path) -> None:
    whole, ids = looking(model)
    loaded = load(model).double()
    states: list[Tensor] = []
    for block in loaded.model.layers:
        block.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    loaded.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    logits(loaded, ids)
    alike = [torch.cosine_similarity(one, other, dim=-1).mean() for one, other in itertools.pairwise(states)]
    torch.testing.assert_close(whole.influence(), 1 - torch.stack(alike), rtol=1e-4, atol=1e-6)


def scored(model: Path, gone: Sequence[int], ids: Tensor, score: str) -> float:
    """Restated with plain transformers, in float64."""
    left = logits(without(model, gone).double(), ids).log_softmax(-1)
    if score == "perplexity":
        return float(-left[:, :-1].gather(2, ids[:, 1:, None]).mean())
    dense = logits(load(model).double(), ids).log_softmax(-1)
    return float((dense.exp() * (dense - left)).sum(-1).mean())


@pytest.mark.parametrize("score", ["kl", "perplexity"])
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_answers_of_shorter_models_are_what_they_are_by_plain_transformers(
    score: Any, at_once: int, model: Path
) -> None:
    whole, ids = looking(model)
    whole._at_once = at_once
    candidates = [frozenset(gone) for gone in ((), (0,), (2, 3), (5,), (0, 1, 2, 3, 4, 5))]
    found = whole.measure(candidates, range(4), score)
    assert found == [pytest.approx(scored(model, sorted(gone), ids, score), rel=1e-3, abs=1e-5) for gone in candidates]
    some = whole.measure(candidates[2:3], [3, 1], score)
    assert some == [pytest.approx(scored(model, [2, 3], ids[[1, 3]], score), rel=1e-3)]


class Told:
    """A model in which every choice of blocks has a value that is made up."""

    def __init__(self, blocks: int, value: Callable[[frozenset[int]], float]) -> None:
        self.blocks, self.sequences, self.value = blocks, 4, value
        self.asked: list[frozenset[int]] = []

    def influence(self) -> Tensor:
        return torch.tensor([self.value(frozenset({number})) for number in range(self.blocks)])

    def measure(self, without: Sequence[frozenset[int]], part: Sequence[int], score: str = "kl") -> list[float]:
        assert len(part) <= 4
        self.asked += without
        return [self.value(gone) for gone in without]


COSTS = (9.0, 3.0, 1.0, 2.0, 5.0, 0.5, 7.0, 8.0)


def together(gone: frozenset[int]) -> float:
    """What neighbours cost is more than the sum, so that those that cost least alone are a bad choice."""
    return sum(COSTS[number] for number in gone) + 6 * sum(number + 1 in gone for number in gone)


@pytest.mark.parametrize("count", range(1, 7))
def test_greedy_takes_the_best_each_time(count: int) -> None:
    expected: frozenset[int] = frozenset()
    for _ in range(count):
        options = [expected | {number} for number in range(8) if number not in expected]
        expected = min(options, key=together)
    assert depth.load("greedy").choose(Told(8, together), count, Silent()) == expected


@pytest.mark.parametrize("count", range(1, 8))
def test_influence_takes_the_least(count: int) -> None:
    least = sorted(range(8), key=COSTS.__getitem__)[:count]
    assert depth.load("influence").choose(Told(8, together), count, Silent()) == frozenset(least)


@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize("seed", range(3))
def test_evolve_finds_the_best_of_all(count: int, seed: int) -> None:
    best = min(map(frozenset, itertools.combinations(range(8), count)), key=together)
    chosen = depth.load({"name": "evolve", "seed": seed}).choose(Told(8, together), count, Silent())
    assert together(chosen) == together(best)


def test_evolve_is_never_worse_than_what_it_began_with() -> None:
    def backwards(gone: frozenset[int]) -> float:
        return 0.0 if gone == frozenset({5, 2}) else 1.0

    told = Told(8, lambda gone: together(gone) if len(gone) == 1 else backwards(gone))
    assert depth.load({"name": "evolve", "generations": 3}).choose(told, 2, Silent()) == {5, 2}


@pytest.mark.parametrize("by", ["influence", "greedy", {"name": "greedy", "score": "perplexity"}, "evolve"], ids=str)
def test_whole_runs(by: Any, model: Path, tmp_path: Path) -> None:
    report = llmprune.prune(model, out=tmp_path / "out", depth={"drop": "34%", "by": by}, **SETTINGS)
    assert report.kept_blocks is not None
    assert len(report.kept_blocks) == 4
    assert report.calibration is not None


@pytest.mark.parametrize("score", ["kl", "perplexity"])
def test_a_whole_run_takes_the_best_each_time(score: str, model: Path, tmp_path: Path) -> None:
    one = {**SETTINGS, "samples": 1}  # a quarter of one sequence is all of it
    by = {"name": "greedy", "score": score}
    report = llmprune.prune(model, out=tmp_path / "out", depth={"drop": 2, "by": by}, **one)
    ids = looking(model)[1][:1]
    gone: list[int] = []
    for _ in range(2):
        options = [sorted({*gone, number}) for number in range(BLOCKS) if number not in gone]
        gone = min(options, key=lambda option: scored(model, option, ids, score))
    assert report.kept_blocks == [number for number in range(BLOCKS) if number not in gone]


# -- with all the rest ------------------------------------------------------------------------------------------------


def test_what_is_left_is_pruned_besides(model: Path, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"sparsity": "2:4", "method": "wanda", "reconstruct": "cg", **SETTINGS}
    chosen["calibration.asymmetric"] = 0  # else one would aim at the dense model, and the other at what is left of it
    report = llmprune.prune(model, out=tmp_path / "both", depth={"drop": [1, 4]}, **chosen)
    assert report.sparsity == 0.5
    assert len(report.blocks) == 4
    assert llmprune.verify(tmp_path / "both").ok
    llmprune.prune(model, out=tmp_path / "short", depth={"drop": [1, 4]})
    llmprune.prune(tmp_path / "short", out=tmp_path / "then", **chosen)  # one after the other comes to the same
    both, then = digests(tmp_path / "both"), digests(tmp_path / "then")
    assert {name: both[name] for name in both if name.endswith("safetensors")} == {
        name: then[name] for name in then if name.endswith("safetensors")
    }


def test_the_dense_model_is_measured_whole(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 20)
    asked = {"text": str(text), "length": 32, "max_perplexity": None}
    report = llmprune.prune(model, out=tmp_path / "out", depth={"drop": [0, 1]}, evaluate=asked)
    assert report.dense is not None
    assert report.sparse is not None
    whole, left = (perplexity(path, str(text), length=32) for path in (model, tmp_path / "out"))
    assert (report.dense.value, report.sparse.value) == pytest.approx((whole.value, left.value))
    assert whole.value != pytest.approx(left.value)


def interrupted(
    model: Path, out: Path, blocks: int, monkeypatch: pytest.MonkeyPatch, of: int = 4, **chosen: Any
) -> None:
    """A run that is stopped when so many of its blocks are finished."""
    advance, left = pipeline._propagate, [blocks]

    def stopping(*args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        advance(*args)

    monkeypatch.setattr(pipeline, "_propagate", stopping)
    with pytest.raises(Interrupted, match=f"{blocks} of {of} blocks are finished"):
        llmprune.prune(model, out=out, **chosen)
    monkeypatch.setattr(pipeline, "_propagate", advance)


def test_a_run_goes_on_with_the_blocks_that_were_chosen(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, Any] = {"depth": {"drop": 2}, "sparsity": "50%", "method": "wanda", **SETTINGS}
    llmprune.prune(model, out=tmp_path / "whole", **chosen)
    interrupted(model, tmp_path / "out", 3, monkeypatch, **chosen)
    monkeypatch.setattr(prepare, "choose", lambda *_: pytest.fail("they were chosen before"))
    report = llmprune.prune(model, out=tmp_path / "out", **chosen)
    assert report.resumed == 3
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_another_choice_is_another_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted):
        llmprune.prune(model, out=tmp_path / "out", depth={"drop": [1]})
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"unfinished run with another recipe\.depth\.drop"):
        llmprune.prune(model, out=tmp_path / "out", depth={"drop": [2]})


def shortened_on(model: Path, out: Path) -> None:
    pipeline.draw_page = lambda *_: None  # type: ignore[assignment]
    report = llmprune.prune(model, out=out, depth={"drop": 2}, sparsity="50%", method="wanda", **SETTINGS)
    assert report.ranks == int(os.environ["WORLD_SIZE"])
    assert report.kept_blocks is not None


def test_ranks_choose_what_one_does(model: Path, tmp_path: Path) -> None:
    llmprune.prune(model, out=tmp_path / "one", depth={"drop": 2}, sparsity="50%", method="wanda", **SETTINGS)
    with Ranks(tmp_path, 2, shortened_on, model, tmp_path / "two") as ranks:
        ranks.all_well()
    one, two = (json.loads((tmp_path / name / "llmprune.json").read_text()) for name in ("one", "two"))
    assert one["kept_blocks"] == two["kept_blocks"]
    assert [linear["sparsity"] for linear in one["linears"]] == [linear["sparsity"] for linear in two["linears"]]


# -- what is left makes up for what went ------------------------------------------------------------------------------

REPAIR: dict[str, Any] = {"reconstruct": [{"name": "block", "steps": 32}], **SETTINGS}


def states(folder: Path, ids: Tensor) -> list[Tensor]:
    """What goes into each block, and what leaves the last, by plain transformers."""
    loaded, found = load(folder), []
    for block in loaded.model.layers:
        block.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    loaded.model.norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    logits(loaded, ids)
    return found


def test_blocks_are_fitted_to_the_states_of_the_whole_model(model: Path, tmp_path: Path) -> None:
    gone = [1, 2, 5]
    llmprune.prune(model, out=tmp_path / "plain", depth={"drop": gone})
    report = llmprune.prune(model, out=tmp_path / "out", depth={"drop": gone}, **REPAIR)
    assert report.kept_blocks == [0, 3, 4]
    _, ids = looking(model)
    dense, plain, fitted = (states(path, ids) for path in (model, tmp_path / "plain", tmp_path / "out"))
    for place, end in enumerate((3, 4, 6)):  # behind each block, and the gap that follows it
        assert relative(fitted[place + 1], dense[end]) < relative(plain[place + 1], dense[end])
        record = report.blocks[place]
        assert record.away == pytest.approx(relative(fitted[place + 1], dense[end]), rel=1e-3)
        assert record.away_before is not None
        assert record.away < record.away_before
    assert report.blocks[0].away_before == pytest.approx(relative(plain[1], dense[3]), rel=1e-3)
    assert not report.pruned
    assert llmprune.verify(tmp_path / "out").ok


def test_a_gap_at_the_start_is_made_up_for_too(model: Path, tmp_path: Path) -> None:
    report = llmprune.prune(model, out=tmp_path / "out", depth={"drop": [0, 1]}, **REPAIR)
    _, ids = looking(model)
    dense, fitted = states(model, ids), states(tmp_path / "out", ids)
    assert report.blocks[0].away == pytest.approx(relative(fitted[1], dense[3]), rel=1e-3)


def test_blocks_in_front_of_all_gaps_stay_as_they_are(model: Path, tmp_path: Path) -> None:
    report = llmprune.prune(model, out=tmp_path / "out", depth={"drop": [3]}, ignore=["*.4.mlp.up_proj"], **REPAIR)
    dense, left = (Checkpoint(resolve(path), "cpu") for path in (model, tmp_path / "out"))
    for number in range(2):
        assert report.blocks[number].away is None  # there is nothing to make up for
        written = left.load_block(number).state
        assert all(torch.equal(value, written[name]) for name, value in dense.load_block(number).state.items())
    before, after = dense.load_block(4).state, left.load_block(3).state
    same = {name for name, value in after.items() if torch.equal(value, before[name.replace("layers.3", "layers.4")])}
    fitted = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}
    assert not {name.split(".")[-2] for name in same} & fitted
    assert "model.layers.3.mlp.up_proj.weight" in same  # names are those of the dense model


def test_a_repair_goes_on_where_it_was(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"depth": {"drop": [1, 4]}, **REPAIR}
    llmprune.prune(model, out=tmp_path / "whole", **chosen)
    interrupted(model, tmp_path / "out", 2, monkeypatch, **chosen)
    report = llmprune.prune(model, out=tmp_path / "out", **chosen)
    assert report.resumed == 2
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("family", ["mixtral", "gemma3_text", "gpt2"])
def test_best_goes_with_fewer_blocks(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "model")
    report = llmprune.prune(
        source, out=tmp_path / "out", depth={"drop": [1]}, sparsity="2:4", quality="best", **SETTINGS
    )
    assert report.sparsity == 0.5
    assert llmprune.verify(tmp_path / "out").ok
    for record in report.blocks:
        assert record.away is not None
        assert record.away_before is not None
        assert record.away <= record.away_before


# -- the plan, the report, and mistakes -------------------------------------------------------------------------------


def test_the_plan_says_what_goes_and_what_it_takes(model: Path) -> None:
    checkpoint, plan = pipeline.plan(model, depth={"drop": 2}, **SETTINGS)
    assert len(checkpoint.blocks) == len(plan.blocks) == 4
    told = plan.to_dict()
    assert told["blocks"] == {"left": 4, "of": BLOCKS, "by": "greedy", "dropped": None}
    assert told["memory"]["choose"] <= told["peak_memory"]
    assert plan.abreast == BLOCKS
    _, given = pipeline.plan(model, depth={"drop": [0, 5]})
    assert given.to_dict()["blocks"] == {"left": 4, "of": BLOCKS, "by": "given", "dropped": [0, 5]}
    assert "choose" not in given.to_dict()["memory"]
    assert not given.needs_data
    found = []
    for drop in (1, 2, [0]):
        recipe = assemble(None, {**SETTINGS, "depth": {"drop": drop}})
        found.append(cost(*pipeline.plan(model, recipe=recipe), recipe).total)
    assert found[1] > found[0] > found[2] == 0


def test_under_a_cap_fewer_are_measured_together(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "model", num_hidden_layers=8, max_position_embeddings=4096)
    way = {"name": "greedy", "tokens": 2**16}
    chosen: dict[str, Any] = {"depth": {"drop": 2, "by": way}, "calibration": "builtin", "samples": 16, "length": 4096}
    with pytest.raises(UserError, match="the smallest that can hold is") as caught:
        pipeline.plan(source, max_memory="1MB", **chosen)
    least = parse_size(str(caught.value).rsplit(" ", 1)[-1])
    each = 2 * 2**16 * 32 * 4
    few, many = (pipeline.plan(source, max_memory=str(least + more), **chosen)[1] for more in (0, 8 * each))
    assert few.abreast < 8
    assert many.abreast == 8
    assert few.schedule.peak.host <= least


def test_the_report_tells_what_went(model: Path, tmp_path: Path) -> None:
    from llmprune.report import card, page
    from llmprune.report.results import read_results

    out = tmp_path / "out"
    report = llmprune.prune(model, out=out, depth={"drop": [1, 4]})
    read = Report.read(json.loads((out / "llmprune.json").read_text()), out)
    assert read.shortened == report.shortened == "4 of 6 blocks, without 1, 4"
    drawn = page.render(read_results(out), []).decode()
    assert "4 of 6 blocks, without 1, 4" in drawn
    made = str(card.make_card(report.to_dict(), [], "me/short", {}))
    assert "it has 4 of 6 blocks, without 1, 4" in made
    assert "0, 2, 3, 5" in made
    assert "zeros are stored" not in made
    assert "None by itself" not in made


def test_histograms_are_of_the_block_that_it_comes_from(model: Path, tmp_path: Path) -> None:
    from llmprune.report.weights import weigh

    out = tmp_path / "out"
    llmprune.prune(model, out=out, depth={"drop": [0, 2]}, sparsity="50%", method="magnitude")
    shown = weigh(out, resolve(model), ["model.layers.1.mlp.up_proj"], kept=[1, 3, 4, 5])[0]
    own = weigh(out, resolve(model), ["model.layers.1.mlp.up_proj"], kept=[0, 1, 4, 5])[0]
    dense = Checkpoint(resolve(model), "cpu").read_parameter("model.layers.3.mlp.up_proj.weight")
    assert shown.before is not None
    assert shown.edge == pytest.approx(8 * float(dense.square().mean().sqrt()), rel=1)
    assert own.edge != pytest.approx(shown.edge)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"drop": 0}, "depth.drop is 0 of 6 blocks: at least one must go"),
        ({"drop": 6}, "depth.drop is 6 of 6 blocks: .* at least one must stay"),
        ({"drop": [0, 1, 2, 3, 4, 5]}, "depth.drop is 6 of 6 blocks"),
        ({"drop": [6]}, r"blocks are numbers from 0 to 5, not \[6\]"),
        ({"drop": [-1]}, r"blocks are numbers from 0 to 5, not \[-1\]"),
        ({"drop": ["1"]}, r"blocks are numbers from 0 to 5, not \['1'\]"),
        ({"drop": [1, 1]}, "it names a block twice"),
        ({"drop": []}, "it names no block"),
        ({"drop": "a few"}, "depth.drop must be a number of blocks .*, not 'a few'"),
        ({"drop": "120%"}, "depth.drop must be a number of blocks .*, not '120%'"),
        ({"drop": 1.5}, "depth.drop must be a number of blocks .*, not 1.5"),
        ({"drop": True}, "depth.drop must be .*, not True"),
        ({"drop": 1, "by": "gready"}, "unknown way to choose blocks 'gready': did you mean 'greedy'"),
        ({"drop": 1, "by": {"name": "greedy", "score": "ppl"}}, "unknown score 'ppl'.* known: kl, perplexity"),
        ({"drop": 1, "by": {"name": "greedy", "tokens": 0}}, "tokens must be at least 1, not 0"),
        ({"drop": 1, "by": {"name": "influence", "tokens": 0}}, "tokens must be at least 1, not 0"),
        ({"drop": 1, "by": {"name": "evolve", "offspring": 0}}, "offspring must be at least 1, not 0"),
        ({"by": "evolve"}, "depth.by says how blocks are chosen that go, and depth.drop not how many"),
        ({"dropp": 1}, "unknown depth key 'dropp': did you mean 'drop'"),
    ],
    ids=str,
)
def test_mistakes(chosen: dict[str, Any], message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        llmprune.prune(model, out=tmp_path / "out", depth=chosen, **SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("refine", "swaps"), ("reconstruct", ["cg", "block"]), ("permute", True), ("calibration.asymmetric", 0.5)],
)
def test_what_follows_pruning_asks_for_it(key: str, value: Any, model: Path) -> None:
    with pytest.raises(UserError, match=f"{key} follows the pruning of linears, and no sparsity is asked for"):
        pipeline.plan(model, **{"depth": {"drop": 1}, **SETTINGS, key: value})
    with pytest.raises(UserError, match="allocation owl divides a sparsity, and none is asked for"):
        pipeline.plan(model, depth={"drop": 1}, allocation="owl", **SETTINGS)


def test_a_rule_alone_prunes_what_it_matches(model: Path, tmp_path: Path) -> None:
    rules = [{"match": "*.1.mlp.*", "sparsity": "50%"}]  # as the dense model has it
    report = llmprune.prune(model, out=tmp_path / "out", depth={"drop": [0]}, rules=rules, method="magnitude")
    assert {record.name for record in report.pruned} == {
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    }


def test_a_plan_file_says_what_is_pruned_of_what_is_left(model: Path, tmp_path: Path) -> None:
    chosen = {"depth": {"drop": [2, 3]}, "method": "wanda", **SETTINGS}
    first = llmprune.prune(model, out=tmp_path / "first", allocation="owl", sparsity="60%", **chosen)
    again = llmprune.prune(model, out=tmp_path / "again", allocation=str(tmp_path / "first/allocation.yaml"), **chosen)
    assert [record.pattern for record in again.linears] == [record.pattern for record in first.linears]
    assert again.sparsity == first.sparsity == pytest.approx(0.6, abs=1e-3)


def test_mistakes_are_found_before_blocks_are_chosen(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "choose", lambda *_: pytest.fail("the request makes no sense"))
    chosen: dict[str, Any] = {"depth": {"drop": 2}, **SETTINGS}
    for wrong, message in (
        ({"sparsity": "3:7"}, "3:7 needs in_features divisible by 7"),
        ({"ignore": ["*.no_proj"]}, "name in ignore, it matches no linear"),
        ({"sparsity": "50%", "method": "wandda"}, "did you mean 'wanda'"),
    ):
        with pytest.raises(UserError, match=message):
            llmprune.prune(model, out=tmp_path / "out", **chosen, **wrong)
    for refused in (
        make("qwen3_moe", tmp_path / "model", mlp_only_layers=[], decoder_sparse_step=2, num_hidden_layers=4),
        make("gpt2", tmp_path / "other", scale_attn_by_inverse_layer_idx=True),
    ):
        with pytest.raises(UserError, match="cannot do without these blocks"):
            llmprune.prune(refused, out=tmp_path / "out", depth={"drop": 1}, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_dense_model_that_is_broken_is_found_out(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        loaded.model.layers[1].mlp.down_proj.weight *= 1e7
    loaded.save_pretrained(source)
    for by in ("influence", "greedy", "evolve"):
        with pytest.raises(Failure, match="returns NaN or infinite activations while it is dense, in float16"):
            llmprune.prune(source, out=tmp_path / by, depth={"drop": 1, "by": by}, dtype="float16", **SETTINGS)


def test_a_choice_is_kept_as_soon_as_it_is_made(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: dict[str, Any] = {
        "depth": {"drop": 2}, "sparsity": "60%", "method": "wanda", "allocation": "owl", **SETTINGS,
    }  # fmt: skip
    llmprune.prune(model, out=tmp_path / "whole", **chosen)
    look = dense.look
    monkeypatch.setattr(dense, "look", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted):
        llmprune.prune(model, out=tmp_path / "out", **chosen)
    monkeypatch.setattr(dense, "look", look)
    monkeypatch.setattr(prepare, "choose", lambda *_: pytest.fail("they were chosen before"))
    llmprune.prune(model, out=tmp_path / "out", **chosen)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_what_fits_when_it_is_planned_fits_when_blocks_were_chosen(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, Any] = {"depth": {"drop": 2}, "sparsity": "50%", "method": "wanda", **SETTINGS}
    with pytest.raises(UserError, match="the smallest that can hold is") as caught:
        pipeline.plan(model, max_memory="1MB", **chosen)
    least = parse_size(str(caught.value).rsplit(" ", 1)[-1]) + 2**23
    grown, choose, current = [0], prepare.choose, memory.current

    def growing(*told: Any) -> tuple[int, ...]:
        grown[0] = 2**30
        return choose(*told)

    monkeypatch.setattr(prepare, "choose", growing)
    monkeypatch.setattr(memory, "current", lambda: current() + grown[0])
    report = llmprune.prune(model, out=tmp_path / "out", max_memory=str(least), **chosen)
    assert grown[0]
    assert report.predicted_memory <= least


def test_a_broken_dense_model_is_found_out_before_blocks_are_chosen(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "choose", lambda *_: pytest.fail("it is broken"))
    asked = {"text": "builtin", "length": 32, "max_perplexity": 1.5}
    with pytest.raises(UserError, match="is broken before it is pruned"):
        llmprune.prune(model, out=tmp_path / "out", depth={"drop": 1}, evaluate=asked, **SETTINGS)


def test_a_sweep_of_shorter_models_asks_for_a_sparsity(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(model), "-o", str(tmp_path / "sweep"), "--drop-blocks", "1"]) == 2
    assert "a sweep needs at least one sparsity" in capsys.readouterr().err


def test_numbers_that_json_has_not_stay_in_the_config(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "mamba2", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_heads=8, head_dim=8, expand=2,
        state_size=8, n_groups=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    llmprune.prune(tmp_path / "model", out=tmp_path / "out", depth={"drop": [1]})
    written = AutoConfig.from_pretrained(tmp_path / "out")
    assert written.num_hidden_layers == 2
    assert tuple(written.time_step_limit) == tuple(config.time_step_limit)


def test_an_older_run_without_depth_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted):
        llmprune.prune(model, out=tmp_path / "out", method="magnitude")
    header = json.loads((tmp_path / "out" / "llmprune.journal.jsonl").read_text().splitlines()[0])
    assert "depth" not in header["fingerprint"]["recipe"]


def test_a_config_that_cannot_say_it_is_refused(tmp_path: Path) -> None:
    # every second block has experts, by its number
    source = make("qwen3_moe", tmp_path / "model", mlp_only_layers=[], decoder_sparse_step=2, num_hidden_layers=4)
    with pytest.raises(UserError, match="cannot do without these blocks"):
        llmprune.prune(source, out=tmp_path / "out", depth={"drop": [1]})
    llmprune.prune(source, out=tmp_path / "out", depth={"drop": [0, 1]})


def test_a_block_that_hangs_on_its_number_is_found_out(tmp_path: Path) -> None:
    source = make("gpt2", tmp_path / "model", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UserError, match=r"block 2 would be block 1, .*attn\.scaling is 0\.176"):
        shortened(Checkpoint(resolve(source), "cpu"), (0, 2))
    shortened(Checkpoint(resolve(source), "cpu"), (0, 1))


def test_a_block_that_asks_for_its_number_while_it_runs_is_found_out(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def numbered(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) * (1 + self.self_attn.layer_idx)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", numbered)
    with pytest.raises(UserError, match=r"block 5 would be block 4, .*it returns something else"):
        shortened(Checkpoint(resolve(model), "cpu"), (0, 1, 3, 4, 5))
    shortened(Checkpoint(resolve(model), "cpu"), (0, 1, 2))


def test_the_default_sparsity_hangs_on_what_else_is_asked() -> None:
    assert Recipe().settled().sparsity == "50%"
    assert Recipe.from_dict({"depth": {"drop": 1}}).settled().sparsity is None
    assert Recipe.from_dict({"depth": {"drop": 1}, "sparsity": "2:4"}).settled().sparsity == "2:4"


def test_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["prune", str(model), "-o", str(out), "--drop-blocks", "0,3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept_blocks"] == [1, 2, 4, 5]
    chosen = ["--drop-blocks", "20%", "--drop-by", "influence", "--calibration", "builtin", "--samples", "2"]
    assert main(["plan", str(model), *chosen, "--length", "32"]) == 0
    told = capsys.readouterr().out
    assert "5 of 6; those that go are chosen by influence" in told
    assert main(["plan", str(model), "--drop-blocks", "9"]) == 2
    assert "depth.drop is 9 of 6 blocks" in capsys.readouterr().err
