"""The peak memory of pruning, against the cap it was given and against what the plan said.

python -m tests.bench.memory [--blocks 0:2] [--max-memory 6GiB] [--samples 4] [--length 256] [--keep FOLDER]
python -m tests.bench.memory --shapes

The first makes a random Llama of 7.1e9 parameters in bfloat16 (the shapes of Llama 2 7B, with two blocks more), one
block in memory at a time, and prunes some of its blocks; all others are run, written and verified as they are. The
second prunes a deep, a wide and a sparse model, each under the smallest cap that it can be pruned in. Every run is a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune.recipe import format_size, parse_size
from tests.families import SHAPES, make, tokenizer

SEVEN = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=34, num_attention_heads=32, num_key_value_heads=32,
    vocab_size=32000, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype="bfloat16",
)  # fmt: skip
TEXT = "We are such stuff as dreams are made on, and our little life is rounded with a sleep. "


def build(config: LlamaConfig, folder: Path, device: str = "cpu") -> None:
    """Write a random Llama, one shard a block and one for the rest; its numbers are drawn on the device."""
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    groups: dict[str, list[str]] = {}
    for name in state:
        number = re.search(r"layers\.(\d+)\.", name)
        groups.setdefault(f"block-{number[1]}" if number else "rest", []).append(name)
    for group, names in groups.items():
        tensors = {name: _random(state[name].shape, device) for name in names}
        save_file(tensors, folder / f"{group}.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"{group}.safetensors" for group, names in groups.items() for name in names}
    total = sum(2 * value.numel() for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(shape: torch.Size, device: str) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16, device=device).uniform_(-1, 1).mul_((3 / shape[-1]) ** 0.5).cpu()


def prune(model: Path, out: Path, recipe: dict[str, Any], cap: str) -> subprocess.CompletedProcess[str]:
    """Prune in a process of its own."""
    written = out.with_name(f"{out.name}.yaml")
    written.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "llmprune", "prune", str(model), "-o", str(out), "--recipe", str(written)]
    return subprocess.run([*command, "--max-memory", cap, "--json"], stdout=subprocess.PIPE, text=True, check=False)


def smallest(model: Path, recipe: dict[str, Any], folder: Path) -> str:
    """The smallest cap that a model can be pruned in, as the message of one that is too small names it."""
    written = folder / "plan.yaml"
    written.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "llmprune", "plan", str(model), "--recipe", str(written), "--max-memory", "1MB"]
    done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, check=False)
    found = re.search(r"smallest that can hold is (\S+)", done.stderr)
    if found is None:
        raise SystemExit(done.stderr)
    return found[1]


def table(rows: list[tuple[str, ...]]) -> None:
    """Print rows, of which the first is the heading."""
    for row in (rows[0], ("---",) * len(rows[0]), *rows[1:]):
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def figures(report: dict[str, Any]) -> tuple[str, str, str]:
    """Predicted and measured peak, and their ratio."""
    predicted, measured = report["predicted_memory"], report["peak_memory"]
    return format_size(predicted), format_size(measured), f"{predicted / measured:.2f}"


def seven(chosen: argparse.Namespace, folder: Path) -> None:
    with torch.device("meta"):
        parameters = sum(value.numel() for value in LlamaForCausalLM(SEVEN).parameters())
    model, out = folder / "model", folder / "out"
    needed = 2 * parameters * (1 if model.exists() else 2) + 10**9
    free = shutil.disk_usage(folder).free
    print(f"{parameters:,} parameters; {folder} has {format_size(free)} free, {format_size(needed)} are needed\n")
    if free < needed:
        raise SystemExit("too little room on the disk: choose another place with --keep FOLDER")
    if not model.exists():
        began = time.monotonic()
        build(SEVEN, model)
        print(f"made in {time.monotonic() - began:.0f} s\n", flush=True)
    stored = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    first, last = (int(number) for number in chosen.blocks.split(":"))
    wanted = "|".join(map(str, range(first, last)))
    rules = [{"match": rf"re:model\.layers\.(?!({wanted})\.).*", "skip": True}]
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    done = prune(model, out, {**recipe(chosen, folder), "rules": rules}, chosen.max_memory)
    total = time.monotonic() - began
    if done.returncode:
        raise SystemExit(done.returncode)
    report = json.loads(done.stdout)
    blocks = [block["seconds"] for block in report["blocks"][first:last]]
    spent = {phase: sum(block[phase] for block in blocks) / len(blocks) for phase in blocks[0]}
    predicted, measured, ratio = figures(report)
    under = "yes" if report["peak_memory"] <= parse_size(chosen.max_memory) else "NO"
    table([
        ("what", "figure"),
        ("parameters", f"{parameters:,}"),
        ("bytes on the disk", f"{stored:,}"),
        ("pruned", f"blocks {chosen.blocks} of {SEVEN.num_hidden_layers}, {chosen.method} {chosen.sparsity}"),
        ("calibration", f"{chosen.samples} x {chosen.length} tokens"),
        ("cap", chosen.max_memory),
        ("peak, predicted", predicted),
        ("peak, measured", measured),
        ("predicted / measured", ratio),
        ("under the cap", under),
        *((f"seconds a block: {phase}", f"{seconds:.1f}") for phase, seconds in spent.items()),
        ("seconds a block", f"{sum(spent.values()):.1f}"),
        ("seconds in all", f"{total:.0f}"),
    ])  # fmt: skip
    print("seconds of the run: " + ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in report["seconds"].items()))


def shapes(chosen: argparse.Namespace, folder: Path) -> None:
    rows = [("model", "parameters", "method", "smallest cap", "predicted", "measured", "predicted / measured", "under")]
    for name, (family, changes) in SHAPES.items():
        model = make(family, folder / name, dtype=torch.bfloat16, **changes)
        parameters = sum(path.stat().st_size for path in model.glob("*.safetensors")) // 2
        for method in ("wanda", "sparsegpt"):
            wanted = {**recipe(chosen, folder), "method": method}
            cap = smallest(model, wanted, folder)
            done = prune(model, folder / "out", wanted, cap)
            if done.returncode:
                raise SystemExit(done.returncode)
            report = json.loads(done.stdout)
            under = "yes" if report["peak_memory"] <= parse_size(cap) else "NO"
            rows.append((name, f"{parameters / 1e6:,.0f}e6", method, cap, *figures(report), under))
            shutil.rmtree(folder / "out")
        shutil.rmtree(model)
    table(rows)


def recipe(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both ask for; the text is long enough for all samples."""
    text = folder / "text.txt"
    text.write_text(TEXT * (chosen.samples * chosen.length // len(TEXT) + 100))
    calibration = {"source": str(text), "samples": chosen.samples, "length": chosen.length}
    return {"sparsity": chosen.sparsity, "method": chosen.method, "calibration": calibration}


@contextmanager
def place(keep: str | None) -> Iterator[Path]:
    """The folder that is kept, or one that is gone afterwards."""
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        Path(keep).mkdir(parents=True, exist_ok=True)
        yield Path(keep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="0:2", help="those that are pruned, first:last")
    parser.add_argument("--max-memory", default="6GiB")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the model there, or take the one that is there")
    parser.add_argument("--shapes", action="store_true")
    chosen = parser.parse_args()
    with place(chosen.keep) as folder:
        (shapes if chosen.shapes else seven)(chosen, folder)


if __name__ == "__main__":
    main()
