"""Evaluate a model, dense or sparse: perplexity, block by block, and the tasks of EleutherAI's lm-eval.

example: llmprune eval OUT --perplexity wikitext2 --tasks arc_easy,hellaswag
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llmprune.cli.options import MODEL, add_device, add_json, add_tasks, add_text, print_json, task_options
from llmprune.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("model", help=MODEL)
    add = add_text(parser)
    add("--stride", type=int, help="let windows overlap, and count the last so many tokens of each [no overlap]")
    add("--against", metavar="DENSE", help="a second model: the divergence from what it says, and how often both agree")
    add_tasks(parser)
    add_device(parser)
    results = "write eval.json there, and lm-eval's own results as lm_eval.json"
    parser.add_argument("-o", "--out", metavar="FOLDER", help=results)
    add_json(parser)


def run(chosen: argparse.Namespace) -> int:
    """Evaluate."""
    from llmprune import distributed
    from llmprune.progress import Bars

    names, options = task_options(chosen)
    text = chosen.text or (None if names else "wikitext2")
    where = {"device": chosen.device, "dtype": chosen.dtype, "progress": Bars()}
    where["trust_remote_code"] = chosen.trust_remote_code
    told: dict[str, Any] = {"model": chosen.model}
    raw: dict[str, Any] | None = None
    folder = None if chosen.out is None else Path(chosen.out)
    with distributed.joined():
        if folder is not None and distributed.is_first():
            make(folder)
        if text is not None:
            from llmprune.evaluate.perplexity import perplexity

            found = perplexity(chosen.model, text, length=chosen.length, stride=chosen.stride, **where)
            told["perplexity"] = vars(found)
            if distributed.is_first() and not chosen.json:
                print(f"perplexity {found}, {found.seconds:.0f} s")
        if chosen.against is not None:
            from llmprune.evaluate.divergence import divergence

            apart = divergence(chosen.model, chosen.against, text or "wikitext2", length=chosen.length, **where)
            told["divergence"] = {"dense": chosen.against, **vars(apart)}
            if distributed.is_first() and not chosen.json:
                print(f"from {chosen.against}: {apart}, {apart.seconds:.0f} s")
        if names:
            from llmprune.evaluate import tasks

            scored = tasks.evaluate(chosen.model, names, samples=chosen.out is not None, **options, **where)
            told["tasks"], raw = scored.to_dict(), scored.raw
            if distributed.is_first() and not chosen.json:
                show(scored)
        if distributed.is_first():
            if folder is not None:
                keep(folder, told, raw)
            if chosen.json:
                print_json(told if raw is None or chosen.out is not None else {**told, "lm_eval": raw})
    return 0


def show(scored: Any) -> None:
    """Print what the tasks told for people."""
    from rich.console import Console

    from llmprune.report import tables

    console = Console()
    console.print(tables.tasks_table(scored.scores))
    for name, mean in scored.means.items():
        console.print(f"mean accuracy of {name!r}: {mean:.4f}", highlight=False)
    console.print(f"{scored.seconds:.0f} s", highlight=False)


def make(folder: Path) -> None:
    """See before any work that results can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"results cannot be written to {folder}: {error.strerror} (--out)") from None


def keep(folder: Path, told: dict[str, Any], raw: dict[str, Any] | None) -> None:
    """Write what was found."""
    for name, found in (("eval.json", told), ("lm_eval.json", raw)):
        if found is not None:
            draft = folder / f".{name}"
            draft.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            draft.rename(folder / name)
