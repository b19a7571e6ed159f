"""Prune a model and write it as a plain Hugging Face checkpoint.

example: llmprune prune HuggingFaceTB/SmolLM2-135M-Instruct --sparsity 2:4 --method sparsegpt -o OUT
"""

from __future__ import annotations

import argparse
from typing import Any

from llmprune.cli.options import (
    MODEL,
    add_json,
    add_recipe,
    add_run,
    add_token,
    log,
    print_json,
    recipe_options,
    tell_undrawn,
)
from llmprune.errors import Failure, LLMPruneError, UserError


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument("-o", "--out", required=True, help="the folder to write")
    parser.add_argument(
        "--push-to", metavar="OWNER/NAME", help="when it is done, send it there on the Hub (see `push`)"
    )
    parser.add_argument("--private", action="store_true", help="make the repository of --push-to a private one")
    add_token(parser)
    add_recipe(parser)
    add_json(parser)
    add_run(parser)


def run(chosen: argparse.Namespace) -> int:
    """Prune."""
    from llmprune import distributed
    from llmprune.pipeline import prune

    options = recipe_options(chosen)
    if chosen.private and chosen.push_to is None:
        raise UserError("--private is about the repository of --push-to, which is not given")
    with distributed.joined():
        if chosen.push_to is not None:
            before(chosen)
        report = prune(chosen.model, out=chosen.out, restart=chosen.restart, progress=log(chosen), **options)
        told = report.to_dict()
        if distributed.is_first() and not chosen.json:
            show(report)
        if distributed.is_first():
            tell_undrawn(report.out, report.page_problem)
        try:
            if chosen.push_to is not None:
                told["pushed"] = after(chosen, bool(report.recipe.get("trust_remote_code")))
        finally:
            if distributed.is_first() and chosen.json:
                print_json(told)
    return 0


def before(chosen: argparse.Namespace) -> None:
    """See that the result can be pushed, before hours of work."""
    from llmprune import distributed
    from llmprune.hub import check_may_write

    with distributed.first():
        if distributed.is_first():
            check_may_write(chosen.push_to, private=chosen.private)


def after(chosen: argparse.Namespace, trusted: bool) -> dict[str, Any] | None:
    """Push the result from the first rank; where that fails the result stays, and can be pushed later.

    Args:
        trusted: code that comes with the model is run.
    """
    from llmprune import distributed
    from llmprune.cli.push import show as show_pushed
    from llmprune.push import push

    with distributed.first():
        if not distributed.is_first():
            return None
        try:
            pushed = push(
                chosen.out, chosen.push_to, private=chosen.private, trust_remote_code=trusted, progress=log(chosen)
            )
        except LLMPruneError as error:
            switches = " --private" * chosen.private + " --trust-remote-code" * trusted
            raise Failure(
                f"{chosen.out} is finished and stays, but it could not be pushed: {error} "
                f"(`llmprune push {chosen.out} --to {chosen.push_to}{switches}` does it later)"
            ) from None
        if not chosen.json:
            show_pushed(pushed)
        return pushed.to_dict()


def show(report: object) -> None:
    """Print a report for people."""
    from rich.console import Console

    from llmprune.report import tables
    from llmprune.report.record import Report

    assert isinstance(report, Report)
    console = Console()
    if report.solved:
        console.print(tables.result_table(report))
    console.print(tables.summary(report))
    for note in tables.all_notes(report):
        console.print(f"[yellow]note[/yellow] {note}")
