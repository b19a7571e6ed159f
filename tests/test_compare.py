"""Checkpoints side by side: the figures of the single commands, paired differences, and going on after a stop."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy import stats

pytest.importorskip("lm_eval")

import lm_eval
import lm_eval.evaluator

import llmprune
from llmprune import cli
from llmprune.errors import Failure, NotFinite, UserError
from llmprune.evaluate import compare as room
from llmprune.evaluate import divergence, perplexity, tasks
from llmprune.evaluate.pieces import FOLDER
from llmprune.progress import Silent
from llmprune.report.comparison import Compared
from llmprune.report.record import Score
from llmprune.report.tables import models_table, scores_table
from tests.families import make
from tests.test_tasks import HEAD
from tests.test_tasks import TASKS as YAML

LENGTH = 32
TASKS = ("tiny_choice", "tiny_last", "tiny_rolling")


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """lm-eval resamples 100,000 times for the standard error of a perplexity, and asks other programs for versions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        patch.setattr(lm_eval, "simple_evaluate", functools.partial(lm_eval.simple_evaluate, bootstrap_iters=1000))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Some rise by sin, and some by virtue fall. The miserable have no other medicine. " * 6)
    return str(path)


@pytest.fixture(scope="module")
def own(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks whose right answers the dense model is made to know: those that it holds the most likely itself."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = torch.Generator().manual_seed(1)

    def letters(count: int) -> str:
        return "".join(chr(97 + int(code)) for code in torch.randint(0, 26, (count,), generator=draw))

    documents = []
    for number in range(40):
        choices = [letters(4) for _ in range(4)]
        page = " ".join(letters(5) for _ in range(4 + number % 7))
        documents.append({"question": letters(9), "choices": choices, "label": number % 4, "page": page})
    data = folder / "documents.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    for name in TASKS:
        (folder / f"{name}.yaml").write_text(f"task: {name}{HEAD.format(data=data)}{YAML[name]}")
    return folder


@pytest.fixture(scope="module")
def models(own: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model that answers everything right, itself once more, one pruned a little, and a wreck."""
    folder = tmp_path_factory.mktemp("models")
    dense = make("llama", folder / "dense", num_hidden_layers=2)
    data = own / "documents.jsonl"
    said = tasks.evaluate(dense, ["tiny_choice"], include_path=[own], samples=True).raw["samples"]["tiny_choice"]
    documents = [json.loads(line) for line in data.read_text().splitlines()]
    for sample in said:
        likely = [answer[0] for answer in sample["filtered_resps"]]
        documents[sample["doc_id"]]["label"] = likely.index(max(likely))
    data.write_text("\n".join(map(json.dumps, documents)))
    llmprune.prune(dense, out=folder / "sparse", sparsity="10%", method="magnitude")
    shutil.copytree(dense, folder / "copy")
    make("llama", folder / "other", num_hidden_layers=2, seed=7)
    weights = load_file(folder / "other" / "model.safetensors")
    weights["model.norm.weight"] *= 6  # it is surer of what it says than it should be
    save_file(weights, folder / "other" / "model.safetensors", metadata={"format": "pt"})
    return {name: folder / name for name in ("dense", "sparse", "copy", "other")}


def options(own: Path, text: str) -> dict[str, Any]:
    return {"text": text, "length": LENGTH, "tasks": TASKS, "include_path": [own]}


@pytest.fixture(scope="module")
def found(models: dict[str, Path], own: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    others = [models[name] for name in ("copy", "sparse", "other")]
    out = tmp_path_factory.mktemp("out")
    return llmprune.compare(models["dense"], others, out=out, **options(own, text)), out


def test_figures_are_those_of_the_single_commands(found: Any, models: dict[str, Path], own: Path, text: str) -> None:
    rows = {model.name: model for model in found[0].models}
    assert list(rows) == ["dense", "copy", "sparse", "other"]
    assert [model.dense for model in rows.values()] == [True, False, False, False]
    for name, row in rows.items():
        alone = llmprune.perplexity(models[name], text, length=LENGTH)
        assert row.perplexity.value == pytest.approx(alone.value, rel=1e-12)
        assert row.perplexity.tokens == alone.tokens
        scored = tasks.evaluate(models[name], TASKS, include_path=[own])
        assert [(score.task, score.metric) for score in row.scores] == [(s.task, s.metric) for s in scored.scores]
        for mine, theirs in zip(row.scores, scored.scores, strict=True):
            assert mine.value == pytest.approx(theirs.value, rel=1e-5)
        if name == "dense":
            assert row.divergence is None
        else:
            apart = llmprune.divergence(models[name], models["dense"], text, length=LENGTH)
            assert row.divergence.kl == pytest.approx(apart.kl, rel=1e-12)
            assert row.divergence.stderr == pytest.approx(apart.stderr, rel=1e-12)
            assert row.divergence.agreement == apart.agreement
        weights = load_file(next(models[name].glob("*.safetensors"))) if name != "sparse" else None
        if weights is not None:
            assert row.weights == sum(weight.numel() for weight in weights.values())
            assert row.bytes == (models[name] / "model.safetensors").stat().st_size
            assert row.sparsity == pytest.approx(sum(int((w == 0).sum()) for w in weights.values()) / row.weights)
    assert rows["sparse"].linears_sparsity == pytest.approx(0.1, abs=1e-3)
    assert 0 < rows["sparse"].sparsity < rows["sparse"].linears_sparsity


def differences(found: Any, model: str) -> dict[tuple[str, str], Any]:
    return {(entry.task, entry.metric): entry for entry in found.differences if entry.model == model}


def test_a_copy_does_not_differ(found: Any) -> None:
    same = differences(found[0], "copy")
    assert len(same) == 7
    for entry in same.values():
        assert entry.difference == 0
        assert entry.p == 1
        assert entry.beyond_noise is False
    assert found[0].models[1].divergence.kl == 0


def test_another_model_is_beyond_noise(found: Any) -> None:
    other = differences(found[0], "other")
    assert other["perplexity", "nats"].beyond_noise is True
    assert other["tiny_choice", "acc"].beyond_noise is True
    assert other["tiny_choice", "acc"].difference < 0
    assert other["tiny_choice", "acc"].test == "mcnemar"
    assert found[0].judged == {"level": 0.05, "adjusted": "holm", "tests": 21}
    assert all(entry.adjusted >= entry.p for entry in found[0].differences)


def test_differences_restated(found: Any, models: dict[str, Path], own: Path, text: str) -> None:
    """From lm-eval's own samples and from plain losses, by scipy."""
    entries = differences(found[0], "other")
    sides = [tasks.evaluate(models[name], TASKS, include_path=[own], samples=True).raw for name in ("dense", "other")]

    def values(task: str, metric: str) -> list[numpy.ndarray]:
        return [numpy.array([sample[metric] for sample in side["samples"][task]], float) for side in sides]

    first, second = values("tiny_choice", "acc")
    entry = entries["tiny_choice", "acc"]
    assert entry.difference == pytest.approx((second - first).mean())
    assert entry.stderr == pytest.approx(stats.sem(second - first))
    gained, lost = int((second > first).sum()), int((second < first).sum())
    assert entry.p == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    first, second = values("tiny_last", "perplexity")
    entry = entries["tiny_last", "perplexity"]
    assert entry.difference == pytest.approx(numpy.exp(-second.mean()) - numpy.exp(-first.mean()), rel=1e-4)
    assert entry.p == pytest.approx(stats.ttest_rel(second, first).pvalue, rel=1e-2)
    first, second = values("tiny_rolling", "word_perplexity")
    entry = entries["tiny_rolling", "word_perplexity"]
    means = [part[:, 0].sum() / part[:, 1].sum() for part in (first, second)]
    assert entry.difference == pytest.approx(numpy.exp(-means[1]) - numpy.exp(-means[0]), rel=1e-4)
    rows = {model.name: model for model in found[0].models}
    nats = numpy.log(rows["other"].perplexity.value) - numpy.log(rows["dense"].perplexity.value)
    assert entries["perplexity", "nats"].difference == pytest.approx(nats)
    assert entries["perplexity", "nats"].documents == rows["dense"].perplexity.windows


def test_nothing_is_measured_twice(
    found: Any, models: dict[str, Path], own: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(found[1], tmp_path / "out"))
    assert not list((out / FOLDER).glob("states-*"))
    passes: list[str] = []

    class Watching(Silent):
        def over(self, items: Any, title: str) -> Iterator[Any]:
            passes.append(title)
            yield from items

    others = [models["other"], models["sparse"]]
    again = llmprune.compare(models["dense"], others, out=out, progress=Watching(), **options(own, text))
    assert passes == []
    assert [model.name for model in again.models] == ["dense", "other", "sparse"]
    assert again.models[1] == found[0].models[3]
    with (models["sparse"] / "config.json").open("a") as file:
        file.write("\n")  # another file is another model
    try:
        llmprune.compare(models["dense"], others, out=out, progress=Watching(), **options(own, text))
    finally:
        (models["sparse"] / "config.json").write_text((models["sparse"] / "config.json").read_text()[:-1])
    assert passes == ["evaluating the dense model again", "evaluating sparse"] + ["scoring"] * 3


class Stopping(Silent):
    """Stops before the nth pass through a model."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.passes: list[str] = []

    def over(self, items: Any, title: str) -> Iterator[Any]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.passes.append(title)
        yield from items


def test_what_was_cut_off_goes_on(found: Any, models: dict[str, Path], own: Path, text: str, tmp_path: Path) -> None:
    others = [models[name] for name in ("copy", "sparse", "other")]
    passes: list[str] = []
    for _ in range(40):
        watch = Stopping(1)
        try:
            result = llmprune.compare(
                models["dense"], others, out=tmp_path / "out", progress=watch, **options(own, text)
            )
            passes += watch.passes
            break
        except KeyboardInterrupt:
            passes += watch.passes
    else:
        pytest.fail("it does not come to an end")
    # The copy has the files of the dense model, so that its tasks are known; no other pass was made twice.
    assert passes.count("evaluating dense") == 1
    assert len(passes) == 1 + 3 + 1 + 2 * 4
    whole, pieces = found[0].to_dict(), result.to_dict()
    assert pieces["differences"] == whole["differences"]
    for mine, theirs in zip(pieces["models"], whole["models"], strict=True):
        for part in ("perplexity", "divergence"):
            for side in (mine, theirs):
                (side[part] or {}).pop("seconds", None)
        assert mine == theirs
    assert json.loads((tmp_path / "out" / room.RESULT).read_text())["differences"] == whole["differences"]


def test_a_piece_that_was_torn_is_made_again(models: dict[str, Path], text: str, tmp_path: Path) -> None:
    given = {"text": text, "length": LENGTH, "out": tmp_path / "out"}
    first = llmprune.compare(models["dense"], [models["other"]], **given)
    for path in (tmp_path / "out" / FOLDER).glob("*.json"):
        path.write_text(path.read_text()[:40])
    again = llmprune.compare(models["dense"], [models["other"]], **given)
    assert again.differences == first.differences


def test_the_same_tokens_in_other_windows_are_measured_anew(models: dict[str, Path], text: str, tmp_path: Path) -> None:
    dense, *others = list(models.values())[:2]
    for length in (16, 32):  # in one folder, which has kept what was found out
        kept = llmprune.compare(dense, others, text=text, length=length, device="cpu", out=tmp_path / "kept")
        anew = llmprune.compare(dense, others, text=text, length=length, device="cpu")
        for mine, theirs in zip(kept.models, anew.models, strict=True):
            assert mine.perplexity is not None
            assert theirs.perplexity is not None
            assert mine.perplexity.length == length
            assert mine.perplexity.value == theirs.perplexity.value


def test_another_vocabulary_leaves_the_divergence_out(models: dict[str, Path], text: str, tmp_path: Path) -> None:
    wider = make("llama", tmp_path / "wider", vocab_size=140, num_hidden_layers=1)
    strange = Path(shutil.copytree(models["other"], tmp_path / "strange"))
    words = json.loads((strange / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (strange / "tokenizer.json").write_text(json.dumps(words))
    made = llmprune.compare(models["dense"], [wider, strange, models["other"]], text=text, length=LENGTH)
    assert all(model.perplexity is not None for model in made.models)
    assert [model.divergence is None for model in made.models] == [True, True, True, False]
    assert [entry.model for entry in made.differences] == ["wider", "other"]  # these read the same tokens
    assert made.notes[0].endswith("have other tokens (140 and 128): no divergence")
    assert "its own tokens, which is not compared" in made.notes[1]


def test_documents_that_changed_meanwhile_are_seen(
    models: dict[str, Path], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data of a task may lie anywhere; what was kept of other documents is not paired with those of now."""
    data = Path(shutil.copy(own / "documents.jsonl", tmp_path / "documents.jsonl"))
    (tmp_path / "own").mkdir()
    yaml = f"task: moved{HEAD.format(data=data)}{YAML['tiny_choice']}"
    (tmp_path / "own" / "moved.yaml").write_text(yaml)
    given: dict[str, Any] = {"tasks": ["moved"], "include_path": [tmp_path / "own"], "out": tmp_path / "out"}
    llmprune.compare(models["dense"], [models["copy"]], **given)
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[1:], lines[0]]))
    with pytest.raises(Failure, match="the documents of moved are not the same for dense and other"):
        llmprune.compare(models["dense"], [models["other"]], **given)


def test_a_figure_that_is_no_mean_has_no_verdict(models: dict[str, Path], own: Path, tmp_path: Path) -> None:
    yaml = f"task: whole{HEAD.format(data=own / 'documents.jsonl')}{YAML['tiny_choice']}"
    (tmp_path / "whole.yaml").write_text(yaml.replace("acc_norm, aggregation: mean", "acc_norm, aggregation: median"))
    made = llmprune.compare(models["dense"], [models["other"]], tasks=["whole"], include_path=[tmp_path])
    entries = differences(made, "other")
    assert (entries["whole", "acc_norm"].p, entries["whole", "acc_norm"].beyond_noise) == (None, None)
    assert entries["whole", "acc"].p is not None
    assert made.judged["tests"] == sum(entry.p is not None for entry in made.differences) == 1


def test_mistakes_are_told_before_any_work(
    models: dict[str, Path], own: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(perplexity, "losses", never)
    monkeypatch.setattr(divergence, "apart", never)
    dense, other = models["dense"], models["other"]
    with pytest.raises(UserError, match="name at least one beside the dense one"):
        llmprune.compare(dense, [], text=text, length=LENGTH)
    with pytest.raises(UserError, match="no model at"):
        llmprune.compare(dense, [other, "./nowhere"], text=text, length=LENGTH)
    with pytest.raises(UserError, match="no folder with tasks at"):
        llmprune.compare(dense, [other], text=text, length=LENGTH, tasks=TASKS, include_path=[own / "nowhere"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="results cannot be written to"):
        llmprune.compare(dense, [other], text=text, length=LENGTH, out=tmp_path / "file")


def test_weights_that_give_nothing_finite_are_named(
    models: dict[str, Path], own: Path, text: str, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(models["dense"], tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights = {name: weight * 3e38 if name == "model.norm.weight" else weight for name, weight in weights.items()}
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    given: dict[str, Any] = {**options(own, text), "out": tmp_path / "out"}
    made = llmprune.compare(models["dense"], [broken, models["copy"]], **given)
    wreck, copy = made.models[1:]
    assert (wreck.perplexity, wreck.divergence, wreck.scores) == (None, None, [])
    assert wreck.sparsity == pytest.approx(made.models[0].sparsity)
    assert copy.perplexity == made.models[0].perplexity or copy.perplexity is not None
    assert {entry.model for entry in made.differences} == {"copy"}
    assert f"what {broken} says of the text is not finite; it has no perplexity here" in made.notes
    assert [f"{task} of broken is not finite, and left out" in made.notes for task in TASKS] == [True] * len(TASKS)
    assert "-" in [cell for column in models_table(made.models).columns for cell in column.cells]
    with pytest.raises(NotFinite, match="broken says of the text is not finite"):
        llmprune.compare(broken, [models["copy"]], text=text, length=LENGTH)
    with pytest.raises(NotFinite, match="broken says is not finite"):
        llmprune.compare(broken, [models["copy"]], tasks=["tiny_choice"], include_path=[own])


def test_a_task_that_is_asked_for_twice_counts_once(models: dict[str, Path], own: Path, tmp_path: Path) -> None:
    for path in own.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "pair.yaml").write_text("group: pair\ntask: [tiny_choice, tiny_last]\n")
    given: dict[str, Any] = {"include_path": [tmp_path], "limit": 8}
    once = llmprune.compare(models["dense"], [models["other"]], tasks=["pair"], **given)
    more = llmprune.compare(models["dense"], [models["other"]], tasks=["tiny_last", "pair", "tiny_c*"], **given)
    assert {entry.task for entry in once.differences} == {"tiny_choice", "tiny_last"}
    assert [vars(entry) for entry in more.differences] == [vars(entry) for entry in once.differences]
    assert more.judged == once.judged


def test_a_tokenizer_that_reads_the_text_otherwise_is_told(models: dict[str, Path], text: str, tmp_path: Path) -> None:
    """The same vocabulary, and other tokens of this text; and one that is only written otherwise."""
    small = Path(shutil.copytree(models["other"], tmp_path / "small"))
    words = json.loads((small / "tokenizer.json").read_text())
    words["normalizer"] = {"type": "Lowercase"}
    (small / "tokenizer.json").write_text(json.dumps(words))
    alike = Path(shutil.copytree(models["other"], tmp_path / "alike"))
    words["normalizer"] = {"type": "NFC"}
    (alike / "tokenizer.json").write_text(json.dumps(words))
    made = llmprune.compare(models["dense"], [small, alike], text=text, length=LENGTH)
    assert [model.divergence is None for model in made.models] == [True, True, False]
    assert [entry.model for entry in made.differences] == ["alike"]
    own = llmprune.perplexity(small, text, length=LENGTH)
    assert made.models[1].perplexity is not None
    assert made.models[1].perplexity.value == pytest.approx(own.value, rel=1e-12)
    assert any("make other tokens of" in note and "not compared" in note for note in made.notes)


def test_a_context_that_all_can_take(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long, short = (make("gpt2", tmp_path / str(count), n_positions=count) for count in (64, 32))
    for dense, other in ((long, short), (short, long)):
        made = llmprune.compare(dense, [other], text=text)
        assert [model.perplexity.length for model in made.models if model.perplexity is not None] == [32, 32]
        assert llmprune.divergence(other, dense, text).length == 32
    given = ["compare", str(long), str(short), "--perplexity", text, "--length", "48"]
    assert cli.main(given) == 2
    assert "longer than" in (said := capsys.readouterr().err)
    assert "(32)" in said


def test_a_column_of_a_text(models: dict[str, Path], text: str, tmp_path: Path) -> None:
    records = tmp_path / "text.jsonl"
    records.write_text(json.dumps({"page": Path(text).read_text(), "other": 1}) + "\n")
    given = ["--perplexity", str(records), "--length", str(LENGTH)]
    dense, other = str(models["dense"]), str(models["other"])
    told = tmp_path / "told"
    assert cli.main(["eval", dense, *given]) == 2
    assert cli.main(["eval", dense, *given, "--text-column", "page", "--against", other, "-o", str(told)]) == 0
    assert cli.main(["compare", dense, other, *given, "--text-column", "page", "-o", str(told)]) == 0
    value = llmprune.perplexity(dense, text, length=LENGTH).value
    assert json.loads((told / "eval.json").read_text())["perplexity"]["value"] == value
    compared = json.loads((told / "comparison.json").read_text())
    assert compared["models"][0]["perplexity"]["value"] == pytest.approx(value, rel=1e-12)


def test_the_command_line(
    models: dict[str, Path],
    own: Path,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    names = [str(models[name]) for name in ("dense", "sparse", "other")]
    given = ["compare", *names, "--text", text, "--length", str(LENGTH), "--tasks", "tiny_choice,tiny_last"]
    given += ["--include-path", str(own), "--limit", "20", "-o", str(tmp_path / "out")]
    assert cli.main([*given, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert told["dense"] == "dense"
    assert {score["documents"] for model in told["models"] for score in model["scores"]} == {20}
    keys = {"name", "path", "dense", "bytes", "weights", "sparsity", "perplexity", "divergence", "scores"}
    assert all(keys <= set(model) for model in told["models"])
    assert cli.main(given) == 0
    shown = capsys.readouterr().out
    for words in ("Models", "Tasks", "Differences from dense", "beyond noise", "tiny_choice", "nats", "windows of a"):
        assert words in shown
    assert cli.main(["compare", names[0], "./nowhere", "--text", text]) == 2
    assert "no model at ./nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["compare", names[0]])


@pytest.mark.parametrize(("count", "wide"), [(2, True), (7, False)])
def test_figures_of_many_models_are_whole_in_a_narrow_window(count: int, wide: bool) -> None:
    models = [Compared(f"model-{number}", "", False, 1, 1, 0.0, 0.0, {}) for number in range(count)]
    for number, model in enumerate(models):
        model.scores = [Score("quiz", name, "none", number / 10 + 0.0123, 0.0456, 9, 0, True) for name in ("acc", "f1")]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(scores_table(models, console))
    lines = captured.get().splitlines()
    assert all(len(line) <= 80 for line in lines)
    for number in range(count):
        told = [line for line in lines if f"{number / 10 + 0.0123:.4f} ± 0.0456" in line]
        assert len(told) == 2
        assert any(f"model-{number}" in line for line in (lines if wide else told))


def test_weights_are_told_where_a_model_has_fewer() -> None:
    def heads(*weights: int) -> dict[str, list[str]]:
        table = models_table([Compared(f"m{count}", "", False, 2 * count, count, 0.0, 0.0, {}) for count in weights])
        return {str(column.header): list(map(str, column.cells)) for column in table.columns}

    assert heads(120_000, 96_000)["weights"] == ["120,000", "96,000"]
    assert "weights" not in heads(120_000, 120_000)
