"""Where the time goes, against what the machine can do at best, and how it grows with the work.

python -m tests.bench.speed MODEL --calibration C4.jsonl [--samples 32] [--length 1024] [--rounds 3] [--dtype bfloat16]
python -m tests.bench.speed --seven 32 --device cuda --calibration C4.jsonl --samples 128 --length 2048 --sparsity 2:4
python -m tests.bench.speed --growth

The first prunes MODEL to 50 % with Wanda and SparseGPT, each run in a process of its own, and prints the medians. The
least time for the forwards and the Grams is their floating point operations, by the linears alone, over the rate that a
plain matrix product reached on this machine just before; what share of that rate they reach each by itself is told
first, for a block in the middle and batches as the pruning takes them. The second does so with a random Llama of so
many blocks, each of the shape of Llama 2 7B's. The third doubles the blocks, the tokens and the width of a random Llama
in turn.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from llmprune.budget import batch_size
from llmprune.model import blocks
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.cpu import quick
from llmprune.model.linears import Linear
from llmprune.model.source import resolve
from llmprune.pipeline import plan
from llmprune.stats import LinearStats
from tests.bench.memory import SEVEN, build
from tests.families import make

METHODS = ("wanda", "sparsegpt")

BATCHES, ROUNDS = 8, 5
"""Batches in a round of what is timed by itself, and rounds."""


def rate(dtype: torch.dtype, device: str) -> float:
    """Operations per second of a matrix product of a usual size, the median of 30."""
    rows, columns, inner = (2048, 1536, 576) if device == "cpu" else (8192, 4096, 4096)
    a, b = (torch.randn(size, inner, device=device).to(dtype) for size in (rows, columns))
    seconds = []
    for _ in range(30):
        seconds.append(_timed(device, lambda: torch.mm(a, b.T)))
    return 2.0 * rows * columns * inner / statistics.median(seconds)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def operations(linears: Sequence[Linear], tokens: int) -> tuple[float, float]:
    """Of one forward of all tokens through linears, and of the Grams of their inputs, half of each by symmetry."""
    forward = sum(2.0 * linear.numel * tokens for linear in linears)
    return forward, sum(1.0 * width**2 * tokens for width in inputs(linears))


def inputs(linears: Sequence[Linear]) -> list[int]:
    """How wide each input is that linears of Llama's blocks read: q, k and v share one, and gate and up."""
    unshared = ("o_proj", "down_proj")
    names = {one.name if one.name.endswith(unshared) else one.name.rsplit(".", 1)[0]: one.shape[1] for one in linears}
    return list(names.values())


def alone(model: str, device: str, dtype: str, length: int) -> tuple[float, float]:
    """Operations per second of one block's forwards, and of the Grams of its inputs, each with nothing else around it.

    What is counted is as for `operations`.
    """
    checkpoint = Checkpoint(resolve(model, dtype), device, dtype)
    chain, number = blocks.probe(checkpoint), len(checkpoint.blocks) // 2
    sequences = batch_size(checkpoint, length)
    ids = torch.randint(checkpoint.config.get_text_config().vocab_size, (BATCHES, sequences, length))
    _, made = plan(model, method="sparsegpt")
    block = [choice.linear for choice in made.choices if choice.linear.name.startswith(f"{checkpoint.blocks[number]}.")]
    forward, grams = operations(block, ids.numel())
    given = [torch.randn(ids.numel() // BATCHES, width, device=device).to(checkpoint.dtype) for width in inputs(block)]
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad(), quick(checkpoint.device, checkpoint.dtype):
        activations = blocks.start(checkpoint, chain, list(ids))
        checkpoint.load_block(number)
        calls = activations.calls[number]
        for _ in range(ROUNDS):
            times[0].append(_timed(device, lambda: blocks.pass_through(checkpoint, number, calls, activations)))
            sums = [LinearStats(x.shape[1], "gram", device) for x in given]

            def add(sums: list[LinearStats] = sums) -> None:
                for _ in range(BATCHES):
                    for total, x in zip(sums, given, strict=True):
                        total.add(x)

            times[1].append(_timed(device, add))
    return forward / statistics.median(times[0]), grams / statistics.median(times[1])


def _timed(device: str, work: Callable[[], object]) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def prune(model: str | Path, arguments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "llmprune", "prune", str(model), "-o", f"{folder}/out", *arguments, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    for row in (heading, ("---",) * len(heading), *rows):
        print("| " + " | ".join(row) + " |")
    print()


def account(chosen: argparse.Namespace) -> None:
    dtype, where = getattr(torch, chosen.dtype), (chosen.model, chosen.device, chosen.dtype)
    rates = {kind: rate(kind, chosen.device) for kind in {dtype, torch.float32}}
    print(", ".join(f"{str(kind).removeprefix('torch.')} {value / 1e9:.0f} GFLOP/s" for kind, value in rates.items()))
    for name, reached in zip(("forwards", "Grams"), alone(*where, chosen.length), strict=True):
        part = reached / max(rates.values())
        print(f"{name} by themselves: {reached / 1e9:.0f} GFLOP/s, {part:.0%} of the rate of a product")
    tokens = chosen.samples * chosen.length
    given = ["--calibration", chosen.calibration, "--samples", str(chosen.samples), "--length", str(chosen.length)]
    for method in chosen.methods:
        arguments = ["--method", method, "--sparsity", chosen.sparsity, "--dtype", chosen.dtype, *given]
        arguments += ["--device", chosen.device]
        reports = [prune(chosen.model, arguments) for _ in range(chosen.rounds)]
        _, made = plan(chosen.model, method=method, sparsity=chosen.sparsity)
        forward, grams = operations([choice.linear for choice in made.choices], tokens)
        if chosen.json:
            Path(f"{chosen.json}-{method}.json").write_text(json.dumps(reports))
        # A block's one forward is timed in two phases, before and after its last linears are solved.
        least = (forward + (grams if method == "sparsegpt" else 0.0)) / max(rates.values())
        rows = []
        for phases in [*([phase] for phase in reports[0]["seconds"]), ["capture", "propagate"]]:
            seconds = statistics.median(sum(report["seconds"][phase] for phase in phases) for report in reports)
            bounded = phases in (["total"], ["capture", "propagate"])
            share = (f"{least:.1f} s", f"{seconds / least:.2f}") if bounded else ("", "")
            rows.append((" + ".join(phases), f"{seconds:.1f} s", *share))
        peak = statistics.median(report["peak_memory"] for report in reports)
        device = max(report["peak_device_memory"] or 0 for report in reports)
        held = f"{peak / 2**30:.2f} GiB" + (f", on the device {device / 2**30:.2f} GiB" if device else "")
        print(f"{method}, {chosen.sparsity}, median of {chosen.rounds}, peak memory {held}\n")
        table(("phase", "time", "at the rate of a product", "ratio"), rows)


def growth(chosen: argparse.Namespace) -> None:
    base = {"blocks": 4, "tokens": 16384, "width": 512}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("Nothing will come of nothing: speak again. " * 20_000)
        for doubled in (None, *base):
            size = {name: value * (2 if name == doubled else 1) for name, value in base.items()}
            source = make(
                "llama", Path(folder) / str(doubled), num_hidden_layers=size["blocks"], hidden_size=size["width"],
                intermediate_size=4 * size["width"], num_attention_heads=size["width"] // 64, head_dim=64,
                max_position_embeddings=512, dtype=getattr(torch, chosen.dtype),
            )  # fmt: skip
            given = ["--calibration", str(text), "--samples", str(size["tokens"] // 512), "--length", "512"]
            row = ["base" if doubled is None else f"{doubled} x 2"]
            for method in chosen.methods:
                arguments = ["--method", method, "--sparsity", chosen.sparsity, "--dtype", chosen.dtype, *given]
                runs = [prune(source, arguments)["blocks"] for _ in range(chosen.rounds)]
                row.append(f"{statistics.median(sum(sum(b['seconds'].values()) for b in run) for run in runs):.2f}")
            rows.append(tuple(row))
    first = rows[0]
    ratios = [
        (
            row[0],
            *(f"{mine} s ({float(mine) / float(least):.2f})" for mine, least in zip(row[1:], first[1:], strict=True)),
        )
        for row in rows
    ]
    print(f"random Llama, {base}, seconds in the blocks and the ratio to the base, median of {chosen.rounds}\n")
    table(("", *chosen.methods), ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--sparsity", default="50%")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--seven", type=int, metavar="BLOCKS")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="where to write the reports, the method's name and .json after it")
    chosen = parser.parse_args()
    if chosen.growth:
        growth(chosen)
    elif chosen.seven and chosen.calibration:
        with tempfile.TemporaryDirectory() as folder:
            chosen.model = f"{folder}/model"
            config = copy.deepcopy(SEVEN)
            config.num_hidden_layers = chosen.seven
            build(config, Path(chosen.model), chosen.device)
            account(chosen)
    elif chosen.model and chosen.calibration:
        account(chosen)
    else:
        parser.error("give MODEL or --seven and --calibration, or --growth")


if __name__ == "__main__":
    main()
