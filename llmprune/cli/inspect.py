"""Show the sparsity of every weight of any checkpoint, and which N:M patterns hold.

example: llmprune inspect RedHatAI/Sparse-Llama-3.1-8B-2of4
"""

from __future__ import annotations

import argparse

from llmprune.cli.options import MODEL, add_json, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("path", help=f"{MODEL}; also a single .safetensors or .bin file")
    parser.add_argument("--all", action="store_true", help="a row for every single weight")
    add_json(parser)


def run(chosen: argparse.Namespace) -> int:
    """Inspect."""
    from rich.console import Console

    from llmprune.report import tables
    from llmprune.report.inspect import inspect

    found = inspect(chosen.path)
    if chosen.json:
        print_json(found.to_dict())
    else:
        console = Console()
        console.print(tables.inspection_table(found, chosen.all))
        console.print(f"{found.sparsity:.2%} zeros over {len(found.matrices):,} weights", highlight=False)
    return 0
