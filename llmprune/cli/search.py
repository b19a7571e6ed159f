"""Find the highest sparsity that keeps a promise about quality, and leave the checkpoint that keeps it.

example: llmprune search Qwen/Qwen3-0.6B --target ppl+5% --target 'kl<=0.05' --method sparsegpt -o FOLDER
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from llmprune.cli.options import (
    MODEL,
    add_json,
    add_log,
    add_recipe,
    add_tasks,
    listed,
    log,
    print_json,
    recipe_options,
    task_options,
)
from llmprune.errors import Failure, UserError

if TYPE_CHECKING:
    from llmprune.search import Search


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("model", help=MODEL)
    target = (
        "what is to hold: ppl+5%%, 'ppl<=20', 'kl<=0.05' (nats a token), 'agreement>=90%%' (the same likeliest token), "
        "arc_easy-1se (a task, no more than one standard error below the dense model), or arc_easy-0.02; repeat, and "
        "all must hold"
    )
    parser.add_argument("--target", action="append", metavar="PROMISE", required=True, help=target)
    results = "the folder for model (the checkpoint), search.json and search.html; the same command goes on there"
    parser.add_argument("-o", "--out", metavar="FOLDER", required=True, help=results)
    span = "the lowest and the highest sparsity that may come out [10%%,90%%]"
    parser.add_argument("--between", metavar="LOW,HIGH", default="10%,90%", help=span)
    step = "the answer is a multiple of this sparsity [1%%]"
    parser.add_argument("--resolution", metavar="S", default="1%", help=step)
    second = "measure the answer on a second text too, which no choice sees"
    parser.add_argument("--confirm", metavar="TEXT", help=second)
    add_recipe(parser, sought=True)
    add_tasks(parser)
    add_log(parser)
    add_json(parser)


def run(chosen: argparse.Namespace) -> int:
    """Search."""
    from llmprune import distributed
    from llmprune.search import search

    if chosen.sparsity is not None:
        raise UserError(
            f"--sparsity {chosen.sparsity}: a search finds the sparsity; say with --between 20%,60% where it looks, or "
            "prune to this one with `llmprune prune`"
        )
    tasks, options = task_options(chosen, promised=True)
    with distributed.joined():
        made = search(
            chosen.model,
            out=chosen.out,
            target=chosen.target,
            between=listed(chosen.between),
            resolution=chosen.resolution,
            confirm=chosen.confirm,
            tasks=tasks,
            progress=log(chosen),
            **recipe_options(chosen, open_=True),
            **options,
        )
        if distributed.is_first():
            print_json(made.to_dict()) if chosen.json else show(made, chosen.out)
        if made.chosen is None:
            raise Failure(f"{made.answer}; no checkpoint is kept, the curve is in {chosen.out}")
    return 0


def show(made: Search, folder: str) -> None:
    """Print a search for people."""
    from pathlib import Path

    from rich.console import Console

    from llmprune.report import tables
    from llmprune.search import PAGE

    console = Console()
    patterns = {point.name: point.pattern for point in made.points}
    console.print(tables.search_table(made.comparison, patterns, made.verdicts, made.chosen))
    lines = tables.text_lines(made.comparison) + [f"note: {note}" for note in made.comparison.notes]
    if made.chosen is not None:
        lines += [made.answer, made.confirmation, f"the checkpoint is {made.checkpoint}"]
    for line in filter(None, lines):
        console.print(line, highlight=False, markup=False)
    console.print(f"drawn in {Path(folder) / PAGE}", highlight=False)
