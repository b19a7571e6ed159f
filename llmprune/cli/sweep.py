"""Prune with several methods to several sparsities, and draw what each costs in quality.

example: llmprune sweep Qwen/Qwen3-0.6B --sparsity 30%,40%,50%,2:4 --method wanda,sparsegpt -o FOLDER
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
from llmprune.errors import UserError

if TYPE_CHECKING:
    from llmprune.sweep import Sweep


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("model", help=MODEL)
    results = "the folder for sweep.json and sweep.html; the same command goes on there, longer lists add points"
    parser.add_argument("-o", "--out", metavar="FOLDER", required=True, help=results)
    parser.add_argument("--keep-models", action="store_true", help="keep the weights of each point, in FOLDER/NAME")
    add_recipe(parser, several=True)
    add_tasks(parser)
    add_log(parser)
    add_json(parser)


def run(chosen: argparse.Namespace) -> int:
    """Sweep."""
    from llmprune import distributed
    from llmprune.sweep import sweep

    sparsities, methods = (listed(chosen.sparsity or ""), listed(chosen.method or ""))
    for name, given, found in (("sparsity", chosen.sparsity, sparsities), ("method", chosen.method, methods)):
        if given is not None and not found:
            raise UserError(f"--{name} names none: give them with commas between")
    chosen.sparsity = chosen.method = None
    recipe = recipe_options(chosen, open_=True)["recipe"]
    own = recipe.method if isinstance(recipe.method, str) else recipe.method["name"]
    tasks, options = task_options(chosen)
    with distributed.joined():
        made = sweep(
            chosen.model,
            out=chosen.out,
            sparsity=sparsities or [one for one in [recipe.settled().sparsity] if one is not None],
            method=methods or [own],
            recipe=recipe,
            tasks=tasks,
            keep_models=chosen.keep_models,
            progress=log(chosen),
            **options,
        )
        if distributed.is_first():
            print_json(made.to_dict()) if chosen.json else show(made, chosen.out)
    return 0


def show(made: Sweep, folder: str) -> None:
    """Print a sweep for people."""
    from pathlib import Path

    from rich.console import Console

    from llmprune.report import tables
    from llmprune.sweep import PAGE

    console = Console()
    for table in tables.comparison_tables(made.comparison, console):
        console.print(table)
    for line in tables.comparison_notes(made.comparison):
        console.print(line, highlight=False)
    console.print(f"drawn in {Path(folder) / PAGE}", highlight=False)
