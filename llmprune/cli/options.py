"""Arguments that several subcommands share, and how they become a recipe."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from llmprune.errors import UserError
from llmprune.recipe import SHORT, assemble, read_value

if TYPE_CHECKING:
    from llmprune.progress import Progress

MODEL = "a Hub name (owner/name or owner/name@revision), a folder, or a .gguf file"


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The recipe and each of its keys."""
    add = parser.add_argument_group("recipe").add_argument
    add("--recipe", metavar="FILE", help="a YAML recipe; the options below go on top of it")
    add("--sparsity", metavar="S", help="2:4, 4:8, any N:M (keeps at most N of every M), 0.5 or 50%% [50%%]")
    add("--method", metavar="NAME", help="magnitude, wanda, sparsegpt, ... [sparsegpt]")
    add("--scope", choices=("row", "matrix"), help="what an unstructured sparsity is counted over [the method's own]")
    add("--calibration", metavar="TEXT", help="c4, wikitext2, builtin, owner/name on the Hub, or a local file [c4]")
    add("--samples", type=int, metavar="N", help="calibration sequences [128]")
    add("--length", type=int, metavar="N", help="tokens per calibration sequence [2048]")
    add("--seed", type=int, metavar="N", help="draws the calibration documents [0]")
    add(
        "--ignore",
        action="append",
        metavar="NAME",
        help="leave more linears dense: a glob, or re:EXPRESSION; repeat",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... [a GPU where there is one]")
    add("--dtype", metavar="NAME", help="run the blocks in float32, bfloat16 or float16 [the checkpoint's]")
    add("--shard-size", metavar="SIZE", help="the largest file to write [5GB]")
    add("--max-memory", metavar="SIZE", help="stay below this much of the host's memory, such as 8GiB [what is free]")
    add_trust(add)
    add("--evaluate", metavar="TEXT", help="measure perplexity on this text before and after pruning")
    add("--set", action="append", metavar="KEY=VALUE", help="any recipe key, such as method.damping=0.05; repeat")


def recipe_options(chosen: argparse.Namespace, default: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The keyword arguments for `prune` and `plan` that the command line asks for.

    Args:
        default: the recipe where no file is named.
    """
    names = ("sparsity", "method", "scope", "calibration", "samples", "length", "seed", "device", "dtype")
    options = {name: getattr(chosen, name) for name in (*names, "shard_size", "max_memory", "evaluate")}
    options["trust_remote_code"] = chosen.trust_remote_code or None
    recipe = assemble(chosen.recipe if chosen.recipe is not None else default, options)
    if chosen.ignore:
        recipe = recipe.override("ignore", [*recipe.ignore, *chosen.ignore])
    for entry in chosen.set or ():
        key, mark, value = entry.partition("=")
        if not mark:
            raise UserError(f"--set takes KEY=VALUE, not {entry!r}")
        try:
            recipe = recipe.override(SHORT.get(key.strip(), key.strip()), read_value(value))
        except UserError as error:
            raise UserError(f"--set {entry}: {error}") from None
    return {"recipe": recipe}


def add_trust(add: Callable[..., Any]) -> None:
    """The switch for models with code of their own."""
    add("--trust-remote-code", action="store_true", help="run code that comes with the model; read it before")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The switch for machines."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def add_run(parser: argparse.ArgumentParser) -> None:
    """What to do about an earlier run, and how progress is shown."""
    anew = "begin anew: do away with an earlier run in OUT instead of going on with it"
    parser.add_argument("--restart", action="store_true", help=anew)
    parser.add_argument("--log-json", action="store_true", help="show progress as lines of JSON on standard error")


def log(chosen: argparse.Namespace) -> Progress:
    """Where progress is shown."""
    from llmprune.progress import Bars, JsonLines

    return JsonLines() if chosen.log_json else Bars()


def print_json(data: Any) -> None:
    """Print plain data for machines."""
    json.dump(data, sys.stdout, indent=2, default=str, allow_nan=False)
    print()
