"""Prune a small real model on this machine, from download to comparison; no Hub is needed.

It takes SmolLM2-135M-Instruct, prunes it to 50 % with SparseGPT on a text that comes with Python, measures the
perplexity before and after on a part that was held out, and lets both models answer a question.

example: llmprune demo --sparsity 2:4
"""

from __future__ import annotations

import argparse

from llmprune.cli.options import add_json, add_recipe, add_run, log, print_json, recipe_options


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("-o", "--out", help="the folder to write [smollm2-METHOD-SPARSITY]")
    add_recipe(parser)
    add_json(parser)
    add_run(parser)


def run(chosen: argparse.Namespace) -> int:
    """Show it."""
    from llmprune.cli.prune import show
    from llmprune.demo import DEFAULTS, demo

    shown = demo(chosen.out, progress=log(chosen), restart=chosen.restart, **recipe_options(chosen, DEFAULTS))
    if chosen.json:
        print_json({**shown.report.to_dict(), "question": shown.question, "answers": shown.answers})
        return 0
    show(shown.report)
    print(f"\nQ: {shown.question}")
    for name, answer in shown.answers.items():
        print(f"{name}: {answer}")
    return 0
