"""Evaluate a model, dense or sparse: perplexity, block by block, and the tasks of EleutherAI's lm-eval.

example: llmprune eval OUT --perplexity wikitext2 --tasks arc_easy,hellaswag
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.cli.options import MODEL, add_device, add_json, add_tasks, add_text, print_json, task_options, text_of
from llmprune.errors import UserError

if TYPE_CHECKING:
    from llmprune.progress import Progress

FILE, RAW = "eval.json", "lm_eval.json"


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
    against = chosen.against is not None
    plain = chosen.text is not None or not names  # whether the perplexity is wanted
    text = text_of(chosen, chosen.text or ("wikitext2" if plain or against else None))
    if chosen.stride is not None and against:
        raise UserError("both are measured on the same windows, which do not overlap: leave out --stride or --against")
    where = {"device": chosen.device, "dtype": chosen.dtype, "progress": Bars()}
    where["trust_remote_code"] = chosen.trust_remote_code
    folder = None if chosen.out is None else Path(chosen.out)
    with distributed.joined():
        speaks = distributed.is_first() and not chosen.json
        if folder is not None and distributed.is_first():
            make(folder)
        if names:
            from llmprune.evaluate import tasks

            with tasks.calm():
                options["manager"], _ = tasks.find(names, list(map(str, options["include_path"])))
        told: dict[str, Any] = {"model": chosen.model, **_weights(chosen, Bars())}
        raw: dict[str, Any] | None = None
        if text is not None and plain:
            from llmprune.evaluate.perplexity import perplexity

            found = perplexity(chosen.model, text, **where)
            told["perplexity"] = vars(found)
            keep(folder, told)
            if speaks:
                print(f"perplexity {found}, {found.seconds:.0f} s")
        if text is not None and against:
            from llmprune.evaluate.divergence import divergence

            apart = divergence(chosen.model, chosen.against, text, **where)
            told["divergence"] = {"dense": chosen.against, **vars(apart)}
            keep(folder, told)
            if speaks:
                print(f"from {chosen.against}: {apart}, {apart.seconds:.0f} s")
        if names:
            scored = tasks.evaluate(chosen.model, names, samples=chosen.out is not None, **options, **where)
            told["tasks"], raw = scored.to_dict(), scored.raw
            keep(folder, told, raw)
            if speaks:
                show(scored)
        if distributed.is_first() and chosen.json:
            print_json(told if raw is None or chosen.out is not None else {**told, "lm_eval": raw})
    return 0


def _weights(chosen: argparse.Namespace, shown: Progress) -> dict[str, Any]:
    """Of which weights the figures will be, where these are kept; that both models can be had is found out."""
    from llmprune import distributed
    from llmprune.model.index import hash_weights
    from llmprune.model.source import resolve

    with distributed.first():
        for model in filter(None, (chosen.against, chosen.model)):
            source = resolve(model, chosen.dtype, trust_remote_code=chosen.trust_remote_code, progress=shown)
    if not distributed.is_first() or (chosen.out is None and not chosen.json):
        return {}
    with shown.waiting(f"hashing the files of {chosen.model}"):
        return {"shards": hash_weights(source.folder)}


def show(scored: Any) -> None:
    """Print what the tasks told for people."""
    from rich.console import Console

    from llmprune.report import tables

    console = Console()
    console.print(tables.tasks_table(scored.scores))
    for name, mean in scored.means.items():
        console.print(f"mean accuracy of {name!r}: {mean:.4f}", highlight=False)
    for figure in scored.broken:
        console.print(f"note: {figure} is not finite, and left out", highlight=False)
    console.print(f"{scored.seconds:.0f} s", highlight=False)


def make(folder: Path) -> None:
    """See before any work that results can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"results cannot be written to {folder}: {error.strerror} (--out)") from None


def keep(folder: Path | None, told: Mapping[str, Any], raw: Mapping[str, Any] | None = None) -> None:
    """Write what was found so far, on the first rank; what is known of the same weights besides stays."""
    from llmprune import distributed
    from llmprune.evaluate.pieces import writing

    if folder is None or not distributed.is_first():
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        known = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if known.get("shards") == told["shards"]:
            told = {**known, **told}
    if "tasks" not in told:
        (folder / RAW).unlink(missing_ok=True)  # of other weights
    for name, found in ((FILE, told), (RAW, raw)):
        if found is not None:
            with writing(folder / name, "") as draft:
                draft.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
