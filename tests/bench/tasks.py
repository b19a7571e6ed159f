"""Seconds of tasks beside lm-eval itself, whole processes in turns, and whether both find the same.

python -m tests.bench.tasks MODEL --tasks arc_easy,hellaswag --limit 200 [--include-path FOLDER] [--rounds 3]

lm-eval runs as `lm_eval --model hf`, in the dtype of the model and with log probabilities in float32, as llmprune has
them; its batches are of --batch documents.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOOLS = ("llmprune", "lm_eval")

Figures = dict[str, float]
"""`task metric` to value."""


def ours(chosen: argparse.Namespace, folder: Path) -> Figures:
    command = [sys.executable, "-m", "llmprune", "eval", chosen.model, "--tasks", chosen.tasks, "--json"]
    command += ["--limit", str(chosen.limit), "--device", chosen.device]
    for path in chosen.include_path:
        command += ["--include-path", path]
    told = json.loads(_run(command))
    return {f"{score['task']} {score['metric']}": score["value"] for score in told["tasks"]["scores"]}


def theirs(chosen: argparse.Namespace, folder: Path) -> Figures:
    given = f"pretrained={chosen.model},dtype=auto,softmax_dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", given, "--tasks", chosen.tasks]
    command += ["--limit", str(chosen.limit), "--device", chosen.device, "--batch_size", str(chosen.batch)]
    for path in chosen.include_path:
        command += ["--include_path", path]
    _run([*command, "--output_path", str(folder)])
    (path,) = folder.rglob("results_*.json")
    told = json.loads(path.read_text())["results"]
    return {
        f"{task} {metric.removesuffix(',none')}": value
        for task, figures in told.items()
        for metric, value in figures.items()
        if metric.endswith(",none") and "_stderr" not in metric
    }


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder")
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--include-path", action="append", default=[])
    parser.add_argument("--batch", default="16", help="for lm-eval: documents, or auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    seconds: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    found: dict[str, Figures] = {}
    for number in range(chosen.rounds):
        for tool in TOOLS if number % 2 == 0 else TOOLS[::-1]:
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                found[tool] = (ours if tool == "llmprune" else theirs)(chosen, Path(folder))
                seconds[tool].append(time.perf_counter() - began)
            print(f"{tool}, round {number + 1}: {seconds[tool][-1]:.0f} s", file=sys.stderr, flush=True)
    print(f"| | {' | '.join(TOOLS)} |\n|---|{'---:|' * len(TOOLS)}")
    print(
        f"| seconds, median of {chosen.rounds} | {' | '.join(f'{statistics.median(seconds[x]):.0f}' for x in TOOLS)} |"
    )
    for name in found["llmprune"]:
        cells = (f"{found[tool][name]:.4f}" if name in found[tool] else "-" for tool in TOOLS)
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
