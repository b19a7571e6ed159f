"""The real SmolLM2-135M-Instruct, got as the demo gets it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune import data
from llmprune.demo import demo, get_model
from llmprune.errors import Failure
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import resolve
from llmprune.pipeline import plan
from tests.wikitext import word_perplexity

pytestmark = pytest.mark.slow

SAMPLES, LENGTH = 8, 256


@pytest.fixture(scope="module")
def model() -> str | Path:
    try:
        return get_model()
    except Failure as failure:
        pytest.skip(f"the model cannot be had here: {failure}")


def test_the_demo_from_download_to_answer(model: str | Path, tmp_path: Path) -> None:
    shown = demo(tmp_path / "out", samples=SAMPLES, length=LENGTH)
    report = shown.report
    assert report.sparsity == pytest.approx(0.5, abs=1e-4)
    assert report.dense is not None
    assert report.sparse is not None
    assert 5 < report.dense.value < report.sparse.value < 3 * report.dense.value
    assert report.dense.tokens > 20_000
    assert "Paris" in shown.answers["dense"]
    assert shown.answers["sparse"]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written.dtype == torch.bfloat16
    assert llmprune.verify(tmp_path / "out").ok


def test_wanda_in_fp32_equals_the_published_rule(model: str | Path, tmp_path: Path) -> None:
    """The rule is restated on plain transformers: each block's inputs come from the pruned blocks before it."""
    calibration = {"source": "builtin", "samples": SAMPLES, "length": LENGTH, "true_sequential": False}
    options = {"calibration": calibration, "dtype": "float32"}
    llmprune.prune(model, out=tmp_path / "out", sparsity="50%", method="wanda", **options)
    source = resolve(model, "float32")
    tokens = data.draw(data.documents("builtin"), Checkpoint(source).tokenizer, SAMPLES, LENGTH, 0, "builtin")
    restated = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval().model
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).model
    same = total = 0
    with torch.no_grad():
        hidden = restated.embed_tokens(tokens.ids)
        places = torch.arange(LENGTH)[None]
        rotary = restated.rotary_emb(hidden, places)
        for number, layer in enumerate(restated.layers):
            squares: dict[str, torch.Tensor] = {}
            handles = []
            for name, part in layer.named_modules():
                if isinstance(part, torch.nn.Linear):

                    def add(_: object, given: tuple[torch.Tensor], name: str = name, squares: Any = squares) -> None:
                        squares[name] = squares.get(name, 0) + given[0].flatten(0, 1).square().sum(0)

                    handles.append(part.register_forward_pre_hook(add))
            for row in hidden:
                layer(row[None], position_embeddings=rotary, position_ids=places, attention_mask=None)
            for handle in handles:
                handle.remove()
            for name, square in squares.items():
                weight = layer.get_submodule(name).weight.data
                score = weight.abs() * square.sqrt()
                lowest = score.sort(dim=1, stable=True).indices[:, : weight.shape[1] // 2]
                weight.scatter_(1, lowest, 0.0)
                mask = written.layers[number].get_submodule(name).weight != 0
                same += int((mask == (weight != 0)).sum())
                total += weight.numel()
            hidden = torch.cat(
                [
                    layer(row[None], position_embeddings=rotary, position_ids=places, attention_mask=None)
                    for row in hidden
                ]
            )
    assert same / total >= 0.999


@pytest.mark.parametrize(("dtype", "near"), [("bfloat16", 2e-3), ("float32", 1e-5)])
def test_streamed_perplexity_is_that_of_the_whole_model(
    model: str | Path, dtype: str, near: float, tmp_path: Path
) -> None:
    documents = data.builtin("evaluation")[:8]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    found = llmprune.perplexity(model, str(tmp_path / "text.jsonl"), length=512, dtype=dtype)
    folder = resolve(model, dtype).folder
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    ids = AutoTokenizer.from_pretrained(folder)("\n\n".join(documents), return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 512 * 512].reshape(-1, 512)
    assert found.windows == len(windows) > 4
    losses = []
    with torch.no_grad():
        for window in windows:
            scores = whole(input_ids=window[None]).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(scores, window[1:]))
    assert found.value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=near)


def test_perplexity_converted_to_words_is_that_of_lm_evals_wikitext(model: str | Path, tmp_path: Path) -> None:
    windows, length = 3, 512
    folder = resolve(model, "float32").folder
    text = "\n\n".join(data.builtin("evaluation"))[:20_000]
    page, theirs, words, before = word_perplexity(folder, text, windows * length, length, tmp_path)
    (tmp_path / "page.txt").write_text(before + page)
    ours = llmprune.perplexity(folder, str(tmp_path / "page.txt"), length=length + 1, stride=length)
    assert (ours.windows, ours.tokens) == (windows, windows * length)
    assert math.exp(math.log(ours.value) * ours.tokens / words) == pytest.approx(theirs, rel=1e-3)


def test_the_plan_covers_what_it_should(model: str | Path) -> None:
    _, made = plan(model, sparsity="2:4")
    assert len(made.pruned) == 30 * 7
    assert made.covered == pytest.approx(0.789, abs=0.001)
