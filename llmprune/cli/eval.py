"""Measure the perplexity of a model, dense or sparse, one block in memory at a time.

example: llmprune eval OUT --text wikitext2 --length 2048
"""

from __future__ import annotations

import argparse

from llmprune.cli.options import MODEL, add_json, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--text", default="wikitext2", help="wikitext2, c4, builtin, owner/name, or a file [wikitext2]")
    parser.add_argument("--length", type=int, help="context length in tokens [2048, or what the model can take]")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... [a GPU where there is one]")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 [the checkpoint's]")
    add_json(parser)


def run(chosen: argparse.Namespace) -> int:
    """Evaluate."""
    from llmprune import distributed
    from llmprune.evaluate.perplexity import perplexity
    from llmprune.progress import Bars

    options = {"length": chosen.length, "device": chosen.device, "dtype": chosen.dtype}
    with distributed.joined():
        found = perplexity(chosen.model, chosen.text, progress=Bars(), **options)
        if distributed.is_first():
            told = f"perplexity {found}, {found.seconds:.0f} s"
            print_json({"model": chosen.model, "perplexity": vars(found)}) if chosen.json else print(told)
    return 0
