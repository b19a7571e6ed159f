"""Units chosen by what the dense model's loss feels of them: against plain transformers, and that all else goes on."""

from __future__ import annotations

import dataclasses
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmprune
from llmprune import budget, pipeline, prepare
from llmprune.errors import Failure, UserError
from llmprune.model import blocks, cpu
from llmprune.model.backward import Numbers, Run
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import resolve
from llmprune.patterns import Columns
from llmprune.plan import foreseen
from llmprune.progress import Silent
from llmprune.recipe import Recipe
from llmprune.stats import LinearStats
from llmprune.structured import slopes, width
from llmprune.structured.knowing import Knowing
from llmprune.structured.width.taylor import Solver
from tests.families import make
from tests.test_depth import interrupted, load, logits
from tests.test_distributed import Ranks
from tests.test_evolve import uneven
from tests.test_resume import digests

pytestmark = pytest.mark.usefixtures("no_pages")

SETTINGS: dict[str, Any] = {"calibration": "builtin", "samples": 5, "length": 24}
BOTH: dict[str, Any] = {"channels": "25%", "heads": 1, "by": "taylor"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven(tmp_path_factory.mktemp("uneven"), tie_word_embeddings=False)


def planned(source: Path, **options: Any) -> tuple[Checkpoint, Any, Any]:
    """The model, the plan, and its tokens."""
    chosen = {"width": BOTH, **SETTINGS, **options}
    checkpoint, plan = pipeline.plan(source, **chosen)
    drawn = {"source": "builtin", "samples": chosen["samples"], "length": chosen["length"]}
    return checkpoint, plan, pipeline.draw(checkpoint, Recipe.from_dict({"calibration": drawn}), chosen["length"])


def units_of(plan: Any) -> dict[str, int]:
    """How many units there are, by the names of the linears whose inputs they are."""
    return {name: cut.pattern.units for block in plan.narrow.cuts for name, cut in block.items()}


def restated(source: Path, units: dict[str, int], ids: Tensor) -> dict[str, Tensor]:
    """Σ_s (∂L_s/∂g)² by plain transformers in float64, with a real gate for each unit of some linears' inputs."""
    whole = load(source).double()
    modules = dict(whole.named_modules())
    gates = {name: torch.ones(count, dtype=torch.float64, requires_grad=True) for name, count in units.items()}

    def gated(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            each = inputs[0].shape[-1] // len(gates[name])
            return (inputs[0] * gates[name].repeat_interleave(each),)

        return hook

    for name in units:
        modules[name].register_forward_pre_hook(gated(name))
    sums = {name: torch.zeros(count, dtype=torch.float64) for name, count in units.items()}
    for sequence in ids:
        loss = whole(input_ids=sequence[None], labels=sequence[None]).loss
        for name, slope in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
            sums[name] += slope.square()
    return sums


def seen(source: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[dict[str, Tensor], Any, Tensor]:
    """The saliencies that are found, the plan, and the calibration tokens."""
    found: dict[str, Tensor] = {}
    finish = slopes._Felt.finish

    def finished(felt: Any) -> dict[str, Tensor]:
        told = finish(felt)
        found.update(told)
        return told

    monkeypatch.setattr(slopes._Felt, "finish", finished)
    checkpoint, plan, tokens = planned(source, **options)
    with torch.no_grad(), cpu.quick(checkpoint.device, checkpoint.dtype):
        slopes.foresee(checkpoint, plan, tokens, Silent())
    return found, plan, tokens.ids


def test_saliencies_are_those_of_plain_transformers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, plan, ids = seen(model, monkeypatch)
    cuts = units_of(plan)
    assert len(cuts) == 6
    wanted = restated(model, cuts, ids)
    for name, value in wanted.items():
        assert float((found[name] - value).norm()) < 1e-4 * float(value.norm()), name


@pytest.mark.parametrize("kind", ["all", "products", "none"])
def test_half_precision(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_halves", lambda: kind)
    source = make("llama", tmp_path / "model")  # with weights that rounding does not carry away
    found, plan, ids = seen(source, monkeypatch, dtype="bfloat16")
    cuts = units_of(plan)
    for name, value in restated(source, cuts, ids).items():
        assert float((found[name] - value).norm()) < 0.1 * float(value.norm()), name


@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt_neox", "cohere2", "qwen3"])
def test_other_families(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(family, tmp_path / "model")
    found, plan, ids = seen(source, monkeypatch, width={"channels": "25%", "by": "taylor"})
    cuts = units_of(plan)
    for name, value in restated(source, cuts, ids).items():
        assert float((found[name] - value).norm()) < 1e-3 * float(value.norm()), name


def test_only_so_many_tokens_are_looked_at(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by = {**BOTH, "by": {"name": "taylor", "tokens": 25}}
    found, plan, ids = seen(model, monkeypatch, width=by)
    cuts = units_of(plan)
    for name, value in restated(model, cuts, ids[:2]).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-9)


def test_those_go_that_are_felt_the_least(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, plan, _ = seen(model, monkeypatch)
    report = llmprune.prune(model, out=tmp_path / "out", width=BOTH, **SETTINGS)
    assert llmprune.verify(tmp_path / "out").ok
    dense = load(model)
    parameters = dict(dense.named_parameters())
    for block in plan.narrow.cuts:
        for name, cut in block.items():
            gone = found[name].argsort()[: cut.pattern.units - cut.pattern.kept]
            weight = parameters[f"{name}.weight"].data
            weight.view(len(weight), cut.pattern.units, -1)[:, gone] = 0
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(load(tmp_path / "out").double(), ids), logits(dense.double(), ids))
    for record in report.solved:
        assert record.method == "taylor"
        assert 0 < record.relative_error < 1


def test_a_unit_that_nothing_feels_goes_first(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(model)
    for block in source.model.layers:
        block.mlp.down_proj.weight.data[:, 8:24] = 0
    source.save_pretrained(tmp_path / "model")
    for path in model.glob("tokenizer*"):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    llmprune.prune(tmp_path / "model", out=tmp_path / "out", width={"channels": 16, "by": "taylor"}, **SETTINGS)
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    made, whole = load(tmp_path / "out"), load(tmp_path / "model")
    assert made.config.intermediate_size == whole.config.intermediate_size - 16
    torch.testing.assert_close(logits(made, ids), logits(whole, ids), rtol=1e-5, atol=1e-5)


def test_experts_that_no_token_reached_lose_their_smallest_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make("qwen3_moe", tmp_path / "model", num_experts=16)  # two of them are asked for each of four tokens
    by = {"channels": "25%", "by": {"name": "taylor", "tokens": 1}}
    found, plan, _ = seen(source, monkeypatch, width=by, length=4, samples=1)
    checkpoint = Checkpoint(resolve(source), "cpu")
    weights = checkpoint.read(checkpoint.index)
    silent = 0
    for name in (name for block in plan.narrow.cuts for name in block if "experts" in name):
        magnitude = weights[f"{name}.weight"].float().abs().sum(0).double()
        silent += torch.allclose(found[name], magnitude)
    assert silent >= 2 * (16 - 8)  # in both blocks that have any
    report = llmprune.prune(source, out=tmp_path / "out", width=by, **{**SETTINGS, "length": 4, "samples": 2})
    assert llmprune.verify(report.out).ok
    notes = [record.note for record in report.linears if record.note]
    assert sum("no token reached it when its units were chosen" in note for note in notes) >= silent
    assert any("tokens reached it when its units were chosen" in note for note in notes)


def test_what_stays_can_make_up_for_it(model: Path, tmp_path: Path) -> None:
    report = llmprune.prune(model, out=tmp_path / "out", width=BOTH, reconstruct=["cg"], **SETTINGS)
    for record in report.solved:
        assert record.course["cg"] < record.course["taylor"]
    shorter = llmprune.prune(model, out=tmp_path / "shorter", width=BOTH, depth={"drop": [1]}, **SETTINGS)
    assert len(shorter.blocks) == 2
    assert llmprune.verify(tmp_path / "shorter").ok


@pytest.mark.parametrize("stopped", [1, 2])
def test_it_goes_on_without_choosing_anew(
    stopped: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"width": BOTH, **SETTINGS}
    llmprune.prune(model, out=tmp_path / "whole", **chosen)
    interrupted(model, tmp_path / "out", stopped, monkeypatch, of=3, **chosen)
    monkeypatch.setattr(prepare, "foresee", lambda *_: pytest.fail("units are chosen anew"))
    report = llmprune.prune(model, out=tmp_path / "out", **chosen)
    assert report.resumed == stopped
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def chosen_on(model: Path, out: Path) -> None:
    llmprune.prune(model, out=out, width=BOTH, **SETTINGS)


def test_ranks_choose_the_same(model: Path, tmp_path: Path) -> None:
    chosen_on(model, tmp_path / "one")
    with Ranks(tmp_path, 2, chosen_on, model, tmp_path / "two") as ranks:
        ranks.all_well()
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_the_plan_counts_the_way_back(model: Path, tmp_path: Path) -> None:
    large = {"hidden_size": 64, "intermediate_size": 512, "max_position_embeddings": 2048, "head_dim": 16}
    wide = make("llama", tmp_path / "model", **large)
    felt, longer = (pipeline.plan(wide, width=BOTH, **{**SETTINGS, "length": length})[1] for length in (512, 1024))
    _, plain = pipeline.plan(model, width={**BOTH, "by": "wanda"}, **SETTINGS)
    assert "foresee" not in plain.schedule.memory
    assert plain.foresight is None
    taken = [plan.schedule.memory["foresee"].host - plan.schedule.base for plan in (felt, longer)]
    behind = 512 * 4 * (6 * 512 + 24 * 64)  # of 512 more tokens: what a block leaves for its gradient
    assert taken[1] - taken[0] >= behind
    with pytest.raises(UserError, match="phase 'foresee' of this model takes more"):
        pipeline.plan(wide, width=BOTH, max_memory="64MiB", calibration="builtin", samples=1, length=2048)


@pytest.mark.parametrize(
    "sizes", [(2, 128, 64), (8, 128, 64), (8, 128, 128), (8, 256, 64), (4, 128, 256), None], ids=str
)
def test_what_a_block_leaves_for_its_gradient_is_planned(
    sizes: tuple[int, int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned_bytes: list[int] = []
    behind = budget.Needs._behind

    def told(needs: Any, *args: Any) -> int:
        planned_bytes.append(behind(needs, *args))
        return planned_bytes[-1]

    monkeypatch.setattr(budget.Needs, "_behind", told)
    at_once, hidden, inside = sizes or (0, 128, 512)
    shape = {"hidden_size": hidden, "head_dim": hidden // 4, "num_hidden_layers": 1, "max_position_embeddings": 512}
    if sizes:
        experts = {"num_experts": 16, "num_experts_per_tok": at_once, "moe_intermediate_size": inside}
        source = make("qwen3_moe", tmp_path / "model", **shape, **experts, mlp_only_layers=[])
    else:
        source = make("llama", tmp_path / "model", **shape, intermediate_size=inside)
    checkpoint, plan = pipeline.plan(source, width={**BOTH, "heads": None}, **{**SETTINGS, "length": 256})
    calls = blocks.start(checkpoint, plan.chain, [torch.arange(256)[None] % 120 + 3])
    block = checkpoint.load_block(0)
    weights = {value.untyped_storage().data_ptr() for value in block.module.state_dict().values()}
    held: dict[int, int] = {}

    def left(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            held[memory.data_ptr()] = memory.nbytes()
        return tensor

    felt = slopes._Felt(block, plan.narrow.cuts[0], plan.foresight)
    given = calls.read(0).clone().requires_grad_()
    with felt.watching(block.module, block.name), torch.autograd.graph.saved_tensors_hooks(left, lambda value: value):
        Run(block.module, Numbers(checkpoint.dtype, False))(calls.calls[0][0], given)
    assert sum(held.values()) < max(planned_bytes) < 3 * sum(held.values())


def test_one_block_is_in_memory_at_a_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, plan, tokens = planned(model)
    load_block, alive, most = checkpoint.load_block, [], []

    def loading(number: int, **options: Any) -> Any:
        most.append(sum(there() is not None for there in alive))
        block = load_block(number, **options)
        alive.append(weakref.ref(next(iter(block.state.values()))))
        return block

    monkeypatch.setattr(checkpoint, "load_block", loading)
    with torch.no_grad():
        slopes.foresee(checkpoint, plan, tokens, Silent())
    assert most == [0] * 6


def test_a_disk_that_is_too_small(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, plan, tokens = planned(model)
    usage = shutil.disk_usage(tmp_path)
    enough = 5 * 24 * checkpoint.hidden_size * (4 * 4 + 4)
    monkeypatch.setattr(slopes.shutil, "disk_usage", lambda _: usage._replace(free=enough - 1))
    with pytest.raises(Failure, match=r"while units are chosen, .*tokens: 2048"):
        slopes.foresee(checkpoint, plan, tokens, Silent(), tmp_path)
    monkeypatch.setattr(slopes.shutil, "disk_usage", lambda _: usage._replace(free=enough))
    with torch.no_grad():
        assert slopes.foresee(checkpoint, plan, tokens, Silent(), tmp_path)


def test_a_gradient_that_is_no_number_is_told(tmp_path: Path) -> None:
    broken = uneven(tmp_path / "model", tie_word_embeddings=False)
    checkpoint, plan, tokens = planned(broken)
    head = checkpoint.load_outer

    def loaded(**options: Any) -> None:
        head(**options)
        if options.get("head"):
            checkpoint.model.get_output_embeddings().weight.data[5] = float("nan")

    checkpoint.load_outer = loaded  # type: ignore[method-assign]
    message = "the gradient of .*model's loss holds NaN or infinite values in .*, in float32; try --dtype"
    with torch.no_grad(), pytest.raises(Failure, match=message):
        slopes.foresee(checkpoint, plan, tokens, Silent())


def test_the_way_itself() -> None:
    with pytest.raises(UserError, match="tokens must be at least 1, not 0"):
        width.load({"name": "taylor", "tokens": 0})
    stats = LinearStats(6, "norms")
    with pytest.raises(RuntimeError, match="before the first block"):
        Solver().solve(torch.ones(2, 6), stats, Columns(2, 3))
    solved = Knowing(frozenset({1}), 99).solve(torch.ones(2, 6), stats, Columns(2, 3))
    assert torch.equal(solved, torch.tensor([1.0, 1, 0, 0, 1, 1]).expand(2, 6))


def test_linears_that_are_kept_stay_as_they_are(model: Path) -> None:
    _, plan, _ = planned(model)
    gone = {choice.linear.name: {"units": [0], "tokens": 120} for choice in plan.pruned}
    known = foreseen(plan, gone)
    assert known.foresight is None
    for before, after in zip(plan.choices, known.choices, strict=True):
        assert (before == after) == (before.kept is not None)
        if before.kept is None:
            assert dataclasses.replace(after, solver=before.solver) == before


RANKED: dict[str, Any] = {"by": "taylor", "ranking": "global"}


def with_heads(folder: Path, dead: int | None = None) -> Path:
    """Four heads with keys of their own, of two queries each; what a dead one gives is never looked at."""
    heads = {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": 48,
        "head_dim": 8,
        "num_hidden_layers": 4,
    }
    source = uneven(folder, tie_word_embeddings=False, **heads)
    if dead is not None:
        whole = load(source)
        for block in whole.model.layers:
            block.self_attn.o_proj.weight.data[:, 16 * dead : 16 * dead + 16] = 0
        whole.save_pretrained(source)
    return source


def ranked_by_hand(source: Path, asked: float, ids: Tensor) -> tuple[int, int]:
    """The channels and heads that stay: of all that leave so few weights those whose loss of saliencies is smallest."""
    whole = load(source)
    blocks_ = len(whole.model.layers)
    units = {f"model.layers.{number}.self_attn.o_proj": 4 for number in range(blocks_)}
    units |= {f"model.layers.{number}.mlp.down_proj": 64 for number in range(blocks_)}
    sums = {name: saliency.sort().values for name, saliency in restated(source, units, ids).items()}
    total = sum(value.numel() for value in whole.state_dict().values())
    found = []
    for heads in (4, 3, 2, 1):
        if 48 % (2 * heads):  # what the config of a llama cannot say
            continue
        for channels in range(64, 0, -4):
            left = total - blocks_ * ((4 - heads) * (2 * 2 + 2) * 8 * 48 + (64 - channels) * 3 * 48)
            if left <= asked * total:
                lost = sum(
                    float(each[: len(each) - (heads if "o_proj" in name else channels)].sum())
                    for name, each in sums.items()
                )
                found.append((lost, channels, heads))
                break
    return min(found)[1:]


@pytest.mark.parametrize("asked", [0.9, 0.8, 0.6])
@pytest.mark.parametrize("dead", [None, 2])
def test_a_ranking_says_how_many_of_each_kind_go(asked: float, dead: int | None, tmp_path: Path) -> None:
    source = with_heads(tmp_path / "model", dead)
    _, _, tokens = planned(source)
    channels, heads = ranked_by_hand(source, asked, tokens.ids)
    report = llmprune.prune(source, out=tmp_path / "out", width={"params": asked, **RANKED}, **SETTINGS)
    config = load(tmp_path / "out").config
    assert (config.intermediate_size, config.num_key_value_heads) == (channels, heads)
    assert config.num_attention_heads == 2 * heads
    assert report.dense_weights is not None
    assert report.weights <= asked * report.dense_weights
    if dead is not None:
        assert heads < 4
        ids = tokens.ids
        if channels == 64:
            assert torch.allclose(logits(load(tmp_path / "out"), ids), logits(load(source), ids), atol=1e-4)


@pytest.mark.parametrize("stopped", [1, 2])
def test_a_ranking_is_gone_on_with(stopped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_heads(tmp_path / "model", 1)
    chosen: dict[str, Any] = {"width": {"flops": "85%", **RANKED}, **SETTINGS}
    llmprune.prune(source, out=tmp_path / "whole", **chosen)
    interrupted(source, tmp_path / "out", stopped, monkeypatch, **chosen)
    monkeypatch.setattr(prepare, "foresee", lambda *_: pytest.fail("it was ranked before"))
    report = llmprune.prune(source, out=tmp_path / "out", **chosen)
    assert report.resumed == stopped
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def ranked_on(model: Path, out: Path) -> None:
    llmprune.prune(model, out=out, width={"params": "80%", **RANKED}, **SETTINGS)


def test_ranks_rank_the_same(tmp_path: Path) -> None:
    source = with_heads(tmp_path / "model", 0)
    ranked_on(source, tmp_path / "one")
    with Ranks(tmp_path, 2, ranked_on, source, tmp_path / "two") as ranks:
        ranks.all_well()
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"params": "80%", "ranking": "global"}, "ranking global compares units of all blocks .* osscar does not"),
        ({"channels": 8, **RANKED}, "finds out how many channels and heads go within a budget"),
        ({"params": "80%", "heads": 1, **RANKED}, "finds out how many channels and heads go within a budget"),
        ({"params": "80%", "by": "taylor", "ranking": "gobal"}, "width.ranking must be local or global, not 'gobal'"),
        ({"params": "1%", **RANKED}, "width.params: channels and heads bring the model to"),
    ],
)  # fmt: skip
def test_what_cannot_be_ranked(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    source = with_heads(tmp_path / "model")
    with pytest.raises(UserError, match=says):
        llmprune.prune(source, out=tmp_path / "out", width=changes, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_plan_tells_that_it_is_still_to_be_ranked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llmprune.cli import main

    source = with_heads(tmp_path / "model")
    ranked = ["--params", "80%", "--narrow-by", "taylor", "--ranking", "global", "--calibration", "builtin"]
    assert main(["plan", str(source), *ranked, "--length", "24"]) == 0
    assert "channels and heads go until 80% of the weights are left" in " ".join(capsys.readouterr().out.split())
