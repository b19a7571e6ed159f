"""Perplexity, time and memory of methods, and of what follows them, on SmolLM2-135M-Instruct.

python tests/bench/smollm2.py MODEL --calibration C4.jsonl --text wiki.test.raw [--dtype float32] [--device cuda]

MODEL is a folder or a .gguf; the calibration is 32 sequences of 1,024 tokens, the perplexity has a context of 1,024.
Each method runs in a process of its own, so that its peak memory is its own. Beside names of methods --methods takes
options of `prune`, such as --methods=wanda '--quality balanced' '--method alps --refine swaps --reconstruct cg'.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS = ("magnitude", "wanda", "sparsegpt")
PATTERNS = ("50%", "4:8", "2:4")


def llmprune(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "llmprune", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", default="32")
    parser.add_argument("--length", default="1024")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="names of methods, or options of `prune`")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any recipe key; repeat")
    parser.add_argument("--no-perplexity", action="store_true", help="time and memory alone")
    chosen = parser.parse_args()
    run = ("--dtype", chosen.dtype, "--device", chosen.device)
    calibration = ("--calibration", chosen.calibration, "--samples", chosen.samples, "--length", chosen.length)
    calibration += tuple(part for entry in chosen.set for part in ("--set", entry))
    measure = ("--text", chosen.text, "--length", chosen.length, *run)
    rows = []

    def quality(path: str) -> str:
        if chosen.no_perplexity:
            return "-"
        found = llmprune("eval", path, *measure)["perplexity"]
        tokens.add(found["tokens"])
        return f"{found['value']:.2f}"

    tokens: set[int] = set()
    rows.append(("dense", "", quality(chosen.model), "", ""))
    versions: dict[str, str] = {}
    for method in chosen.methods:
        for pattern in chosen.patterns:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                asked = shlex.split(method) if method.startswith("-") else ("--method", method)
                report = llmprune(
                    "prune", chosen.model, *asked, "--sparsity", pattern, "-o", str(out), *calibration, *run
                )
                versions = report["versions"]
                seconds, peak = f"{report['seconds']['total']:.0f} s", f"{report['peak_memory'] / 1e9:.2f} GB"
                rows.append((method, pattern, quality(str(out)), seconds, peak))
                shutil.rmtree(out)
            print(*rows[-1], file=sys.stderr)
    heading = ("method", "pattern", "perplexity", "time", "peak memory")
    for row in (heading, ("---",) * len(heading), *rows):
        print("| " + " | ".join(row) + " |")
    print(f"\n{platform.processor() or platform.machine()}, {versions}, predicted tokens {sorted(tokens)}")


if __name__ == "__main__":
    main()
