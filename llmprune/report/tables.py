"""What people read on the terminal: the plan, the result, an inspection."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from rich.table import Table

from llmprune.plan import Choice, Plan
from llmprune.report.inspect import Inspection, Matrix
from llmprune.report.record import LinearRecord, Report, Score

T = TypeVar("T")


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

    def key(choice: Choice) -> tuple[object, ...]:
        name = choice.linear.name if every else kind(choice.linear.name)
        return name, choice.linear.shape, choice.kept, choice.method, str(choice.pattern)

    for group in _grouped(plan.choices, key):
        first = group[0]
        share = sum(choice.linear.numel for choice in group) / max(plan.weights, 1)
        method = first.method if first.kept is None else f"[dim]dense: {first.kept}[/dim]"
        scope = f" per {first.pattern.scope}" if first.pattern.group == 1 else ""
        pattern = f"{first.pattern}{scope}" if first.kept is None else ""
        name = first.linear.name if every else kind(first.linear.name)
        rows, columns = first.linear.shape
        table.add_row(name, f"{columns:,} x {rows:,}", f"{len(group):,}", method, pattern, f"{share:.1%}")
    return table


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


def result_table(report: Report) -> Table:
    """The result: sparsity and error by kind of linear."""
    table = Table(title="Pruned", title_justify="left")
    for heading in ("linear", "count", "pattern", "zeros", "relative error: mean", "worst"):
        table.add_column(heading, justify="left" if heading in ("linear", "pattern") else "right")
    for group in _grouped(report.pruned, lambda record: (kind(record.name), record.pattern)):
        errors = [record.relative_error for record in group if record.relative_error is not None]
        mean, worst = (f"{sum(errors) / len(errors):.4f}", f"{max(errors):.4f}") if errors else ("-", "-")
        zeros = sum(record.sparsity for record in group) / len(group)
        table.add_row(kind(group[0].name), f"{len(group):,}", group[0].pattern, f"{zeros:.2%}", mean, worst)
    return table


def summary(report: Report) -> Table:
    """The result in a few lines."""
    table = Table.grid(padding=(0, 2))
    table.add_row("zeros", f"{report.sparsity:.2%} of pruned linears, {report.model_sparsity:.2%} of all weights")
    if report.origin is not None:
        table.add_row("source", report.origin)
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
    return table


def notes(records: Iterable[LinearRecord]) -> list[str]:
    """What was out of the ordinary, each kind of it once."""
    noted = [record for record in records if record.note]
    groups = _grouped(noted, lambda record: (kind(record.name), re.sub(r"[\d,.]+", "", record.note or "")))
    return [
        f"{group[0].name}{f' and {len(group) - 1} like it' if len(group) > 1 else ''}: {group[0].note}"
        for group in groups
    ]


def tasks_table(scores: Iterable[Score]) -> Table:
    """What tasks told: a row for each figure."""
    table = Table(title="Tasks", title_justify="left")
    for heading in ("task", "metric", "value", "standard error", "documents", "shots"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for score in scores:
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        error = "-" if score.stderr is None else f"{score.stderr:.4f}"
        table.add_row(score.task, metric, f"{score.value:.4f}", error, f"{score.documents:,}", str(score.shots))
    return table


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
