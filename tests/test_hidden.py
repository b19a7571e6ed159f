"""Fewer hidden channels: what is left is the dense model without the others, in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import pipeline, prepare
from llmprune.budget import CHOOSE
from llmprune.errors import UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.hidden import way_to_slim
from llmprune.model.index import Part, TensorInfo, read_header, read_tensors
from llmprune.model.source import resolve
from llmprune.model.writer import JOURNAL, REPORT, Writer
from llmprune.pipeline import draw
from llmprune.recipe import Recipe
from tests.families import FAMILIES, make
from tests.test_distributed import Ranks
from tests.test_fit import relative
from tests.test_resume import cut_off, digests

pytestmark = pytest.mark.usefixtures("no_pages")

SETTINGS: dict[str, Any] = {
    "width": {"hidden": "25%"},
    "calibration": {"source": "builtin", "samples": 40, "length": 32},
}

OTHERS = {"bloom", "cohere2", "falcon", "gpt2", "gpt_neox", "gptj", "opt", "stablelm", "starcoder2", "olmoe"}
"""Norms that subtract a mean, but for OLMoE, whose norms of heads are as wide as the hidden states."""

OTHERS.add("olmo2")
"""Its norms of heads have their epsilon from the same number, which decides in a model of such small weights."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=4)


def calibration(model: Path) -> Tensor:
    checkpoint, plan = pipeline.plan(model, recipe=SETTINGS)
    return draw(checkpoint, Recipe.from_dict(SETTINGS), plan.schedule.length).ids


def load(path: Path, dtype: torch.dtype = torch.float64) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def states(loaded: Any, ids: Tensor, blocks: list[str]) -> list[Tensor]:
    """What goes into the first of these blocks, and what leaves each."""
    found: list[Tensor] = []
    loaded.get_submodule(blocks[0]).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    for name in blocks:
        kept = lambda *told: found.append(told[2][0] if isinstance(told[2], tuple) else told[2])  # noqa: E731
        loaded.get_submodule(name).register_forward_hook(kept)
    with torch.no_grad():
        loaded(input_ids=ids, use_cache=False)
    return found


def without(dense: Any, slim: Any, kept: list[int]) -> None:
    """Let the dense model have zeros wherever the slim one has nothing."""
    shapes = {name: value.shape for name, value in slim.state_dict().items()}
    for name, value in dense.state_dict().items():
        gone = torch.tensor(sorted(set(range(32)).difference(kept)))
        for dim, size in enumerate(shapes[name]):
            if size != value.shape[dim] and (value.dim() > 1 or name.endswith("bias")):  # norms divide all the same
                value.index_fill_(dim, gone, 0)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - OTHERS))
def test_what_is_left_is_the_dense_model_without_the_others(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "model")
    report = llmprune.prune(source, out=tmp_path / "out", recipe=SETTINGS)
    kept = report.hidden_channels
    assert kept is not None
    assert len(kept) == 24
    assert report.widths == {"hidden_size": [32, 24]}
    experts = "mo" in family or family in ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_next")
    dense, slim = (load(path, torch.float32 if experts else torch.float64) for path in (source, tmp_path / "out"))
    assert slim.config.get_text_config().hidden_size == 24
    without(dense, slim, kept)
    ids = torch.randint(0, 100, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = (each(input_ids=ids, use_cache=False).logits for each in (dense, slim))
    close = 1e-2 if family == "qwen3_next" else 1e-4  # norms inside of its blocks have their epsilon from there too
    near = (found - wanted).norm(dim=-1) <= close * wanted.norm(dim=-1)
    assert near.float().mean() >= (0.9 if experts else 1.0)  # two experts may be alike
    slim.generate(ids[:1], max_new_tokens=3, do_sample=False)
    assert llmprune.verify(tmp_path / "out").ok


@pytest.mark.parametrize("family", sorted(OTHERS))
def test_others_are_refused_before_any_work(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "model")
    with pytest.raises(UserError, match="hidden channels"):
        llmprune.prune(source, out=tmp_path / "out", recipe=SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "starcoder2", "cohere2"])
def test_a_trial_tells_in_half_precision_what_it_tells_in_full(family: str, tmp_path: Path) -> None:
    """Where few channels go, a scale that is wrong is hardly more than what bfloat16 rounds."""
    found: list[int | None] = []
    for dtype in (torch.float32, torch.bfloat16):
        source = make(family, tmp_path / str(dtype), hidden_size=128, dtype=dtype)
        checkpoint = Checkpoint(resolve(source), "cpu")
        try:
            with torch.no_grad():
                found.append(way_to_slim(checkpoint, range(4, 124)))
        except UserError:
            found.append(None)
    assert found[0] == found[1]
    assert (found[0] is None) == (family in OTHERS)


def test_channels_that_are_always_zero_are_those_that_go(model: Path, tmp_path: Path) -> None:
    dead = [0, 5, 6, 11, 17, 23, 30, 31]
    dense = load(model)
    for name, value in dense.state_dict().items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            value[:, dead] = 0
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            value[dead] = 0
    dense.float().save_pretrained(tmp_path / "model")
    for path in model.iterdir():
        if not (tmp_path / "model" / path.name).exists():
            (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    report = llmprune.prune(tmp_path / "model", out=tmp_path / "out", recipe=SETTINGS)
    assert report.hidden_channels == sorted(set(range(32)).difference(dead))
    ids = calibration(model)[:4]
    with torch.no_grad():
        wanted, found = (load(path)(input_ids=ids).logits for path in (tmp_path / "model", tmp_path / "out"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_those_stay_that_carry_the_most(model: Path, tmp_path: Path) -> None:
    report = llmprune.prune(model, out=tmp_path / "out", recipe=SETTINGS)
    seen = states(load(model), calibration(model), [block.name for block in report.blocks])
    assert len(seen) == 5
    energy = sum((x.square() / x.square().sum(-1, keepdim=True)).nan_to_num(0).sum((0, 1)) for x in seen)
    assert report.hidden_channels == sorted(energy.topk(24).indices.tolist())  # type: ignore[union-attr]


FIT = {"name": "block", "steps": 24, "first": 2}


def test_blocks_are_fitted_to_the_dense_models_states(model: Path, tmp_path: Path) -> None:
    plain = llmprune.prune(model, out=tmp_path / "plain", recipe=SETTINGS)
    report = llmprune.prune(model, out=tmp_path / "out", recipe={**SETTINGS, "reconstruct": [FIT]})
    assert report.hidden_channels == plain.hidden_channels
    kept, names = torch.tensor(report.hidden_channels), [block.name for block in report.blocks]
    ids = calibration(model)
    dense, before, found = (
        states(load(path), ids, names)[1:] for path in (model, tmp_path / "plain", tmp_path / "out")
    )
    for number, block in enumerate(report.blocks):
        wanted = dense[number][..., kept]
        assert block.away == pytest.approx(relative(found[number], wanted), rel=1e-3)
        assert relative(found[number], wanted) < relative(before[number], wanted)
    assert report.blocks[0].away_before == pytest.approx(relative(before[0], dense[0][..., kept]), rel=1e-3)


def test_blocks_and_channels_of_mlps_go_too(model: Path, tmp_path: Path) -> None:
    changes = {"width": {"hidden": 8, "channels": "25%"}, "depth": {"drop": [1]}, "reconstruct": ["cg", FIT]}
    report = llmprune.prune(model, out=tmp_path / "out", recipe={**SETTINGS, **changes})
    assert report.widths == {"hidden_size": [32, 24], "intermediate_size": [64, 48]}
    assert report.kept_blocks == [0, 2, 3]
    slim = load(tmp_path / "out")
    assert slim.config.hidden_size == 24
    assert slim.config.intermediate_size == 48
    assert slim.config.num_hidden_layers == 3
    kept, names = torch.tensor(report.hidden_channels), [block.name for block in report.blocks]
    ids = calibration(model)
    dense = states(load(model), ids, [f"model.layers.{number}" for number in range(4)])[1:]
    found = states(slim, ids, names)[1:]
    for place, end in enumerate((1, 2, 3)):
        wanted = dense[end][..., kept]
        assert report.blocks[place].away == pytest.approx(relative(found[place], wanted), rel=1e-2)
        before, after = report.blocks[place].away_before, report.blocks[place].away
        assert before is not None
        assert after is not None
        assert after < before


@pytest.mark.parametrize("changes", [{}, {"reconstruct": [FIT]}], ids=["sliced", "fitted"])
def test_a_run_that_goes_on_gives_the_same_bytes(
    changes: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, **changes}
    llmprune.prune(model, out=tmp_path / "whole", recipe=settings)
    with cut_off(Writer, "commit_block", 2):
        llmprune.prune(model, out=tmp_path / "out", recipe=settings)
    assert json.loads((tmp_path / "out" / JOURNAL).read_text().splitlines()[0])["hidden"]

    def never(*_: Any) -> None:
        raise AssertionError("chosen anew")

    monkeypatch.setattr(prepare, "choose_hidden", never)
    report = llmprune.prune(model, out=tmp_path / "out", recipe=settings)
    assert report.resumed == 2
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def slimmed(model: Path, out: Path) -> None:
    llmprune.prune(model, out=out, recipe=SETTINGS)


def test_ranks_choose_together(model: Path, tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, slimmed, model, tmp_path / "many") as ranks:
        ranks.all_well()
    slimmed(model, tmp_path / "one")
    assert digests(tmp_path / "many") == digests(tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": {"hidden": 32}}, "at least one must stay"),
        ({"width": {"hidden": "some"}}, r"width.hidden must be how many go .*'some'"),
        ({"width": {"hidden": 5}}, r"27 of 32 hidden channels: .*\(27\) is not a multiple"),
        ({"sparsity": "2:4"}, "sparsity does not go together with width"),
        ({"reconstruct": ["cg"]}, "reconstruct follows the pruning of linears"),
        (
            {"calibration": {"source": "builtin", "asymmetric": 0.5}},
            "asymmetric does not go together with width.hidden",
        ),
        ({"width": {"hidden": 8, "by": "wanda"}}, "width.by says how channels and heads are chosen"),
    ],
    ids=["all", "some", "heads", "sparsity", "cg", "asymmetric", "by"],
)
def test_mistakes_are_told_before_any_work(changes: dict[str, Any], says: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        llmprune.prune(model, out=tmp_path / "out", recipe={**SETTINGS, **changes})
    assert not (tmp_path / "out").exists()


def test_tensors_that_no_module_asks_for_are_told(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for path in model.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "extra.weight": torch.zeros(4, 32)}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no module asks for extra\.weight"):
        llmprune.prune(source, out=tmp_path / "out", recipe=SETTINGS)


def test_the_plan_says_how_much_is_left(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llmprune.cli import main

    assert main(["plan", str(model), "--drop-hidden", "25%", "--calibration", "builtin", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["widths"] == {"hidden_size": [32, 24]}
    assert CHOOSE in told["memory"]
    assert main(["plan", str(model), "--drop-hidden", "8", "--calibration", "builtin"]) == 0
    assert "hidden_size 24 of 32" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(700, 32), (32, 900), (5, 32, 7), (32,), (32, 32)], ids=str)
def test_a_part_of_a_tensor_is_read(shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.model.index._AT_ONCE", 512)
    places = torch.tensor([0, 3, 4, 17, 30])
    stored = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"before": torch.zeros(3), "here": stored}, tmp_path / "file.safetensors")
    info = read_header(tmp_path / "file.safetensors")["here"]
    dims = tuple(dim for dim, size in enumerate(shape) if size == 32)
    wanted = stored
    for dim in dims:
        wanted = wanted.index_select(dim, places)
    chosen = dict.fromkeys(dims, places)
    part = TensorInfo(info.file, info.dtype, tuple(wanted.shape), info.offset, Part(shape, chosen))
    assert torch.equal(read_tensors({"here": part})["here"], wanted)
    scaled = TensorInfo(info.file, info.dtype, tuple(wanted.shape), info.offset, Part(shape, chosen, 1.5, 0.25))
    assert torch.equal(read_tensors({"here": scaled})["here"], (wanted.double() * 1.5 + 0.25).bfloat16())


def test_the_report_and_the_next_run_know_of_it(model: Path, tmp_path: Path) -> None:
    report = llmprune.prune(model, out=tmp_path / "out", recipe=SETTINGS)
    told = json.loads((tmp_path / "out" / REPORT).read_text())
    assert told["hidden_channels"] == report.hidden_channels
    assert told["dense_weights"] > told["weights"]
    assert report.smaller == "hidden_size 24 of 32"
    again = llmprune.prune(
        tmp_path / "out",
        out=tmp_path / "sparse",
        method="wanda",
        sparsity="2:4",
        samples=8,
        length=32,
        calibration="builtin",
    )
    assert llmprune.verify(again.out).ok


def test_the_card_tells_of_them(model: Path, tmp_path: Path) -> None:
    from llmprune.report import card

    report = llmprune.prune(model, out=tmp_path / "out", recipe=SETTINGS)
    made = str(card.make_card(report.to_dict(), [], "me/slim", {}))
    assert "hidden_size 24 of 32" in made
    assert "**Hidden channels** that are left" in made
    assert "**Width**" not in made
    assert "Its matrices are smaller" in made
    assert "chosen by" not in made
