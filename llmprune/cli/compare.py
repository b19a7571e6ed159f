"""Put checkpoints side by side: sizes, sparsity, perplexity, divergence, tasks, and which differences are beyond noise.

example: llmprune compare Qwen/Qwen3-8B qwen3-8b-2-4 qwen3-8b-50 --perplexity wikitext2 --tasks arc_easy -o FOLDER
"""

from __future__ import annotations

import argparse

from llmprune.cli.options import MODEL, add_device, add_json, add_tasks, add_text, print_json, task_options, text_of


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("dense", help=f"what the others are compared with: {MODEL}")
    parser.add_argument("models", nargs="+", metavar="model", help="the others")
    add_text(parser)
    add_tasks(parser)
    add_device(parser)
    results = "write comparison.json there, and keep what is done, so that the same command goes on from there"
    parser.add_argument("-o", "--out", metavar="FOLDER", help=results)
    add_json(parser)


def run(chosen: argparse.Namespace) -> int:
    """Compare."""
    from llmprune import distributed
    from llmprune.evaluate.compare import compare
    from llmprune.progress import Bars

    names, options = task_options(chosen)
    text = text_of(chosen, chosen.text or (None if names else "wikitext2"))
    where = {"device": chosen.device, "dtype": chosen.dtype, "out": chosen.out, "progress": Bars()}
    where["trust_remote_code"] = chosen.trust_remote_code
    with distributed.joined():
        found = compare(chosen.dense, chosen.models, text=text, tasks=names, **options, **where)
        if distributed.is_first():
            print_json(found.to_dict()) if chosen.json else show(found)
    return 0


def show(found: object) -> None:
    """Print a comparison for people."""
    from rich.console import Console

    from llmprune.report import tables
    from llmprune.report.comparison import Comparison

    assert isinstance(found, Comparison)
    console = Console()
    for table in tables.comparison_tables(found, console):
        console.print(table)
    for line in tables.comparison_notes(found):
        console.print(line, highlight=False)
