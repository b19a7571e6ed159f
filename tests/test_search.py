"""The search: promises, which place is tried next, the answer against a sweep over all, going on after a stop."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import llmprune
from llmprune import cli
from llmprune.errors import UserError
from llmprune.evaluate.compare import Reference
from llmprune.grid import SLACK, Grid, next_place
from llmprune.promise import Promise, Verdict
from llmprune.push import push
from llmprune.report import curve
from llmprune.report.comparison import Compared, Difference
from llmprune.report.record import Divergence, Perplexity, Score
from llmprune.search import MODEL, PAGE, RESULT, Search, search
from llmprune.sweep import Sweep, sweep
from tests.families import make
from tests.test_distributed import Ranks
from tests.test_sweep import LENGTH, Watching
from tests.test_tasks import HEAD, TASKS

PLACES = range(20, 61, 5)
ONE = "The better part of valour is discretion, in the which better part I have saved my life. " * 12
OTHER = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. " * 12
THIRD = "If music be the food of love, play on; give me excess of it, that the appetite may sicken, and so die. " * 10


class TestPromises:
    """What is understood, and when it is kept."""

    @pytest.mark.parametrize(
        ("written", "told"),
        [
            ("ppl+5%", ("perplexity", 0.05, "rise", "", None)),
            (" ppl + 2.5 % ", ("perplexity", 0.025, "rise", "", None)),
            ("perplexity<=20", ("perplexity", 20, "bound", "", None)),
            ("kl<=0.05", ("kl", 0.05, "bound", "", None)),
            ("agreement>=90%", ("agreement", 0.9, "bound", "", None)),
            ("agreement>=.95", ("agreement", 0.95, "bound", "", None)),
            ("arc_easy", ("task", 1, "stderr", "arc_easy", None)),
            ("arc_easy-2se", ("task", 2, "stderr", "arc_easy", None)),
            ("arc_easy:acc_norm-0.02", ("task", 0.02, "drop", "arc_easy", "acc_norm")),
            ("wmt14-en-fr:bleu-1.5se", ("task", 1.5, "stderr", "wmt14-en-fr", "bleu")),
            ("kl_task", ("task", 1, "stderr", "kl_task", None)),
        ],
    )
    def test_understood(self, written: str, told: tuple[Any, ...]) -> None:
        made = Promise.read(written)
        assert (made.figure, pytest.approx(made.amount), made.unit, made.task, made.metric) == told
        assert made.written == "".join(written.split())

    @pytest.mark.parametrize(
        ("written", "words"),
        [
            ("size<=60%", "zeros do not make the files smaller"),
            ("ppl", r"'ppl' is not understood: write ppl\+5%"),
            ("ppl+5", "is not understood"),
            ("ppl-5%", "is not understood"),
            ("kl-1se", "is not understood"),
            ("arc_easy+1", "is not understood"),
            ("", "is not understood"),
            ("kl>=0.05", "lower is better, so turn the sign"),
            ("agreement<=90%", "higher is better, so turn the sign"),
            ("kl<=5%", "bounded by a number"),
            ("kl<=0", "nothing is allowed"),
            ("ppl+0%", "nothing is allowed"),
            ("arc_easy-0se", "nothing is allowed"),
            ("agreement>=100%", "between 0% and 100%"),
        ],
    )
    def test_not_understood(self, written: str, words: str) -> None:
        with pytest.raises(UserError, match=words):
            Promise.read(written)

    @pytest.mark.parametrize(
        ("written", "bound", "better", "worse"),
        [
            ("ppl+5%", 21.0, 20.5, 21.001),
            ("ppl<=24", 24.0, 20.5, 24.001),
            ("kl<=0.05", 0.05, 0.02, 0.0501),
            ("agreement>=90%", 0.9, 0.95, 0.8999),
            ("quiz-0.02", 0.48, 0.49, 0.4799),
            ("quiz-2se", 0.44, 0.46, 0.4399),
            ("quiz:loss-0.5", 2.5, 2.4, 2.5001),
        ],
    )
    def test_the_bound_itself_is_kept(self, written: str, bound: float, better: float, worse: float) -> None:
        first = {"ppl": 20.0, "kl": 0.0, "agreement": 1.0}.get(re.split(r"[+<>]", written)[0], 0.5)
        first = 2.0 if ":loss" in written else first
        found = [judged(written, value) for value in (first, better, bound, worse)]
        assert [verdict.holds for verdict in found] == [True, True, True, False]
        assert [verdict.spent for verdict in found] == sorted(verdict.spent for verdict in found)
        assert found[0].spent == 0
        assert found[2].spent == 1
        assert 0.1 < found[1].spent < 0.8
        assert found[2].bound == pytest.approx(bound)
        assert found[2].value == pytest.approx(bound)

    def test_what_is_better_than_the_dense_model_spends_less_than_nothing(self) -> None:
        for written, value in (("ppl+5%", 19.0), ("quiz-1se", 0.55), ("quiz:loss-0.5", 1.9)):
            assert judged(written, value).spent < 0

    def test_answers_that_are_all_the_same(self) -> None:
        assert judged("quiz-1se", 0.5, stderr=0.0).holds
        assert not judged("quiz-1se", 0.49, stderr=0.0).holds

    def test_what_cannot_be_promised(self) -> None:
        with pytest.raises(UserError, match=r"the dense model itself has perplexity 20\.00 \("):
            judged("ppl<=20", 20.0)
        with pytest.raises(UserError, match=r"noise of quiz acc is not known.*such as quiz-0\.02"):
            judged("quiz-1se", 0.5, stderr=None)
        with pytest.raises(UserError, match="quiz has no figure f1; it has acc, loss"):
            judged("quiz:f1-0.1", 0.5)
        with pytest.raises(UserError, match="others has no figure of its own"):
            judged("others-1se", 0.5)

    def test_a_figure_that_is_not_finite_breaks_it(self) -> None:
        dense, model, _ = compared(0.5, "quiz", 0.03)
        verdict = Promise.read("quiz-1se").judge(dense, replace(model, scores=[]), [])
        assert not verdict.holds
        assert verdict.value is None


def compared(value: float, name: str, stderr: float | None) -> tuple[Compared, Compared, list[Difference]]:
    """A dense model, another with one figure of that value, and their differences."""
    made = []
    for dense in (True, False):
        told = {"ppl": 20.0, "agreement": 1.0, "kl": 0.0, "quiz": 0.5, "quiz:loss": 2.0}
        if not dense:
            told[name] = value
        found = Compared("dense" if dense else "sparse", "", dense, 1, 1, 0.0, 0.0, {})
        found.perplexity = Perplexity(told["ppl"], "text", 8, 2, 14, 0.0)
        found.divergence = None if dense else Divergence(told["kl"], None, told["agreement"], "text", 8, 2, 14, 0.0)
        acc = Score("quiz", "acc", "none", told["quiz"], None, 9, 0, True)
        found.scores = [acc, Score("quiz", "loss", "none", told["quiz:loss"], None, 9, 0, False)]
        made.append(found)
    pairs = zip(made[1].scores, made[0].scores, strict=True)
    differences = [
        Difference("sparse", "quiz", own.metric, "none", own.value - first.value, stderr, 9, None)
        for own, first in pairs
    ]
    return made[0], made[1], differences


def judged(written: str, value: float, stderr: float | None = 0.03) -> Verdict:
    promise = Promise.read(written)
    name = {"perplexity": "ppl", "task": "quiz:loss" if promise.metric == "loss" else "quiz"}
    return promise.judge(*compared(value, name.get(promise.figure, promise.figure), stderr))


@pytest.mark.parametrize("written", ["ppl+5%", "ppl<=24", "kl<=0.05", "agreement>=90%"])
def test_a_model_that_says_nothing_finite_keeps_no_promise(written: str) -> None:
    promise = Promise.read(written)
    dense, model, _ = compared(0.5, "quiz", 0.03)
    model.perplexity = model.divergence = None
    verdict = promise.judge(dense, model, [])
    assert (verdict.value, verdict.holds) == (None, False)
    assert "not finite" in str(verdict)
    assert promise.judge(dense, dense, []).holds


def run(curve_of: Callable[[int], float], grid: Grid, known: dict[float, float] | None = None) -> dict[float, float]:
    """What is known at the end."""
    known = dict(known or {})
    while (number := next_place(known, grid)) is not None:
        assert grid.low <= number <= grid.high
        assert number not in known
        known[number] = curve_of(number)
    return known


def answer_of(known: dict[float, float]) -> float | None:
    return max((place for place, value in known.items() if value <= 1), default=None)


def most_for(grid: Grid) -> int:
    """What halving needs, and the slack."""
    return math.ceil(math.log2(grid.high - grid.low + 2)) + SLACK


class TestNextPlace:
    """Against trying all places."""

    grid = Grid(10, 90, 0.01)

    @pytest.mark.parametrize("breaks", range(9, 91))
    def test_of_curves_that_rise(self, breaks: int) -> None:
        """The answer is that of trying all, with few points, whatever the curve is like."""
        draw = random.Random(breaks)
        steps = [draw.random() ** 8 for _ in range(101)]
        total = sum(steps[: breaks + 1]) + steps[breaks + 1] / 2
        curves: list[Callable[[int], float]] = [
            lambda place: math.exp(0.115 * (place - breaks - 0.5)),
            lambda place: math.exp(0.5 * (place - breaks - 0.5)),
            lambda place: float(place > breaks) * 1e6,
            lambda place: 0.999 if place <= breaks else 1.001,
            lambda place: place / (breaks + 0.5),
            lambda place: -1.0 if place <= breaks - 3 else 0.9 if place <= breaks else 1e6,
            lambda place: sum(steps[: place + 1]) / total,
        ]
        for curve_of in curves:
            known = run(curve_of, self.grid)
            tried = [place for place in range(10, 91) if curve_of(place) <= 1]
            assert answer_of(known) == max(tried, default=None)
            assert len(known) <= most_for(self.grid)

    def test_of_curves_that_are_like_those_of_models_takes_fewer_points_than_halving(self) -> None:
        counts = [
            len(run(lambda place: math.exp(growth * (place - breaks)), self.grid))  # noqa: B023
            for growth in (0.05, 0.1, 0.15, 0.2)
            for breaks in (20.3, 33.5, 47.1, 58.7, 69.4)
        ]
        assert max(counts) <= 6
        assert sum(counts) / len(counts) < 4.5  # halving takes 6 or 7

    def test_of_curves_that_go_up_and_down(self) -> None:
        """The answer holds, and what stands above it breaks, or is the end."""
        for seed in range(300):
            draw = random.Random(seed)
            values = {place: math.exp(0.1 * (place - 50) + draw.gauss(0, 1.5)) for place in range(10, 91)}
            known = run(values.__getitem__, self.grid)
            answer = answer_of(known)
            assert len(known) <= most_for(self.grid)
            if answer is None:
                assert known[10] > 1
            else:
                assert values[int(answer)] <= 1
                assert answer == 90 or known[answer + 1] > 1

    def test_the_way_is_the_same_from_whatever_is_known(self) -> None:
        """So that a search that was cut off goes on as it would have."""
        known: dict[float, float] = {}
        way = []
        while (number := next_place(known, self.grid)) is not None:
            way.append(number)
            shuffled = random.Random(number).sample(sorted(known), len(known))
            assert next_place({place: known[place] for place in shuffled}, self.grid) == number
            known[number] = math.exp(0.2 * (number - 37.5))
        assert len(way) > 2

    def test_what_another_search_has_left_is_used(self) -> None:
        def curve_of(place: float) -> float:
            return math.exp(0.1 * (place - 52.7))

        before = {place: curve_of(place) for place in (15.0, 52.5, 54.0, 88.0)}
        known = run(curve_of, self.grid, before)
        assert set(known) - set(before) == {53}
        assert answer_of(known) == 52.5
        assert len(run(lambda place: 2.0, self.grid, {10.0: 1.5, 70.0: 0.4})) > 2  # a point that holds is above

    def test_few_places(self) -> None:
        for high in (10, 11, 12):
            for breaks in range(9, high + 1):
                known = run(lambda place: float(place > breaks) * 9, Grid(10, high, 0.01))  # noqa: B023
                assert answer_of(known) == (breaks if breaks >= 10 else None)

    def test_reading_a_grid(self) -> None:
        assert Grid.read(("10%", 0.9), "1%") == Grid(10, 90, 0.01)
        grid = Grid.read(["12%", "70%"], "2.5%")
        assert (str(grid.pattern(grid.low)), str(grid.pattern(grid.high))) == ("12.5%", "70%")
        assert grid.place(0.525) == 21
        assert grid.place(0.51) == pytest.approx(20.4)
        for between, step, words in (
            (("2:4", "90%"), "1%", "unstructured sparsity, and of 2:4 there is only one"),
            (("10%",), "1%", "between two sparsities"),
            (("90%", "10%"), "1%", "no multiple of 1% lies between 90% and 10%"),
            (("10%", "100%"), "1%", "must lie between"),
            (("10%", "90%"), "0.001%", "finer than any model can tell"),
        ):
            with pytest.raises(UserError, match=words):
                Grid.read(between, step)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and three texts."""
    folder = tmp_path_factory.mktemp("place")
    make("llama", folder / "tiny", num_hidden_layers=2)
    for name, text in (("one", ONE), ("other", OTHER), ("third", THIRD)):
        (folder / f"{name}.txt").write_text(text)
    return folder


def options(place: Path) -> dict[str, Any]:
    shared = {"calibration": str(place / "one.txt"), "samples": 4, "length": LENGTH, "method": "wanda"}
    return {**shared, "evaluate": {"text": str(place / "other.txt"), "length": LENGTH, "max_perplexity": None}}


def span() -> dict[str, Any]:
    return {"between": ("20%", "60%"), "resolution": "5%"}


@pytest.fixture(scope="module")
def swept(place: Path) -> Sweep:
    """All places, for the answer of brute force."""
    given = {**options(place), "method": ["wanda"], "sparsity": [f"{part}%" for part in PLACES]}
    return sweep(place / "tiny", out=place / "sweep", **given)


def kl_of(swept: Sweep, part: int) -> float:
    row = next(row for row in swept.comparison.models if row.name == f"wanda-{part}")
    assert row.divergence is not None
    return row.divergence.kl


def between_50_and_55(swept: Sweep) -> str:
    """A promise that 50 % keeps, and 55 % does not."""
    assert [kl_of(swept, part) for part in PLACES] == sorted(kl_of(swept, part) for part in PLACES)
    return f"kl<={math.sqrt(kl_of(swept, 50) * kl_of(swept, 55)):.6f}"


@pytest.fixture(scope="module")
def found(place: Path, swept: Sweep) -> tuple[Search, Path, Watching]:
    out, watch = place / "search", Watching()
    given = {**span(), **options(place), "target": between_50_and_55(swept), "progress": watch}
    return search(place / "tiny", out=out, confirm=str(place / "third.txt"), **given), out, watch


def pruned(watch: Watching) -> int:
    return sum("pruning blocks" in title for title in watch.titles)


def names(made: Search) -> list[str]:
    return [point.name for point in made.points]


def test_the_answer_is_that_of_a_sweep_over_all_places(
    found: tuple[Search, Path, Watching], swept: Sweep, place: Path
) -> None:
    made, _, watch = found
    assert made.chosen == "wanda-50"
    assert made.bounded
    assert {"wanda-50", "wanda-55"} <= set(names(made))
    assert pruned(watch) == len(made.points) <= 5
    assert "point 1, wanda 40%: pruning blocks" in watch.titles
    assert watch.titles.count("evaluating dense") == 1
    rows = {row.name: row for row in swept.comparison.models}
    for row in made.comparison.models:
        assert row.perplexity is not None
        other = rows[row.name].perplexity
        assert other is not None
        assert row.perplexity.value == pytest.approx(other.value, rel=1e-12)
    for point in made.points:
        assert made.verdicts[point.name][0].value == pytest.approx(kl_of(swept, round(point.target * 100)), rel=1e-12)
        assert made.holds(point) == (point.target < 0.52)
    assert made.answer.startswith(f"50% keeps {made.promises[0]} (kl ")
    assert made.answer.endswith("; 55% does not")


def test_the_checkpoint_is_left_and_no_other(found: tuple[Search, Path, Watching], place: Path, tmp_path: Path) -> None:
    made, out, _ = found
    assert sorted(path.name for path in out.iterdir()) == [".pieces", MODEL, "points", PAGE, RESULT]
    assert {path.parent for path in out.rglob("model-*.safetensors")} == {out / MODEL}
    assert made.checkpoint == str(out / MODEL)
    assert llmprune.verify(out / MODEL).ok
    report = json.loads((out / MODEL / "llmprune.json").read_text())
    assert report["out"] == str(out / MODEL)
    alone = {**options(place), "evaluate": None}
    again = llmprune.prune(place / "tiny", out=tmp_path / "out", sparsity="50%", **alone)
    assert [linear["mask_sha256"] for linear in report["linears"]] == [linear.mask_sha256 for linear in again.linears]
    told = json.loads((out / MODEL / "evaluation" / "comparison.json").read_text())
    assert [row["name"] for row in told["models"]] == ["dense", "wanda-50"]
    assert "KL(dense" in (out / MODEL / "report.html").read_text()


def test_the_second_text(found: tuple[Search, Path, Watching], place: Path) -> None:
    confirmed = found[0].confirmed
    assert confirmed is not None
    apart = llmprune.divergence(found[1] / MODEL, place / "tiny", str(place / "third.txt"), length=LENGTH)
    assert confirmed["model"]["divergence"]["kl"] == pytest.approx(apart.kl, rel=1e-12)
    assert confirmed["verdicts"][0]["value"] == pytest.approx(apart.kl, rel=1e-12)
    assert confirmed["verdicts"][0]["holds"] == (apart.kl <= confirmed["verdicts"][0]["bound"])
    assert "which no choice saw" in found[0].confirmation


def test_what_is_drawn(found: tuple[Search, Path, Watching]) -> None:
    told = json.loads((found[1] / RESULT).read_text())
    drawn = next(plot for plot in curve.plots_of(told) if plot.name == "divergence-curve")
    bound = found[0].verdicts["wanda-50"][0].bound
    assert [shape.y0 for shape in drawn.figure.layout.shapes].count(bound) == 1
    (line,) = drawn.figure.data
    assert list(line.marker.symbol) == ["circle" if point["holds"] else "circle-open" for point in told["points"]]
    assert list(line.x) == sorted(line.x)
    assert "Filled points keep what was promised" in drawn.caption
    assert curve._found(told).startswith("50% keeps ")


@pytest.mark.parametrize(("kind", "number"), [("pruning blocks", 1), ("evaluating wanda", 1), ("pruning blocks", 3)])
def test_stopped(
    kind: str, number: int, found: tuple[Search, Path, Watching], swept: Sweep, place: Path, tmp_path: Path
) -> None:
    """The same points are tried after a stop, and none twice."""
    given = {**span(), **options(place), "target": between_50_and_55(swept)}
    with pytest.raises(KeyboardInterrupt):
        search(place / "tiny", out=tmp_path / "out", progress=Watching(kind, number), **given)
    # The best so far has its weights there, and nothing else but the point at work.
    records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "points").glob("wanda-*.json")]
    best = max(entry["point"]["target"] for entry in records if entry["point"]["target"] < 0.52)
    report = json.loads((tmp_path / "out" / MODEL / "llmprune.json").read_text())
    assert report["recipe"]["sparsity"] == f"{best:.0%}"
    others = {path.parent.name for path in (tmp_path / "out").rglob("model-*.safetensors")} - {MODEL}
    assert len(others) == ("evaluating" in kind)
    assert not others & {entry["point"]["name"] for entry in records}
    made = search(place / "tiny", out=tmp_path / "out", progress=(watch := Watching()), **given)
    assert made.chosen == "wanda-50"
    assert names(made) == names(found[0])
    assert pruned(watch) == len(made.points) - number - ("evaluating" in kind)
    assert "evaluating dense" not in watch.titles
    assert {path.parent for path in (tmp_path / "out").rglob("model-*.safetensors")} == {tmp_path / "out" / MODEL}


def test_another_target_uses_the_points(
    found: tuple[Search, Path, Watching], swept: Sweep, place: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(found[1], tmp_path / "out"))
    given = {**options(place), "progress": (watch := Watching())}
    # A point that is known is the answer, and its weights are gone.
    looser = f"kl<={kl_of(swept, 55):.9f}1"
    made = search(place / "tiny", out=out, target=looser, between=("20%", "55%"), resolution="5%", **given)
    assert made.chosen == "wanda-55"
    assert not made.bounded
    assert "55% is the end of --between" in made.answer
    assert pruned(watch) == 1
    assert json.loads((out / MODEL / "llmprune.json").read_text())["recipe"]["sparsity"] == "55%"
    # None keeps this: no checkpoint stays, and what the lowest gave is told.
    given["progress"] = Watching()
    made = search(place / "tiny", out=out, target=[looser, "kl<=0.0000001"], **span(), **given)
    assert made.chosen is None
    assert made.checkpoint is None
    assert "no sparsity from 20% to 60% keeps" in made.answer
    assert re.search(r": 20% gives kl [\d.e-]+, at most 1e-07$", made.answer)
    assert not list(out.rglob("model-*.safetensors"))
    assert json.loads((out / RESULT).read_text())["chosen"] is None


def test_perplexity_of_a_curve_that_goes_up_and_down(swept: Sweep, place: Path, tmp_path: Path) -> None:
    """A random model's perplexity hardly depends on the sparsity: the answer is a point that holds all the same."""
    rows = {row.name: row.perplexity.value for row in swept.comparison.models if row.perplexity is not None}
    ordered = sorted(rows[f"wanda-{part}"] / rows["dense"] for part in PLACES)
    rise = max(100 * (ordered[4] - 1), 0.001)
    given = {**span(), **options(place), "target": [f"ppl+{rise:.5f}%", "agreement>=0.01%"]}
    made = search(place / "tiny", out=tmp_path / "out", **given)
    holding = [part for part in PLACES if rows[f"wanda-{part}"] <= rows["dense"] * (1 + float(f"{rise:.5f}") / 100)]
    if made.chosen is None:
        assert "wanda-20" in names(made)
        assert 20 not in holding
    else:
        answer = int(made.chosen.removeprefix("wanda-"))
        assert answer in holding
        assert answer == 60 or f"wanda-{answer + 5}" in names(made)
        assert answer + 5 not in holding
    assert [verdict.promise for verdict in made.verdicts[names(made)[0]]] == made.promises


def test_a_task(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks_of(tmp_path)
    given = {**options(place), "include_path": [tmp_path / "own"], "between": ("30%", "60%"), "resolution": "30%"}
    made = search(place / "tiny", out=tmp_path / "out", target="tiny_choice:acc_norm-1se", **given)
    for point in made.points:
        verdict = made.verdicts[point.name][0]
        told = next(row for row in made.comparison.models if row.name == point.name)
        assert verdict.value == pytest.approx(next(s.value for s in told.scores if s.metric == "acc_norm"))
        difference = next(
            entry for entry in made.comparison.differences if (entry.model, entry.metric) == (point.name, "acc_norm")
        )
        assert difference.stderr is not None
        assert verdict.holds == (difference.difference >= -difference.stderr)
    with pytest.raises(UserError, match="it has acc, acc_norm"):
        search(place / "tiny", out=tmp_path / "other", target="tiny_choice:f1", **given)


def tasks_of(folder: Path) -> None:
    """A folder with a task."""
    (folder / "own").mkdir()
    data = folder / "own" / "documents.jsonl"
    documents = [{"question": f"{number}", "choices": ["ab", "c", "d", "ef"], "label": 1} for number in range(9)]
    data.write_text("\n".join(map(json.dumps, documents)))
    (folder / "own" / "tiny_choice.yaml").write_text(f"task: tiny_choice{HEAD.format(data=data)}{TASKS['tiny_choice']}")


def by_ranks(place: Path, out: Path, target: str) -> None:
    os.environ["LOCAL_RANK"] = os.environ["RANK"]  # as torchrun tells
    given = {**span(), **options(place), "target": target, "device": "cpu"}
    made = search(place / "tiny", out=out, confirm=str(place / "third.txt"), **given)
    assert made.chosen == "wanda-50"  # every rank is told
    assert made.confirmed is not None


def test_two_ranks(swept: Sweep, place: Path, tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, by_ranks, place, tmp_path / "out", between_50_and_55(swept)) as ranks:
        for process in ranks.processes:
            process.join(240)
        ranks.all_well()
    assert json.loads((tmp_path / "out" / RESULT).read_text())["chosen"] == "wanda-50"
    assert llmprune.verify(tmp_path / "out" / MODEL).ok


class TestRefused:
    """Before any work."""

    @pytest.fixture(autouse=True)
    def no_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def never(*_: Any, **__: Any) -> None:
            raise AssertionError("work was begun")

        monkeypatch.setattr(Reference, "measure", never)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"target": "size<=60%"}, "zeros do not make the files smaller"),
            ({"target": []}, "at least one target"),
            ({"sparsity": "2:4"}, "the recipe's sparsity is 2:4"),
            ({"method": "wandaa"}, "did you mean 'wanda'"),
            ({"calibration": "{other}"}, "is the calibration text, on which a pruned model looks better"),
            ({"confirm": "{other}"}, "cannot confirm anything"),
            ({"confirm": "{copy}"}, "cannot confirm anything"),
            ({"confirm": "nowhere.txt"}, "no text file at nowhere.txt"),
            ({"allocation": "{plan}"}, "there is nothing to search for"),
        ],
    )
    def test_refused(self, change: dict[str, Any], words: str, place: Path, tmp_path: Path) -> None:
        (tmp_path / "copy.txt").write_text(ONE)
        (tmp_path / "plan.yaml").write_text("default: 50%\n")
        names = {"other": place / "other.txt", "copy": tmp_path / "copy.txt", "plan": tmp_path / "plan.yaml"}
        change = {key: value.format(**names) if isinstance(value, str) else value for key, value in change.items()}
        with pytest.raises(UserError, match=words):
            search(place / "tiny", out=tmp_path / "out", **{"target": "kl<=0.1", **span(), **options(place), **change})
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("calibration", "evaluate"),
        [
            ({"source": "wikitext2", "split": "test"}, {"text": "wikitext2"}),
            ({"source": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test"}, {"text": "wikitext2"}),
            ({"source": "a/b"}, {"text": "a/b", "split": "train"}),
        ],
    )
    def test_the_same_part_of_a_data_set(
        self, calibration: dict[str, Any], evaluate: dict[str, Any], place: Path, tmp_path: Path
    ) -> None:
        given = {"calibration": calibration, "evaluate": evaluate, "target": "kl<=0.1"}
        with pytest.raises(UserError, match="is the calibration text"):
            search(place / "tiny", out=tmp_path / "out", **given)


def test_what_the_folder_holds(found: tuple[Search, Path, Watching], place: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(found[1], tmp_path / "out"))
    given = {"target": "kl<=0.1", **span(), **options(place)}
    before = (out / RESULT).read_bytes()
    with pytest.raises(UserError, match=r"holds a search with another recipe\.method \(\"wanda\" there"):
        search(place / "tiny", out=out, **{**given, "method": "ria"})
    with pytest.raises(UserError, match=r"another recipe\.calibration\.samples \(4 there, 3 here\)"):
        search(place / "tiny", out=out, **{**given, "samples": 3})
    assert (out / RESULT).read_bytes() == before
    # What somebody else put where the answer is to be, and what a run of the user's own has left, stays.
    (tmp_path / "mine" / MODEL).mkdir(parents=True)
    (tmp_path / "mine" / MODEL / "file").write_text("mine")
    shutil.copytree(out / MODEL, tmp_path / "pruned" / MODEL)
    shutil.copytree(out / MODEL, tmp_path / "pruned" / "wanda-mine")
    for folder in ("mine", "pruned"):
        with pytest.raises(UserError, match="is not what a search left there"):
            search(place / "tiny", out=tmp_path / folder, **given)
    shutil.rmtree(tmp_path / "pruned" / MODEL)
    given.update(between=("20%", "30%"), resolution="10%")
    search(place / "tiny", out=tmp_path / "pruned", **given)
    assert llmprune.verify(tmp_path / "pruned" / "wanda-mine").ok
    assert sorted(path.name for path in (tmp_path / "mine" / MODEL).iterdir()) == ["file"]


def test_the_command_line(
    found: tuple[Search, Path, Watching],
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = Path(shutil.copytree(found[1], tmp_path / "out"))
    given = ["search", str(place / "tiny"), "-o", str(out), "--method", "wanda", "--between", "20%, 60%"]
    given += ["--resolution", "5%", "--calibration", str(place / "one.txt"), "--samples", "4", "--length", str(LENGTH)]
    given += ["--evaluate", str(place / "other.txt"), "--set", f"evaluate.length={LENGTH}"]
    given += ["--set", "evaluate.max_perplexity=null"]
    target = found[0].promises[0]
    assert cli.main([*given, "--target", target, "--confirm", str(place / "third.txt"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((out / RESULT).read_text())
    assert told["chosen"] == "wanda-50"
    assert told["confirmed"]["text"] == str(place / "third.txt")
    assert [point["name"] for point in told["points"]] == names(found[0])
    assert cli.main([*given, "--target", target]) == 0
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert lines["50%"].split()[:2] == ["50%", "keeps"]
    assert lines["55%"].rstrip().endswith(f"no: {target}")
    assert "the checkpoint is" in shown
    assert cli.main([*given, "--target", target, "--target", "kl<=0.0000001"]) == 1
    told_twice = capsys.readouterr()
    assert "no sparsity from 20% to 60% keeps" in told_twice.err
    assert "no checkpoint is kept" in told_twice.err
    assert "no: kl<=0.0000001" in told_twice.out
    assert cli.main([*given, "--target", "size<=60%"]) == 2
    assert cli.main([*given, "--target", target, "--sparsity", "50%"]) == 2
    assert "a search finds the sparsity" in capsys.readouterr().err


def test_functions_are_not_hidden_by_their_modules() -> None:
    assert llmprune.search is search
    assert llmprune.sweep is sweep
    assert llmprune.push is push
    assert llmprune.push is push
