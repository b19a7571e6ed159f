"""The trade-off curve: the figures of single runs, one dense evaluation, going on after a stop, and the picture."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import llmprune
from llmprune import cli, points
from llmprune.errors import UserError
from llmprune.evaluate.compare import Reference
from llmprune.model.writer import REPORT
from llmprune.progress import Silent
from llmprune.report import curve
from llmprune.sweep import PAGE, RESULT, Sweep, sweep
from tests import browser
from tests.families import make
from tests.test_distributed import Ranks
from tests.test_tasks import HEAD, TASKS

LENGTH = 32
NAMES = ["wanda-30", "wanda-60", "wanda-2-4", "magnitude-30", "magnitude-60", "magnitude-2-4"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The better part of valour is discretion, in the which better part I have saved my life. " * 12)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=2)


def options(text: str) -> dict[str, Any]:
    shared = {"calibration": text, "samples": 4, "length": LENGTH}
    return {**shared, "evaluate": {"text": text, "length": LENGTH, "max_perplexity": None}}


def lists(sparsity: str = "30%,60%,2:4", method: str = "wanda,magnitude") -> dict[str, Any]:
    return {"sparsity": sparsity.split(","), "method": method.split(",")}


class Watching(Silent):
    """Writes down what is done, and stops before the nth thing of a kind."""

    def __init__(self, kind: str = "", stop: int = 10**6) -> None:
        self.kind, self.left, self.titles = kind, stop, list[str]()

    def over(self, items: Any, title: str) -> Iterator[Any]:
        self.titles.append(title)
        if self.kind and self.kind in title:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        yield from items


@pytest.fixture(scope="module")
def found(model: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path, Watching]:
    out, watch = tmp_path_factory.mktemp("out") / "sweep", Watching()
    return sweep(model, out=out, progress=watch, **lists(), **options(text)), out, watch


def figures(made: Sweep) -> list[dict[str, Any]]:
    """All figures of a sweep but times and places."""
    rows = [model.to_dict() for model in made.comparison.models]
    for row in rows:
        row["path"] = None
        for part in ("perplexity", "divergence"):
            (row[part] or {}).pop("seconds", None)
    return rows


def test_figures_are_those_of_single_runs(
    found: tuple[Sweep, Path, Watching], model: Path, text: str, tmp_path: Path
) -> None:
    made = found[0]
    assert [point.name for point in made.points] == NAMES
    rows = {row.name: row for row in made.comparison.models}
    for point in made.points:
        report = llmprune.prune(
            model, out=tmp_path / point.name, sparsity=point.pattern, method=point.method, **options(text)
        )
        row = rows[point.name]
        assert report.sparse is not None
        assert report.dense is not None
        assert row.perplexity is not None
        assert row.divergence is not None
        assert row.perplexity.value == pytest.approx(report.sparse.value, rel=1e-12)
        assert rows["dense"].perplexity is not None
        assert rows["dense"].perplexity.value == pytest.approx(report.dense.value, rel=1e-12)
        apart = llmprune.divergence(tmp_path / point.name, model, text, length=LENGTH)
        assert row.divergence.kl == pytest.approx(apart.kl, rel=1e-12)
        assert row.linears_sparsity == pytest.approx(report.sparsity, abs=1e-9)
        assert point.target == pytest.approx(report.sparsity, abs=0.02)
        kept = json.loads((found[1] / "points" / f"{point.name}.json").read_text())["report"]
        assert [linear["mask_sha256"] for linear in kept["linears"]] == [
            linear.mask_sha256 for linear in report.linears
        ]


def test_the_dense_model_is_run_once_and_no_weights_stay(found: tuple[Sweep, Path, Watching]) -> None:
    dense = [title for title in found[2].titles if title == "evaluating dense" or "dense model" in title]
    assert dense == ["evaluating dense"]
    assert "3 of 6, wanda 2:4: pruning blocks" in found[2].titles
    assert sorted(path.name for path in found[1].iterdir()) == [".pieces", "points", PAGE, RESULT]
    assert not list(found[1].rglob("*.safetensors"))


@pytest.mark.parametrize("stop", [0, 2, 5])
def test_stopped_while_it_prunes(
    stop: int, found: tuple[Sweep, Path, Watching], model: Path, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        sweep(model, out=out, progress=Watching("pruning blocks", stop), **lists(), **options(text))
    watch = Watching()
    assert figures(sweep(model, out=out, progress=watch, **lists(), **options(text))) == figures(found[0])
    assert sum("pruning blocks" in title for title in watch.titles) == 6 - stop
    assert "evaluating dense" not in watch.titles
    assert not list(out.rglob("*.safetensors"))


def test_a_point_that_says_nothing_finite_does_not_stop_the_others(
    found: tuple[Sweep, Path, Watching], model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pruned(*given: Any, out: Path, **named: Any) -> Any:
        report = prune(*given, out=out, **named)
        if out.name == "wanda-60":
            for shard in out.glob("*.safetensors"):
                weights = load_file(shard)
                if "model.norm.weight" in weights:
                    weights["model.norm.weight"].fill_(float("nan"))
                    save_file(weights, shard, metadata={"format": "pt"})
        return report

    prune = points.pipeline.prune
    monkeypatch.setattr(points.pipeline, "prune", pruned)
    made = sweep(model, out=tmp_path / "out", **lists(), **options(text))
    wanted = {row["name"]: row for row in figures(found[0])}
    for row in figures(made):
        if row["name"] == "wanda-60":
            assert (row["perplexity"], row["divergence"]) == (None, None)
        else:
            assert row == wanted[row["name"]]
    assert any("wanda-60 says of the text is not finite" in note for note in made.comparison.notes)
    drawn = curve.plots_of(made.to_dict())[0].figure
    assert [len(trace.x) for trace in drawn.data if trace.name == "wanda"] == [1]


def test_a_model_that_moves_on_the_hub_meanwhile_is_told(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pruned(*given: Any, **named: Any) -> Any:
        report = prune(*given, **named)
        report.revision = "f" * 40
        return report

    prune = points.pipeline.prune
    monkeypatch.setattr(points.pipeline, "prune", pruned)
    with pytest.raises(UserError, match=r"has moved from None to f{40} on the Hub since the dense model was measured"):
        sweep(model, out=tmp_path / "out", **lists("30%", "wanda"), **options(text))
    assert not list((tmp_path / "out" / "points").glob("wanda*.json"))


def test_stopped_while_it_measures(found: tuple[Sweep, Path, Watching], model: Path, text: str, tmp_path: Path) -> None:
    """What was pruned is not pruned again."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        sweep(model, out=out, progress=Watching("evaluating wanda-60", 0), **lists(), **options(text))
    assert (out / "wanda-60" / REPORT).is_file()
    watch = Watching()
    assert figures(sweep(model, out=out, progress=watch, **lists(), **options(text))) == figures(found[0])
    assert sum("pruning blocks" in title for title in watch.titles) == 4


def test_killed(found: tuple[Sweep, Path, Watching], model: Path, text: str, tmp_path: Path) -> None:
    """A process that dies at once, in the middle of the third point, and the same command again."""
    out = tmp_path / "out"
    shared = {**lists(), **options(text)}
    script = f"""
import os, signal
from llmprune.progress import Silent
from llmprune.sweep import sweep
class Dying(Silent):
    def block(self, record):
        if os.path.exists({str(out / "points" / "wanda-60.json")!r}):
            os.kill(os.getpid(), signal.SIGKILL)
sweep({str(model)!r}, out={str(out)!r}, progress=Dying(), **{shared!r})
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (out / "wanda-2-4").is_dir()
    assert figures(sweep(model, out=out, **shared)) == figures(found[0])


def test_longer_lists_add_points(found: tuple[Sweep, Path, Watching], model: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep(model, out=out, **lists("30%", "magnitude"), **options(text))  # needs no calibration tokens
    watch = Watching()
    sweep(model, out=out, progress=watch, **lists("30%,2:4,0.3", "wanda"), **options(text))
    assert sum("pruning blocks" in title for title in watch.titles) == 2
    again = sweep(model, out=out, progress=(watch := Watching()), **lists("2:4", "magnitude"), **options(text))
    assert sum("pruning blocks" in title for title in watch.titles) == 1
    assert [point.name for point in again.points] == ["magnitude-30", "magnitude-2-4", "wanda-30", "wanda-2-4"]
    wanted = {row["name"]: row for row in figures(found[0])}
    assert figures(again) == [wanted[name] for name in ("dense", *(point.name for point in again.points))]


def test_another_request_is_refused(
    found: tuple[Sweep, Path, Watching], model: Path, text: str, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(found[1], tmp_path / "out"))
    before = (out / RESULT).read_bytes()
    other = tmp_path / "other.txt"
    other.write_text(Path(text).read_text().replace("valour", "valor"))
    changed: list[tuple[dict[str, Any], str]] = [
        ({"samples": 3}, r"another recipe\.calibration\.samples \(4 there, 3 here\)"),
        ({"ignore": ["*.o_proj"]}, r"another recipe\.ignore"),
        ({"evaluate": {"text": str(other), "length": LENGTH, "max_perplexity": None}}, "another evaluation text"),
    ]
    for change, words in changed:
        with pytest.raises(UserError, match=words):
            sweep(model, out=out, **lists(), **{**options(text), **change})
    strange = make("llama", tmp_path / "strange", num_hidden_layers=2, seed=3)
    with pytest.raises(UserError, match=r"another files\.model\.safetensors"):
        sweep(strange, out=out, **lists(), **options(text))
    # The calibration text's file is the same by name, and holds something else.
    own = Path(shutil.copy(text, tmp_path / "own.txt"))
    sweep(model, out=tmp_path / "two", **lists("30%", "wanda"), **{**options(text), "calibration": str(own)})
    own.write_text(other.read_text())
    with pytest.raises(UserError, match="another calibration tokens"):
        sweep(model, out=tmp_path / "two", **lists("30%", "wanda"), **{**options(text), "calibration": str(own)})
    assert (out / RESULT).read_bytes() == before


def test_a_point_that_cannot_be_is_told_before_any_work(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = make("llama", tmp_path / "odd", intermediate_size=66)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(Reference, "measure", never)
    with pytest.raises(UserError, match=r"wanda 2:4: 2:4 needs in_features divisible by 4; .*down_proj has 66"):
        sweep(odd, out=tmp_path / "out", **lists("50%,2:4", "wanda"), **options(text))
    with pytest.raises(UserError, match="unknown method 'wandaa': did you mean 'wanda'"):
        sweep(odd, out=tmp_path / "out", **lists("50%", "wanda,wandaa"), **options(text))
    assert not (tmp_path / "out").exists()


def test_a_broken_dense_model_is_refused(model: Path, text: str, tmp_path: Path) -> None:
    given = {**options(text), "evaluate": {"text": text, "length": LENGTH, "max_perplexity": 2.0}}
    with pytest.raises(UserError, match="is broken before it is pruned"):
        sweep(model, out=tmp_path / "out", **lists(), **given)


def test_models_that_are_kept(found: tuple[Sweep, Path, Watching], model: Path, text: str, tmp_path: Path) -> None:
    out = Path(shutil.copytree(found[1], tmp_path / "out"))
    watch = Watching()
    kept = sweep(model, out=out, keep_models=True, progress=watch, **lists("2:4", "wanda"), **options(text))
    assert llmprune.verify(out / "wanda-2-4").ok
    assert [point.name for point in kept.points if point.kept] == ["wanda-2-4"]
    assert not any("evaluating" in title for title in watch.titles)  # their figures are known by their files
    sweep(model, out=out, **lists("30%,2:4", "wanda"), **options(text))
    assert llmprune.verify(out / "wanda-2-4").ok
    assert not (out / "wanda-30").exists()


def test_options_of_a_method_are_those_of_its_points(model: Path, text: str, tmp_path: Path) -> None:
    given = {**options(text), "recipe": {"method": {"name": "sparsegpt", "damping": 0.5}}}
    sweep(model, out=tmp_path / "out", **lists("50%", "magnitude,sparsegpt"), **given)
    recipes = {
        name: json.loads((tmp_path / "out" / "points" / f"{name}-50.json").read_text())["report"]["recipe"]
        for name in ("magnitude", "sparsegpt")
    }
    assert recipes["magnitude"]["method"] == "magnitude"
    assert recipes["sparsegpt"]["method"] == {"name": "sparsegpt", "damping": 0.5}
    given["recipe"] = {"method": {"name": "sparsegpt", "damping": 0.1}}
    with pytest.raises(UserError, match=r"another recipe\.method\.damping \(0\.5 there, 0\.1 here\)"):
        sweep(model, out=tmp_path / "out", **lists("50%", "sparsegpt"), **given)


def by_ranks(model: Path, out: Path, text: str, own: Path) -> None:
    os.environ["LOCAL_RANK"] = os.environ["RANK"]  # as torchrun tells
    given = {**lists("60%", "wanda"), **options(text), "device": "cpu"}
    made = sweep(model, out=out, tasks=["tiny_choice"], include_path=[own], **given)
    assert [point.name for point in made.points] == ["wanda-60"]
    assert made.comparison.models[1].scores  # every rank is told


def test_two_ranks(found: tuple[Sweep, Path, Watching], model: Path, text: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "own").mkdir()
    data = tmp_path / "own" / "documents.jsonl"
    documents = [{"question": f"{number}", "choices": ["ab", "c", "d", "ef"], "label": 1} for number in range(9)]
    data.write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "own" / "tiny_choice.yaml").write_text(
        f"task: tiny_choice{HEAD.format(data=data)}{TASKS['tiny_choice']}"
    )
    with Ranks(tmp_path, 2, by_ranks, model, tmp_path / "out", text, tmp_path / "own") as ranks:
        for process in ranks.processes:
            process.join(240)
        ranks.all_well()
    told = json.loads((tmp_path / "out" / RESULT).read_text())
    wanted = {row["name"]: row for row in figures(found[0])}
    for row in told["models"]:
        assert row["perplexity"]["value"] == pytest.approx(wanted[row["name"]]["perplexity"]["value"], rel=1e-3)
    assert told["models"][1]["divergence"]["kl"] == pytest.approx(wanted["wanda-60"]["divergence"]["kl"], rel=1e-2)
    assert {entry["task"] for entry in told["differences"]} == {"perplexity", "tiny_choice"}
    assert not list((tmp_path / "out").rglob("*.safetensors"))


class TestPicture:
    """What is drawn."""

    def test_lines_and_marks_are_the_points(self, found: tuple[Sweep, Path, Watching]) -> None:
        told = found[0].to_dict()
        rows = {row["name"]: row for row in told["models"]}
        drawn = curve.plots_of(told)
        assert [plot.name for plot in drawn] == ["perplexity-curve", "divergence-curve"]
        for plot, part, key in zip(drawn, ("perplexity", "divergence"), ("value", "kl"), strict=True):
            lines = {trace.name: trace for trace in plot.figure.data}
            assert set(lines) == {"wanda", "wanda, N:M", "magnitude", "magnitude, N:M"}
            assert list(lines["wanda"].y) == [rows[name][part][key] for name in ("wanda-30", "wanda-60")]
            assert list(lines["wanda"].x) == [rows[name]["linears_sparsity"] for name in ("wanda-30", "wanda-60")]
            assert list(lines["magnitude, N:M"].y) == [rows["magnitude-2-4"][part][key]]
            assert list(lines["magnitude, N:M"].text) == ["2:4"]
            assert lines["wanda"].marker.symbol != lines["wanda, N:M"].marker.symbol
            assert lines["wanda"].mode == "lines+markers"
            assert "2:4" in lines["wanda, N:M"].hovertext[0]
            assert f"{rows['wanda-2-4']['perplexity']['value']:.2f}" in lines["wanda, N:M"].hovertext[0]
            assert plot.figure.layout.xaxis.range[0] < min(lines["wanda"].x) - 0.04  # points of one sparsity together
        level = [shape for shape in drawn[0].figure.layout.shapes if shape.y0 == rows["dense"]["perplexity"]["value"]]
        assert len(level) == 1

    def test_the_page_needs_no_network(self, found: tuple[Sweep, Path, Watching]) -> None:
        page = (found[1] / PAGE).read_text()
        assert "plotly.js v" in page
        assert "default-src 'none'" in page
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page)
        assert tags
        assert not any("src=" in tag or "href=" in tag for tag in tags if "'" not in tag)

    def test_the_page_has_the_figures_in_tables(self, found: tuple[Sweep, Path, Watching]) -> None:
        page = (found[1] / PAGE).read_text()
        for row in figures(found[0]):
            assert f'<th scope="row">{row["name"]}</th>' in page
            assert f"<td>{row['perplexity']['value']:.2f}</td>" in page
            for score in row["scores"]:
                assert f"{score['value']:.4f}" in page

    @browser.needed
    def test_both_plots_are_drawn(self, found: tuple[Sweep, Path, Watching], tmp_path: Path) -> None:
        assert browser.drawn(found[1] / PAGE, tmp_path) == {"perplexity-curve", "divergence-curve"}

    @browser.needed
    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    def test_nothing_is_wider_than_a_narrow_window(
        self, dark: bool, found: tuple[Sweep, Path, Watching], tmp_path: Path
    ) -> None:
        drawn = "document.querySelectorAll('.plot .main-svg').length"
        shown = browser.seen((found[1] / PAGE).read_text(encoding="utf-8"), tmp_path, 500, dark, drawn)
        browser.fits(shown, 500, dark)
        assert int(shown.more) >= 2

    def test_what_others_have_named_is_text(self, found: tuple[Sweep, Path, Watching]) -> None:
        """Plotly obeys marks of HTML in what it writes beside points."""
        told = json.loads(json.dumps(found[0].to_dict()))
        hostile = "<img src=x onerror=alert(1)>"
        score = {"task": hostile, "metric": hostile, "filter": "none", "value": 0.5, "stderr": None}
        for row in told["models"]:
            row["scores"] = [{**score, "documents": 4, "shots": 0, "higher_is_better": True}]
        for point in told["points"]:
            point |= {"method": hostile, "verdicts": [{"promise": hostile, "holds": True}], "holds": True}
            point["pattern"] = f"2:4{hostile}" if ":" in point["pattern"] else hostile
        for plot in curve.plots_of(told):
            assert len(plot.figure.data) == 2
            for trace in plot.figure.data:
                texts = [trace.name, *trace.hovertext, *(trace.text or ())]
                assert not any("<img" in text for text in texts)
                assert "&lt;img" in trace.name
                assert all(text.count("&lt;img") == 5 for text in trace.hovertext)


def test_the_command_line(
    found: tuple[Sweep, Path, Watching],
    model: Path,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    given = ["sweep", str(model), "-o", str(tmp_path / "out"), "--method", "wanda", "--sparsity", "60%, 2:4"]
    given += ["--calibration", text, "--samples", "4", "--length", str(LENGTH), "--perplexity", text]
    given += ["--set", f"evaluate.length={LENGTH}", "--set", "evaluate.max_perplexity=null"]
    assert cli.main([*given, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "out" / RESULT).read_text())
    assert [point["name"] for point in told["points"]] == ["wanda-60", "wanda-2-4"]
    wanted = {row["name"]: row for row in figures(found[0])}
    assert [row["divergence"]["kl"] for row in told["models"][1:]] == [
        wanted[name]["divergence"]["kl"] for name in ("wanda-60", "wanda-2-4")
    ]
    assert cli.main(given) == 0
    shown = capsys.readouterr().out
    for words in ("wanda-2-4", "KL, nats", "beyond noise", "sweep.html"):
        assert words in shown
    assert cli.main([*given, "--samples", "5"]) == 2
    assert "holds a sweep with another recipe.calibration.samples" in capsys.readouterr().err
