"""Send a pruned checkpoint to the Hub, with a model card; only what `verify` passes is sent.

example: llmprune push OUT --to owner/name
"""

from __future__ import annotations

import argparse

from llmprune.cli.options import add_json, add_token, add_trust, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    add = parser.add_argument
    add("folder", help="a folder written by llmprune")
    add("--to", required=True, metavar="OWNER/NAME", help="the repository; it is made where there is none")
    add("--private", action="store_true", help="make it a private one")
    add("--revision", metavar="BRANCH", help="the branch; it is made where there is none [main]")
    add("--create-pr", action="store_true", help="open a pull request instead")
    add("--base-model", metavar="OWNER/NAME", help="the dense model on the Hub [as it was pruned by name]")
    add("--license", metavar="NAME", help="for the card, such as apache-2.0 [that of the dense model]")
    kept = "what to do about a README.md in the folder that was written or changed by hand [keep]"
    add("--card", choices=("keep", "new"), default="keep", help=kept)
    add("--dry-run", action="store_true", help="show the card and the files, and send nothing")
    add_trust(add)
    add_token(parser)
    add_json(parser)


def run(chosen: argparse.Namespace) -> int:
    """Push."""
    from llmprune import distributed
    from llmprune.progress import Bars
    from llmprune.push import push

    with distributed.joined(), distributed.first():
        if not distributed.is_first():
            return 0
        pushed = push(
            chosen.folder,
            chosen.to,
            private=chosen.private,
            revision=chosen.revision,
            create_pr=chosen.create_pr,
            card=chosen.card,
            base_model=chosen.base_model,
            license=chosen.license,
            dry_run=chosen.dry_run,
            trust_remote_code=chosen.trust_remote_code,
            progress=Bars(),
        )
    print_json(pushed.to_dict()) if chosen.json else show(pushed)
    return 0


def show(pushed: object) -> None:
    """Print what was sent for people."""
    from llmprune.push import Pushed
    from llmprune.report.tables import size

    assert isinstance(pushed, Pushed)
    if pushed.url is None:
        print(pushed.card)
        for name, count in pushed.files.items():
            print(f"{size(count):>10}  {name}")
    for note in pushed.notes:
        print(f"note: {note}")
    sent = f"{len(pushed.files)} files, {size(sum(pushed.files.values()))}"
    if pushed.url is None:
        print(f"would be pushed to {pushed.to}: {sent}; nothing was sent")
    else:
        where = f"opened {pushed.pull_request}, " if pushed.pull_request else ""
        print(f"pushed to {pushed.to}: {sent}; {where}commit {pushed.url}")
