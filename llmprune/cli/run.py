"""Prune, recover and measure by one recipe: the dense, the pruned and the recovered model end up side by side.

example: llmprune run HuggingFaceTB/SmolLM2-135M-Instruct --recipe recipes/smollm2-135m-2-4-recovered.yaml -o FOLDER
"""

from __future__ import annotations

import argparse

from llmprune.cli.options import MODEL, add_json, add_run, log, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument("-o", "--out", metavar="FOLDER", required=True, help="the folder for pruned and recovered")
    sections = "a YAML file with the sections prune, recover and evaluate"
    parser.add_argument("--recipe", metavar="FILE", required=True, help=sections)
    add_json(parser)
    add_run(parser)


def run(chosen: argparse.Namespace) -> int:
    """Run."""
    from llmprune import course, distributed
    from llmprune.cli.compare import show

    with distributed.joined():
        shown = log(chosen)
        done = course.run(chosen.model, out=chosen.out, recipe=chosen.recipe, restart=chosen.restart, progress=shown)
        if distributed.is_first() and chosen.json:
            print_json(done.to_dict())
        elif distributed.is_first():
            show(done.comparison)
            last = done.recovered or done.pruned
            print(f"the result is in {last}, and drawn in {last / 'report.html'}")
    return 0
