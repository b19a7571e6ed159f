"""Prune, recover and measure in one: what is made, that it is what the single commands make, and going on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llmprune
from llmprune import course, pipeline
from llmprune.cli import main
from llmprune.course import Course
from llmprune.errors import Failure, Interrupted, UserError
from llmprune.recover import recover
from llmprune.report import page
from llmprune.report.page import verdict
from llmprune.report.record import Score
from llmprune.report.results import read_results
from tests.families import make
from tests.test_distributed import Ranks
from tests.test_report_page import Parsed
from tests.test_resume import digests

pytestmark = pytest.mark.usefixtures("no_pages")

PRUNE: dict[str, Any] = {
    "sparsity": "2:4", "method": "wanda", "device": "cpu",
    "calibration": {"source": "builtin", "samples": 4, "length": 32},
}  # fmt: skip
TRAIN: dict[str, Any] = {
    "distill": True, "steps": 12, "length": 16, "batch": 2, "held_out": 4, "rate": 1e-2, "save_every": 0,
    "device": "cpu",
}  # fmt: skip
MEASURE: dict[str, Any] = {"text": "builtin", "length": 32}


@pytest.fixture(scope="module")
def recipe(text: str) -> dict[str, Any]:
    return {"prune": PRUNE, "recover": {"data": text, **TRAIN}, "evaluate": MEASURE}


@pytest.fixture(scope="module")
def whole(model: Path, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    course.run(model, out=out, recipe=recipe)
    return out


def weights(out: Path) -> dict[str, str]:
    """The hashes of the two checkpoints' weights."""
    return {name: digest for name, digest in digests(out).items() if name.endswith(".safetensors")}


def test_it_is_what_the_single_commands_make(
    model: Path, text: str, recipe: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    llmprune.prune(model, out=tmp_path / "pruned", recipe=PRUNE)
    recover(tmp_path / "pruned", out=tmp_path / "recovered", data=text, **{**TRAIN, "distill": model})
    assert weights(whole) == weights(tmp_path)
    found = llmprune.compare(
        model, [whole / "pruned", whole / "recovered"], text="builtin", length=32, device="cpu"
    ).to_dict()
    told = json.loads((whole / "comparison.json").read_text())
    assert [entry["name"] for entry in told["models"]] == ["dense", "pruned", "recovered"]
    for mine, theirs in zip(told["models"], found["models"], strict=True):
        for figure in ("perplexity", "divergence"):
            for value in ("value", "kl", "agreement", "tokens"):
                assert (mine[figure] or {}).get(value) == (theirs[figure] or {}).get(value)
    for place in ("pruned", "recovered"):
        assert llmprune.verify(whole / place).ok
        assert json.loads((whole / place / "evaluation" / "comparison.json").read_text()) == told


def test_the_report_shows_dense_pruned_and_recovered(whole: Path) -> None:
    dense, pruned, recovered = json.loads((whole / "comparison.json").read_text())["models"]
    results = read_results(whole / "recovered")
    sentences, rows, missing = verdict(results)
    row = next(row for row in rows if row.name == "Perplexity")
    assert (row.dense, row.before, row.pruned) == tuple(
        f"{entry['perplexity']['value']:.2f}" for entry in (dense, pruned, recovered)
    )
    row = next(row for row in rows if row.name.startswith("KL(dense ‖ recovered)"))
    assert row.before == f"{pruned['divergence']['kl']:.4g}"
    assert row.pruned.startswith(f"{recovered['divergence']['kl']:.4g}")
    assert any(f"Before the recovery it was {pruned['perplexity']['value']:.2f}." in told for told in sentences)
    assert "divergence from the dense model" not in missing
    drawn = page.draw(whole / "recovered").path.read_text()
    record = results.report.recovery
    losses = Parsed(drawn).data["losses-data"]["data"][0]
    assert [*zip(losses["x"], losses["y"], strict=True)] == [(told["step"], told["loss"]) for told in record["losses"]]
    assert "before it was trained" in drawn
    head = drawn[drawn.index('<table class="verdict-table">') :].partition("</thead>")[0]
    assert [part.partition("<")[0] for part in head.split('<th scope="col">')[2:]] == [
        "dense", "pruned", "recovered", "difference",
    ]  # fmt: skip
    _, rows, _ = verdict(read_results(whole / "pruned"))
    assert not any(row.before for row in rows)


def test_the_recovered_scores_stand_beside_the_pruned_ones(whole: Path) -> None:
    """A model that is called `pruned` in the comparison does not take the place of the one that the page is of."""
    results = read_results(whole / "recovered")
    assert results.comparison is not None
    for place, entry in enumerate(results.comparison.models):
        value = 0.25 * (place + 1)
        entry.scores = [Score("arc_easy", "acc", "none", value, 0.01, 100, 0, True)]
    shown = page._task_scores(results)
    assert {name: [score.value for score in scores] for name, scores in shown.items()} == {
        "dense": [0.25], "pruned": [0.5], "recovered": [0.75],
    }  # fmt: skip
    row = next(row for row in verdict(results)[1] if row.name.startswith("arc_easy"))
    assert [row.dense[:4], row.before[:4], row.pruned[:4]] == ["0.25", "0.50", "0.75"]


@pytest.mark.parametrize("moment", ["pruning", "recovering", "measuring"])
def test_it_goes_on_where_it_was_cut_off(
    moment: str, model: Path, recipe: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done = tmp_path / "out", []
    prune, train, measure = pipeline.prune, course.recover, course.Reference.measure

    def stopped(*_: Any, **__: Any) -> Any:
        raise Interrupted("interrupted")

    def counted(name: str, work: Any) -> Any:
        return lambda *args, **kwargs: (done.append(name), work(*args, **kwargs))[1]

    with monkeypatch.context() as patch:
        if moment == "pruning":
            patch.setattr(pipeline, "prune", stopped)
        elif moment == "recovering":
            patch.setattr(course, "recover", stopped)
        else:
            patch.setattr(course, "side_by_side", stopped)
        with pytest.raises(Interrupted):
            course.run(model, out=out, recipe=recipe)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "prune", counted("prune", prune))
        patch.setattr(course, "recover", counted("recover", train))
        patch.setattr(course.Reference, "measure", counted("measure", measure))
        course.run(model, out=out, recipe=recipe)
    assert weights(out) == weights(whole)
    assert done == {
        "pruning": ["measure", "prune", "recover", "measure", "measure"],
        "recovering": ["measure", "recover", "measure", "measure"],
        "measuring": ["measure", "measure", "measure"],
    }[moment]  # fmt: skip


def test_another_request_is_refused_and_another_measure_is_not(
    model: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    out, first = tmp_path / "out", {"prune": PRUNE, "evaluate": MEASURE}
    done = course.run(model, out=out, recipe=first)
    assert done.recovered is None
    assert [entry.name for entry in done.comparison.models] == ["dense", "pruned"]
    before = weights(out)
    other = {**recipe, "prune": {**PRUNE, "sparsity": "1:4"}}
    with pytest.raises(UserError, match=r"another prune.sparsity \(.2:4. there, .1:4. here\).*--restart"):
        course.run(model, out=out, recipe=other)
    with pytest.raises(UserError, match="another files"):
        course.run(make("llama", tmp_path / "another", seed=3), out=out, recipe=first)
    done = course.run(model, out=out, recipe={**recipe, "evaluate": {"text": "builtin", "length": 16}})
    assert done.recovered == out / "recovered"
    assert done.comparison.models[2].perplexity.length == 16  # type: ignore[union-attr]
    assert before.items() <= weights(out).items()
    with pytest.raises(UserError, match=r"another recover\.steps"):
        course.run(model, out=out, recipe={**recipe, "recover": {**recipe["recover"], "steps": 3}})
    course.run(model, out=out, recipe={**recipe, "recover": {**recipe["recover"], "save_every": 5}}, restart=False)
    assert course.run(model, out=out, recipe=first).recovered is None
    assert course.run(model, out=out, recipe=recipe).recovered == out / "recovered"  # it was still there
    (out / "request.json").unlink()
    with pytest.raises(UserError, match="does not say what they are of"):
        course.run(model, out=out, recipe=other)


@pytest.mark.parametrize("moment", ["pruning", "recovering"])
def test_a_restart_that_was_stopped_leaves_nothing_of_what_was_there(
    moment: str, model: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", {**recipe, "prune": {**PRUNE, "sparsity": "1:4"}}
    course.run(model, out=out, recipe=recipe)

    def stopped(*_: Any, **__: Any) -> Any:
        raise Interrupted("stopped: the same command goes on")

    with monkeypatch.context() as patch:
        patch.setattr(*(pipeline, "prune") if moment == "pruning" else (course, "recover"), stopped)
        with pytest.raises(Interrupted, match="goes on; leave --restart out then"):
            course.run(model, out=out, recipe=other, restart=True)
    assert not any("recovered" in name for name in weights(out))
    course.run(model, out=out, recipe=other)
    for place in ("pruned", "recovered"):
        told = json.loads((out / place / "llmprune.json").read_text())
        assert {record["pattern"] for record in told["linears"]} == {"1:4"}
        assert llmprune.verify(out / place).ok
    hashes = [
        [record["mask_sha256"] for record in json.loads((out / place / "llmprune.json").read_text())["linears"]]
        for place in ("pruned", "recovered")
    ]
    assert hashes[0] == hashes[1]


def test_a_mistake_in_the_recovery_can_be_mended(
    model: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise Failure("out of memory")

    out, known = tmp_path / "out", pipeline.prune
    with monkeypatch.context() as patch:
        patch.setattr(course, "recover", failing)
        with pytest.raises(Failure):
            course.run(model, out=out, recipe=recipe)
    monkeypatch.setattr(pipeline, "prune", lambda *_, **__: pytest.fail("it was pruned again"))
    done = course.run(model, out=out, recipe={**recipe, "recover": {**recipe["recover"], "batch": 1}})
    assert done.recovered is not None
    assert json.loads((done.recovered / "llmprune.json").read_text())["recovery"]["batch"] == 1
    with pytest.raises(UserError, match=r"another recover\.batch.*recovered away to train anew"):
        course.run(model, out=out, recipe=recipe)
    monkeypatch.setattr(pipeline, "prune", known)


def test_sections_have_the_keys_of_their_commands(model: Path, tmp_path: Path) -> None:
    made = Course.from_dict({"prune": {"quality": "balanced", "calibration": {"samples": 3}, "reconstruct": ["cg"]}})
    assert (made.prune.method, made.prune.calibration.samples, made.prune.calibration.asymmetric) == ("wanda", 3, 0.5)
    assert made.prune.reconstruct == ("cg",)
    path = tmp_path / "recipe.yaml"
    path.write_text("prune: {sparsity: 2:4}\nrecover: {data: builtin, steps: 9}\n")
    made = Course.read(path, {"recover.steps": 5, "evaluate.max_perplexity": None, "prune.calibration.samples": 7})
    assert made.recover is not None
    assert made.recover.training.steps == 5
    assert made.prune.calibration.samples == 7
    assert made.evaluate.asked(made.prune).evaluation.max_perplexity is None
    done = course.run(
        model, out=tmp_path / "out", recipe={"prune": PRUNE, "evaluate": {**MEASURE, "max_perplexity": None}}
    )
    assert done.comparison.models[1].name == "pruned"
    with pytest.raises(UserError, match="broken before it is pruned"):
        course.run(model, out=tmp_path / "no", recipe={"prune": PRUNE, "evaluate": {**MEASURE, "max_perplexity": 1.5}})


def test_a_page_that_cannot_be_drawn_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(report: Any, _: Any) -> None:
        report.page_problem = "ValueError: no ink"

    monkeypatch.setattr(pipeline, "draw_page", broken)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"prune": PRUNE, "evaluate": MEASURE}))
    assert main(["run", str(model), "--recipe", str(path), "-o", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert (
        f"{tmp_path / 'out' / 'pruned'} is finished, but its report.html could not be drawn (ValueError: no ink)"
        in told
    )


def test_figures_are_found_where_the_folder_was_moved(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "there")
    (tmp_path / "there").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("comparison.json"):
        path.write_text(path.read_text().replace(str(whole), str(tmp_path / "there")))
    rows = [verdict(read_results(place / "recovered"))[1] for place in (whole, tmp_path / "moved")]
    assert [(row.name, row.pruned) for row in rows[0]] == [(row.name, row.pruned) for row in rows[1]]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"prun": {}}, "unknown section 'prun'.*prune"),
    ({"prune": {"sparsty": "2:4"}}, "prune key 'sparsty'.*sparsity"),
    ({"prune": ["2:4"]}, "prune must be a mapping"),
    ({"prune": {"calibration": {"samples": 0}}}, "samples must be above 0"),
    ({"recover": {}}, "recover lacks a key: data"),
    ({"recover": None}, "recover lacks a key: data"),
    ({"recover": {"data": "builtin", "trust_remote_code": True}}, "say it in the section prune"),
    ({"recover": {"data": "builtin", "distill": "./nowhere"}}, "nowhere"),
    ({"recover": {"data": "builtin", "dtype": "float16", "device": "cpu"}}, "float16 takes a GPU"),
    ({"prune": {"method": "wanda", "depth": {"drop": 1}}}, "method is about zeros"),
    ({"recover": {"data": "builtin", "step": 3}}, "recover key 'step'.*steps"),
    ({"recover": {"data": "builtin", "hidden_weight": 1.0}}, "hidden_weight is about a dense teacher"),
    ({"evaluate": {"task": ["arc_easy"]}}, "evaluate key 'task'.*tasks"),
    ({"evaluate": {"text": "builtin", "length": 0}}, r"evaluate\.length must be above 0"),
]


@pytest.mark.parametrize(("values", "message"), MISTAKES, ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_found_before_any_work(
    values: dict[str, Any], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "prune", lambda *_, **__: pytest.fail("it was pruned"))
    with pytest.raises(UserError, match=message):
        course.run(model, out=tmp_path / "out", recipe={"evaluate": MEASURE, **values})
    assert not (tmp_path / "out" / "pruned").exists()


def test_the_model_itself_is_not_the_folder(model: Path, recipe: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is the model itself"):
        course.run(model, out=model, recipe=recipe)
    assert not (model / "request.json").exists()


def test_too_little_text_is_found_before_pruning(
    model: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "prune", lambda *_, **__: pytest.fail("it was pruned"))
    with pytest.raises(UserError, match="give more text, fewer --steps"):
        course.run(model, out=tmp_path / "out", recipe={**recipe, "recover": {**recipe["recover"], "steps": 100_000}})
    assert not (tmp_path / "out" / "request.json").exists()  # so that another number is not another request


def by_ranks(model: Path, out: Path, recipe: dict[str, Any]) -> None:
    os.environ["LOCAL_RANK"] = os.environ["RANK"]  # as torchrun tells
    done = course.run(model, out=out, recipe=recipe)
    assert [entry.name for entry in done.comparison.models] == ["dense", "pruned", "recovered"]


def test_two_ranks(model: Path, recipe: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, by_ranks, model, tmp_path / "out", recipe) as ranks:
        for process in ranks.processes:
            process.join(240)
        ranks.all_well()
    assert llmprune.verify(tmp_path / "out" / "recovered").ok
    pruned = {name: digest for name, digest in weights(whole).items() if name.startswith("pruned")}
    assert pruned.items() <= weights(tmp_path / "out").items()


def test_the_command(model: Path, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    asked = ["run", str(model), "--recipe", str(path), "-o", str(tmp_path / "out")]
    assert main(asked) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "recovered" in shown
    assert str(tmp_path / "out" / "recovered") in shown.replace("\n", "")
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recovered"] == str(tmp_path / "out" / "recovered")
    assert [entry["name"] for entry in told["models"]] == ["dense", "pruned", "recovered"]
    path.write_text("prune: {sparsity: 2:4}\nrecovery: {}\n")
    assert main(asked) == 2
    assert f"{path}: unknown section 'recovery'" in capsys.readouterr().err
    assert torch.is_grad_enabled()
