"""Prune, recover and measure by one recipe: the dense, the pruned and the recovered model end up side by side.

example: llmprune run HuggingFaceTB/SmolLM2-135M-Instruct --recipe recipes/smollm2-135m-2-4-recovered.yaml -o FOLDER
"""

from __future__ import annotations

import argparse

from llmprune.cli.options import MODEL, add_json, add_run, log, print_json, read_changes, tell_undrawn


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument("-o", "--out", metavar="FOLDER", required=True, help="the folder for pruned and recovered")
    sections = "a YAML file with the sections prune, recover and evaluate"
    parser.add_argument("--recipe", metavar="FILE", required=True, help=sections)
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="any key, such as recover.steps=50; repeat")
    add_json(parser)
    add_run(parser)


def run(chosen: argparse.Namespace) -> int:
    """Run."""
    from llmprune import course, distributed
    from llmprune.cli.compare import show

    recipe = course.Course.read(chosen.recipe, dict(read_changes(chosen.set or ())))
    with distributed.joined():
        done = course.run(chosen.model, out=chosen.out, recipe=recipe, restart=chosen.restart, progress=log(chosen))
        if not distributed.is_first():
            return 0
        last = done.recovered or done.pruned
        if chosen.json:
            print_json(done.to_dict())
        else:
            show(done.comparison)
            print(f"the result is in {last}, and drawn in {last / 'report.html'}")
        for place, problem in done.page_problems.items():
            tell_undrawn(place, problem)
    return 0
