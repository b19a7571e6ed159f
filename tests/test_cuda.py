"""What only a GPU can show: the same work on CUDA gives what the CPU gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import llmprune
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.linears import find_linears
from llmprune.model.source import Source
from llmprune.patterns import parse
from llmprune.recover import GradualPruning, recover
from llmprune.recover.masks import trained_linears
from llmprune.report.record import packed
from tests.families import make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FAMILIES = ("llama", "mixtral", "gpt_oss", "gpt2", "deepseek_v3", "gemma3_text", "opt", "bloom", "qwen3_next")


@pytest.mark.parametrize("shape", [(1,), (8, 16), (3, 5), (24, 1001)])
def test_masks_are_packed_as_on_the_cpu(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    assert packed(mask.cuda()).tobytes() == packed(mask).tobytes()


@pytest.mark.parametrize("rows", [7, 40_000])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:5", "50%", "70%"])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_the_same_saliency_gives_the_same_mask(scope: Any, pattern: str, rows: int) -> None:
    rule = parse(pattern, scope)
    for saliency in (torch.rand(rows, 40), torch.randint(0, 4, (rows, 40)).float()):  # without and with ties
        assert torch.equal(rule.keep(saliency.cuda()).cpu(), rule.keep(saliency))


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
    # Without a token of padding: its embedding is zero, and so is what a router says of one that comes first.
    source = make(family, tmp_path / "model", pad_token_id=None)
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_two_gpus_agree_with_one(method: str, tmp_path: Path) -> None:
    """By NCCL."""
    source, text = make("llama", tmp_path / "model", num_hidden_layers=1), tmp_path / "text.txt"
    text.write_text("How many roads must a man walk down, before you call him a man? " * 60)
    alone = llmprune.prune(
        source, out=tmp_path / "one", sparsity="2:4", method=method, device="cuda:0",
        calibration={"source": str(text), "samples": 16, "length": 32},
    )  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "llmprune",
        "prune", str(source), "-o", str(tmp_path / "two"), "--sparsity", "2:4", "--method", method, "--json",
        "--calibration", str(text), "--samples", "16", "--length", "32", "--device", "cuda",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (alone.ranks, json.loads(done.stdout)["ranks"]) == (1, 2)
    one, two = masks(tmp_path / "one"), masks(tmp_path / "two")
    same = sum(int((mask == two[name]).sum()) for name, mask in one.items())
    assert same / sum(mask.numel() for mask in one.values()) >= 0.999


def test_perplexity_agrees_with_the_cpu(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The answer, my friend, is blowing in the wind. " * 60)
    first, second = (llmprune.perplexity(source, str(text), length=32, device=device) for device in ("cpu", "cuda"))
    assert first.value == pytest.approx(second.value, rel=1e-3)


SMALLER: list[dict[str, Any]] = [
    {"width": {"channels": "25%", "heads": 1}},
    {"width": {"channels": "25%", "by": "flap"}},
    {"width": {"channels": "25%", "by": "taylor"}},
    {"depth": {"drop": 1}},
    {"depth": {"drop": 1, "by": "influence"}, "reconstruct": [{"name": "block", "steps": 4}]},
]


@pytest.mark.parametrize("chosen", SMALLER, ids=str)
def test_smaller_dense_models_are_those_of_the_cpu(chosen: dict[str, Any], tmp_path: Path) -> None:
    source = make("llama", tmp_path / "model")
    reports = [shrink(source, tmp_path, device, **chosen) for device in ("cpu", "cuda")]
    assert reports[0].kept_blocks == reports[1].kept_blocks
    answers = [llmprune.divergence(tmp_path / d, source, "builtin", length=32, device="cpu") for d in ("cpu", "cuda")]
    assert answers[1].kl == pytest.approx(answers[0].kl, rel=0.05)


@pytest.mark.parametrize("by", ["reap", "frequency", "norm"])
def test_the_same_experts_go_as_on_the_cpu(by: str, tmp_path: Path) -> None:
    source = make("mixtral", tmp_path / "model", pad_token_id=None)
    reports = [shrink(source, tmp_path, device, experts={"drop": 1, "by": by}) for device in ("cpu", "cuda")]
    told = [[(one.kept, one.tokens) for block in report.blocks for one in block.experts or ()] for report in reports]
    assert told[0]
    assert told[0] == told[1]


def shrink(source: Path, folder: Path, device: str, **chosen: Any) -> llmprune.Report:
    calibration = {"source": "builtin", "samples": 16, "length": 32}
    report = llmprune.prune(source, out=folder / device, device=device, calibration=calibration, **chosen)
    assert llmprune.verify(folder / device).ok
    return report


@pytest.mark.parametrize("method", ["full", "lora", "norms"])
def test_a_recovery_keeps_the_zeros(method: str, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "model")
    llmprune.prune(source, out=tmp_path / "out", method="magnitude", sparsity="2:4")
    found = recover(
        tmp_path / "out", out=tmp_path / "recovered", data="builtin", distill=source, method=method, device="cuda",
        steps=30, length=32, batch=4, held_out=8, rate=1e-2,
    )  # fmt: skip
    assert llmprune.verify(tmp_path / "recovered").ok
    assert found.kl_before is not None
    assert found.kl_after is not None
    assert found.kl_after < found.kl_before


@pytest.mark.parametrize("saliency", ["magnitude", "wanda", "movement"])
def test_gradual_pruning_and_its_zeros(saliency: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make("llama", tmp_path / "model")).cuda()
    gradual = GradualPruning("2:4", saliency=saliency, begin=1, end=6, every=2)
    options = TrainingArguments(tmp_path / "trained", max_steps=8, report_to=[], save_strategy="no", logging_steps=1)
    tokens = torch.arange(32) % 100 + 3
    data = [{"input_ids": tokens, "labels": tokens}] * 8
    Trainer(model, options, train_dataset=data, callbacks=[gradual]).train()
    found = dict(model.named_parameters())
    for linear in trained_linears(model):
        weight = linear.view(found[linear.parameter].detach())
        assert weight.is_cuda
        assert ((weight.view(len(weight), -1, 4) == 0).sum(2) == 2).all(), linear.name


def test_speed_is_measured_with_the_memory_of_the_device(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "model")
    llmprune.prune(source, out=tmp_path / "out", depth={"drop": [1]})
    found = llmprune.speed(
        source, [tmp_path / "out"], prompt_tokens=20, new_tokens=6, rounds=3, threads=1, device="cuda"
    )
    for one in found.models:
        assert one.peak_device_memory
