"""Arguments that several subcommands share, and how they become a recipe."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llmprune.errors import UserError
from llmprune.recipe import SHORT, Evaluation, assemble, check_said, read_value

if TYPE_CHECKING:
    from llmprune.progress import Progress

MODEL = "a Hub name (owner/name or owner/name@revision), a folder, or a .gguf file"


def add_recipe(parser: argparse.ArgumentParser, several: bool = False, sought: bool = False) -> None:
    """The recipe and each of its keys.

    Args:
        several: sparsities and methods are lists, and the evaluation is part of the work.
        sought: the sparsity is what comes out, and the evaluation is part of the work.
    """
    measured = several or sought
    add = parser.add_argument_group("recipe").add_argument
    add("--recipe", metavar="FILE", help="a YAML recipe; the options below go on top of it")
    sparsity = "2:4, 4:8, any N:M (keeps at most N of every M), 0.5 or 50%% [50%%]"
    method = "magnitude, wanda, ria, sparsegpt, admm, alps [sparsegpt]"
    words = argparse.SUPPRESS if sought else f"several of {sparsity}" if several else sparsity
    add("--sparsity", metavar="S,..." if several else "S", help=words)
    add("--method", metavar="NAME,..." if several else "NAME", help=f"several of {method}" if several else method)
    blocks = "blocks that the model does without: how many (6), a share of them (20%%), or their numbers (3,4,5)"
    add("--drop-blocks", metavar="N", help=f"{blocks}; pruned besides only with --sparsity")
    add("--drop-by", metavar="NAME", help="how they are chosen: greedy, influence, evolve [greedy]")
    narrower = "channels of each MLP that go: how many, or a share of them (20%%); no linear is pruned besides"
    add("--drop-channels", metavar="N", help=narrower)
    budget = "instead: as many channels as it takes for this share of the dense model's weights to stay (80%%)"
    add("--params", metavar="SHARE", help=budget)
    add("--flops", metavar="SHARE", help="likewise, of the products that a token takes")
    ranking = (
        "global: heads go within the budget as well as channels, as many of each as lose the least over all blocks"
    )
    add("--ranking", metavar="NAME", help=f"{ranking} (with --narrow-by taylor)")
    groups = "heads of each attention that go, with their queries: how many of those with keys of their own, or a share"
    add("--drop-heads", metavar="N", help=groups)
    hidden = "hidden channels that the whole model does without: how many, or a share"
    add("--drop-hidden", metavar="N", help=hidden)
    add(
        "--narrow-by",
        metavar="NAME",
        help="how channels and heads are chosen: osscar, taylor, flap, wanda, magnitude [osscar]",
    )
    routed = "experts of each mixture that go, of those that a router chooses among: how many, or a share"
    add("--drop-experts", metavar="N", help=routed)
    add("--experts-by", metavar="NAME", help="how these are chosen: reap, frequency, norm [reap]")
    if not several:
        qualities = (
            "fast, balanced or best: a method and what follows it; `plan` shows what it takes, options below it win"
        )
        add("--quality", metavar="NAME", help=qualities)
        permute = "let channels change places before N:M groups are made of them, where the model stays the same"
        add("--permute", action="store_true", default=None, help=permute)
        add("--refine", metavar="NAME,...", help="then make the mask better: swaps, dsnot")
        add("--reconstruct", metavar="NAME,...", help="then choose the kept weights anew: cg, block")
    add("--scope", choices=("row", "matrix"), help="what an unstructured sparsity is counted over [the method's own]")
    add(
        "--allocation",
        metavar="NAME",
        help="how the sparsity is divided: uniform, owl, alpha, global, evolve, or a plan file (.yaml) [uniform]",
    )
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
    cap = (
        f"stay below this much of the host's memory{' while pruning' if measured else ''}, such as 8GiB [what is free]"
    )
    add("--max-memory", metavar="SIZE", help=cap)
    add_trust(add)
    if measured:
        text = "measure perplexity and divergence on this text [wikitext2]"
        add("--perplexity", "--evaluate", dest="evaluate", metavar="TEXT", help=text)
    else:
        add("--evaluate", metavar="TEXT", help="measure perplexity on this text before and after pruning")
    add("--set", action="append", metavar="KEY=VALUE", help="any recipe key, such as method.damping=0.05; repeat")


def recipe_options(
    chosen: argparse.Namespace, default: Mapping[str, Any] | None = None, open_: bool = False
) -> dict[str, Any]:
    """The keyword arguments for `prune` and `plan` that the command line asks for.

    Args:
        default: the recipe where no file is named.
        open_: the sparsity is said elsewhere, or is what comes out.

    Raises:
        UserError: an option makes no sense, or has no effect on what is asked for.
    """
    names = ("sparsity", "method", "scope", "allocation", "calibration", "samples", "length", "seed", "device", "dtype")
    options = {name: getattr(chosen, name) for name in (*names, "shard_size", "max_memory", "evaluate")}
    options["quality"] = getattr(chosen, "quality", None)
    options["permute"] = getattr(chosen, "permute", None)
    for name in ("refine", "reconstruct"):
        if (named := getattr(chosen, name, None)) is not None:
            options[name] = listed(named)
    if chosen.drop_blocks is not None:
        options["depth.drop"] = _blocks(chosen.drop_blocks)
    options["depth.by"], options["width.by"], options["experts.by"] = (
        chosen.drop_by,
        chosen.narrow_by,
        chosen.experts_by,
    )
    for part in ("channels", "heads", "hidden"):
        options[f"width.{part}"] = _value(getattr(chosen, f"drop_{part}"))
    for part in ("params", "flops"):
        options[f"width.{part}"] = _value(getattr(chosen, part))
    options["width.ranking"] = chosen.ranking
    options["experts.drop"] = _value(chosen.drop_experts)
    options["trust_remote_code"] = chosen.trust_remote_code or None
    recipe = assemble(chosen.recipe if chosen.recipe is not None else default, options)
    if chosen.ignore:
        recipe = recipe.override("ignore", [*recipe.ignore, *chosen.ignore])
    for key, value in read_changes(chosen.set or ()):
        try:
            recipe = recipe.override(SHORT.get(key, key), value)
        except UserError as error:
            raise UserError(f"--set {key}: {error}") from None
    if not open_:
        check_said(recipe.settled(), options)
    return {"recipe": recipe}


def read_changes(entries: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Keys and values as --set takes them."""
    for entry in entries:
        key, mark, value = entry.partition("=")
        if not mark:
            raise UserError(f"--set takes KEY=VALUE, not {entry!r}")
        try:
            yield key.strip(), read_value(value)
        except UserError as error:
            raise UserError(f"--set {entry}: {error}") from None


def _value(text: str | None) -> Any:
    """What an option says, None where it is not given."""
    return None if text is None else read_value(text)


def _blocks(text: str) -> Any:
    """What --drop-blocks says: a list where there is a comma."""
    return read_value(f"[{text}]" if "," in text else text)


def add_text(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """The text of an evaluation; returns what adds more to its group."""
    add = parser.add_argument_group("perplexity").add_argument
    texts = "wikitext2, c4, ptb, builtin, owner/name, or a file [wikitext2, where no tasks are named]"
    add("--perplexity", "--text", dest="text", metavar="TEXT", help=texts)
    add("--length", type=int, help="context length in tokens [2048, or what the model can take]")
    for name, words in (("config", "configuration"), ("split", "split"), ("column", "column that holds the text")):
        add(f"--text-{name}", metavar="NAME", help=f"of a data set, its {words}")
    return add


def text_of(chosen: argparse.Namespace, text: str | None) -> Evaluation | None:
    """The text of an evaluation, with all that is said of it.

    Raises:
        UserError: something is said of a text, and there is none.
    """
    options = ("length", "stride", "text_config", "text_split", "text_column")
    said = {option: value for option in options if (value := getattr(chosen, option, None)) is not None}
    if text is not None:
        return Evaluation(text, **{option.removeprefix("text_"): value for option, value in said.items()})
    if said:
        raise UserError(f"{_flag(next(iter(said)))} is for a perplexity, and none is asked for (--perplexity)")
    return None


def _flag(option: str) -> str:
    """What an option is called on the command line."""
    return f"--{option.replace('_', '-')}"


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """The tasks of an evaluation."""
    add = parser.add_argument_group("tasks, by lm-eval").add_argument
    add("--tasks", metavar="NAME,...", help="tasks or groups that lm-eval knows; `pruning` for the seven of the papers")
    add("--include-path", action="append", default=[], metavar="FOLDER", help="a folder with tasks of yours; repeat")
    add("--few-shot", type=int, metavar="N", help="solved examples before each question [as the task says]")
    add("--limit", type=float, metavar="N", help="only the first N documents of each task; below 1, that part of them")
    add("--batch-tokens", type=int, metavar="N", help="tokens that run at once [what suits the device]")
    unsafe = "let tasks run the code that the model writes, on this machine (humaneval, mbpp)"
    add("--run-unsafe-code", action="store_true", help=unsafe)


def task_options(chosen: argparse.Namespace, promised: bool = False) -> tuple[list[str], dict[str, Any]]:
    """The names of the tasks, and the other options of `tasks.evaluate`.

    Args:
        promised: tasks may be asked for elsewhere too.

    Raises:
        UserError: an option makes no sense, or is for tasks where none are asked for.
    """
    names = listed(chosen.tasks or "")
    if chosen.tasks is not None and not names:
        raise UserError("--tasks names none: give names with commas between, such as arc_easy,hellaswag")
    if chosen.few_shot is not None and chosen.few_shot < 0:
        raise UserError(f"--few-shot takes a number of examples, 0 or more, not {chosen.few_shot}")
    if chosen.limit is not None and not 0 < chosen.limit < math.inf:
        raise UserError(f"--limit takes a number of documents, or a part of them below 1, not {chosen.limit:g}")
    if chosen.batch_tokens is not None and chosen.batch_tokens < 1:
        raise UserError(f"--batch-tokens takes a number of at least 1, not {chosen.batch_tokens}")
    if not (names or promised):
        for option in ("few_shot", "limit", "include_path", "batch_tokens", "run_unsafe_code"):
            if getattr(chosen, option) not in (None, [], False):
                raise UserError(f"{_flag(option)} is for tasks, and none is asked for (--tasks)")
    options = {"shots": chosen.few_shot, "limit": chosen.limit, "batch": chosen.batch_tokens}
    options.update(include_path=chosen.include_path, unsafe_code=chosen.run_unsafe_code)
    return names, options


def listed(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where an evaluation runs, and whether with code that comes with the model."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... [a GPU where there is one]")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 [the checkpoint's]")
    add_trust(parser.add_argument)


def add_trust(add: Callable[..., Any]) -> None:
    """The switch for models with code of their own."""
    add("--trust-remote-code", action="store_true", help="run code that comes with the model; read it before")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The switch for machines."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


class _NoToken(argparse.Action):
    """A token on the command line is refused without being shown: others see it there, and logs keep it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Refuse."""
        parser.error("a token is never taken from the command line: log in with `hf auth login`, or set HF_TOKEN")


def add_token(parser: argparse.ArgumentParser) -> None:
    """Answer somebody who gives a token."""
    parser.add_argument("--token", action=_NoToken, help=argparse.SUPPRESS)


def add_run(parser: argparse.ArgumentParser) -> None:
    """What to do about an earlier run, and how progress is shown."""
    anew = "begin anew: do away with an earlier run in OUT instead of going on with it"
    parser.add_argument("--restart", action="store_true", help=anew)
    add_log(parser)


def add_log(parser: argparse.ArgumentParser) -> None:
    """How progress is shown."""
    parser.add_argument("--log-json", action="store_true", help="show progress as lines of JSON on standard error")


def log(chosen: argparse.Namespace) -> Progress:
    """Where progress is shown."""
    from llmprune.progress import Bars, JsonLines

    return JsonLines() if chosen.log_json else Bars()


def tell_undrawn(out: Any, problem: str | None) -> None:
    """Say on standard error why the page of a finished checkpoint could not be drawn, if it could not."""
    if problem is not None:
        told = f"{out} is finished, but its report.html could not be drawn ({problem})"
        print(f"llmprune: {told}: `llmprune report {out}` draws it", file=sys.stderr)


def print_json(data: Any) -> None:
    """Print plain data for machines."""
    json.dump(data, sys.stdout, indent=2, default=str, allow_nan=False)
    print()
