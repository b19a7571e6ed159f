"""How a sparsity is divided among the linears: the published rules, exact budgets, plan files, whole runs."""

from __future__ import annotations

import json
import math
import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import allocate, allocation, data, pipeline, prepare
from llmprune.allocate.alpha import exponent
from llmprune.allocation import DENSE, LEFT_DENSE, Fitted, Known, Seen, reached, target
from llmprune.errors import UserError
from llmprune.model import writer
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import resolve
from llmprune.model.writer import ALLOCATION, JOURNAL, PAGE, REPORT
from llmprune.patterns import NM, Scope, parse
from llmprune.pipeline import plan
from llmprune.recipe import Recipe
from llmprune.report.card import make_card
from llmprune.report.tables import summary
from tests.families import make
from tests.test_distributed import Ranks
from tests.test_resume import digests, kill

CPU = torch.device("cpu")
FITTED = ("owl", "alpha", "global")
SETTINGS: dict[str, Any] = {"method": "wanda", "samples": 8, "length": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its blocks differ: their weights have the tails of other distributions, and their inputs other sizes."""
    folder = make("llama", tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=4)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for number, block in enumerate(loaded.model.layers):
            block.input_layernorm.weight[: 2 + number] *= 1 + 3 * number
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                linear.weight *= linear.weight.abs() ** (number / 2)
    loaded.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("A miss is as good as a mile, and what is done by halves is never done right. " * 60)
    return str(path)


def linears_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= {name: value for name, value in load_file(path).items() if "_proj" in name}
    return {name.removesuffix(".weight"): value.float() for name, value in sorted(found.items())}


def dense_norms(folder: Path, text: str) -> dict[str, Tensor]:
    """The root mean square of each linear's inputs in the dense model, by plain transformers."""
    checkpoint = Checkpoint(resolve(folder), "cpu")
    tokens = data.draw(data.documents(text), checkpoint.tokenizer, SETTINGS["samples"], SETTINGS["length"], 0, text)
    return norms_on(folder, tokens.ids)


def norms_on(folder: Path, ids: Tensor) -> dict[str, Tensor]:
    """The same on some tokens."""
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    found: dict[str, Tensor] = {}
    for name, module in loaded.named_modules():
        if name.endswith("_proj"):

            def hook(_: Any, given: tuple[Tensor, ...], name: str = name) -> None:
                found[name] = given[0].flatten(0, -2).square().mean(0).sqrt()

            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        loaded(input_ids=ids)
    return found


def pruned(folder: Path, out: Path, text: str, **changes: Any) -> tuple[llmprune.Report, dict[str, float]]:
    """A run's report, and the fraction of zeros in each linear as written."""
    report = llmprune.prune(folder, out=out, calibration=text, **{**SETTINGS, **changes})
    return report, {name: (value == 0).float().mean().item() for name, value in linears_of(out).items()}


# -- the rules ---------------------------------------------------------------------------------------------------------


def test_owl_equals_the_published_formula(model: Path, text: str, tmp_path: Path) -> None:
    asked = {"name": "owl", "multiple": 3, "spread": 0.1}
    _, zeros = pruned(model, tmp_path / "out", text, sparsity="60%", scope="matrix", allocation=asked)
    weights, norms = linears_of(model), dense_norms(model, text)
    outliers = []
    for number in range(4):
        scores = torch.cat([
            (weights[name].abs() * norms[name]).flatten() for name in weights if f"layers.{number}." in name
        ])  # fmt: skip
        outliers.append((scores > 3 * scores.mean()).float().mean().item() * 100)
    share = numpy.array(outliers)
    density = (share - share.min()) / (share.max() - share.min()) * 2 * 0.1
    density = density - density.mean() + (1 - 0.6)
    assert share.max() > 1.1 * share.min()
    for name, found in zeros.items():
        expected = 1 - density[int(name.split(".")[2])]
        assert found == pytest.approx(expected, abs=1.5 / weights[name].numel() + 2e-3), name
    assert max(zeros.values()) - min(zeros.values()) == pytest.approx(0.2, abs=5e-3)


def exponent_restated(weight: Tensor) -> float:
    eigenvalues = numpy.linalg.eigvalsh((weight.double() @ weight.double().T).numpy())
    if weight.shape[0] > weight.shape[1]:
        eigenvalues = eigenvalues[-weight.shape[1] :]
    logs = numpy.log10(eigenvalues)
    heights, edges = numpy.histogram(logs, 100)
    tail = eigenvalues[logs >= edges[numpy.argmax(heights)] - 1e-9]
    return float(1 + len(tail) / numpy.log(tail / tail.min()).sum())


def test_alpha_equals_its_formula(model: Path, tmp_path: Path) -> None:
    asked = {"name": "alpha", "spread": 0.2}
    out = tmp_path / "out"
    report = llmprune.prune(model, out=out, method="magnitude", sparsity="50%", allocation=asked)
    assert report.calibration is None
    weights = linears_of(model)
    means = [
        numpy.mean([exponent_restated(weights[name]) for name in weights if f"layers.{number}." in name])
        for number in range(4)
    ]
    alphas = numpy.array(means)
    times = (alphas - alphas.min()) / (alphas.max() - alphas.min()) * 0.4 + 0.8
    times /= times.mean()  # the blocks are of one size
    for name, value in linears_of(out).items():
        found, expected = (value == 0).float().mean().item(), 0.5 * times[int(name.split(".")[2])]
        assert found == pytest.approx(expected, abs=2e-3), name


@pytest.mark.parametrize("alpha", [2.5, 3.5])
def test_the_exponent_of_a_power_law_is_found(alpha: float) -> None:
    draw = numpy.random.default_rng(0)
    eigenvalues = torch.tensor((1 - draw.random(1500)) ** (-1 / (alpha - 1)))
    found = exponent(eigenvalues.sqrt().float().diag(), 100)
    assert found == pytest.approx(alpha, rel=0.15)


def test_alpha_of_weights_without_a_spectrum() -> None:
    allocator = allocate.load("alpha")
    told = allocator.look([Seen(weight, None, CPU) for weight in (torch.zeros(4, 8), torch.eye(6), torch.ones(3, 3))])
    assert list(told) == [None, None, None]
    linears = [Known(str(block), block, (8, 8), "matrix", block_told) for block, block_told in enumerate([*told, 2.0])]
    assert set(allocator.allocate(linears, 0.5).values()) == {"50%"}


def test_global_is_one_threshold_on_the_share_of_the_energy(model: Path, text: str, tmp_path: Path) -> None:
    _, zeros = pruned(
        model, tmp_path / "out", text, sparsity="50%", scope="matrix", allocation={"name": "global", "most": 0.99}
    )
    weights, norms = linears_of(model), dense_norms(model, text)
    shares = {}
    for name, weight in weights.items():
        energy = (weight.double() * norms[name]).square()
        shares[name] = energy / energy.sum()
    threshold = torch.cat([share.flatten() for share in shares.values()]).quantile(0.5)
    for name, found in zeros.items():
        # The threshold lies somewhere in a step of the histogram, in which the weights are taken as even.
        low, high = ((shares[name] <= threshold * 2**side).double().mean().item() for side in (-1 / 16, 1 / 16))
        assert low - 2e-3 <= found <= high + 2e-3, name
    assert max(zeros.values()) - min(zeros.values()) > 0.1


# -- the budget --------------------------------------------------------------------------------------------------------


def some_linears(chance: random.Random, scope: Scope, count: int, name: str) -> list[Known]:
    """Linears of odd shapes with evidence of the kind that an allocator asks for."""
    linears = []
    for number in range(count):
        shape = (chance.randint(1, 700), chance.randint(64, 900))
        evidence: Any = chance.random()
        if name == "alpha":
            evidence = None if chance.random() < 0.1 else 1 + 4 * chance.random()
        elif name == "global":
            counts = numpy.array([chance.random() ** 4 for _ in range(1024)])
            evidence = numpy.floor(counts / counts.sum() * shape[0] * shape[1])
            evidence[700] += shape[0] * shape[1] - evidence.sum()
            evidence = evidence.astype(numpy.uint32)
        linears.append(Known(f"linear.{number}", number // 7, shape, scope, evidence))
    return linears


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("seed", range(6))
def test_the_budget_is_met(name: str, scope: Scope, seed: int) -> None:
    chance = random.Random(seed)
    linears = some_linears(chance, scope, chance.randint(12, 60), name)
    least, most = chance.choice([(0.0, 0.99), (0.2, 0.8), (0.0, 0.7)])
    asked = chance.uniform(least + 0.02, most - 0.02)
    targets = allocate.load({"name": name, "least": least, "most": most}).allocate(linears, asked)
    assert list(targets) == [linear.name for linear in linears]
    assert abs(reached(linears, targets) - asked) < 5e-4
    for linear in linears:
        pattern = target(targets[linear.name], scope)
        found = 0.0 if pattern is None else pattern.count(linear.shape) / linear.numel
        step = 1 / linear.shape[1] if scope == "row" else 1 / linear.numel
        assert least - step - 2e-6 <= found <= most + step + 2e-6
        if pattern is not None:  # what is counted is what a mask has
            mask = pattern.keep(torch.rand(linear.shape))
            assert int((~mask).sum()) == pattern.count(linear.shape)
            assert pattern.holds(torch.rand(linear.shape).add(0.1) * mask)
            assert str(pattern) == targets[linear.name]


@pytest.mark.parametrize("name", FITTED)
def test_what_is_cut_off_goes_to_the_others(name: str) -> None:
    linears = some_linears(random.Random(3), "matrix", 30, name)
    more = {"spread": 0.3} if name != "global" else {}

    def found(most: float) -> dict[str, float]:
        targets = allocate.load({"name": name, "most": most, **more}).allocate(linears, 0.7)
        return {key: float(text.removesuffix("%")) for key, text in targets.items()}

    before, after = found(0.99), found(0.72)
    assert max(before.values()) > 72.1
    for key, value in before.items():
        if value > 72.1 and name != "global":
            assert after[key] == pytest.approx(72, abs=0.1)
        assert after[key] <= 72.01
    assert sum(after[key] > value + 0.1 for key, value in before.items()) > 2


@pytest.mark.parametrize("asked", [0.1, 0.85])
def test_bounds_that_leave_no_way(asked: float) -> None:
    linears = some_linears(random.Random(0), "row", 8, "owl")
    with pytest.raises(UserError, match=r"between 20\.00% and 80\.00% \(least, most\) a sparsity of \d+\.00%.* cannot"):
        allocate.load({"name": "owl", "least": 0.2, "most": 0.8}).allocate(linears, asked)


def test_large_matrices_are_counted_in_millionths() -> None:
    linears = [Known("a", 0, (40_000, 50_000), "matrix", 0.1), Known("b", 1, (3, 5), "matrix", 0.2)]
    targets = allocate.load("owl").allocate(linears, 0.123456)
    assert reached(linears, targets) == pytest.approx(0.123456, abs=1e-6)
    pattern = target(targets["a"], "matrix")
    assert pattern is not None
    assert str(pattern) == targets["a"]


# -- one pattern for each linear ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("patterns", [("2:4", DENSE), ("1:4", "2:4", DENSE), ("1:4", "3:4"), ("2:4", "4:8", DENSE)])
@pytest.mark.parametrize("seed", range(4))
def test_patterns_meet_the_budget_as_nearly_as_whole_linears_allow(patterns: tuple[str, ...], seed: int) -> None:
    chance = random.Random(seed)
    linears = [
        Known(f"linear.{number}", number, (chance.randint(1, 50), 8 * chance.randint(1, 50)), "row", chance.random())
        for number in range(60)
    ]
    levels = sorted({0.0 if text == DENSE else NM(*map(int, text.split(":"))).sparsity for text in patterns})
    asked = chance.uniform(levels[0] + 0.02, levels[-1] - 0.02)
    targets = allocate.load({"name": "owl", "patterns": list(patterns)}).allocate(linears, asked)
    assert set(targets.values()) <= set(patterns)
    total = sum(linear.numel for linear in linears)
    missed = asked * total - reached(linears, targets) * total

    def sparsity(linear: Known) -> float:
        pattern = target(targets[linear.name], "row")
        return 0.0 if pattern is None else pattern.sparsity

    for linear in linears:  # no linear that goes up brings it nearer
        if sparsity(linear) < levels[-1]:
            more = (levels[levels.index(sparsity(linear)) + 1] - sparsity(linear)) * linear.numel
            assert abs(missed - more) >= abs(missed) - 1e-6
    order = sorted(linears, key=lambda linear: linear.evidence)  # fewer outliers: the more willing to be pruned
    low, high = (numpy.average([sparsity(one) for one in part], weights=[one.numel for one in part])
                 for part in (order[30:], order[:30]))  # fmt: skip
    assert high > low
    if len(levels) == 2:
        left = (asked - levels[0]) * total
        for linear in order:
            left -= (levels[1] - levels[0]) * linear.numel
            if left < 0:
                break
            assert sparsity(linear) == levels[1]


def test_equally_sparse_patterns_go_by_strictness() -> None:
    linears = [Known(str(number), number, (8, 8), "row", number / 10) for number in range(10)]
    targets = allocate.load({"name": "owl", "patterns": ["4:8", DENSE, "2:4"]}).allocate(linears, 0.3)
    assert list(targets.values()) == ["2:4"] * 3 + ["4:8"] * 3 + [DENSE] * 4


def test_patterns_that_cannot_reach_it() -> None:
    linears = [Known(str(number), number, (8, 8), "row", number / 10) for number in range(10)]
    with pytest.raises(UserError, match=r"2:4, dense give 0\.00% to 50\.00%, so that a sparsity of 60\.00%"):
        allocate.load({"name": "owl", "patterns": ["2:4", "dense"]}).allocate(linears, 0.6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("owls", "unknown allocation 'owls': did you mean 'owl'"),
        ({"name": "owl", "lambda": 0.1}, "unknown allocation owl key 'lambda'"),
        ({"name": "owl", "multiple": 0}, "multiple must be above 0"),
        ({"name": "owl", "spread": 0.7}, r"spread must lie in \[0, 0.5\]"),
        ({"name": "alpha", "spread": 1}, r"spread must lie in \[0, 1\)"),
        ({"name": "alpha", "bins": 0}, "bins must be at least 1"),
        ({"name": "global", "least": 0.5, "most": 0.4}, "0 <= least < most < 1"),
        ({"name": "owl", "patterns": ["50%", "dense"]}, "patterns are N:M or dense, not '50%'"),
        ({"name": "owl", "patterns": ["2:4", "4:8"]}, "at least two sparsities"),
        ({"name": "owl", "patterns": "2:4"}, "must be a list"),
        ({"name": "uniform", "spread": 1}, "has no options"),
        ("file", "lacks a key: path"),
        ({"least": 0.1}, "has no name"),
    ],
)
def test_wrong_allocations(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        allocate.load(spec)


def test_options_by_override() -> None:
    recipe = Recipe(allocation="owl").override("allocation.spread", 0.2)
    assert recipe.allocation == {"name": "owl", "spread": 0.2}
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_a_whole_model(name: str, method: str, model: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report, zeros = pruned(model, out, text, sparsity=0.7, method=method, allocation=name)
    total = sum(weight.numel() for weight in linears_of(model).values())
    assert abs(report.sparsity - 0.7) < 5e-4
    assert sum(zeros[name] * weight.numel() for name, weight in linears_of(model).items()) / total == pytest.approx(
        report.sparsity
    )
    assert llmprune.verify(out).ok
    assert len({record.pattern for record in report.pruned}) > 2
    told = (out / ALLOCATION).read_text()
    assert told.startswith(f"# How sparse each linear of {model} is, by the allocation {name}: ")
    written = yaml.safe_load(told)
    assert written == {record.name: record.pattern or DENSE for record in report.linears}
    assert "70.0000% asked" in told
    assert report.recipe["allocation"] == name
    assert report.seconds["allocate"] > 0
    assert (report.calibration is not None) == (method != "magnitude" or name != "alpha")
    page = (out / "report.html").read_text()
    assert f"(70.00% asked), allocated by {name}" in page


def test_experts_of_which_some_are_not_reached(text: str, tmp_path: Path) -> None:
    source = make("mixtral", tmp_path / "model", num_local_experts=16, num_experts_per_tok=1)
    chosen = {"method": "wanda", "calibration": text, "samples": 6, "length": 2, "sparsity": "50%"}
    for name in FITTED:
        report = llmprune.prune(source, out=tmp_path / name, allocation=name, **chosen)
        assert any(record.tokens == 0 for record in report.pruned)
        assert abs(report.sparsity - 0.5) < 5e-4


def test_a_file_gives_the_same_again_and_can_be_edited(model: Path, text: str, tmp_path: Path) -> None:
    first, _ = pruned(model, tmp_path / "a", text, sparsity=0.6, allocation="owl")
    kept = tmp_path / "kept.yaml"
    kept.write_text((tmp_path / "a" / ALLOCATION).read_text())
    second, _ = pruned(model, tmp_path / "b", text, sparsity="2:4", allocation=str(kept))
    assert second.linears == first.linears
    assert {name: value for name, value in digests(tmp_path / "a").items() if name != ALLOCATION} == {
        name: value for name, value in digests(tmp_path / "b").items() if name != ALLOCATION
    }
    edited = yaml.safe_load(kept.read_text())
    edited |= {"model.layers.0.mlp.up_proj": "2:4", "model.layers.1.mlp.up_proj": 0, "model.layers.2.mlp.up_proj": 0.25}
    del edited["model.layers.3.mlp.up_proj"]
    kept.write_text(yaml.safe_dump({**edited, "default": "12.5%"}))
    report, zeros = pruned(model, tmp_path / "c", text, allocation={"name": "file", "path": str(kept)})
    found = {record.name: record for record in report.linears}
    up = [found[f"model.layers.{number}.mlp.up_proj"] for number in range(4)]
    assert [record.pattern for record in up] == ["2:4", None, "25%", "12.5%"]
    assert [zeros[record.name] for record in up] == [0.5, 0.0, 0.25, 0.125]
    assert up[1].kept == LEFT_DENSE
    assert up[1].mask_sha256 is None
    dense, sparse = (linears_of(folder)[up[1].name] for folder in (model, tmp_path / "c"))
    assert torch.equal(dense, sparse)
    assert llmprune.verify(tmp_path / "c").ok
    again = yaml.safe_load((tmp_path / "c" / ALLOCATION).read_text())
    assert again["model.layers.1.mlp.up_proj"] == DENSE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model.layers.0.mlp.up_pro: 50%\ndefault: 50%", "did you mean 'model.layers.0.mlp.up_proj'"),
        ("model.layers.0.mlp.up_proj: 50%", r"says nothing of model\.layers\.0\..* \(and 26 more\)"),
        ("default: 150%", "default: sparsity '150%' must lie between"),
        ("default: half", "default: sparsity 'half' is not understood"),
        ("default: [50%]", "default must be 43.2%, 2:4 or dense"),
        ("- a", "must be a mapping"),
        ("default: 3:5", "needs in_features divisible by 5"),
        ("default: dense", "nothing is left to prune"),
    ],
)
def test_wrong_files(content: str, message: str, model: Path, text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        pruned(model, tmp_path / "out", text, allocation=str(path))
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there(model: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read allocation nowhere\.yaml"):
        pruned(model, tmp_path / "out", text, allocation="nowhere.yaml")


def test_patterns_for_a_whole_model(model: Path, text: str, tmp_path: Path) -> None:
    asked = {"name": "global", "patterns": ["2:4", "dense"]}
    report, _ = pruned(model, tmp_path / "out", text, sparsity="30%", method="sparsegpt", allocation=asked)
    weights = sum(record.shape[0] * record.shape[1] for record in report.linears)
    zeros = sum(record.sparsity * record.shape[0] * record.shape[1] for record in report.pruned)
    assert {record.pattern for record in report.pruned} == {"2:4"}
    assert {record.kept for record in report.linears} == {None, LEFT_DENSE}
    assert zeros / weights == pytest.approx(0.3, abs=0.01)
    assert report.sparsity == pytest.approx(zeros / weights)
    told = json.loads((tmp_path / "out" / REPORT).read_text())
    assert told["sparsity"] == report.sparsity
    card = make_card(told, [], "me/small", {}).text
    share = f"{report.sparsity:.2%}"
    assert f"{share} of the weights of the pruned linears and of those that the allocation left dense are zero" in card
    rows = "".join(str(cell) for column in summary(report).columns for cell in column.cells)
    assert f"{share} of pruned linears and those left dense, {report.model_sparsity:.2%} of all weights" in rows
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert f"of the weights in {len(report.linears)} linears are zero" in page
    assert llmprune.verify(tmp_path / "out").ok


def test_an_n_m_sparsity_is_no_budget(model: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"divides a sparsity such as 40%, not 2:4: .*allocation.patterns=\[2:4, dense\]"
    ):
        pruned(model, tmp_path / "out", text, sparsity="2:4", allocation="owl")
    asked = {"name": "owl", "patterns": ["3:5", "dense"]}
    with pytest.raises(UserError, match=r"3:5 needs in_features divisible by 5; model.layers.0"):
        pruned(model, tmp_path / "out", text, sparsity="20%", allocation=asked)


def test_rules_and_ignored_linears_stand_outside_of_the_budget(model: Path, text: str, tmp_path: Path) -> None:
    rules = [
        {"match": "*.o_proj", "sparsity": "2:4"},
        {"match": "*.k_proj", "skip": True},
        {"match": "*.q_proj", "method": "magnitude"},
    ]
    out = tmp_path / "out"
    report, zeros = pruned(model, out, text, sparsity=0.7, allocation="owl", rules=rules, ignore=["*.v_proj"])
    shared = [record for record in report.linears if not record.name.endswith(("o_proj", "k_proj", "v_proj"))]
    sizes = numpy.array([record.shape[0] * record.shape[1] for record in shared])
    assert numpy.average([record.sparsity for record in shared], weights=sizes) == pytest.approx(
        0.7,
        abs=16 / sizes.sum(),  # half of what one zero more in each of 32 rows is
    )
    assert {zeros[name] for name in zeros if name.endswith(("k_proj", "v_proj"))} == {0.0}
    assert {zeros[name] for name in zeros if name.endswith("o_proj")} == {0.5}
    assert set(yaml.safe_load((out / ALLOCATION).read_text())) == {record.name for record in shared}
    with pytest.raises(UserError, match="allocation owl has nothing to allocate"):
        plan(model, allocation="owl", sparsity=0.7, rules=[{"match": "*", "sparsity": "50%"}])


@pytest.mark.parametrize("asked", ["45%", "60%", "62.3%", "0.7", "50%"])
def test_uniform_writes_no_file_and_what_is_asked(asked: str, model: Path, text: str, tmp_path: Path) -> None:
    report, zeros = pruned(model, tmp_path / "out", text, sparsity=asked, allocation="uniform")
    assert not (tmp_path / "out" / ALLOCATION).exists()
    share = parse(asked).sparsity
    assert {record.pattern for record in report.pruned} == {str(parse(asked))}
    for record in report.pruned:
        width = record.shape[1]
        assert zeros[record.name] in (int(share * width) / width, math.ceil(share * width) / width)
    for block in range(4):
        for kinds in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({zeros[f"model.layers.{block}.{kind}"] for kind in kinds}) == 1  # they share an input
    most = max(record.shape[0] for record in report.pruned) * 3  # rows of linears that are rounded alike
    total = sum(record.shape[0] * record.shape[1] for record in report.pruned)
    assert report.sparsity == pytest.approx(share, abs=most / 2 / total)


def test_no_row_loses_all_its_weights(model: Path, tmp_path: Path) -> None:
    report, _ = pruned(model, tmp_path / "out", "builtin", sparsity="99.5%")
    for name, weight in linears_of(tmp_path / "out").items():
        assert (weight != 0).any(1).all(), name
    assert report.sparsity < 0.99  # 31 of 32, and 63 of 64


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_the_plan_tells_what_it_knows(model: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    from llmprune.cli import main

    def printed(*more: str) -> str:
        assert main(["plan", str(model), "--sparsity", "70%", "--calibration", text, "--length", "32", *more]) == 0
        return " ".join(capsys.readouterr().out.split())

    told = printed("--allocation", "owl", "--set", "allocation.spread=0.1")
    assert "allocated by owl: 70.00% asked, found on the calibration text" in told
    assert "by owl" in told
    told = printed("--allocation", "alpha")
    assert "allocated by alpha: 70.00% asked, 70." in told
    assert " .. " in told
    assert "allocated" not in printed()
    found = json.loads(printed("--allocation", "owl", "--json"))
    assert (found["allocation"], found["allocated"], found["linears"][0]["pattern"]) == ("owl", False, None)
    assert found["memory"]["allocate"] > 0
    found = json.loads(printed("--allocation", "alpha", "--json", "--method", "magnitude"))
    assert (found["allocation"], found["allocated"]) == ("alpha", True)
    assert found["linears"][0]["pattern"].endswith("%")


def test_a_cap_changes_nothing(model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the activations on the disk the same is found."""
    from llmprune import budget
    from llmprune.budget import Needs

    before, _ = pruned(model, tmp_path / "a", text, sparsity=0.6, allocation="owl")
    chosen = Needs.schedule
    monkeypatch.setattr(
        Needs, "schedule", lambda *given: budget.replace(chosen(*given), place="disk", overlap=False, held=0)
    )
    after, _ = pruned(model, tmp_path / "b", text, sparsity=0.6, allocation="owl")
    assert after.linears == before.linears
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


# -- going on ----------------------------------------------------------------------------------------------------------


def victim(model: str, out: str, text: str, lines: int) -> None:
    torch.set_num_threads(2)
    left = [lines]

    def then_kill(write: Callable[[writer.Writer, Any], None]) -> Any:
        def writing(self: writer.Writer, line: Any) -> None:
            write(self, line)
            left[0] -= 1
            if left[0] == 0:
                kill()

        return writing

    writer.Writer.begin = then_kill(writer.Writer.begin)  # type: ignore[method-assign]
    writer.Writer._append = then_kill(writer.Writer._append)  # type: ignore[method-assign]
    llmprune.prune(model, out=out, calibration=text, sparsity=0.6, allocation="owl", **SETTINGS)


@pytest.mark.parametrize("lines", [1, 3])
def test_a_killed_run_goes_on_with_its_allocation(
    lines: int, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = pruned(model, tmp_path / "whole", text, sparsity=0.6, allocation="owl")
    context = multiprocessing.get_context("forkserver")
    out = tmp_path / "out"
    process = context.Process(target=victim, args=(str(model), str(out), text, lines))
    process.start()
    process.join(120)
    assert process.exitcode == -9
    assert (out / JOURNAL).exists()
    assert not (out / REPORT).exists()
    monkeypatch.setattr(prepare.dense, "look", lambda *_: pytest.fail("it is found out anew"))
    report, _ = pruned(model, out, text, sparsity=0.6, allocation="owl")
    assert report.resumed == lines - 1
    assert report.linears == whole.linears
    assert digests(out) == digests(tmp_path / "whole")


def test_an_unfinished_run_with_another_file_is_refused(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("default: 50%")
    monkeypatch.setattr(pipeline, "_finish", lambda *_: (_ for _ in ()).throw(llmprune.Failure("stopped")))
    with pytest.raises(llmprune.Failure, match="stopped"):
        pruned(model, tmp_path / "out", text, allocation=str(path))
    monkeypatch.undo()
    path.write_text("default: 25%")
    with pytest.raises(UserError, match="holds an unfinished run with another allocation"):
        pruned(model, tmp_path / "out", text, allocation=str(path))
    path.write_text("default: 50%")
    report, _ = pruned(model, tmp_path / "out", text, allocation=str(path))
    assert report.resumed == 4


def test_restart_takes_the_file_of_an_earlier_run_away(model: Path, text: str, tmp_path: Path) -> None:
    pruned(model, tmp_path / "out", text, sparsity=0.5, allocation="alpha")
    assert (tmp_path / "out" / ALLOCATION).exists()
    pruned(model, tmp_path / "out", text, sparsity=0.5, restart=True)
    assert not (tmp_path / "out" / ALLOCATION).exists()


def one_of_two(model: str, text: str, out: str, name: str) -> None:
    llmprune.prune(model, out=out, calibration=text, sparsity=0.6, allocation=name, **SETTINGS)


@pytest.mark.parametrize("name", ["owl", "alpha"])
def test_two_ranks_find_the_same(name: str, model: Path, text: str, tmp_path: Path) -> None:
    whole, _ = pruned(model, tmp_path / "one", text, sparsity=0.6, allocation=name)
    with Ranks(tmp_path, 2, one_of_two, str(model), text, str(tmp_path / "two"), name) as ranks:
        ranks.all_well()
    report = json.loads((tmp_path / "two" / REPORT).read_text())
    assert report["ranks"] == 2
    for record, other in zip(report["linears"], whole.linears, strict=True):
        assert record["sparsity"] == pytest.approx(other.sparsity, abs=2e-3)
    assert report["sparsity"] == pytest.approx(0.6, abs=5e-4)
    assert llmprune.verify(tmp_path / "two").ok


def test_an_allocation_is_no_side_file(model: Path, text: str, tmp_path: Path) -> None:
    """A model that was pruned by an allocation may be pruned again without one."""
    pruned(model, tmp_path / "first", text, sparsity=0.3, allocation="alpha")
    pruned(tmp_path / "first", tmp_path / "second", text, sparsity=0.5)
    assert not (tmp_path / "second" / ALLOCATION).exists()


def test_a_sweep_over_sparsities_takes_no_file(model: Path, text: str, tmp_path: Path) -> None:
    from llmprune.sweep import sweep

    path = tmp_path / "plan.yaml"
    path.write_text("default: 50%")
    with pytest.raises(UserError, match="sweep over one, or methods"):
        sweep(
            model, out=tmp_path / "out", sparsity=["30%", "50%"], method=["magnitude"], allocation=str(path),
            evaluate={"text": text, "length": 32},
        )  # fmt: skip


def test_the_room_is_listed() -> None:
    assert set(allocate.names()) >= {"uniform", "owl", "alpha", "global", "file"}
    assert isinstance(allocate.load("owl"), Fitted)
    assert allocation.spanned(["50%", "2:4", "7.5%"]) == "7.5% .. 50%, 2:4"
