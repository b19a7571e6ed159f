"""The page about a pruned checkpoint: report.html in OUT, one file that needs no network.

It is drawn from what lies in OUT, and from the weights of the dense model if they are still on this machine.
"""

from __future__ import annotations

import hashlib
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmprune.allocate import PLAN_FILES
from llmprune.evaluate.pieces import writing
from llmprune.model.source import Source
from llmprune.model.writer import PAGE
from llmprune.patterns import parse
from llmprune.report import plots, tables
from llmprune.report.comparison import Compared, Difference
from llmprune.report.earlier import beginning
from llmprune.report.frame import Beside, Plot, fill
from llmprune.report.record import (
    FEW_TOKENS,
    Divergence,
    LinearRecord,
    Perplexity,
    Report,
    Score,
    short_name,
)
from llmprune.report.results import Evaluated, Results, find_dense, read_results
from llmprune.report.speed import PHASES, spread
from llmprune.report.weights import MOST, Histogram, choose, weigh

LISTED = 600
"""Linears in the table of all; of more, those with the largest errors."""

TASK_ROWS = 8
"""Figures of tasks in the verdict; of more, the means."""


@dataclass(frozen=True)
class Drawn:
    """A page that was drawn.

    Attributes:
        path: the file.
        histograms: the linears whose weights it shows.
        source: the folder of the dense model, None where it is not on this machine.
    """

    path: Path
    histograms: list[str]
    source: Path | None


@dataclass(frozen=True)
class Row:
    """A line of the verdict: a figure of the dense and of the pruned model, and how they differ."""

    name: str
    detail: str = ""
    dense: str = ""
    pruned: str = ""
    difference: str = ""
    before: str = ""


def draw(
    out: str | Path,
    *,
    linears: Sequence[str] = (),
    source: Source | None = None,
    shards: dict[str, str] | None = None,
    trust_remote_code: bool = False,
) -> Drawn:
    """Draw report.html for a folder that llmprune wrote.

    Args:
        out: the folder.
        linears: whose weights to show, globs or `re:` expressions; by default the worst of some kinds.
        source: the dense model; by default it is looked for on this machine.
        shards: the sha256 of the files that hold the weights, by name, where they are known already.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: the folder holds no report, or something in it cannot be used.
        Failure: its files cannot be read or written.
    """
    folder = Path(out).expanduser().absolute()
    results = read_results(folder, shards)
    if source is None:
        source = find_dense(results.report, trust_remote_code)
    page, shown = made(folder, results, source, linears, trust_remote_code)
    with writing(folder / PAGE, "") as draft:
        draft.write_bytes(page)
    return Drawn(folder / PAGE, shown, source.folder if source else None)


def made(
    folder: Path, results: Results, source: Source | None, linears: Sequence[str], trust_remote_code: bool = False
) -> tuple[bytes, list[str]]:
    """The page of a folder, and the linears whose weights it shows; see `draw`."""
    report = results.report
    histograms = weigh(folder, source, choose(report.linears, linears), trust_remote_code, report.kept_blocks)
    page = render(results, histograms, many=bool(linears) and len(histograms) == MOST)
    return page, [shown.name for shown in histograms]


def drawn_on(text: str, report: Report) -> list[str]:
    """The linears whose weights a page of this report shows."""
    return [record.name for record in report.linears if f'id="{_weights_id(record.name)}"' in text]


def render(results: Results, histograms: Sequence[Histogram], many: bool = False) -> bytes:
    """The page, as its file holds it.

    Args:
        many: whether more linears were asked for than `histograms` has.
    """
    report = results.report
    cells = plots.grid(report.linears)
    sentences, rows, missing = verdict(results)
    listed = sorted(report.linears, key=_worst_first)[:LISTED] if len(report.linears) > LISTED else report.linears
    return fill(
        "page.html",
        report=report,
        name=short_name(report.model),
        asked=_asked(report),
        last=_last(report),
        calibrated=_calibrated(report),
        sentences=sentences,
        rows=rows,
        missing=missing,
        measure=measure_command(results),
        compared=_beside(results),
        scores=_score_rows(results),
        task_plot=_task_plot(results),
        errors=_error_plots(report, cells),
        zeros=_zeros_plot(cells) if report.pruned or not report.smaller else None,
        experts=_experts_plot(report),
        losses=_losses_plot(report),
        kinds=_kind_rows(report.solved, report.allocation == "uniform"),
        notes=tables.all_notes(report),
        weights=[_weight_plot(shown, _last(report)) for shown in histograms],
        dense_seen=any(shown.before is not None for shown in histograms),
        many=many,
        generations=results.generations,
        work=_work_plots(report),
        recipe=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True),
        linears=[_linear_row(record) for record in listed],
        size=tables.size,
    )


# -- the verdict -----------------------------------------------------------------------------------------------------


def verdict(results: Results) -> tuple[list[str], list[Row], list[str]]:
    """Dense against pruned: in sentences, as a table, and what was not measured."""
    report, comparison = results.report, results.comparison
    pairs = _perplexities(results)
    pruned, dense = _models(results)
    parent = _parent(results)
    covered = len(report.pruned) + len(report.left_dense)
    count = f"{covered:,} linear{'s' if covered != 1 else ''}"
    sentences = []
    if report.smaller and report.dense_weights:
        left = _percent(report.weights / report.dense_weights)
        sentences.append(f"{_upper(report.smaller)}: {left} of the weights are left.")
    if report.pruned or not sentences:
        sentences.append(
            f"{_percent(report.sparsity)} of the weights in {count} are zero, {_percent(report.model_sparsity)} of the "
            "whole model."
        )
    rows = _size_rows(results)
    for before, after in pairs:
        ratio = after.value / before.value if before is not None else None
        rows.append(
            Row(
                "Perplexity",
                _protocol(after),
                "" if before is None else f"{before.value:.2f}",
                f"{after.value:.2f}",
                "" if ratio is None else f"× {ratio:.3g}",
                "" if (between := _between(parent, after)) is None else f"{between.value:.2f}",
            )
        )
    if both := next(((before, after) for before, after in pairs if before is not None), None):
        before, after = both
        between = _between(parent, after)
        way = "rises" if after.value > before.value else "falls"
        times = f"{after.value / before.value:.3g}"
        sentences.append(
            f"Perplexity on {short_name(after.text)} {way} from {before.value:.2f} to {after.value:.2f}, "
            + ("hardly a change." if times == "1" else f"{times} times what it was.")
            + (f" Before the recovery it was {between.value:.2f}." if between is not None else "")
        )
    evaluated = _evaluated(results)
    apart = (evaluated.divergence if evaluated else None) or (pruned.divergence if pruned else None)
    if apart is not None:
        error = "" if apart.stderr is None else f" ±\N{NO-BREAK SPACE}{apart.stderr:.3g}"
        where = _protocol(apart)
        last = _last(report)
        had = parent.divergence if parent is not None else None
        had = had if had is not None and _protocol(had) == where else None
        was = ("", "") if had is None else (f"{had.kl:.4g}", _percent(had.agreement))
        rows.append(Row(f"KL(dense ‖ {last}), nats a token", where, "0", f"{apart.kl:.4g}{error}", before=was[0]))
        rows.append(Row("Same most likely token", where, "100%", _percent(apart.agreement), before=was[1]))
        sentences.append(f"Both hold the same token for the most likely in {_percent(apart.agreement)} of places.")
    differences = (
        [entry for entry in comparison.differences if pruned and entry.model == pruned.name] if comparison else []
    )
    for entry in differences:
        if entry.task == "perplexity":
            rows.append(
                Row("Loss, nats a token", f"paired over {entry.documents:,} windows", "", "", _difference(entry))
            )
    own = _own_scores(results)
    other = {plots.score_name(score): score for score in dense.scores} if dense else {}
    earlier = {plots.score_name(score): _score(score) for score in parent.scores} if parent else {}
    by_name = {_difference_name(entry): entry for entry in differences if entry.task != "perplexity"}
    if len(own) <= TASK_ROWS:
        for score in own:
            name = plots.score_name(score)
            told = _difference(by_name[name]) if name in by_name else ""
            before_score = _score(other[name]) if name in other else ""
            what = f"{score.documents:,} documents, {score.shots} shots"
            rows.append(Row(name, what, before_score, _score(score), told, earlier.get(name, "")))
    else:
        rows += _mean_rows(results, f"{len(own)} figures, below")
    judged = [entry for entry in by_name.values() if entry.beyond_noise is not None]
    if judged:
        beyond = sum(bool(entry.beyond_noise) for entry in judged)
        sentences.append(f"Of {len(judged)} task figures {beyond} differ from the dense model's by more than noise.")
    missing = []
    if not both:
        missing.append("perplexity before and after" if not pairs else "perplexity of the dense model")
    if apart is None:
        missing.append("divergence from the dense model")
    if not own:
        missing.append("tasks")
    elif not other:
        missing.append("tasks on the dense model")
    if timed := _speed_rows(results):
        rows += timed
    else:
        missing.append("speed")
    if results.changed:
        sentences.append("Its weights were changed after that by something else: figures of the run are not theirs.")
    if not both and apart is None and not own:
        sentences.append("What that costs in quality has not been measured.")
    if report.earlier:
        sentences.append(beginning(report.earlier))
    if report.recovery is not None:
        before, after = (report.recovery[moment]["perplexity"] for moment in ("before", "after"))
        within = ", within the same masks" if report.recovery["masked_linears"] else ""
        sentences.append(
            f"It was trained after that for {report.recovery['steps']:,} steps{within}: perplexity on "
            f"{short_name(report.recovery['data']['source'])} that was held out went from {before['value']:.2f} to "
            f"{after['value']:.2f}."
        )
    return sentences, rows, missing


def _size_rows(results: Results) -> list[Row]:
    """Weights and bytes of both models, where the model has become smaller."""
    report = results.report
    pruned, dense = _models(results)
    if not report.smaller or not report.dense_weights:
        return []
    left = f"× {report.weights / report.dense_weights:.3g}"
    own = f"{report.weights:,}"
    rows = [Row("Weights", "", f"{report.dense_weights:,}", own, left, own if report.recovery else "")]
    if pruned is not None and dense is not None:
        part = f"× {pruned.bytes / dense.bytes:.3g}"
        rows.append(Row("Files", "", tables.size(dense.bytes), tables.size(pruned.bytes), part))
    return rows


def _mean_rows(results: Results, detail: str) -> list[Row]:
    """The means of named sets of tasks; where there are none, that figures are told further down."""
    evaluated, (pruned, dense) = _evaluated(results), _models(results)
    means = pruned.means if pruned and pruned.scores else evaluated.means if evaluated else {}
    rows = []
    for title, mean in means.items():
        before = dense.means.get(title) if dense else None
        dense_mean, change = ("", "") if before is None else (f"{before:.4f}", f"{mean - before:+.4f}")
        rows.append(Row(f"Mean accuracy of {title!r}", detail, dense_mean, f"{mean:.4f}", change))
    return rows or [Row("Tasks", detail)]


def _speed_rows(results: Results) -> list[Row]:
    """How fast both models are, where that was measured."""
    found = results.speed
    own = found.own(results.shards) if found is not None else None
    if found is None or own is None:
        return []
    rows = []
    for phase in PHASES:
        before, after, ratio = found.dense.rate(phase), own.rate(phase), found.ratio(own, phase)
        if before is not None and after is not None and ratio is not None:
            name = f"{_upper(phase)}, tokens/s"
            rows.append(Row(name, found.where, spread(before), spread(after), f"× {ratio}"))
    for name, before_bytes, after_bytes in (
        ("Peak memory, loading included", found.dense.peak_memory, own.peak_memory),
        ("The same of the GPU", found.dense.peak_device_memory, own.peak_device_memory),
    ):
        if before_bytes and after_bytes:
            sizes = tables.size(before_bytes), tables.size(after_bytes)
            rows.append(Row(name, found.where, *sizes, f"× {after_bytes / before_bytes:.3g}"))
    return rows


def _percent(part: float) -> str:
    return f"{100 * part:.4g}%"


def _perplexities(results: Results) -> list[tuple[Perplexity | None, Perplexity]]:
    """What was measured of the pruned model, each protocol once, with the dense model's figure where there is one."""
    report, evaluated = results.report, _evaluated(results)
    pruned, dense = _models(results)
    found: list[tuple[Perplexity | None, Perplexity]] = []
    if report.sparse is not None and not results.changed:
        found.append((report.dense, report.sparse))
    if pruned is not None and pruned.perplexity is not None:
        found.append((dense.perplexity if dense is not None else None, pruned.perplexity))
    if evaluated is not None and evaluated.perplexity is not None:
        found.append((None, evaluated.perplexity))
    once: dict[str, tuple[Perplexity | None, Perplexity]] = {}
    for pair in found:
        once.setdefault(_protocol(pair[1]), pair)
    return list(once.values())


def _protocol(found: Perplexity | Divergence) -> str:
    step = getattr(found, "stride", None)  # divergences are of windows that do not overlap
    stride = "" if step is None else f", stride {step:,}"
    return f"{short_name(found.text)}, context {found.length:,}{stride}, {found.tokens:,} tokens"


def _models(results: Results) -> tuple[Compared | None, Compared | None]:
    """The entries of a comparison that are this checkpoint, and the dense model."""
    return results.comparison.own(results.shards) if results.comparison is not None else (None, None)


def _beside(results: Results) -> Beside | None:
    """A comparison as a whole; None where it has no models but this checkpoint and the dense one."""
    found, (own, dense) = results.comparison, _models(results)
    if found is None or all(model is own or model is dense for model in found.models):
        return None
    made = Beside.of(found)
    here = results.report.out.expanduser().resolve()
    for model, row in zip(found.models, made.models[1], strict=True):
        before = model is not own and Path(model.path).expanduser().resolve() == here
        row[0] += " (dense)" if model.dense else " (this one)" if model is own else " (other weights)" if before else ""
    return made


def _parent(results: Results) -> Compared | None:
    """The entry of a comparison that is what this checkpoint was before it was trained; None where there is none."""
    recovery, comparison = results.report.recovery, results.comparison
    if recovery is None or comparison is None:
        return None
    own, dense = _models(results)
    of = Path(recovery["of"]).expanduser().resolve()
    others = (model for model in comparison.models if model is not own and model is not dense)
    return next((model for model in others if Path(model.path).expanduser().resolve() == of), None)


def _between(parent: Compared | None, after: Perplexity) -> Perplexity | None:
    """The perplexity before the training by the same protocol as one after it."""
    found = parent.perplexity if parent is not None else None
    return found if found is not None and _protocol(found) == _protocol(after) else None


def _evaluated(results: Results) -> Evaluated | None:
    """What `eval` told of this checkpoint as it is."""
    found = results.evaluated
    return found if found is not None and found.shards == results.shards else None


def _own_scores(results: Results) -> list[Score]:
    pruned, _ = _models(results)
    if pruned is not None and pruned.scores:
        return pruned.scores
    evaluated = _evaluated(results)
    return evaluated.scores if evaluated is not None else []


def _difference(entry: Difference) -> str:
    error = "" if entry.stderr is None else f" ±\N{NO-BREAK SPACE}{entry.stderr:.2g}"
    noise = {True: ", beyond noise", False: ", within noise", None: ""}[entry.beyond_noise]
    return f"{entry.difference:+.4f}{error}{noise}"


def _difference_name(entry: Difference) -> str:
    return f"{entry.task} {entry.metric}" + ("" if entry.filter == "none" else f" ({entry.filter})")


def _score(score: Score) -> str:
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ±\N{NO-BREAK SPACE}{score.stderr:.4f}")


def measure_command(results: Results) -> str:
    """The command that measures what a run by itself does not."""
    report = results.report
    out, model = shlex.quote(str(report.out)), shlex.quote(report.model)
    return (
        f"llmprune compare {model} {out} --perplexity wikitext2 --tasks arc_easy,hellaswag -o {out}/evaluation\n"
        f"llmprune speed {model} {out} -o {out}/evaluation\nllmprune report {out}"
    )


# -- plots and tables ------------------------------------------------------------------------------------------------


def _error_plots(report: Report, cells: plots.Grid) -> list[Plot]:
    return [*_linear_error_plots(report, cells), *_drift_plots(report)]


def _drifted(report: Report) -> bool:
    return any(block.away is not None or block.drift is not None for block in report.blocks)


def _linear_error_plots(report: Report, cells: plots.Grid) -> list[Plot]:
    seen = [record for record in report.linears if record.relative_error]
    if not seen:
        return []
    heads, rows = _grid_rows(cells, lambda cell: "" if cell.error is None else f"{cell.error:.4g}")
    sampled = any(record.error_from == "sample" for record in seen)
    return [
        Plot(
            "error-map",
            "Relative error by block and linear",
            plots.error_map(cells),
            "‖(Ŵ−W)X‖² / ‖WX‖² of each linear on the calibration inputs that reached it"
            + (", in part estimated on a sample of them" if sampled else "")
            + ". Colours are on a logarithmic scale; the lowest twentieth share one."
            + (
                " Experts of one kind are one cell, their mean."
                if any(c.count > 1 for c in cells.cells.values())
                else ""
            ),
            heads,
            rows,
        ),
        Plot(
            "depth",
            "Relative error over depth",
            plots.depth(report.linears),
            "Mean and worst over the linears of each block. Each error is that of one linear alone, on inputs that "
            "come from the pruned blocks before it: it is not the sum of those before."
            + (
                ""
                if _drifted(report)
                else " How far the outputs of blocks drift away from the dense model's was not recorded."
            ),
        ),
    ]


def _drift_plots(report: Report) -> list[Plot]:
    if not _drifted(report):
        return []
    fitted = any(block.away is not None for block in report.blocks)
    caption = (
        f"d = ‖x − x₀‖² / ‖x₀‖², the mean over {'the' if fitted else 'some'} tokens of the calibration text, of the "
        "states x that leave a pruned block and x₀ that leave it in the dense model: all that was lost up to there. "
        "Of a token that is further away than 1 it is 1 + ln d."
    )
    if report.kept_blocks is not None:
        caption += " Of a block in front of some that were taken out, x₀ is what leaves the last of these."
    if report.hidden_channels is not None:
        caption += " Both are looked at in the hidden channels that are left."
    return [Plot("away", "Distance from the dense model over depth", plots.away(report.blocks), caption)]


def _experts_plot(report: Report) -> Plot | None:
    """Tokens per expert, where there are experts that any could reach."""
    if not (records := report.experts):
        return None
    heads = ["mixture", "experts", "that stay", "fewest tokens", "median", "most", f"fewer than {FEW_TOKENS} tokens"]
    rows = [
        [told.name, f"{len(told.tokens):,}", f"{len(told.kept):,}", f"{min(told.tokens):,}",
         f"{statistics.median(told.tokens):,.0f}", f"{max(told.tokens):,}", ", ".join(map(str, told.few)) or "none"]
        for told in records
    ]  # fmt: skip
    caption = (
        "Tokens of the calibration text that were sent to each expert of a block. Colours are on a logarithmic scale. "
        f"Little is known of those that fewer than {FEW_TOKENS} reached."
    )
    return Plot("experts", "Tokens per expert", plots.experts(records), caption, heads, rows)


def _losses_plot(report: Report) -> Plot | None:
    if report.recovery is None or not report.recovery.get("losses"):
        return None
    aim = "towards the dense model's answers" if report.recovery.get("distilled_from") else "on the text"
    caption = f"Trained {aim}, each point the mean over the steps since the one before."
    return Plot("losses", "Loss in training", plots.losses(report.recovery["losses"]), caption)


def _zeros_plot(cells: plots.Grid) -> Plot | None:
    if not cells.blocks:
        return None
    heads, rows = _grid_rows(cells, lambda cell: "dense" if cell.dense is not None else f"{cell.sparsity:.2%}")
    caption = "Zeros as a fraction of the weights; those that were left dense are 0%."
    return Plot("zeros-map", "Sparsity by block and linear", plots.sparsity_map(cells), caption, heads, rows)


def _grid_rows(cells: plots.Grid, show: Any) -> tuple[list[str], list[list[str]]]:
    found = [[cells.cell(block, place) for place in range(len(cells.kinds))] for block in range(len(cells.blocks))]
    rows = [
        [name, *("" if cell is None else show(cell) for cell in row)]
        for name, row in zip(cells.blocks, found, strict=True)
    ]
    return ["block", *cells.labels], rows


def _last(report: Report) -> str:
    """What the checkpoint is called beside the dense model."""
    return "pruned" if report.recovery is None else "recovered"


def _weight_plot(shown: Histogram, name: str) -> Plot:
    away = f"; {shown.after.outside:.2%} of the weights lie outside" if shown.after.outside >= 5e-5 else ""
    caption = f"{shown.after.zeros:.2%} zeros, which are not drawn{away}."
    return Plot(_weights_id(shown.name), shown.name, plots.weights(shown, name), caption)


def _task_scores(results: Results) -> dict[str, list[Score]]:
    """Scores by the name of their model; the dense one comes first, also where nothing is known of it."""
    own, dense = _models(results)
    parent = _parent(results)
    shown: dict[str, list[Score]] = {"dense": dense.scores if dense is not None else []}
    if parent is not None and parent.scores:
        shown["pruned"] = parent.scores
    shown[_last(results.report)] = _own_scores(results)
    if results.comparison is not None:
        for model in results.comparison.models:
            if all(model is not known for known in (own, dense, parent)) and model.scores:
                shown[model.name if model.name not in shown else model.path] = model.scores
    if results.evaluated is not None and results.evaluated is not _evaluated(results) and results.evaluated.scores:
        shown.setdefault(results.evaluated.model, results.evaluated.scores)
    return shown


def _task_plot(results: Results) -> Plot | None:
    shown = _task_scores(results)
    figure = plots.tasks(shown)
    if figure is None:
        return None
    figures = {plots.score_name(score) for scores in shown.values() for score in scores}
    more = f" The first {plots.TASKS_SHOWN} of {len(figures)} are drawn." if len(figures) > plots.TASKS_SHOWN else ""
    return Plot("tasks-plot", "Scores", figure, "Bars are 95% confidence (1.96 standard errors)." + more)


def _score_rows(results: Results) -> list[list[str]]:
    return [
        [plots.score_name(score), model, _score(score), f"{score.documents:,}", str(score.shots)]
        for model, scores in _task_scores(results).items()
        for score in scores
    ]


def _kind_rows(records: Iterable[LinearRecord], apart: bool) -> list[list[str]]:
    """A row for each kind of linear; where linears have their patterns one by one, these are not told apart."""
    groups: dict[tuple[str, Any, Any], list[LinearRecord]] = {}
    for record in records:
        pattern = record.pattern if apart else None
        groups.setdefault((tables.kind(record.name), record.method, pattern), []).append(record)
    rows = []
    for (name, method, _), group in groups.items():
        pattern = tables.patterns_of(group)
        errors = [record.relative_error for record in group if record.relative_error is not None]
        zeros = sum(record.sparsity for record in group) / len(group)
        mean, worst = (f"{sum(errors) / len(errors):.4g}", f"{max(errors):.4g}") if errors else ("", "")
        rows.append([name, mean, worst, f"{zeros:.2%}", f"{len(group):,}", f"{method} {pattern}"])
    return rows


def _linear_row(record: LinearRecord) -> list[str]:
    rows, columns = record.shape
    what = f"{record.method or 'dense'}: {record.kept}" if record.kept else f"{record.method} {record.pattern}"
    error = "" if record.relative_error is None else f"{record.relative_error:.4g}"
    tokens = "" if record.method is None else f"{record.tokens:,}"  # what reaches those that stay dense is not counted
    note = record.note or ""
    return [record.name, f"{columns:,} × {rows:,}", what, f"{record.sparsity:.2%}", error, tokens, note]


def _worst_first(record: LinearRecord) -> float:
    return -(record.relative_error if record.relative_error is not None else -1.0)


def _work_plots(report: Report) -> list[Plot]:
    if not report.blocks:
        return []
    phases = dict.fromkeys(phase for block in report.blocks for phase in block.seconds)
    rows = [
        [block.name, *(f"{block.seconds.get(phase, 0):.2f}" for phase in phases), tables.size(block.peak_memory),
         "" if block.peak_device_memory is None else tables.size(block.peak_device_memory)]
        for block in report.blocks
    ]  # fmt: skip
    caption = "Writing goes on beside the next block."
    if report.resumed:
        caption += f" {report.resumed} blocks are of an earlier process, from which this run went on."
    return [
        Plot("time", "Time for each block", plots.time(report.blocks), caption,
             ["block", *(f"{phase}, s" for phase in phases), "peak memory", "GPU"], rows),
        Plot("memory", "Peak memory so far", plots.memory(report.blocks),
             "The most that the process had held by the end of each block."),
    ]  # fmt: skip


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _asked(report: Report) -> str:
    if not report.pruned and report.smaller:
        blocks = f"{len(report.kept_blocks)} of {report.dense_blocks} blocks" if report.kept_blocks else ""
        return "; ".join(part for part in (blocks, report.narrowed) if part)
    method = report.recipe.get("method")
    method = method.get("name") if isinstance(method, dict) else method
    if report.allocation == "uniform":
        return f"{method}, {report.recipe.get('sparsity')}"
    told = f"{report.sparsity:.2%} of the weights"
    if not report.allocation.endswith(PLAN_FILES):  # which says itself how much
        told += f" ({parse(report.recipe['sparsity']).sparsity:.2%} asked)"
    return f"{method}, {told}, allocated by {report.allocation}"


def _calibrated(report: Report) -> str:
    if not report.calibration:
        return ""
    told = report.calibration
    return f"{told.get('samples')} × {told.get('length'):,} tokens of {short_name(str(told.get('source')))}"


def _weights_id(name: str) -> str:
    return f"weights-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
