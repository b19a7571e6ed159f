"""The search for an allocation: what is measured, what a step may do, that it finds what is there, whole runs."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import allocate, answers, data, pipeline
from llmprune.allocate import evolve
from llmprune.allocation import DENSE, Known, reached, target
from llmprune.cost import cost
from llmprune.errors import UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import resolve
from llmprune.progress import Silent
from llmprune.recipe import assemble
from tests.families import make
from tests.test_allocate import norms_on
from tests.test_distributed import Ranks
from tests.test_resume import digests

pytestmark = pytest.mark.usefixtures("no_pages")

FEW: dict[str, Any] = {"name": "evolve", "generations": 3, "offspring": 4, "tokens": 256}
SETTINGS: dict[str, Any] = {"method": "wanda", "samples": 12, "length": 32, "calibration": "builtin"}


def uneven(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A model that says something, so that blocks matter, and some more than others."""
    made = make(family, folder / "model", **changes)
    loaded = AutoModelForCausalLM.from_pretrained(made)
    with torch.no_grad():
        loaded.lm_head.weight *= 20
        for number, block in enumerate(loaded.model.layers):
            for value in block.parameters():
                if value.ndim > 1:
                    value *= 1 + 2 * number
    loaded.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven(tmp_path_factory.mktemp("uneven"), tie_word_embeddings=False)


class Measuring:
    """What measures allocations."""

    def __init__(self, found: answers.Answers, plan: pipeline.Plan, norms: dict[str, Tensor]) -> None:
        self.answers, self.plan, self.norms = found, plan, norms
        self.sequences = found.sequences

    def measure(self, candidates: Sequence[Mapping[str, str]], part: Sequence[int]) -> list[float]:
        return self.answers.measure(answers.Allocated(self.plan, self.norms, torch.device("cpu"), candidates), part)


def measuring(model: Path, **changes: Any) -> tuple[Measuring, pipeline.Plan, Tensor, dict[str, Tensor]]:
    """What measures, with the plan, the tokens, and norms of the dense model's inputs by plain transformers."""
    chosen = {"sparsity": "50%", "allocation": "evolve", "method": "wanda", "calibration": "builtin", **changes}
    checkpoint, plan = pipeline.plan(model, samples=6, length=32, **chosen)
    tokens = data.draw(data.documents("builtin"), checkpoint.tokenizer, 6, 32, 0, "builtin")
    norms = norms_on(model, tokens.ids)
    with torch.no_grad():
        found = answers.Answers(checkpoint, plan.chain, tokens, 6 * 32)
    return Measuring(found, plan, norms), plan, tokens.ids, norms


def divergence(model: Path, targets: Mapping[str, str], ids: Tensor, norms: Mapping[str, Tensor]) -> float:
    """Restated with plain transformers, in float64."""
    dense, masked = (AutoModelForCausalLM.from_pretrained(model).eval().double() for _ in range(2))
    modules = dict(masked.named_modules())
    with torch.no_grad():
        for name, text in targets.items():
            weight = modules[name].weight
            pattern = target(text, "row")
            if pattern is not None:
                saliency = (weight.float().abs() * norms[name]).double()
                count = int(pattern.count(tuple(weight.shape)) / len(weight))
                groups = saliency.view(len(weight), -1, 4) if ":" in text else saliency[:, None]
                lost = groups.argsort(-1)[..., : 2 if ":" in text else count]
                weight.copy_((weight.view_as(groups).scatter(-1, lost, 0.0)).view_as(weight))
        right, logs = (each(input_ids=ids).logits.log_softmax(-1) for each in (dense, masked))
    return float((right.exp() * (right - logs)).sum(-1).mean())


def test_what_is_measured_is_the_divergence(model: Path) -> None:
    measure, plan, ids, norms = measuring(model)
    names = [linear.name for linear in plan.known]
    first = dict.fromkeys(names, "50%")
    candidates = [
        first,
        {**first, names[3]: "25%", names[-1]: "75%"},
        {**first, names[0]: DENSE, names[8]: "2:4"},
        dict(first),
        dict.fromkeys(names, DENSE),
    ]
    found = measure.measure(candidates, range(6))
    assert found[0] == found[3]
    assert found[4] == pytest.approx(0.0, abs=1e-6)
    for candidate, value in zip(candidates[:3], found, strict=False):
        assert value == pytest.approx(divergence(model, candidate, ids, norms), rel=1e-3)
    assert measure.measure(candidates[1:2], range(6)) == [pytest.approx(found[1], rel=1e-5)]
    parts = [measure.measure(candidates[1:2], part)[0] for part in (range(2), range(2, 6))]
    assert parts[0] / 3 + parts[1] * 2 / 3 == pytest.approx(found[1], rel=1e-4)
    some = measure.measure(candidates[1:2], [4, 1])
    assert some == [pytest.approx(divergence(model, candidates[1], ids[[1, 4]], norms), rel=1e-3)]


def test_linears_with_a_sparsity_of_their_own_have_it(model: Path) -> None:
    rules = [{"match": "*.0.mlp.up_proj", "sparsity": "2:4"}, {"match": "*.o_proj", "skip": True}]
    measure, plan, ids, norms = measuring(model, rules=rules)
    shared = {linear.name: "40%" for linear in plan.known}
    whole = {**shared, "model.layers.0.mlp.up_proj": "2:4"}
    assert measure.measure([shared], range(6)) == [pytest.approx(divergence(model, whole, ids, norms), rel=1e-3)]


def test_all_that_is_pruned_is_masked_by_norms(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    make_allocated = answers.Allocated.__init__

    def noted(self: Any, plan: Any, norms: dict[str, Tensor], *rest: Any) -> None:
        seen.update(norms)
        make_allocated(self, plan, norms, *rest)

    monkeypatch.setattr(answers.Allocated, "__init__", noted)
    report = run(model, tmp_path / "out", rules=[{"match": "*.up_proj", "sparsity": "2:4"}], ignore=["*.k_proj"])
    assert seen.keys() == {linear.name for linear in report.pruned}


def test_what_is_no_number_is_infinite(model: Path) -> None:
    measure, plan, _, _ = measuring(model)
    measure.answers._dense[0].fill_(torch.nan)
    assert measure.measure([{linear.name: "50%" for linear in plan.known}], range(6)) == [torch.inf]


class Hidden:
    """Measures how far shares are from some that are not told."""

    def __init__(self, linears: Sequence[Known], best: Sequence[float]) -> None:
        self.linears, self.best, self.asked = linears, best, 0

    def __call__(self, candidates: Sequence[Mapping[str, str]], part: Sequence[int]) -> list[float]:
        self.asked += len(candidates)
        values = []
        for candidate in candidates:
            assert abs(reached(self.linears, candidate) - 0.5) < 5e-4
            shares = [
                0.0 if (one := target(candidate[x.name], x.scope)) is None else one.sparsity for x in self.linears
            ]
            assert all(0.1 - 1 / 512 <= share <= 0.9 + 1 / 512 for share in shares)
            values.append(float(numpy.square(numpy.array(shares) - self.best).sum()))
        return values


@pytest.mark.parametrize("seed", range(3))
def test_it_comes_near_to_the_best(seed: int) -> None:
    chance = random.Random(seed)
    linears = [Known(str(place), place, (chance.choice([64, 128]), 512), "row") for place in range(12)]
    sizes = numpy.array([linear.numel for linear in linears])
    best = numpy.array([chance.uniform(0.2, 0.8) for _ in linears])
    best += 0.5 - numpy.average(best, weights=sizes)
    hidden = Hidden(linears, best.clip(0.1, 0.9))
    search = evolve.Allocator(least=0.1, most=0.9, generations=150, step=0.2, seed=seed)
    start = dict.fromkeys((linear.name for linear in linears), "50%")
    found = search.improve(linears, 0.5, start, hidden, 8, Silent())
    assert hidden([found], [])[0] < 0.05 * hidden([start], [])[0]


def test_nothing_worse_takes_the_place_of_the_first() -> None:
    """What is measured on a part of the text says nothing here of the whole."""
    linears = [Known(str(place), place, (64, 512), "row") for place in range(6)]
    start = dict.fromkeys((linear.name for linear in linears), "50%")

    def measure(candidates: Sequence[Mapping[str, str]], part: Sequence[int]) -> list[float]:
        return [float(len(part) == 8 and one != start) for one in candidates]

    assert evolve.Allocator().improve(linears, 0.5, start, measure, 8, Silent()) == start


def test_patterns_are_exchanged_between_linears_of_one_size() -> None:
    linears = [Known(str(place), place, (64 + 64 * (place % 2), 512), "row") for place in range(8)]
    start = {linear.name: "2:4" if int(linear.name) < 4 else DENSE for linear in linears}
    wanted = {linear.name: DENSE if int(linear.name) < 4 else "2:4" for linear in linears}

    def measure(candidates: Sequence[Mapping[str, str]], part: Sequence[int]) -> list[float]:
        for one in candidates:
            assert reached(linears, one) == reached(linears, start)
        return [float(sum(one[name] != text for name, text in wanted.items())) for one in candidates]

    search = evolve.Allocator(patterns=("2:4", DENSE), generations=30)
    assert search.improve(linears, 0.25, start, measure, 8, Silent()) == wanted


def test_where_there_is_nothing_to_exchange_it_ends() -> None:
    linears = [Known("0", 0, (64, 512), "row")]
    measured: list[int] = []

    def measure(candidates: Sequence[Mapping[str, str]], part: Sequence[int]) -> list[float]:
        measured.append(len(candidates))
        return [1.0] * len(candidates)

    assert evolve.Allocator().improve(linears, 0.5, {"0": "50%"}, measure, 8, Silent()) == {"0": "50%"}
    assert measured == [1]


def run(model: Path, out: Path, allocation: Any = FEW, **changes: Any) -> llmprune.Report:
    return llmprune.prune(model, out=out, **{**SETTINGS, "sparsity": "60%", "allocation": allocation, **changes})


def test_a_whole_run(model: Path, tmp_path: Path) -> None:
    report = run(model, tmp_path / "out")
    assert abs(report.sparsity - 0.6) < 5e-4
    assert llmprune.verify(tmp_path / "out").ok
    again = run(model, tmp_path / "again")
    assert again.linears == report.linears
    assert digests(tmp_path / "again") == digests(tmp_path / "out")
    _, _, ids, norms = measuring(model, sparsity="60%")
    found = {linear.name: linear.pattern or DENSE for linear in report.linears}
    start = run(model, tmp_path / "start", "global")
    first = {linear.name: linear.pattern or DENSE for linear in start.linears}
    assert found != first
    assert divergence(model, found, ids, norms) < divergence(model, first, ids, norms)


@pytest.mark.parametrize("family", ["mixtral", "opt", "gpt2"])
@pytest.mark.parametrize("changes", [{}, {"sparsity": "30%", "patterns": ["2:4", "dense"]}])
def test_any_family(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    allocation = {**FEW, **{key: value for key, value in changes.items() if key == "patterns"}}
    sparsity = changes.get("sparsity", "60%")
    report = run(make(family, tmp_path / "model"), tmp_path / "out", allocation, sparsity=sparsity)
    weights = sum(linear.shape[0] * linear.shape[1] for linear in report.linears)
    zeros = sum(linear.sparsity * linear.shape[0] * linear.shape[1] for linear in report.pruned)
    assert zeros / weights == pytest.approx(float(sparsity.rstrip("%")) / 100, abs=0.01)
    assert llmprune.verify(tmp_path / "out").ok


def test_other_starts(model: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "owl", {**FEW, "start": "owl"}).linears != run(model, tmp_path / "global").linears


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"start": "alpha"}, "start must be global or owl, not 'alpha'"),
        ({"generations": 0}, "generations must be at least 1, not 0"),
        ({"offspring": 0}, "offspring must be at least 1, not 0"),
        ({"step": 0}, r"step must lie in \(0, 1\], not 0"),
        ({"least": 0.9, "most": 0.3}, "0 <= least < most < 1"),
    ],
)
def test_wrong_options(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        allocate.load({"name": "evolve", **spec})


def test_it_is_counted_in_the_plan(model: Path) -> None:
    many = {**FEW, "offspring": 10**5}
    found = []
    for allocation in ("global", FEW, many):
        chosen = assemble(None, {**SETTINGS, "sparsity": "60%", "allocation": allocation})
        checkpoint, plan = pipeline.plan(model, recipe=chosen)
        held = plan.schedule.base  # by this process so far, which has given some of it back meanwhile
        found.append((plan.schedule.memory["allocate"].host - held, cost(checkpoint, plan, chosen).forwards))
    states = 2 * (2 * 10**5 + 8) * 32 * 32 * 4  # of offspring on two sequences of eight, before and after a block
    assert found[0][0] <= found[1][0] < found[2][0] - states / 2
    assert found[0][1] < found[1][1] < found[2][1]


def measured_on(model: Path, out: Path) -> None:
    pipeline.draw_page = lambda *_: None  # type: ignore[assignment]
    report = run(model, out)
    assert report.ranks == int(os.environ["WORLD_SIZE"])


def test_ranks_find_what_one_does(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "one")
    with Ranks(tmp_path, 2, measured_on, model, tmp_path / "two") as ranks:
        ranks.all_well()
    one, two = (json.loads((tmp_path / name / "llmprune.json").read_text())["linears"] for name in ("one", "two"))
    assert [linear["pattern"] for linear in one] == [linear["pattern"] for linear in two]


def test_the_dense_checkpoint_is_not_changed(model: Path) -> None:
    before = {key: value.clone() for key, value in Checkpoint(resolve(str(model)), "cpu").load_block(0).state.items()}
    measure, plan, _, _ = measuring(model)
    measure.measure([{linear.name: "90%" for linear in plan.known}], range(6))
    after = Checkpoint(resolve(str(model)), "cpu").load_block(0).state
    assert all(torch.equal(value, after[key]) for key, value in before.items())
