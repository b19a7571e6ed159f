"""report.html: what it shows is what was recorded, and it is one file that needs nothing and runs nothing of others."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llmprune
from llmprune.errors import UserError
from llmprune.model.index import hash_weights
from llmprune.model.source import Source, present
from llmprune.model.writer import PAGE, REPORT, side_files
from llmprune.report import page, plots, weights
from llmprune.report.record import BlockRecord, LinearRecord, Perplexity, Report, Score
from llmprune.report.results import Results, read_results
from tests import browser
from tests.families import make
from tests.test_cli import call

TEXT = "Words are, of course, the most powerful drug used by mankind. " * 60
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"


class Parsed(HTMLParser):
    """Elements with their attributes, the text of the page, and the data inside script elements by their id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, Any] = {}
        self.open: list[str] = []
        self.text = ""
        self._inside: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        self._inside = dict(attributes).get("id") or "" if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> ends another element"
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is None:
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")
        elif self._inside:
            self.data[self._inside] = json.loads(data)

    def names(self) -> list[str]:
        return [name for name, _ in self.elements]


def parsed(out: Path) -> Parsed:
    return Parsed((out / PAGE).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def run(model: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Report:
    out = tmp_path_factory.mktemp("run") / "out"
    changes = {"evaluate": {"text": text, "length": 32, "max_perplexity": 1e9}, "ignore": ["*.1.*.o_proj"]}
    return llmprune.prune(
        model, out=out, sparsity="2:4", method="wanda", calibration=text, samples=4, length=32, **changes
    )


@pytest.fixture
def out(run: Report, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(run.out, tmp_path / "out")


def change(out: Path, **values: Any) -> None:
    path = out / REPORT
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def keep(out: Path, name: str, data: Any) -> None:
    """As if it had been measured later; of an evaluation by itself that of the weights as they are."""
    (out / "evaluation").mkdir(exist_ok=True)
    if name == "eval.json":
        data = {"shards": hash_weights(out), **data}
    (out / "evaluation" / name).write_text(json.dumps(data))


def score(task: str, value: float, metric: str = "acc", **changes: Any) -> dict[str, Any]:
    return {**vars(Score(task, metric, "none", value, 0.01, 400, 0, True)), **changes}


def comparison(out: Path, model: Path) -> dict[str, Any]:
    own = {"name": "own", "path": str(out), "dense": False, "bytes": 9, "weights": 9, "sparsity": 0.4,
           "linears_sparsity": 0.5, "perplexity": None, "divergence": None, "shards": hash_weights(out)}  # fmt: skip
    dense = {
        **own,
        "name": "big",
        "path": str(model),
        "dense": True,
        "shards": hash_weights(model),
        "scores": [score("arc_easy", 0.62)],
    }
    difference = {"model": "own", "task": "arc_easy", "metric": "acc", "filter": "none", "difference": -0.07,
                  "stderr": 0.012, "documents": 400, "p": 0.001, "beyond_noise": True}  # fmt: skip
    loss = {**difference, "task": "perplexity", "metric": "nats", "difference": 0.8, "documents": 12}
    return {
        "dense": "big", "text": None, "versions": {}, "seconds": 1.0, "differences": [difference, loss],
        "judged": {}, "notes": [],
        "models": [dense, {**own, "scores": [score("arc_easy", 0.55)]}],
    }  # fmt: skip


class TestARun:
    def test_ends_with_a_page_that_is_whole(self, run: Report) -> None:
        assert run.page_problem is None
        shown = parsed(run.out)
        assert shown.open == []
        assert not list(run.out.glob(".*draft"))
        named = [attributes["id"] for _, attributes in shown.elements if "id" in attributes]
        assert len(named) == len(set(named))
        linked = [str(attributes["href"])[1:] for name, attributes in shown.elements if name == "a"]
        assert linked
        assert set(linked) <= set(named)

    def test_begins_with_the_verdict(self, run: Report) -> None:
        assert run.dense is not None
        assert run.sparse is not None
        shown = " ".join(parsed(run.out).text.split())
        said = f"from {run.dense.value:.2f} to {run.sparse.value:.2f}"
        assert said in shown
        assert shown.index(said) < shown.index("Where the error is")
        assert "50% of the weights in 20 linears are zero" in shown
        assert f"{run.sparse.tokens:,} tokens" in shown
        assert "Not measured: divergence from the dense model, tasks, speed." in shown

    def test_plots_hold_what_was_recorded(self, run: Report) -> None:
        shown = parsed(run.out)
        errors = shown.data["error-map-data"]["data"][0]
        zeros = shown.data["zeros-map-data"]["data"][0]
        records = {record.name: record for record in run.linears}
        kinds = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
        assert errors["y"] == [kind.split(".")[1] for kind in kinds]
        for place, kind in enumerate(kinds):
            for block in range(3):
                record = records[f"model.layers.{block}.{kind}"]
                assert errors["customdata"][place][block] == record.relative_error
                assert zeros["z"][place][block] == pytest.approx(record.sparsity)
                if record.relative_error is not None:
                    assert 10 ** errors["z"][place][block] == pytest.approx(record.relative_error)
        worst, mean = shown.data["depth-data"]["data"]
        for block in range(3):
            told = [record.relative_error for name, record in records.items() if f".{block}." in name]
            known = [value for value in told if value is not None]
            assert worst["y"][block] == max(known)
            assert mean["y"][block] == pytest.approx(sum(known) / len(known))
        assert "left dense: ignored" in zeros["text"][3][1]

    def test_time_and_memory_are_those_of_the_blocks(self, run: Report) -> None:
        shown = parsed(run.out).data
        seconds = {trace["name"]: trace["y"] for trace in shown["time-data"]["data"]}
        assert [block.seconds["capture"] for block in run.blocks] == seconds["capture"]
        assert [block.peak_memory / 2**30 for block in run.blocks] == shown["memory-data"]["data"][1]["y"]

    def test_recipe_versions_and_hashes(self, run: Report) -> None:
        shown = parsed(run.out).text
        assert run.calibration is not None
        for expected in ("sparsity: '2:4'", torch.__version__, run.calibration["tokens_sha256"], *run.shards.values()):
            assert expected in shown

    def test_nothing_is_loaded_and_nothing_else_may_run(self, run: Report) -> None:
        shown = parsed(run.out)
        for name, attributes in shown.elements:
            assert name not in ("link", "img", "iframe", "object", "embed", "base", "form")
            assert not {"src", "srcset", "style", "onload", "onerror"} & set(attributes) or name == "h3"
            assert name != "a" or str(attributes["href"]).startswith("#")
        css = re.search("<style>(.*?)</style>", (run.out / PAGE).read_text(), re.DOTALL)
        assert css is not None
        assert "url(" not in css[1]
        assert "@import" not in css[1]
        policy = next(a["content"] for _, a in shown.elements if a.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        scripts = policy.split("script-src ")[1].split(";")[0].split()
        assert len(scripts) == 2

    def test_that_cannot_be_written_is_said(self, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (out / PAGE).unlink()
        (out / PAGE).mkdir()
        assert call("report", out) == 1
        told = capsys.readouterr().err
        assert f"llmprune: writing {out / PAGE} failed: " in told
        assert "Traceback" not in told
        assert not [path for path in out.iterdir() if path.name.endswith(".draft")]

    def test_drawing_it_anew_gives_the_same(self, run: Report, model: Path, text: str) -> None:
        first = (run.out / PAGE).read_bytes()
        drawn = page.draw(run.out)
        assert drawn.source == model.resolve()
        assert (run.out / PAGE).read_bytes() == first

    def test_verify_and_inspect_do_not_mind(self, out: Path) -> None:
        keep(out, "generations.json", [{"prompt": "a", "dense": None, "sparse": "b"}])
        page.draw(out)
        verdict = llmprune.verify(out)
        assert verdict.ok
        assert verdict.changed == []
        assert llmprune.inspect(out).sparsity > 0
        assert PAGE not in side_files(out)

    def test_that_begins_anew_takes_away_what_was_of_the_one_before(self, out: Path, model: Path, text: str) -> None:
        keep(out, "eval.json", {"model": str(out), "tasks": {"scores": [score("arc_easy", 0.5)]}})
        keep(out, "my own notes.txt", "")
        page.draw(out)
        assert "arc_easy" in parsed(out).text
        llmprune.prune(model, out=out, method="magnitude", restart=True)
        assert "arc_easy acc" not in parsed(out).text
        assert [path.name for path in (out / "evaluation").iterdir()] == ["my own notes.txt"]

    def test_without_data_says_that_there_are_no_errors(self, model: Path, tmp_path: Path) -> None:
        llmprune.prune(model, out=tmp_path / "out", method="magnitude", sparsity=0.5)
        shown = parsed(tmp_path / "out")
        assert "No errors were recorded" in shown.text
        assert "What that costs in quality has not been measured." in shown.text
        assert "error-map-data" not in shown.data

    def test_that_cannot_be_drawn_is_finished_all_the_same(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def broken(*_: Any, **__: Any) -> str:
            raise ZeroDivisionError("a mistake of ours")

        out = tmp_path / "out"
        with monkeypatch.context() as changed:
            changed.setattr(page, "render", broken)
            assert call("prune", model, "-o", out, "--method", "magnitude") == 0
        told = capsys.readouterr()
        assert "not drawn: ZeroDivisionError" in told.out
        assert f"`llmprune report {out}` draws it" in told.err
        assert not (out / PAGE).exists()
        assert llmprune.verify(out).ok
        assert call("report", out) == 0
        assert parsed(out).open == []


class TestWhatWasFoundLater:
    def test_an_evaluation(self, out: Path) -> None:
        apart = {"dense": "big", "kl": 0.123456, "stderr": 0.01, "agreement": 0.8125, "text": "wiki", "length": 64,
                 "windows": 9, "tokens": 567, "seconds": 1.0}  # fmt: skip
        tasks = {"scores": [score("arc_easy", 0.5), score("lambada", 31.5, "perplexity")], "means": {"pruning": 0.5}}
        keep(out, "eval.json", {"model": str(out), "divergence": apart, "tasks": tasks})
        page.draw(out)
        shown = parsed(out)
        for expected in ("0.1235 ± 0.01", "81.25%", "arc_easy acc", "0.5000 ± 0.0100", "lambada perplexity", "31.5000"):
            assert expected in shown.text
        assert "Not measured: tasks on the dense model, speed." in shown.text
        dense, pruned = shown.data["tasks-plot-data"]["data"]
        assert dense["x"] == []
        assert pruned["x"] == [0.5]  # a perplexity is no share
        assert pruned["error_x"]["array"] == [pytest.approx(1.96 * 0.01)]

    def test_of_another_model_is_not_taken_for_this_one(self, out: Path, model: Path) -> None:
        apart = {"dense": "big", "kl": 0.123456, "stderr": 0.01, "agreement": 0.8125, "text": "wiki", "length": 64,
                 "windows": 9, "tokens": 567, "seconds": 1.0}  # fmt: skip
        told = {"model": str(model), "divergence": apart, "tasks": {"scores": [score("arc_easy", 0.5)]}}
        keep(out, "eval.json", {**told, "shards": hash_weights(model)})
        alone = comparison(out, model)
        alone["models"][1]["shards"] = {"model.safetensors": "0" * 64}
        keep(out, "comparison.json", alone)
        sentences, rows, missing = page.verdict(read_results(out))
        assert {"tasks", "divergence from the dense model"} <= set(missing)
        assert not any("arc_easy" in row.name or "KL" in row.name or "Loss" in row.name for row in rows)
        assert not any("task figures" in sentence for sentence in sentences)

    def test_of_weights_that_were_changed_since_is_not_shown(self, out: Path, model: Path) -> None:
        keep(out, "eval.json", {"model": str(out), "tasks": {"scores": [score("arc_easy", 0.5)]}})
        keep(out, "comparison.json", comparison(out, model))
        path = sorted(out.glob("*.safetensors"))[0]
        save_file({name: 3 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
        sentences, rows, missing = page.verdict(read_results(out))
        assert {"tasks", "perplexity before and after"} <= set(missing)
        assert not any("arc_easy" in row.name for row in rows)
        assert any("changed after that by something else" in sentence for sentence in sentences)

    def test_many_tasks_have_their_means_in_the_verdict(self, out: Path, model: Path) -> None:
        many = comparison(out, model)
        for entry, mean in zip(many["models"], (0.5, 0.45), strict=True):
            entry["scores"] = [score(f"task{number}", 0.5) for number in range(12)]
            entry["means"] = {"pruning": mean}
        keep(out, "comparison.json", many)
        _, rows, _ = page.verdict(read_results(out))
        (row,) = [row for row in rows if "Mean accuracy" in row.name]
        assert (row.dense, row.pruned, row.difference) == ("0.5000", "0.4500", "-0.0500")
        for entry in many["models"]:
            del entry["means"]
        keep(out, "comparison.json", many)
        _, rows, _ = page.verdict(read_results(out))
        assert ("Tasks", "12 figures, below") in [(row.name, row.detail) for row in rows]

    def test_a_comparison(self, out: Path, model: Path) -> None:
        keep(out, "comparison.json", comparison(out, model))
        page.draw(out)
        shown = parsed(out)
        for expected in ("0.6200 ± 0.0100", "0.5500 ± 0.0100", "-0.0700 ± 0.012, beyond noise", "+0.8000 ± 0.012"):
            assert expected in shown.text
        assert "Of 1 task figures 1 differ from the dense model's by more than noise." in " ".join(shown.text.split())
        assert [trace["x"] for trace in shown.data["tasks-plot-data"]["data"]] == [[0.62], [0.55]]

    def test_other_checkpoints_are_beside_it(self, out: Path, model: Path) -> None:
        keep(out, "comparison.json", comparison(out, model))
        page.draw(out)
        assert 'id="compared"' not in (out / PAGE).read_text(encoding="utf-8")  # the verdict says all of it
        told = comparison(out, model)
        read = {"text": "wiki", "windows": 9, "length": 64, "seconds": 1.0, "stride": None, "tokens": 567}
        for entry, value in zip(told["models"], (20.5, 23.25), strict=True):
            entry["perplexity"] = {**read, "value": value}
        apart = {**read, "dense": "big", "kl": 0.5, "stderr": 0.25, "agreement": 0.75}
        del apart["stride"]
        third = {**told["models"][1], "name": "<third>", "path": "elsewhere", "bytes": 1500, "weights": 750}
        third |= {"sparsity": 0.125, "linears_sparsity": 0.25, "divergence": apart, "shards": {"a": "0" * 64}}
        told["models"].append({**third, "perplexity": {**read, "value": 29.75}})
        judged = {"model": "<third>", "adjusted": 0.5, "beyond_noise": False}
        told["differences"].append({**told["differences"][0], **judged})
        told["judged"] = {"level": 0.05, "adjusted": "holm", "tests": 3}
        keep(out, "comparison.json", told)
        page.draw(out)
        _, section = (out / PAGE).read_text(encoding="utf-8").split('<h2 id="compared">')
        cells = unescape(re.sub(r"<[^>]+>", "|", section.split("</section>")[0]))
        shown = re.sub(r"[|\s]*\|[|\s]*", "|", cells)
        assert "|model|weights|files|zeros|in linears|perplexity|KL, nats|same token|" in shown
        assert "|big (dense)|9|9 B|40.0%|50.0%|20.50|-|-|own (this one)|9|9 B|40.0%|50.0%|23.25|-|-|" in shown
        assert "|<third>|750|1.5 kB|12.5%|25.0%|29.75|0.5000 ± 0.2500|75.00%|" in shown
        assert "|text: wiki, context 64, 567 tokens|" in shown
        assert "Holm's adjustment for 3 differences" in shown
        assert "|Differences from the dense model (3)|" in shown
        assert "|<third>|arc_easy|acc|-0.0700 ± 0.0120|400|0.5|no|" in shown

    def test_a_broken_file_is_named(self, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        keep(out, "eval.json", {"model": "x", "perplexity": {"value": 3.0}})
        assert call("report", out) == 2
        assert re.search(r"eval\.json cannot be used: perplexity lacks 'text', 'length'", capsys.readouterr().err)

    def test_answers_of_both_are_kept_and_shown(
        self, out: Path, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for prompt in ("To be, or not", "Once upon"):
            assert call("report", out, "--prompt", prompt, "--tokens", 6, "--json") == 0
        told = json.loads((out / "evaluation" / "generations.json").read_text())
        assert [one["prompt"] for one in told] == ["To be, or not", "Once upon"]
        assert all(isinstance(one["dense"], str) and isinstance(one["sparse"], str) for one in told)
        assert "Once upon" in parsed(out).text
        assert call("report", out, "--prompt", "Once upon", "--tokens", 0) == 2
        change(out, model=str(out / "gone"))
        assert call("report", out, "--prompt", "Once upon", "--tokens", 3) == 0
        again = json.loads((out / "evaluation" / "generations.json").read_text())
        assert again[0] == told[0]
        assert (again[1]["dense"], again[1]["tokens"]) == (None, 3)
        assert "The dense model was not on this machine." in parsed(out).text

    def test_the_answer_is_that_of_generate(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        from llmprune.evaluate.generate import answers
        from tests.families import tokenizer

        ids = tokenizer()("Shall I", return_tensors="pt")["input_ids"]
        loaded = AutoModelForCausalLM.from_pretrained(model)
        for _ in range(5):
            logits = loaded(ids).logits[0, -1].detach()
            logits[2] = -torch.inf  # the end is not to come before the least number of tokens
            ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
        assert answers(Source(str(model), model), ["Shall I"], 5) == [
            tokenizer().decode(ids[0, 7:], skip_special_tokens=True).strip()
        ]


class TestHostileNames:
    def test_are_text(self, out: Path) -> None:
        told = json.loads((out / REPORT).read_text())
        linears = [{**entry, "name": f"{entry['name']}<b>{HOSTILE}", "note": HOSTILE} for entry in told["linears"]]
        blocks = [{**entry, "name": HOSTILE} for entry in told["blocks"]]
        change(out, model=HOSTILE, versions={HOSTILE: HOSTILE}, recipe={HOSTILE: HOSTILE}, blocks=blocks,
               shards={HOSTILE: HOSTILE}, revision=HOSTILE)  # fmt: skip
        keep(out, "generations.json", [{"prompt": HOSTILE, "dense": HOSTILE, "sparse": HOSTILE}])
        keep(out, "eval.json", {"model": HOSTILE, "tasks": {"scores": [score(HOSTILE, 0.5)]}})
        results = read_results(out)
        results.report.linears = [LinearRecord.read(entry) for entry in linears]
        plain = parsed(out)
        (out / PAGE).write_bytes(page.render(results, []))
        shown = parsed(out)
        assert shown.open == []
        assert "img" not in shown.names()
        before = {name for name in plain.data if not name.startswith("weights-")}
        assert set(shown.data) == before | {"tasks-plot-data"}
        assert shown.text.count(HOSTILE) > 10
        assert "alert(2)>49" not in shown.text  # what stands in braces is not computed
        label = shown.data["error-map-data"]["data"][0]["text"][0][0]
        assert "<img" not in label  # plotly obeys marks of HTML in its texts
        assert "&lt;img" in label


class TestOtherReports:
    def test_no_report(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("report", tmp_path) == 2
        assert "no llmprune.json" in capsys.readouterr().err

    def test_of_an_older_version(self, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        told = json.loads((out / REPORT).read_text())
        for optional in ("blocks", "ranks", "predicted_memory", "resumed", "calibration", "seconds"):
            del told[optional]
        (out / REPORT).write_text(json.dumps({**told, "of a later version": 1}))
        assert call("report", out) == 0
        assert parsed(out).open == []
        del told["weights"]
        (out / REPORT).write_text(json.dumps(told))
        assert call("report", out) == 2
        shown = capsys.readouterr().err
        assert f"{out / REPORT} cannot be used: it lacks 'weights' (it may be of another version" in shown

    @pytest.mark.parametrize("content", ["[]", "{", '{"linears": 3}'])
    def test_that_is_none(self, content: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (out / REPORT).write_text(content)
        assert call("report", out) == 2
        assert "cannot be used" in capsys.readouterr().err

    def test_eighty_blocks(self) -> None:
        names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
        made = synthetic(80, names)
        told = page.render(Results(made, made.shards), []).decode()
        shown = Parsed(told)
        assert len(told) < 7e6
        grid = shown.data["error-map-data"]["data"][0]
        assert (len(grid["customdata"]), len(grid["customdata"][0])) == (7, 80)
        assert "All 560 linears" in shown.text

    def test_thousands_of_experts(self) -> None:
        names = ["self_attn.q_proj", *(f"mlp.experts.{expert}.{part}_proj" for expert in range(256)
                                       for part in ("gate", "up", "down"))]  # fmt: skip
        made = synthetic(60, names)
        told = page.render(Results(made, made.shards), []).decode()
        shown = Parsed(told)
        assert len(told) < 7e6
        grid = shown.data["error-map-data"]["data"][0]
        assert grid["y"] == ["q_proj", "gate_proj", "up_proj", "down_proj"]
        experts = [
            record.relative_error for record in made.linears if re.search(r"layers\.7\..*gate_proj", record.name)
        ]
        expected = sum(error for error in experts if error is not None) / 256
        assert grid["customdata"][1][7] == pytest.approx(expected)
        assert "The 600 linears with the largest errors of 46,140" in " ".join(shown.text.split())
        worst = max(made.linears, key=lambda record: record.relative_error or 0)
        assert worst.name in shown.text

    def test_kinds_are_told_apart(self) -> None:
        names = ["mlp.up_proj", "mlp.experts.0.up_proj", "mlp.shared_expert.up_proj", "attn.out"]
        assert plots.grid(synthetic(1, names).linears).labels == [
            "mlp.up_proj", "experts.*.up_proj", "shared_expert.up_proj", "out",
        ]  # fmt: skip


def synthetic(blocks: int, names: list[str]) -> Report:
    made = Report(Path("/nowhere"), "owner/model", "abc", {"method": "wanda", "sparsity": "2:4"}, 10**9)
    random = np.random.default_rng(0)
    for block in range(blocks):
        errors = random.uniform(0.01, 0.2, len(names)).tolist()
        made.linears += [
            LinearRecord(f"model.layers.{block}.{name}", (8, 8), "wanda", "2:4", "row", None, 0.5, error, "gram", 99)
            for name, error in zip(names, errors, strict=True)
        ]
        made.blocks.append(BlockRecord(f"model.layers.{block}", {"capture": 1.0, "solve": 2.0}, 2**30 + block))
    made.dense, made.sparse = Perplexity(9.0, "w", 8, 9, 63, 1.0), Perplexity(12.0, "w", 8, 9, 63, 1.0)
    return made


class TestWeights:
    def test_counts_are_those_of_the_files(self, run: Report, model: Path) -> None:
        name = "model.layers.2.mlp.down_proj"
        drawn = page.draw(run.out, linears=["*.2.mlp.down_proj"])
        assert drawn.histograms == [name]
        after = load_file(run.out / "model-00003-of-00004.safetensors")[f"{name}.weight"].numpy()
        before = load_file(model / "model.safetensors")[f"{name}.weight"].numpy()
        figure = next(data for key, data in parsed(run.out).data.items() if key.startswith("weights-"))
        edge = 4 * float(np.sqrt((before.astype(np.float64) ** 2).mean()))
        for trace, matrix in zip(figure["data"], (before, after), strict=True):
            expected, edges = np.histogram(matrix[matrix != 0], weights.BINS, (-edge, edge))
            assert trace["y"] == pytest.approx((expected / matrix.size).tolist(), abs=1.1 / matrix.size)
            assert trace["x"] == pytest.approx(((edges[1:] + edges[:-1]) / 2).tolist(), rel=1e-4)
        assert "50.00% zeros" in parsed(run.out).text

    @pytest.mark.parametrize(("family", "glob"), [("gpt2", "*.c_fc"), ("mixtral", "*.experts.3.up_proj")])
    def test_transposed_weights_and_experts(self, family: str, glob: str, tmp_path: Path) -> None:
        source = make(family, tmp_path / family)
        report = llmprune.prune(source, out=tmp_path / "out", method="magnitude", sparsity="2:4")
        drawn = page.draw(tmp_path / "out", linears=[glob])
        assert len(drawn.histograms) == 3
        assert drawn.source == source
        chosen = weights.choose(report.linears, [glob])
        for shown in weights.weigh(report.out, present(str(source), None), chosen):
            assert shown.after.zeros == pytest.approx(0.5)
            assert shown.before is not None
            assert shown.before.zeros == pytest.approx(0, abs=1e-3)
            assert sum(shown.before.shares) + shown.before.outside + shown.before.zeros == pytest.approx(1)

    def test_the_worst_of_each_kind_are_chosen(self) -> None:
        made = synthetic(5, ["a.q_proj", "a.k_proj"])
        chosen = weights.choose(made.linears, [])
        worst = sorted(made.linears, key=lambda record: -(record.relative_error or 0))
        assert chosen[0] == worst[0].name
        assert {name.rpartition(".")[2] for name in chosen} == {"q_proj", "k_proj"}

    def test_a_name_that_is_none(self, out: Path) -> None:
        with pytest.raises(UserError, match=r"unknown linear 'model\.layers\.0\.mlp\.down'"):
            page.draw(out, linears=["model.layers.0.mlp.down"])

    def test_a_dense_model_that_is_gone_or_another_is_said(self, out: Path, tmp_path: Path) -> None:
        other = make("llama", tmp_path / "other", intermediate_size=96)
        for name in (str(out / "gone"), str(other)):
            change(out, model=name)
            page.draw(out, linears=["*.0.mlp.up_proj"])
            shown = parsed(out)
            assert "The dense model was not on this machine as it was" in shown.text
            figure = next(data for key, data in shown.data.items() if key.startswith("weights-"))
            assert [len(trace["y"]) for trace in figure["data"]] == [0, weights.BINS]


class TestPresent:
    """The dense model is looked for on this machine; nothing is downloaded or converted for the page."""

    def test_a_gguf_that_was_converted(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))
        assert present("/somewhere/tiny.gguf", "0123456789abcdef" + "0" * 48) is None
        shutil.copytree(model, tmp_path / "gguf" / "tiny-0123456789abcdef-bfloat16")
        found = present("/somewhere/tiny.gguf", "0123456789abcdef" + "0" * 48)
        assert found is not None
        assert found.folder.parent == tmp_path / "gguf"
        assert present("/somewhere/tiny.gguf", "0123456789abcdef" + "0" * 48, "float32") is None

    def test_a_hub_model_is_taken_from_the_cache_alone(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache, revision = tmp_path / "hub", "a" * 40
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        assert present("owner/tiny", revision) is None
        shutil.copytree(model, cache / "models--owner--tiny" / "snapshots" / revision)
        found = present("owner/tiny@main", revision)
        assert found is not None
        assert found.folder.name == revision
        assert present("owner/tiny", "b" * 40) is None

    def test_nonsense(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for name in ("", "no/such/model/at/all", str(tmp_path / "empty"), HOSTILE):
            assert present(name, None) is None


@browser.needed
class TestInABrowser:
    def test_every_plot_is_drawn_and_nothing_complains(self, out: Path, model: Path, tmp_path: Path) -> None:
        keep(out, "comparison.json", comparison(out, model))
        page.draw(out)
        names = browser.drawn(out / PAGE, tmp_path)
        assert {"error-map", "zeros-map", "depth", "time", "memory", "tasks-plot"} <= names

    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    @pytest.mark.parametrize("width", [500, 1400])
    @pytest.mark.parametrize("blocks", [2, 80])
    def test_nothing_is_wider_than_the_window(self, blocks: int, width: int, dark: bool, tmp_path: Path) -> None:
        made = synthetic(blocks, ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
        told = page.render(Results(made, made.shards), []).decode()
        ticks = "[...document.querySelectorAll('#error-map .xtick')].map(one => one.textContent).join(' ')"
        found = browser.seen(told, tmp_path, width, dark, ticks)
        browser.fits(found, width, dark)
        numbers = [int(tick) for tick in found.more.split()]
        assert len(numbers) == len(set(numbers)) >= 2
        assert set(numbers) <= set(range(-1, blocks + 1))
