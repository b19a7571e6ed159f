"""Divergence and agreement, restated on plain transformers models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import budget, cli
from llmprune.errors import UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import resolve
from llmprune.tokenise import encode
from tests.families import make

LENGTH = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("All the world's a stage, and all the men and women merely players. " * 8)
    return str(path)


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def pair(request: pytest.FixtureRequest, text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense model, and one pruned a little."""
    folder = tmp_path_factory.mktemp(request.param)
    dense = make(request.param, folder / "dense")
    llmprune.prune(dense, out=folder / "sparse", sparsity="50%", method="magnitude")
    return dense, folder / "sparse"


def restated(dense: Path, sparse: Path, text: str) -> tuple[float, float, int]:
    """The divergence by its definition, in float64, and the share of equal tokens."""
    ids = torch.tensor(encode(Checkpoint(resolve(dense), "cpu").tokenizer, Path(text).read_text()))
    windows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    first, second = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (dense, sparse))
    with torch.no_grad():
        ours, theirs = (whole(input_ids=windows).logits[:, :-1].double().flatten(0, 1) for whole in (first, second))
    p, q = ours.softmax(-1), theirs.softmax(-1)
    kl = float((p * (p / q).log()).sum(-1).mean())
    return kl, float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()), len(p)


@pytest.mark.parametrize("batch", [16, 100])
def test_equals_the_definition(batch: int, pair: tuple[Path, Path], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(budget.BATCH_TOKENS, "cpu", batch)
    dense, sparse = pair
    found = llmprune.divergence(sparse, dense, text, length=LENGTH)
    kl, agreement, tokens = restated(dense, sparse, text)
    assert kl > 0.001
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.agreement == pytest.approx(agreement, abs=1e-9)
    assert found.tokens == tokens
    assert found.stderr is not None
    assert 0 < found.stderr < found.kl


def test_a_model_does_not_diverge_from_itself(pair: tuple[Path, Path], text: str) -> None:
    found = llmprune.divergence(pair[0], pair[0], text, length=LENGTH)
    assert found.kl == 0
    assert found.agreement == 1


def test_other_tokens_are_refused(pair: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    other = make("llama", tmp_path / "other", vocab_size=140)
    with pytest.raises(UserError, match=r"have other tokens \(140 and 128\)"):
        llmprune.divergence(other, pair[0], text, length=LENGTH)


def test_the_command_line(pair: tuple[Path, Path], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    dense, sparse = map(str, pair)
    given = ["eval", sparse, "--perplexity", text, "--length", str(LENGTH), "--against", dense]
    assert cli.main([*given, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["divergence"]["kl"] == llmprune.divergence(sparse, dense, text, length=LENGTH).kl
    assert told["perplexity"]["tokens"] == told["divergence"]["tokens"]
    assert cli.main(given) == 0
    shown = capsys.readouterr().out
    assert "KL 0." in shown
    assert "the same token" in shown
