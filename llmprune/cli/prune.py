"""Prune a model and write it as a plain Hugging Face checkpoint.

example: llmprune prune HuggingFaceTB/SmolLM2-135M-Instruct --sparsity 2:4 --method sparsegpt -o OUT
"""

from __future__ import annotations

import argparse
import sys

from llmprune.cli.options import MODEL, add_json, add_recipe, add_run, log, print_json, recipe_options


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument("-o", "--out", required=True, help="the folder to write")
    add_recipe(parser)
    add_json(parser)
    add_run(parser)


def run(chosen: argparse.Namespace) -> int:
    """Prune."""
    from llmprune import distributed
    from llmprune.pipeline import prune

    options = recipe_options(chosen)
    with distributed.joined():
        report = prune(chosen.model, out=chosen.out, restart=chosen.restart, progress=log(chosen), **options)
        if distributed.is_first():
            print_json(report.to_dict()) if chosen.json else show(report)
            if report.page_problem is not None:
                print(
                    f"llmprune: {report.out} is finished, but its report.html could not be drawn "
                    f"({report.page_problem}): `llmprune report {report.out}` draws it",
                    file=sys.stderr,
                )
    return 0


def show(report: object) -> None:
    """Print a report for people."""
    from rich.console import Console

    from llmprune.report import tables
    from llmprune.report.record import Report

    assert isinstance(report, Report)
    console = Console()
    console.print(tables.result_table(report), tables.summary(report))
    for note in tables.notes(report.linears):
        console.print(f"[yellow]note[/yellow] {note}")
