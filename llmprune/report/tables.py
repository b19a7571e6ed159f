"""What people read on the terminal: the plan, the result, an inspection."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from llmprune.allocation import reached, spanned
from llmprune.cost import Cost
from llmprune.model.writer import ALLOCATION, PAGE
from llmprune.patterns import Columns, Unstructured
from llmprune.plan import Choice, Plan
from llmprune.promise import Verdict
from llmprune.report.comparison import Compared, Comparison
from llmprune.report.earlier import beginning
from llmprune.report.inspect import Inspection, Matrix
from llmprune.report.record import (
    BlockRecord,
    LinearRecord,
    Perplexity,
    Report,
    Score,
    narrowed,
    shortened,
)

T = TypeVar("T")

Cells = tuple[list[str], list[list[str]]]
"""What stands over the columns of a table, and its rows."""

NAMES = ("model", "task", "metric")
"""Columns of a comparison that hold names; they take several lines where they are too long, and are never cut."""

MIXTURES = 3
"""Those that are noted one by one."""


def kind(name: str) -> str:
    """A linear's name without the numbers of its block and expert: `mlp.experts.*.up_proj`."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join("*" if part.isdigit() else part for part in parts[first + 1 :])


def size(count: float) -> str:
    """A count of bytes for reading."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def plan_table(plan: Plan, every: bool) -> Table:
    """The plan: a row for each linear, or for linears of one kind that are treated alike."""
    table = Table(title="Plan", title_justify="left")
    for heading in ("linear", "in x out", "count", "method", "pattern", "weights"):
        table.add_column(heading, justify="left" if heading in ("linear", "method", "pattern") else "right")

    moved = plan.moved

    def key(choice: Choice) -> tuple[object, ...]:
        name = choice.linear.name if every else kind(choice.linear.name)
        pattern = choice.pattern.scope if choice.allocated and not every else str(choice.pattern)
        return name, choice.linear.shape, choice.kept, choice.method, pattern, choice.linear.name in moved

    for group in _grouped(plan.choices, key):
        first = group[0]
        share = sum(choice.linear.numel for choice in group) / max(plan.weights, 1)
        method = ", ".join((first.method, *first.after.names))
        method = method if first.kept is None else f"[dim]dense: {first.kept}[/dim]"
        free = all(isinstance(choice.pattern, Unstructured) for choice in group)
        scope = f" per {first.pattern.scope}" if free else ""
        pattern = ""
        if first.kept is None:
            whole = isinstance(first.pattern, Columns)  # all of them are alike then
            pattern = str(first.pattern) if whole else f"{spanned(str(choice.pattern) for choice in group)}{scope}"
        if plan.open(first) and plan.budget is not None:
            pattern = f"by {plan.budget.name}"
        if first.linear.name in moved:
            pattern += ", permuted"
        name = first.linear.name if every else kind(first.linear.name)
        rows, columns = first.linear.shape
        table.add_row(name, f"{columns:,} x {rows:,}", f"{len(group):,}", method, pattern, f"{share:.1%}")
    return table


def shortening_lines(plan: Plan) -> list[str]:
    """Which blocks go, where any do."""
    asked = plan.shortening
    if asked is None:
        return []
    if asked.given is not None:
        return [f"blocks       {shortened(asked.kept, asked.total)}"]
    found = f"chosen by {asked.by} on the calibration text when the model is pruned"
    return [f"blocks       {len(asked.kept)} of {asked.total}; those that go are {found}"]


def width_lines(plan: Plan) -> list[str]:
    """How much narrower blocks become, where they do."""
    left = plan.weights if plan.narrow is None else plan.narrow.checkpoint.weights
    dense = plan.weights if plan.slimming is None else plan.slimming.weights
    if plan.ranked:
        slim = f"{narrowed(plan.widths)}; " if plan.widths else ""
        return [f"widths       {slim}channels and heads go until {plan.ranked}, as many of each as a ranking says"]
    if not plan.widths:
        return []
    lines = [f"widths       {narrowed(plan.widths)}: {left:,} of {dense:,} weights ({left / dense:.1%}) are left"]
    if plan.narrow is not None and (others := plan.narrow.checkpoint.unclaimed_keys):
        lines.append(f"note         {len(others)} tensors that no module asks for are copied with their old shapes")
    return lines


def allocation_lines(plan: Plan) -> list[str]:
    """How the sparsity is divided, where it is."""
    if plan.budget is None:
        return []
    asked = "" if plan.budget.sparsity is None else f"{plan.budget.sparsity:.2%} asked, "
    told = "found on the calibration text when the model is pruned"
    if plan.budget.targets is not None:
        told = f"{reached(plan.known, plan.budget.targets):.3%} of the weights that share it"
    return [f"allocated    by {plan.budget.name}: {asked}{told}"]


def after_lines(plan: Plan) -> list[str]:
    """What is aimed at, and what follows when all linears of a block are solved."""
    lines = []
    if plan.aims:
        lines.append(f"aimed at     what the dense model makes of its own inputs, {plan.aims:.0%} of the way")
    if plan.fit is not None:
        first, steps = plan.fit.steps_of(0), plan.fit.steps_of(1)
        more = f", {first:,} for the first" if first != steps else ""
        lines.append(f"then         each block is fitted to the dense one: {steps:,} steps of Adam{more}")
    return lines


def memory_lines(plan: Plan) -> list[str]:
    """What a run will take of memory, and how it is laid out for that."""
    schedule = plan.schedule
    phases = ", ".join(f"{name} {size(peak.host)}" for name, peak in schedule.memory.items())
    lines = [f"peak memory  about {size(schedule.peak.host)} ({phases})"]
    if schedule.peak.device:
        phases = ", ".join(f"{name} {size(peak.device)}" for name, peak in schedule.memory.items() if peak.device)
        lines.append(f"             on the GPU about {size(schedule.peak.device)} ({phases})")
    if plan.needs_data:
        again = schedule.batches - schedule.held
        anew = f", {again} of {schedule.batches} batches run anew for each" if again else ""
        stages = f"up to {schedule.most_stages} stages a block{anew}"
        held = {"device": "on the GPU", "host": "in memory", "disk": "on the disk"}[schedule.place]
        lines.append(
            f"laid out     {schedule.batch} x {schedule.length:,} tokens at once, activations {held}, {stages}"
        )
    return lines


def cost_lines(work: Cost, rate: float) -> list[str]:
    """What a run will take of time, by its operations and how many of them the machine does in a second."""
    if not work.total:
        return []
    parts = ", ".join(f"{name} {value / work.total:.0%}" for name, value in vars(work).items() if value)
    told = f"{work.total:.2g} operations ({parts}), at {rate:.2g} a second as measured here"
    return [f"work         about {_duration(work.seconds(rate))} or more: {told}"]


def _duration(seconds: float) -> str:
    """A time that is known roughly."""
    for unit, size_ in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size_:
            return f"{seconds / size_:.2g} {unit}"
    return f"{seconds:.2g} seconds"


def result_table(report: Report) -> Table:
    """The result: sparsity and error by kind of linear."""
    table = Table(title="Pruned", title_justify="left")
    for heading in ("linear", "count", "pattern", "zeros", "relative error: mean", "worst"):
        table.add_column(heading, justify="left" if heading in ("linear", "pattern") else "right")
    apart = report.allocation == "uniform"
    for group in _grouped(report.solved, lambda record: (kind(record.name), record.pattern if apart else None)):
        errors = [record.relative_error for record in group if record.relative_error is not None]
        mean, worst = (f"{sum(errors) / len(errors):.4f}", f"{max(errors):.4f}") if errors else ("-", "-")
        zeros = sum(record.sparsity for record in group) / len(group)
        pattern = patterns_of(group)
        table.add_row(kind(group[0].name), f"{len(group):,}", pattern, f"{zeros:.2%}", mean, worst)
    return table


def patterns_of(records: Sequence[LinearRecord]) -> str:
    """The patterns of linears of one kind, in few words; or how much narrower they have become."""
    narrower = list(dict.fromkeys(record.kept for record in records if record.pattern is None and record.kept))
    return ", ".join(narrower) if narrower else spanned(record.pattern or "" for record in records)


def summary(report: Report) -> Table:
    """The result in a few lines."""
    table = Table.grid(padding=(0, 2))
    for name, error in courses(report.solved).items():
        table.add_row(f"after {name}", f"relative error {error:.4f} on average")
    if report.smaller:
        weights = f"{report.weights:,} weights of {report.dense_weights:,}"
        table.add_row("blocks" if report.shortened else "widths", f"{report.smaller}: {weights}")
    if report.pruned or not report.smaller:
        among = "pruned linears and those left dense" if report.left_dense else "pruned linears"
        table.add_row("zeros", f"{report.sparsity:.2%} of {among}, {report.model_sparsity:.2%} of all weights")
    if report.origin is not None:
        table.add_row("source", report.origin)
    if report.earlier:
        table.add_row("before that", beginning(report.earlier))
    if report.allocation != "uniform":
        table.add_row("allocation", f"{report.allocation}, kept in {ALLOCATION}")
    if report.dense is not None:
        table.add_row("perplexity, dense", str(report.dense))
    if report.sparse is not None:
        table.add_row("perplexity, sparse", str(report.sparse))
    if report.calibration is not None:
        chosen = report.calibration
        table.add_row("calibration", f"{chosen['source']}, {chosen['samples']} x {chosen['length']:,} tokens")
    phases = ", ".join(
        f"{name} {value:.0f}" for name, value in report.seconds.items() if name != "total" and value >= 0.5
    )
    table.add_row("time", f"{report.seconds['total']:.0f} s ({phases})")
    table.add_row("peak memory", f"{size(report.peak_memory)} (planned {size(report.predicted_memory)})")
    table.add_row("written to", f"{report.out} (masks verified)")
    problem = report.page_problem
    table.add_row("report", str(report.out / PAGE) if problem is None else f"[red]not drawn[/red]: {escape(problem)}")
    return table


def recovery_table(out: Path, record: Mapping[str, Any]) -> Table:
    """The result of a recovery in a few lines, by its record."""
    table = Table.grid(padding=(0, 2))
    told = record["data"]
    tokens = record["steps"] * record["batch"] * record["accumulate"] * record["ranks"] * told["length"]
    table.add_row("trained", f"{record['trained']:,} weights ({record['method']}), {record['steps']:,} steps")
    table.add_row("on", f"{told['source']}, {tokens:,} tokens in sequences of {told['length']:,}")
    if record["distilled_from"] is not None:
        table.add_row("towards", str(record["distilled_from"]))
    for moment in ("before", "after"):
        found = record[moment]
        apart = "" if found["kl"] is None else f", KL from the dense model {found['kl']:.4f} nats"
        table.add_row(f"perplexity {moment}", f"{Perplexity(**found['perplexity'])}{apart}")
    if record["raised"]:
        what = "the smallest number of the dtype, so that masks stay what they were"
        table.add_row("note", f"{record['raised']:,} kept weights became zero, and were set to {what}")
    table.add_row("time", f"{record['seconds']:.0f} s")
    table.add_row("peak memory", size(record["peak_memory"]))
    table.add_row("written to", f"{out} ({record['masked_linears']:,} masks verified)")
    return table


def courses(records: Iterable[LinearRecord]) -> dict[str, float]:
    """Where steps followed the method, the mean relative error over the linears after each, by name."""
    found: dict[str, list[float]] = {}
    for record in records:
        for name, error in (record.course or {}).items():
            found.setdefault(name, []).append(error)
    return {name: sum(errors) / len(errors) for name, errors in found.items()}


def all_notes(report: Report) -> list[str]:
    """What the reader should know of a run."""
    return [*notes(report.linears), *expert_notes(report.blocks), *fit_notes(report.blocks), *batch_notes(report)]


def notes(records: Iterable[LinearRecord]) -> list[str]:
    """What was out of the ordinary, each kind of it once."""
    noted = [record for record in records if record.note]
    groups = _grouped(noted, lambda record: (kind(record.name), re.sub(r"[\d,.]+", "", record.note or "")))
    return [
        f"{group[0].name}{f' and {len(group) - 1} like it' if len(group) > 1 else ''}: {group[0].note}"
        for group in groups
    ]


def expert_notes(blocks: Iterable[BlockRecord]) -> list[str]:
    """Where experts went, those that calibration hardly reached; of many mixtures the first."""
    made = [
        f"{told.name}: hardly any calibration token was sent to {len(told.few)} of {len(told.tokens)} experts "
        f"({', '.join(map(str, told.few[:8]))}{', ...' if len(told.few) > 8 else ''}): little is known of them"
        for block in blocks
        for told in block.experts or ()
        if told.few
    ]
    more = len(made) - MIXTURES
    return made if more < 2 else [*made[:MIXTURES], f"{more} more mixtures have such experts"]


def fit_notes(blocks: Iterable[BlockRecord]) -> list[str]:
    """Blocks that their fit did not bring nearer to the dense ones, so that they are as they were before it."""
    left = [block.name for block in blocks if block.away is not None and block.away == block.away_before]
    if not left:
        return []
    named = ", ".join(left[:8]) + (", ..." if len(left) > 8 else "")
    return [
        f"{named}: fitted to the dense model without coming nearer to it on the calibration text, and so left as "
        f"{'it was' if len(left) == 1 else 'they were'} before"
    ]


def batch_notes(report: Report) -> list[str]:
    """Where the run went on with other batches than it began with, that it did."""
    others = [block.batch for block in report.blocks if block.batch not in (None, report.batch)]
    if report.batch is None or not others:
        return []
    sizes = " or ".join(map(str, sorted({batch for batch in others if batch is not None})))
    return [
        f"{len(others)} of {len(report.blocks)} blocks took {sizes} sequences at once, not {report.batch} as when the "
        "run began (less memory, or more ranks): the last bits may differ from those of an unbroken run"
    ]


def tasks_table(scores: Iterable[Score]) -> Table:
    """What tasks told: a row for each figure."""
    table = Table(title="Tasks", title_justify="left")
    for heading in ("task", "metric", "value", "standard error", "documents", "shots"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for score in scores:
        metric = _metric(score.metric, score.filter)
        error = "-" if score.stderr is None else f"{score.stderr:.4f}"
        table.add_row(score.task, metric, f"{score.value:.4f}", error, f"{score.documents:,}", str(score.shots))
    return table


def comparison_tables(found: Comparison, console: Console) -> list[Table]:
    """Checkpoints side by side: one table of models, one of tasks, one of differences, where there is any.

    Args:
        console: where they are to be printed, which says how wide they may be.
    """
    made = [models_table(found.models)]
    if any(model.scores for model in found.models):
        made.append(scores_table(found.models, console))
    if found.differences:
        made.append(differences_table(found))
    return made


def models_table(models: Sequence[Compared]) -> Table:
    """A row for each checkpoint: size, zeros in all weights and in those that can be pruned, figures of the text."""
    return _compared("Models", *model_rows(models))


def model_rows(models: Sequence[Compared]) -> Cells:
    """The headings of `models_table`, and its rows."""
    read = any(model.perplexity is not None for model in models)
    told = ("perplexity", "KL, nats", "same token") if read else ()
    smaller = len({model.weights for model in models}) > 1
    rows = []
    for model in models:
        row = [model.name, *([f"{model.weights:,}"] if smaller else []), size(model.bytes)]
        row += [f"{model.sparsity:.1%}", f"{model.linears_sparsity:.1%}"]
        if read:
            row.append("-" if model.perplexity is None else f"{model.perplexity.value:.2f}")
            apart = model.divergence
            row += ["-", "-"] if apart is None else [_with_error(apart.kl, apart.stderr), f"{apart.agreement:.2%}"]
        rows.append(row)
    return ["model", *(["weights"] if smaller else []), "files", "zeros", "in linears", *told], rows


def scores_table(models: Sequence[Compared], console: Console) -> Table:
    """A row for each figure of a task, a column for each model; where that is too wide, rows for each model as well."""
    heads, rows = score_rows(models)
    table = _compared("Tasks", heads, rows)
    if Measurement.get(console, console.options.update(max_width=10**6), table).maximum <= console.width:
        return table
    long = [
        [*(row[:2] if place == 2 else ("", "")), heads[place], row[place]]
        for row in rows
        for place in range(2, len(heads))
    ]
    return _compared("Tasks", [*heads[:2], "model", "value"], long)


def score_rows(models: Sequence[Compared]) -> Cells:
    """A row for each figure of a task, a column for each model."""
    cells = [{(score.task, score.metric, score.filter): score for score in model.scores} for model in models]
    rows = []
    for place in dict.fromkeys(place for column in cells for place in column):
        task, metric, kind = place
        row = [
            "-" if (score := column.get(place)) is None else _with_error(score.value, score.stderr) for column in cells
        ]
        rows.append([task, _metric(metric, kind), *row])
    for name in dict.fromkeys(name for model in models for name in model.means):
        row = [f"{model.means[name]:.4f}" if name in model.means else "-" for model in models]
        rows.append([f"mean of {name!r}", "acc", *row])
    return ["task", "metric", *(model.name for model in models)], rows


def differences_table(found: Comparison) -> Table:
    """A row for each difference from the dense model."""
    return _compared(f"Differences from {found.dense}", *difference_rows(found))


def difference_rows(found: Comparison) -> Cells:
    """The headings of `differences_table`, and its rows."""
    rows = []
    for entry in found.differences:
        p = "-" if entry.adjusted is None else f"{entry.adjusted:.2g}"
        verdict = {True: "yes", False: "no", None: "not known"}[entry.beyond_noise]
        told = _with_error(entry.difference, entry.stderr, sign="+")
        metric = _metric(entry.metric, entry.filter)
        rows.append([entry.model, entry.task, metric, told, f"{entry.documents:,}", p, verdict])
    return ["model", "task", "metric", "difference", "pairs", "p, adjusted", "beyond noise"], rows


def search_table(
    found: Comparison, patterns: Mapping[str, str], verdicts: Mapping[str, Sequence[Verdict]], chosen: str | None
) -> Table:
    """A row for each point of a search, in order of the sparsity, the dense model first.

    Args:
        patterns, verdicts: of the points, by their names.
        chosen: the name of the one that is the answer.
    """
    judged = next(iter(verdicts.values()))
    tasks = {
        place: made.figure for place, made in enumerate(judged) if made.figure not in ("perplexity", "kl", "agreement")
    }
    heads = ["sparsity", "in linears", "perplexity", "KL, nats", "same token", *tasks.values(), "holds"]
    table = _compared("Points", heads)
    for model in found.models:
        own = verdicts.get(model.name)
        read, apart = model.perplexity, model.divergence
        row = [patterns.get(model.name, "dense"), f"{model.linears_sparsity:.1%}"]
        row.append("-" if read is None else f"{read.value:.2f}")
        row += ["-", "-"] if apart is None else [_with_error(apart.kl, apart.stderr), f"{apart.agreement:.2%}"]
        for place in tasks:
            value = judged[place].dense if own is None else own[place].value
            row.append("-" if value is None else f"{value:.4f}")
        broken = [made.promise for made in own or () if not made.holds]
        row.append("" if own is None else f"no: {', '.join(broken)}" if broken else "yes")
        table.add_row(*row, style="bold" if model.name == chosen else None)
    return table


def comparison_notes(found: Comparison) -> list[str]:
    """What belongs to the tables: the text, how noise was judged, and what could not be compared."""
    lines = text_lines(found)
    if found.judged.get("tests"):
        rule = f"p below {found.judged['level']:g} after Holm's adjustment for {found.judged['tests']} differences"
        lines.append(f"± is one standard error; beyond noise: {rule}, paired over the same documents")
    if any(entry.task == "perplexity" for entry in found.differences):
        lines.append("windows of a text are neighbours and not independent: the noise of nats is a little larger")
    return lines + [f"note: {note}" for note in found.notes]


def text_lines(found: Comparison) -> list[str]:
    """The text of a comparison, and how it was cut, where there is one."""
    read = next((model.perplexity for model in found.models if model.perplexity is not None), None)
    return [] if read is None else [f"text: {read.text}, context {read.length:,}, {read.tokens:,} tokens"]


def _compared(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in heads:
        _add_column(table, heading)
    for row in rows:
        table.add_row(*row)
    return table


def _add_column(table: Table, heading: str) -> None:
    side: JustifyMethod = "left" if heading in NAMES else "right"
    longest = max(map(len, heading.split()), default=0)
    table.add_column(heading, justify=side, overflow="fold", min_width=min(longest, 12))


def _metric(metric: str, kind: str) -> str:
    return metric if kind == "none" else f"{metric} ({kind})"


def _with_error(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def inspection_table(found: Inspection, every: bool) -> Table:
    """An inspection: a row for each matrix, or for matrices of one kind with the same patterns."""
    table = Table(title=found.name, title_justify="left")
    for heading in ("weight", "shape", "count", "dtype", "zeros", "patterns that hold"):
        table.add_column(heading, justify="right" if heading in ("count", "zeros") else "left")

    def key(matrix: Matrix) -> tuple[object, ...]:
        name = matrix.name if every else kind(matrix.name)
        return name, matrix.shape, matrix.dtype, matrix.patterns, matrix.transposed_patterns

    for group in _grouped(found.matrices, key):
        first = group[0]
        lowest, highest = min(matrix.sparsity for matrix in group), max(matrix.sparsity for matrix in group)
        zeros = f"{lowest:.2%}" if highest - lowest < 5e-5 else f"{lowest:.2%} .. {highest:.2%}"
        held = [*first.patterns, *(f"{pattern} (transposed)" for pattern in first.transposed_patterns)]
        name = first.name if every or len(group) == 1 else kind(first.name)
        table.add_row(name, " x ".join(map(str, first.shape)), f"{len(group):,}", first.dtype, zeros, " ".join(held))
    return table


def _grouped(items: Iterable[T], key: Callable[[T], object]) -> list[list[T]]:
    groups: dict[object, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
