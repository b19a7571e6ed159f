"""The model card: the README.md that tells people on the Hub what a pruned model is, and what it is not."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llmprune import named, reconstruct, refine, solvers
from llmprune.allocate import PLAN_FILES
from llmprune.allocation import LEFT_DENSE, spanned
from llmprune.data import NAMED, SUFFIXES
from llmprune.errors import LLMPruneError
from llmprune.model.source import COMMIT
from llmprune.model.writer import ALLOCATION
from llmprune.patterns import NM, Scope, parse
from llmprune.recipe import Recipe
from llmprune.report.earlier import all_runs, beginning
from llmprune.report.private import Names
from llmprune.report.record import (
    Divergence,
    Perplexity,
    Score,
    allocation_of,
    maybe,
    narrowed,
    short_name,
    smaller,
)
from llmprune.report.results import read_comparison, read_evaluated
from llmprune.report.speed import PHASES, Speed
from llmprune.structured import depth, experts, width

HUB = "https://huggingface.co"

_MARK = re.compile(r"<!-- llmprune card ([0-9a-f]{64}) -->\n")
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class Result:
    """One figure of the pruned model, with the dense model's beside it where that was measured in the same way.

    Attributes:
        measure: perplexity, or a task and its metric.
        dense, sparse: the figures.
        stderr: the standard error of the pruned model's.
        protocol: all that gives the figure a meaning, in words.
        told: the same for the Hub's model index, without the value.
    """

    measure: str
    dense: float | None
    sparse: float
    stderr: float | None
    protocol: str
    told: Mapping[str, Any]


@dataclass
class Measured:
    """What `known_results` found: figures by measure and protocol, the latest of each."""

    results: dict[tuple[str, str], Result] = field(default_factory=dict)

    def add(self, *results: Result) -> None:
        """Take in figures; a dense one that was known is kept where the new one has none."""
        for result in results:
            key = (result.measure, result.protocol)
            known = self.results.get(key)
            if known is not None and result.dense is None:
                result = Result(**{**vars(result), "dense": known.dense})
            if math.isfinite(result.sparse):
                self.results[key] = result


def known_results(folder: Path, report: Mapping[str, Any], shards: Mapping[str, str]) -> list[Result]:
    """Everything that was measured of a pruned model as it is: by its run, and by `eval` and `compare` later.

    Args:
        folder: the checkpoint.
        report: its llmprune.json.
        shards: the sha256 of the files that hold its weights, by name; figures of other weights are not theirs.

    Raises:
        UserError: a file of results cannot be read.
    """
    measured = Measured()
    if shards == report["shards"] and report.get("sparse"):
        measured.add(_perplexity(Perplexity(**report["sparse"]), maybe(Perplexity, report.get("dense"), "dense")))
    later = read_evaluated(folder)
    if later is not None and later.shards == shards:
        if later.perplexity is not None:
            measured.add(_perplexity(later.perplexity, None))
        if later.divergence is not None:
            measured.add(*_divergence(later.divergence))
        for score in later.scores:
            measured.add(_score(score, None))
    compared = read_comparison(folder)
    own, dense = compared.own(shards) if compared is not None else (None, None)
    if own is not None:
        if own.perplexity is not None:
            measured.add(_perplexity(own.perplexity, dense.perplexity if dense else None))
        if own.divergence is not None:
            measured.add(*_divergence(own.divergence))
        before = {_score(score, None).measure: score.value for score in dense.scores} if dense else {}
        for score in own.scores:
            measured.add(_score(score, before.get(_score(score, None).measure)))
    return list(measured.results.values())


def _perplexity(found: Perplexity, dense: Perplexity | None) -> Result:
    windows = "no overlap" if found.stride is None else f"stride {found.stride:,}"
    protocol = f"{short_name(found.text)}, context {found.length:,}, {windows}, {found.tokens:,} predicted tokens"
    index = _index(found.text, "perplexity", f"perplexity ({protocol})")
    return Result("perplexity", dense.value if dense else None, found.value, None, protocol, index)


def _divergence(found: Divergence) -> list[Result]:
    """How far the pruned model is from the dense one, and how often both hold the same token for the most likely."""
    protocol = f"{short_name(found.text)}, context {found.length:,}, {found.tokens:,} tokens"
    apart, same = "KL(dense ‖ this model), nats a token", "same most likely token as the dense model"
    return [
        Result(apart, 0.0, found.kl, found.stderr, protocol,
               _index(found.text, "kl_divergence", f"{apart} ({protocol})")),
        Result(same, 1.0, found.agreement, None, protocol,
               _index(found.text, "top1_agreement", f"{same} ({protocol})")),
    ]  # fmt: skip


def _index(text: str, metric: str, name: str) -> dict[str, Any]:
    """A figure on a text for the Hub's model index, without the value."""
    named = NAMED.get(text, {}).get("evaluation")
    return {
        "task_type": "text-generation",
        "dataset_type": named.name if named else short_name(text),
        "dataset_name": short_name(text),
        "dataset_config": named.config if named else None,
        "dataset_split": named.split if named else None,
        "metric_type": metric,
        "metric_name": name,
    }


def _score(found: Score, dense: float | None) -> Result:
    metric = found.metric if found.filter == "none" else f"{found.metric} ({found.filter})"
    protocol = f"lm-eval, {found.shots} shots, {found.documents:,} documents"
    index = {
        "task_type": "text-generation",
        "dataset_type": found.task,
        "dataset_name": found.task,
        "metric_type": found.metric,
        "metric_name": f"{metric} ({protocol})",
    }
    return Result(f"{found.task} {metric}", dense, found.value, found.stderr, protocol, index)


def make_card(
    report: Mapping[str, Any],
    results: list[Result],
    to: str,
    base: Mapping[str, Any],
    changed: bool = False,
    speed: str = "",
) -> ModelCard:
    """The card of a pruned model.

    Args:
        report: its llmprune.json.
        results: what was measured of it.
        to: what it will be called, owner/name.
        base: what the dense model's card says: `name` on the Hub where it has one, `license`, ...
        changed: the weights are others than the run wrote: somebody has trained them since.
        speed: what was measured of its speed; see `known_speed`.
    """
    pruned = [record for record in report["linears"] if not record.get("kept")]
    methods = list(dict.fromkeys(record["method"] for record in pruned))
    patterns = list(dict.fromkeys(record["pattern"] for record in pruned))
    title = to.split("/")[-1]
    text = "\n\n".join(
        [
            f"# {title}",
            _what(report, base, methods, patterns, changed),
            "## How it was pruned",
            _how(report, pruned, methods),
            "## Quality",
            _quality(results),
            "## How to load it",
            _load(to, _has_code(report)),
            "## What speed-up not to expect" if not speed else "## Speed",
            _speed(patterns, report, speed),
            "## How to make it again",
            _again(report, base),
        ]
    )
    index = [EvalResult(**result.told, metric_value=result.sparse) for result in results]
    runs = all_runs(report)
    texts = [text for run in runs for text in (run.get("calibration"), *(one["data"] for one in _recoveries(run)))]
    metadata = ModelCardData(
        base_model=base.get("name"),
        # The Hub knows adapter, finetune, merge and quantized; of these, new values for all weights is the nearest.
        base_model_relation="finetune" if base.get("name") else None,
        license=base.get("license"),
        license_name=base.get("license_name"),
        license_link=_link(base, report),
        language=base.get("language"),
        library_name="transformers",
        pipeline_tag=base.get("pipeline_tag") or "text-generation",
        tags=[
            "llmprune",
            "pruned",
            *(["sparse"] if any(run["sparsity"] for run in runs) else []),
            *methods,
            *dict.fromkeys(name if ":" in name else "unstructured" for name in patterns),
        ],
        datasets=list(dict.fromkeys(filter(None, map(_data_set, texts)))) or None,
        eval_results=index or None,
        model_name=title if index else None,
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n")


def marked(card: ModelCard) -> str:
    """The text of a card with a mark in it, by which `is_ours` knows later that nobody has changed it."""
    text = str(card)
    digest = hashlib.sha256(text.encode()).hexdigest()
    head, end, rest = text.partition("\n---\n")
    return f"{head}{end}<!-- llmprune card {digest} -->\n{rest}"


def is_ours(text: str) -> bool:
    """Whether a README.md is a card of llmprune that nobody has changed."""
    mark = _MARK.search(text)
    return mark is not None and hashlib.sha256(_MARK.sub("", text, count=1).encode()).hexdigest() == mark[1]


def _what(
    report: Mapping[str, Any], base: Mapping[str, Any], methods: list[str], patterns: list[str], changed: bool
) -> str:
    first = _public_runs(report)[0]
    dense = f"[{base['name']}]({HUB}/{base['name']})" if base.get("name") else short_name(first["model"])
    commit = _commit(first, base)
    at = f" at commit `{commit}`" if commit else ""
    plain = f" The dense weights were {first['origin']} before." if first.get("origin") else ""
    uniform = allocation_of(report["recipe"]) == "uniform"
    told = ", ".join(patterns) if uniform else spanned(patterns)
    pruned = f" ({', '.join(methods)}; {told})" if methods else ""
    trained = report.get("recovery")
    within = ", within the same masks" if methods else ""
    since = f"It was trained after that{within}" if trained else "It was not trained after that"
    since = f"Its weights were changed after that{within}" if changed else since
    *earlier, _ = all_runs(report)
    runs = f" in {len(earlier) + 1} runs. The last{pruned or ' one'}" if earlier else pruned
    before = f" {beginning(earlier)}" if earlier else ""
    return (
        f"{dense}{at}, pruned with llmprune {report['llmprune']}{runs}: {' '.join(_less(report))} "
        f"{since}.{before}{plain} "
        f"It is a plain Hugging Face checkpoint{' in the dense layout, with exact zeros' if methods else ''}."
    )


def _less(report: Mapping[str, Any]) -> list[str]:
    """How much less there is than in the dense model, in sentences."""
    said = []
    if less := smaller(report):
        said.append(f"it has {less}, and {report['weights'] / report['dense_weights']:.2%} of the weights.")
    if report["sparsity"] or not said:
        left = any(linear.get("kept") == LEFT_DENSE for linear in report["linears"])
        among = "the pruned linears and of those that the allocation left dense" if left else "the pruned linears"
        zeros = f"{report['sparsity']:.2%} of the weights of {among} are zero"
        said.append(
            f"{zeros}, which is {report['model_sparsity']:.2%} of all{' that are left' if said else ''} weights."
        )
    return said


def _narrows(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe makes matrices smaller by what `width.by` chooses."""
    return any(recipe["width"].get(key) is not None for key in ("channels", "heads", "params", "flops"))


def _how(report: Mapping[str, Any], pruned: list[dict[str, Any]], methods: list[str]) -> str:
    lines = [f"- **Method**: {_method(solvers, name)}" for name in methods]
    if kept := report.get("kept_blocks"):
        by = named.name_of(report["recipe"]["depth"]["by"])
        way = "by hand" if isinstance(report["recipe"]["depth"]["drop"], list) else f"by {_method(depth, by)}"
        lines.append(f"- **Blocks** that are left, by their numbers in the dense model: {', '.join(map(str, kept))}")
        lines.append(f"- **Those that went** were chosen {way}")
    if widths := report.get("widths"):
        lines.append(f"- **Widths**: {narrowed(widths)}")
        recipe = report["recipe"]
        asked = [("width", width)] if _narrows(recipe) else []
        asked += [("experts", experts)] if recipe["experts"].get("drop") is not None else []
        lines += [f"- **{key.capitalize()}** chosen by {_method(room, named.name_of(recipe[key]['by']))}"
                  for key, room in asked]  # fmt: skip
    if report.get("hidden_channels"):
        lines.append("- **Hidden channels** that are left: those that carry the most of the hidden states' energy")
    if moved := sum(record.get("permuted", False) for record in pruned):
        lines.append(
            f"- **Channel permutation**: for N:M groups that lose less, the inputs of {moved:,} linears have changed "
            "places, with the rows of the linears that make them: weights stand elsewhere than in the dense model"
        )
    for key, room, heading in (("refine", refine, "Mask refined by"), ("reconstruct", reconstruct, "Reconstructed by")):
        names = map(named.name_of, report["recipe"].get(key) or ())
        lines += [f"- **{heading}**: {_method(room, name)}" for name in names]
    allocation = allocation_of(report["recipe"])
    if allocation != "uniform":
        lines.append(f"- **Allocation** of the sparsity to the linears: `{allocation}`; each is in `{ALLOCATION}`")
    kinds: dict[tuple[str, str, Scope | None], list[str]] = {}
    for record in pruned:
        pattern = record["pattern"]
        alike = pattern if allocation == "uniform" or ":" in pattern else "unstructured"
        kinds.setdefault((record["method"], alike, record.get("scope")), []).append(pattern)
    for (method, _, scope), group in kinds.items():
        rule, pattern, count = parse(group[0], scope or "row"), spanned(group), len(group)
        kept_of = f"at most {rule.n} of every {rule.m} consecutive inputs are kept" if isinstance(rule, NM) else ""
        lines.append(
            f"- **Pattern**: {pattern} ({kept_of or f'counted over each {scope}'}) by {method}, {count:,} linears"
        )
    kept = Counter(record["kept"] for record in report["linears"] if record.get("kept"))
    lines += [f"- **Left dense**: {count:,} linears ({why})" for why, count in kept.items()]
    errors = [record["relative_error"] for record in pruned if record.get("relative_error") is not None]
    if errors:
        mean = sum(errors) / len(errors)
        what = "‖(Ŵ−W)X‖² / ‖WX‖² on the calibration text"
        what += ", before it was trained" if report.get("recovery") else ""
        lines.append(f"- **Relative error** of the linears' outputs, {what}: mean {mean:.4f}, worst {max(errors):.4f}")
    chosen = report.get("calibration")
    if chosen is None:
        lines.append("- **Calibration**: none; the method sees no data")
    else:
        lines.append(
            f"- **Calibration**: {short_name(chosen['source'])}, {chosen['samples']} x {chosen['length']:,} tokens, "
            f"seed {chosen['seed']} (sha256 of the tokens: `{chosen['tokens_sha256']}`)"
        )
        if share := chosen.get("asymmetric"):
            aim = f"kept weights aim {share:.0%} of the way at what the dense model makes of its own inputs"
            lines.append(f"- **Asymmetric calibration**: {aim}")
    lines += [_trained(found) for found in _recoveries(report)]
    lines.append("- **Every linear**, with its error and the hash of its mask: `llmprune.json`")
    return "\n".join(lines)


def _recoveries(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The records of all trainings after the pruning, the first first."""
    found: list[Mapping[str, Any]] = []
    record = report.get("recovery")
    while record:
        found.insert(0, record)
        record = record.get("earlier")
    return found


def _trained(record: Mapping[str, Any]) -> str:
    told, sequences = record["data"], record["batch"] * record["accumulate"] * record["ranks"]
    methods = {
        "full": "all kept weights",
        "lora": f"adapters of rank {record['rank']} within the masks, merged",
        "norms": "norms and biases",
    }
    aim = "" if record["distilled_from"] is None else f" towards the answers of {short_name(record['distilled_from'])}"
    before, after = (record[moment]["perplexity"] for moment in ("before", "after"))
    where = f"{told['held_out']:,} sequences of it that were held out, {after['tokens']:,} predicted tokens"
    return (
        f"- **Recovery**: {methods[record['method']]}, trained{aim} for {record['steps']:,} steps of {sequences:,} x "
        f"{told['length']:,} tokens of {short_name(told['source'])} (learning rate {record['rate']:g}, seed "
        f"{record['seed']}; sha256 of the tokens: `{told['tokens_sha256']}`); perplexity {before['value']:.4g} before "
        f"and {after['value']:.4g} after, on {where}"
    )


def _method(room: ModuleType, name: str) -> str:
    """A method, or what follows one, with its published source, as its code names it."""
    try:
        told = type(room.load(name)).__doc__ or ""
    except LLMPruneError:  # of another version
        return f"`{name}`"
    sources = (f"[arXiv:{number}]({f'https://arxiv.org/abs/{number}'})" for number in _ARXIV.findall(told))
    return " ".join([f"`{name}`", *sources])


def _quality(results: list[Result]) -> str:
    if not results:
        return "It was not measured. A pruned model is worse than the dense one: measure before you use it."
    rows = ["| | dense | this model | how it was measured |", "|---|---:|---:|---|"]
    for result in results:
        dense = "not measured" if result.dense is None else f"{result.dense:.4g}"
        error = "" if result.stderr is None else f" ± {result.stderr:.2g}"
        rows.append(f"| {_cell(result.measure)} | {dense} | {result.sparse:.4g}{error} | {_cell(result.protocol)} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _has_code(report: Mapping[str, Any]) -> bool:
    """Whether the model is run by code that comes with it."""
    asked = bool(report["recipe"].get("trust_remote_code"))
    return asked and any(name.endswith(".py") for name in report.get("side_files", ()))


def _load(to: str, code: bool) -> str:
    more = ", trust_remote_code=True" if code else ""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{to}", dtype="auto"{more})
tokenizer = AutoTokenizer.from_pretrained("{to}"{more})
```"""


def known_speed(found: Speed | None, shards: Mapping[str, str]) -> str:
    """What was measured of a pruned model's speed, in a sentence; empty where it was not, or in one round.

    Args:
        found: what `speed` told.
        shards: see `known_results`.
    """
    own = found.own(shards) if found is not None else None
    if found is None or own is None:
        return ""
    told = []
    for phase in PHASES:
        ratio = found.ratio(own, phase)
        if ratio is None or ratio.low is None:
            continue
        if ratio.verdict in ("faster", "slower"):
            told.append(f"{phase} is {ratio.ratio:.3g} times as fast ({ratio.low:.3g} to {ratio.high:.3g})")
        else:
            told.append(f"no difference beyond noise in {phase}")
    if not told:
        return ""
    return f"Against the dense model, both run by plain transformers ({found.where}): {'; '.join(told)}."


def _speed(patterns: Sequence[str], report: Mapping[str, Any], measured: str) -> str:
    kept, widths, said = report.get("kept_blocks"), report.get("widths"), []
    if kept:
        said.append(
            f"A token goes through {len(kept)} blocks instead of {report['dense_blocks']}, and the cache has no keys "
            f"and values of the others{'' if measured else '; how much faster that is was not measured'}."
        )
    unknown = "" if measured else "; how much faster that is was not measured"
    if widths and (_narrows(report["recipe"]) or report.get("hidden_channels")):
        said.append(f"Its matrices are smaller, so that a token takes less memory and fewer products{unknown}.")
    if widths and report["recipe"]["experts"].get("drop") is not None:
        said.append("It has fewer experts, which takes less memory; a token is sent to as many as before.")
    if patterns or not said:
        said.append(
            "Zeros bring none by themselves: they are stored and multiplied like any other number."
            if said
            else "None by itself: zeros are stored and multiplied like any other number, so that this checkpoint is as "
            "large as the dense one, and runs as fast, in transformers and in servers that load it as it is."
            + ("" if measured else " No speed-up was measured for this model.")
        )
        said.append(
            "NVIDIA GPUs from Ampere on have instructions for 2:4, which a runtime uses only after it has compressed "
            "the weights for them; what that brings depends on the shapes, the batch and the kernels."
            if "2:4" in patterns
            else "A runtime with kernels for this kind of sparsity may gain from it; GPUs have no instructions for it."
        )
    return " ".join([measured, *said] if measured else said)


def _again(report: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    runs = _public_runs(report)
    commit = _commit(runs[0], base)
    model = f"{base['name']}@{commit}" if commit else short_name(runs[0]["model"])
    commands, recipes = [], []
    for number, run in enumerate(runs, 1):
        file, out = ("recipe.yaml", "OUT") if len(runs) == 1 else (f"recipe-{number}.yaml", f"OUT-{number}")
        names = ("llmprune", "torch", "transformers")
        versions = ", ".join(f"{name} {run['versions'][name]}" for name in names if name in run["versions"])
        recipes.append(f"with this `{file}`, and {versions}:\n\n```yaml\n{_shown(run['recipe'], run is runs[-1])}```")
        commands.append(f"llmprune prune {model} --recipe {file} -o {out}")
        trained = list(_recover_commands(run, model, out))
        commands += [command for command, _ in trained]
        model = trained[-1][1] if trained else out
        if run.get("changed"):
            commands.append(f"# something else has changed the weights in {model} after that")
    return "```bash\n" + "\n".join(commands) + "\n```\n\n" + "\n\n".join(recipes)


def _public_runs(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs that made a model out of one that others can have, the first first: back to what came from the Hub."""
    runs = all_runs(report)
    public = [number for number, run in enumerate(runs) if COMMIT.fullmatch(run.get("revision") or "")]
    return runs[public[-1] if public else 0 :]


def _commit(run: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """The commit of the model that a run began with, if that is the one of this name on the Hub; else empty."""
    names = ((run.get("base") or {}).get("name"), str(run["model"]).partition("@")[0])
    commit = run.get("revision") or ""
    return commit if base.get("name") in names and COMMIT.fullmatch(commit) else ""


def _shown(recipe: Mapping[str, Any], last: bool) -> str:
    """A recipe as YAML, without where files lie.

    Args:
        last: it is that of the last run, so that a plan file of its allocation is `ALLOCATION` beside the card.
    """
    shown = Names({"recipe": recipe})(recipe)
    if last and allocation_of(recipe).endswith(PLAN_FILES):
        shown["allocation"] = ALLOCATION
    try:
        return Recipe.from_dict(shown).to_yaml()
    except LLMPruneError:  # of another version
        return json.dumps(shown, indent=2) + "\n"


def _recover_commands(report: Mapping[str, Any], model: str, pruned: str) -> Iterator[tuple[str, str]]:
    """What trains a pruned folder as this model was trained, and the folder that each command writes."""
    before, first = pruned, pruned.replace("OUT", "RECOVERED")
    for number, record in enumerate(_recoveries(report), 1):
        told, weights, method = record["data"], record["loss_weights"], record["method"]
        out = first if number == 1 else f"{first}-{number}"
        options: dict[str, Any] = {
            "data": short_name(told["source"]),
            "method": method,
            "steps": record["steps"],
            "rate": f"{record['rate']:g}",
            "weight-decay": f"{record['weight_decay']:g}",
            "batch": record["batch"],
            "accumulate": record["accumulate"] * record["ranks"],  # as in one process
            "length": told["length"],
            "samples": told["samples"],
            "held-out": told["held_out"],
            "seed": record["seed"],
        }
        if method == "lora":
            options |= {"rank": record["rank"], "alpha": f"{record['alpha'] or 2 * record['rank']:g}"}
        if record["distilled_from"] is not None:
            teacher = model if record["distilled_from"] == report["model"] else short_name(record["distilled_from"])
            options |= {"distill": teacher, "temperature": f"{record['temperature']:g}"}
            options |= {f"{part}-weight": f"{value:g}" for part, value in weights.items()}
        switch = " --embeddings" if record["embeddings"] else ""
        told_options = " ".join(f"--{name} {value}" for name, value in options.items())
        yield f"llmprune recover {before} -o {out} {told_options}{switch}", out
        before = out


def _data_set(calibration: Mapping[str, Any] | None) -> str | None:
    """The Hub's name of the calibration text, where it has one."""
    source = str((calibration or {}).get("source", ""))
    if source in NAMED:
        return NAMED[source]["calibration"].name
    local = source.endswith(SUFFIXES) or source.startswith((".", "/", "~")) or Path(source).exists()
    return source if source.count("/") == 1 and not local else None


def _link(base: Mapping[str, Any], report: Mapping[str, Any]) -> str | None:
    """Where the licence can be read; a file that is named beside the base model's card is named as there."""
    link = base.get("license_link")
    if not isinstance(link, str) or "://" in link or link in report.get("side_files", ()):
        return link if isinstance(link, str) else None
    return f"{HUB}/{base['name']}/blob/main/{link}" if base.get("name") else None
