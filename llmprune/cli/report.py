"""Draw report.html anew for a folder that llmprune wrote, with what was measured since.

It reads llmprune.json, and in the folder's `evaluation` what `eval -o` put there; nothing is downloaded.

example: llmprune report OUT --prompt "The capital of France is" --linears '*.0.*'
"""

from __future__ import annotations

import argparse

from llmprune.cli.options import add_json, add_trust, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("folder", metavar="OUT", help="a folder written by llmprune")
    add = parser.add_argument
    worst = "linears whose weights are shown, a glob, or re:EXPRESSION; repeat [the worst of some kinds]"
    add("--linears", action="append", default=[], metavar="NAME", help=worst)
    add(
        "--prompt", action="append", default=[], metavar="TEXT", help="let both models answer it, and show that; repeat"
    )
    add("--tokens", type=int, default=48, metavar="N", help="the most that an answer has [48]")
    add_trust(add)
    add_json(parser)


def run(chosen: argparse.Namespace) -> int:
    """Draw it."""
    from llmprune.progress import Bars
    from llmprune.report.page import draw

    if chosen.prompt:
        ask(chosen)
    with Bars().waiting("drawing"):
        drawn = draw(chosen.folder, linears=chosen.linears, trust_remote_code=chosen.trust_remote_code)
    if chosen.json:
        print_json(vars(drawn))
    else:
        if drawn.source is None:
            print("the dense model is not on this machine as it was: its weights are not shown")
        print(f"{drawn.path} (open it in a browser)")
    return 0


def ask(chosen: argparse.Namespace) -> None:
    """Let both models answer, and keep what they say."""
    from pathlib import Path

    from llmprune.errors import UserError
    from llmprune.evaluate.generate import keep, side_by_side
    from llmprune.progress import Bars
    from llmprune.report.results import find_dense, read_run

    if not all(prompt.strip() for prompt in chosen.prompt):
        raise UserError("--prompt takes a text, and one is empty")
    if chosen.tokens < 1:
        raise UserError(f"--tokens takes a number of at least 1, not {chosen.tokens}")
    out = Path(chosen.folder).expanduser()
    trusted = chosen.trust_remote_code
    dense = find_dense(read_run(out), trusted)
    keep(out, side_by_side(out, dense, chosen.prompt, chosen.tokens, Bars(), trusted))
