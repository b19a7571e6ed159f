"""Show what pruning would do, before any work: each linear, what is not covered, and the memory it takes.

example: llmprune plan MODEL --sparsity 2:4 --ignore '*.o_proj'
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from llmprune.cli.options import MODEL, add_json, add_recipe, print_json, recipe_options


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("model", help=MODEL)
    add_recipe(parser)
    parser.add_argument("--all", action="store_true", help="a row for every single linear")
    add_json(parser)


def run(chosen: argparse.Namespace) -> int:
    """Plan."""
    from rich.console import Console

    from llmprune.cost import cost, rate
    from llmprune.model.blocks import summary
    from llmprune.pipeline import plan
    from llmprune.progress import Bars
    from llmprune.report import tables

    recipe = recipe_options(chosen)["recipe"]
    checkpoint, made = plan(chosen.model, progress=Bars(), recipe=recipe)
    if chosen.json:
        print_json({**made.to_dict(), "operations": asdict(cost(checkpoint, made, recipe))})
        return 0
    console = Console()
    console.print(
        f"{checkpoint.source.name}: {type(checkpoint.model).__name__}, {summary(checkpoint)}", highlight=False
    )
    if checkpoint.source.origin:
        console.print(f"{checkpoint.source.origin}, kept in {checkpoint.source.folder}", highlight=False)
    console.print(tables.plan_table(made, chosen.all))
    console.print(f"covered      {made.covered:.1%} of {made.weights:,} weights", highlight=False)
    shown = {name: share for name, share in made.uncovered.items() if share >= 0.001}
    for name, share in shown.items():
        console.print(f"not covered  {share:.1%}  {name}", highlight=False)
    if rest := sum(made.uncovered.values()) - sum(shown.values()):
        console.print(f"not covered  {rest:.2%}  smaller things, see --json", highlight=False)
    work = cost(checkpoint, made, recipe)
    lines = tables.cost_lines(work, rate(checkpoint))
    fewer = [*tables.shortening_lines(made), *tables.width_lines(made)]
    way = [*tables.allocation_lines(made), *tables.after_lines(made)]
    for line in [*fewer, *way, *tables.memory_lines(made), *lines]:
        console.print(line, highlight=False)
    return 0
