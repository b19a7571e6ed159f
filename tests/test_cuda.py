"""What only a GPU can show: the same work on CUDA gives what the CPU gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmprune
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.linears import find_linears
from llmprune.model.source import Source
from tests.families import make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FAMILIES = ("llama", "mixtral", "gpt_oss", "gpt2", "deepseek_v3", "gemma3_text", "opt", "bloom", "qwen3_next")


def masks(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(Source("", folder.resolve()), "cpu")
    found = {}
    for number, name in enumerate(checkpoint.blocks):
        block = checkpoint.load_block(number)
        for linear in find_linears(block.module, name):
            found[linear.name] = linear.view(block.state[linear.parameter]) != 0
        checkpoint.unload_block(number)
    return found


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_agree_with_the_cpu(family: str, method: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("How many roads must a man walk down, before you call him a man? " * 60)
    found = {}
    for device in ("cpu", "cuda"):
        # SparseGPT's ties are broken otherwise, and random blocks make much of little: one step of it for each block.
        chosen = {"source": str(text), "samples": 16, "length": 32, "true_sequential": method == "wanda"}
        report = llmprune.prune(
            source, out=tmp_path / device, sparsity="2:4", method=method, device=device, calibration=chosen
        )
        found[device] = masks(tmp_path / device)
        assert (report.peak_device_memory is not None) == (device == "cuda")
    same = sum(int((mask == found["cuda"][name]).sum()) for name, mask in found["cpu"].items())
    total = sum(mask.numel() for mask in found["cpu"].values())
    assert same / total > (0.999 if method == "wanda" else 0.98)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "chosen",
    [
        {"sparsity": "2:4", "permute": "auto", "reconstruct": ["cg", {"name": "block", "steps": 4}]},
        {"sparsity": "50%", "allocation": {"name": "evolve", "generations": 2, "offspring": 4}},
    ],
)
def test_what_else_there_is_loses_as_much_as_on_the_cpu(family: str, chosen: dict[str, Any], tmp_path: Path) -> None:
    source = make(family, tmp_path / "model")
    calibration = {"source": "builtin", "samples": 16, "length": 32}
    lost, away = [], []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        report = llmprune.prune(source, out=out, method="wanda", device=device, calibration=calibration, **chosen)
        assert llmprune.verify(out).ok
        lost.append(sum(linear.relative_error or 0.0 for linear in report.pruned))
        away.append([block.away or 0.0 for block in report.blocks])
    assert lost[1] == pytest.approx(lost[0], rel=0.05)
    assert away[1] == pytest.approx(away[0], rel=0.05)


def test_perplexity_agrees_with_the_cpu(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The answer, my friend, is blowing in the wind. " * 60)
    first, second = (llmprune.perplexity(source, str(text), length=32, device=device) for device in ("cpu", "cuda"))
    assert first.value == pytest.approx(second.value, rel=1e-3)
