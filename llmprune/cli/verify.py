"""Check that a pruned checkpoint still has the zeros that its llmprune.json promises.

example: llmprune verify OUT
"""

from __future__ import annotations

import argparse

from llmprune.cli.options import add_json, add_trust, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("folder", help="a folder written by llmprune")
    add_trust(parser.add_argument)
    add_json(parser)


def run(chosen: argparse.Namespace) -> int:
    """Verify; the exit code is 1 when something is not as promised."""
    from llmprune.progress import Bars
    from llmprune.report.verify import verify

    verdict = verify(chosen.folder, progress=Bars(), trust_remote_code=chosen.trust_remote_code)
    if chosen.json:
        print_json(verdict.to_dict())
    else:
        for problem in verdict.problems:
            print(f"not as promised: {problem}")
        if verdict.changed:
            print(
                f"{len(verdict.changed)} files were changed since they were written: {', '.join(verdict.changed[:3])}"
            )
        good = verdict.linears - len(verdict.problems)
        if verdict.linears:
            print(f"{good:,} of {verdict.linears:,} pruned linears are as promised")
        elif verdict.ok:
            print("no zeros were promised; every tensor is there, and has the shape that the config asks for")
    return 0 if verdict.ok else 1
