"""Perplexity by its definition, on plain transformers models, one token at a time."""

from __future__ import annotations

import math
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
from tests.wikitext import word_perplexity

PAGE = " = Music = \n If music be the food of love , play on ; give me excess of it , that , surfeiting , may die . \n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("If music be the food of love, play on, give me excess of it. " * 3)
    return str(path)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp(request.param) / "model")


def restated(model: Path, text: str, length: int, stride: int | None) -> tuple[float, int]:
    """Every token that counts, by itself, from the tokens that its window has before it."""
    ids = encode(Checkpoint(resolve(model), "cpu").tokenizer, Path(text).read_text())
    whole = AutoModelForCausalLM.from_pretrained(model).eval()
    losses: list[float] = []
    start = done = 0  # tokens before `done` have been looked at
    while start + length <= len(ids):
        with torch.no_grad():
            logs = whole(input_ids=torch.tensor([ids[start : start + length]])).logits[0].double().log_softmax(-1)
        first = max(start + 1, done if stride else 0)
        losses += [-float(logs[place - start - 1, ids[place]]) for place in range(first, start + length)]
        done = start + length
        start += stride or length
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("stride", [None, 8, 17, 1])
@pytest.mark.parametrize("batch", [16, 100])
def test_equals_the_definition(
    stride: int | None, batch: int, model: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(budget.BATCH_TOKENS, "cpu", batch)
    value, tokens = restated(model, text, 32, stride)
    found = llmprune.perplexity(model, text, length=32, stride=stride)
    assert found.value == pytest.approx(value, rel=1e-4)
    assert (found.tokens, found.stride) == (tokens, stride)
    assert ("stride" in str(found)) == (stride is not None)


def test_a_stride_that_leaves_tokens_out_is_refused(model: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="a stride of 32 leaves tokens out: it must be less than the length, 32"):
        llmprune.perplexity(model, text, length=32, stride=32)
    assert cli.main(["eval", str(model), "--perplexity", text, "--length", "32", "--stride", "0"]) == 2
    assert "stride" in capsys.readouterr().err


def test_converted_to_words_it_is_that_of_lm_evals_wikitext(model: Path, tmp_path: Path) -> None:
    """lm-eval puts a token before the text, predicts every token once, and counts words."""
    ids = encode(Checkpoint(resolve(model), "cpu").tokenizer, PAGE)
    windows, length = 3, 25
    page, theirs, words, before = word_perplexity(model, PAGE, windows * length, length, tmp_path)
    assert len(ids) > windows * length
    (tmp_path / "page.txt").write_text(before + page)
    ours = llmprune.perplexity(model, str(tmp_path / "page.txt"), length=length + 1, stride=length)
    assert (ours.windows, ours.tokens) == (windows, windows * length)
    assert math.exp(math.log(ours.value) * ours.tokens / words) == pytest.approx(theirs, rel=1e-3)
