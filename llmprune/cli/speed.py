"""Measure how fast checkpoints generate with plain transformers, and their memory: dense against pruned, with noise.

Each model is in a process of its own, and they take turns: prefill (up to the first new token) and decode.

example: llmprune speed Qwen/Qwen3-0.6B OUT --prompt-tokens 512 --new-tokens 64 --rounds 10 -o OUT/evaluation
"""

from __future__ import annotations

import argparse

from llmprune.cli.options import MODEL, add_device, add_json, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("dense", help=f"what the others are compared with: {MODEL}")
    parser.add_argument("models", nargs="*", metavar="model", help="the others; without any, one model is measured")
    add = parser.add_argument
    add("--prompt-tokens", type=int, default=512, metavar="N", help="tokens of each prompt [512]")
    add("--new-tokens", type=int, default=64, metavar="N", help="tokens that are generated after it [64]")
    add("--batch", type=int, default=1, metavar="N", help="sequences at once [1]")
    add("--rounds", type=int, default=5, metavar="N", help="how often each model is timed, after a warm-up [5]")
    add("--text", default="builtin", metavar="TEXT", help="prompts are cut from it: see `eval --perplexity` [builtin]")
    add("--seed", type=int, default=0, metavar="N", help="draws where they begin [0]")
    add("--threads", type=int, metavar="N", help="threads on the CPU [as torch chooses]")
    add_device(parser)
    parser.add_argument("-o", "--out", metavar="FOLDER", help="write speed.json there")
    add_json(parser)


def run(chosen: argparse.Namespace) -> int:
    """Measure."""
    from llmprune.evaluate.speed import speed
    from llmprune.progress import Bars

    names = ("prompt_tokens", "new_tokens", "batch", "rounds", "text", "seed", "threads", "device", "dtype", "out")
    options = {name: getattr(chosen, name) for name in (*names, "trust_remote_code")}
    found = speed(chosen.dense, chosen.models, progress=Bars(), **options)
    print_json(found.to_dict()) if chosen.json else show(found)
    return 0


def show(found: object) -> None:
    """Print what was measured for people."""
    from rich.console import Console

    from llmprune.report import speed

    assert isinstance(found, speed.Speed)
    console = Console()
    for table in speed.tables_of(found):
        console.print(table)
    for line in speed.lines(found):
        console.print(line, highlight=False, markup=False)
