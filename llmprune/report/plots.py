"""The plots of the page, by plotly. They carry no colours: the page gives them those of the reader's theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

import plotly.graph_objects as go

from llmprune.report.record import FEW_TOKENS, BlockRecord, ExpertsRecord, LinearRecord, Score
from llmprune.report.tables import kind, size
from llmprune.report.weights import Histogram

Figure: TypeAlias = Any
"""One of plotly's, which has no types."""

ROW = 26
"""The height of a row of a heat map, in pixels."""

TASKS_SHOWN = 40
"""Figures of tasks in one plot; more are in the table alone."""


@dataclass(frozen=True)
class Cell:
    """The linears of one kind in one block: one, or all experts' of that kind.

    Attributes:
        count: how many.
        sparsity: the fraction of zeros over them.
        error, worst, where: the mean and the largest relative error, and the linear that has it; None without errors.
        dense: why they were left dense, where all were.
    """

    count: int
    sparsity: float
    error: float | None
    worst: float | None
    where: str
    dense: str | None


@dataclass(frozen=True)
class Grid:
    """All linears, by block and kind.

    Attributes:
        blocks, kinds: their names, in order.
        cells: by the places of a block and of a kind; a block need not have every kind.
    """

    blocks: list[str]
    kinds: list[str]
    cells: dict[tuple[int, int], Cell]

    def cell(self, block: int, place: int) -> Cell | None:
        """What is at a place."""
        return self.cells.get((block, place))

    @property
    def labels(self) -> list[str]:
        """The kinds, each by the shortest ending that no other kind has."""
        labels = []
        for name in self.kinds:
            others = ["." + other for other in self.kinds if other != name]
            parts = name.split(".")
            endings = [".".join(parts[place:]) for place in reversed(range(len(parts))) if parts[place] != "*"]
            alone = (ending for ending in endings if not any(other.endswith("." + ending) for other in others))
            labels.append(next(alone, name))
        return labels


def block_of(name: str) -> str:
    """The name of a linear's block, which ends with the first number in it."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: first + 1])


def grid(linears: Sequence[LinearRecord]) -> Grid:
    """Sort linears by block and kind."""
    blocks: dict[str, int] = {}
    kinds: dict[str, int] = {}
    groups: dict[tuple[int, int], list[LinearRecord]] = {}
    for record in linears:
        block, sort = block_of(record.name), kind(record.name)
        place = blocks.setdefault(block, len(blocks)), kinds.setdefault(sort, len(kinds))
        groups.setdefault(place, []).append(record)
    return Grid(list(blocks), list(kinds), {place: _cell(group) for place, group in groups.items()})


def _cell(group: list[LinearRecord]) -> Cell:
    seen = [record for record in group if record.relative_error is not None]
    errors = [record.relative_error or 0.0 for record in seen]
    weights = sum(math.prod(record.shape) for record in group)
    zeros = sum(record.sparsity * math.prod(record.shape) for record in group)
    reasons = {record.kept for record in group}
    return Cell(
        len(group),
        zeros / max(weights, 1),
        sum(errors) / len(errors) if errors else None,
        max(errors, default=None),
        max(seen, key=lambda record: record.relative_error or 0.0).name if seen else group[0].name,
        next(iter(reasons)) if len(reasons) == 1 else None,
    )


def error_map(cells: Grid) -> Figure:
    """Relative errors by block and kind, as colours on a logarithmic scale; `customdata` has them as they are.

    The lowest twentieth get one colour: a linear with next to no error would leave little of the scale to the others.
    """
    values = _matrix(cells, lambda cell: cell.error)
    known = sorted(value for row in values for value in row if value)
    low, high = known[len(known) // 20], known[-1]
    scaled = [[math.log10(value) if value else None for value in row] for row in values]
    ticks = _ticks(low, high)
    bar = {"tickvals": [math.log10(tick) for tick in ticks], "ticktext": [f"{tick:g}" for tick in ticks]}
    figure = _map(cells, scaled, values, bar, ROW)
    return figure.update_layout(coloraxis={"cmin": math.log10(low), "cmax": math.log10(high)})


def sparsity_map(cells: Grid) -> Figure:
    """The fraction of zeros by block and kind."""
    values = _matrix(cells, lambda cell: cell.sparsity)
    figure = _map(cells, values, values, {"tickformat": ".0%"}, ROW - 8)
    return figure.update_layout(coloraxis={"cmin": 0, "cmax": 1})


def _matrix(cells: Grid, of: Callable[[Cell], float | None]) -> list[list[float | None]]:
    found = [[cells.cell(block, place) for block in range(len(cells.blocks))] for place in range(len(cells.kinds))]
    return [[None if cell is None else of(cell) for cell in row] for row in found]


def _map(cells: Grid, scaled: Any, values: Any, bar: dict[str, Any], row: int) -> Figure:
    texts = [
        ["" if (cell := cells.cell(block, place)) is None else _told(cells, block, place, cell)
         for block in range(len(cells.blocks))]
        for place in range(len(cells.kinds))
    ]  # fmt: skip
    trace = _heat(scaled, texts, list(range(len(cells.blocks))), _labels(cells.labels), gap=len(cells.blocks) <= 40)
    trace.customdata = values
    figure = _laid_out(go.Figure(trace), row * len(cells.kinds) + 96, len(cells.blocks), bar)
    return figure.update_layout(yaxis={"dtick": 1})


def _heat(z: Any, texts: Any, x: Sequence[Any], y: Sequence[Any], *, gap: bool) -> Any:
    return go.Heatmap(
        z=z, text=texts, x=x, y=y, hovertemplate="%{text}<extra></extra>", hoverongaps=False, coloraxis="coloraxis",
        xgap=2 if gap else 0.5, ygap=2,
    )  # fmt: skip


def _laid_out(figure: Figure, height: int, columns: int, bar: dict[str, Any]) -> Figure:
    """A heat map over so many blocks with its bar of colours."""
    bar = {
        "orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "len": 0.6, "thickness": 8,
        "ypad": 4, "outlinewidth": 0, "ticklabelposition": "outside top", **bar,
    }  # fmt: skip
    return figure.update_layout(
        height=height,
        coloraxis={"colorbar": bar},
        xaxis={
            **_numbered("block", columns, standoff=10),
            "showgrid": False,
            "zeroline": False,
            "automargin": True,
        },
        yaxis={"autorange": "reversed", "showgrid": False, "automargin": True},
        margin={"t": 8, "r": 20},
    )


def _told(cells: Grid, block: int, place: int, cell: Cell) -> str:
    lines = [f"<b>{escape(cells.blocks[block])} · {escape(cells.kinds[place])}</b>"]
    if cell.dense is not None:
        return "<br>".join([*lines, f"left dense: {escape(cell.dense)}"])
    lines.append(f"zeros {cell.sparsity:.2%}" + (f" of {cell.count:,} linears" if cell.count > 1 else ""))
    if cell.error is not None and cell.worst is not None:
        one = f"relative error {cell.error:.4g}"
        many = f"relative error: mean {cell.error:.4g}, worst {cell.worst:.4g} ({escape(cell.where)})"
        lines.append(one if cell.count == 1 else many)
    return "<br>".join(lines)


def depth(linears: Sequence[LinearRecord]) -> Figure:
    """The mean and the largest relative error of the linears of each block."""
    blocks: dict[str, list[LinearRecord]] = {}
    for record in linears:
        of = blocks.setdefault(block_of(record.name), [])
        if record.relative_error is not None:
            of.append(record)
    places = [place for place, group in enumerate(blocks.values()) if group]
    groups = [group for group in blocks.values() if group]
    worst = [max(group, key=lambda record: record.relative_error or 0.0) for group in groups]
    means = [sum(record.relative_error or 0.0 for record in group) / len(group) for group in groups]
    figure = go.Figure()
    figure.add_scatter(
        name="worst", x=places, y=[record.relative_error for record in worst], mode="lines",
        text=[escape(record.name) for record in worst],
        hovertemplate="worst %{y:.4g}: %{text}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        name="mean", x=places, y=means, mode="lines+markers", hovertemplate="mean %{y:.4g}<extra></extra>"
    )
    return figure.update_layout(
        height=300,
        hovermode="x unified",
        xaxis=_numbered("block", len(blocks)),
        yaxis={"title": {"text": "relative error"}, "rangemode": "tozero"},
    )


def away(blocks: Sequence[BlockRecord]) -> Figure:
    """How far the output of each block is from the dense model's, where it was fitted before and after that."""
    lines = {
        "before the fit": [block.away_before for block in blocks],
        "after": [block.away for block in blocks],
    }
    if not any(block.away is not None for block in blocks):
        lines = {"pruned": [block.drift for block in blocks]}
    figure = go.Figure()
    for name, values in lines.items():
        figure.add_scatter(
            name=name, x=list(range(len(blocks))), y=values, mode="lines+markers",
            hovertemplate=f"{name} %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    return figure.update_layout(
        height=300,
        hovermode="x unified",
        xaxis=_numbered("block", len(blocks)),
        yaxis={"title": {"text": "distance"}, "rangemode": "tozero"},
    )


def experts(records: Sequence[ExpertsRecord]) -> Figure:
    """How many tokens each expert was sent, as colours on a logarithmic scale; those that went or hardly got any."""
    count, most = max(len(told.tokens) for told in records), max(max(told.tokens) for told in records)
    places = [(place, number) for place, told in enumerate(records) for number in range(len(told.tokens))]
    scaled: list[list[float | None]] = [[None] * len(records) for _ in range(count)]
    tokens: list[list[int | None]] = [[None] * len(records) for _ in range(count)]
    for place, number in places:
        tokens[number][place] = sent = records[place].tokens[number]
        scaled[number][place] = round(math.log10(max(sent, 1)), 3)
    ticks = _ticks(1, max(most, 10))
    bar = {"tickvals": [math.log10(tick) for tick in ticks], "ticktext": [f"{tick:,.0f}" for tick in ticks]}
    row = max(6, min(ROW, 720 // count))
    blocks = [block_of(told.name).rpartition(".")[2] for told in records]
    names = blocks if len(set(blocks)) == len(blocks) else _labels([told.name for told in records])
    trace = _heat(scaled, None, names, list(range(count)), gap=len(records) <= 40)
    trace.update(customdata=tokens, hovertemplate="block %{x}, expert %{y}: %{customdata:,} tokens<extra></extra>")
    if row < ROW // 2:
        trace.ygap = 0.5
    figure = go.Figure(trace)
    gone = [(place, number) for place, number in places if number not in records[place].kept]
    few = [(place, number) for place, number in places if number in records[place].few]
    white = {"color": "#ffffff", "width": 1}  # is seen on any of the scale's colours, in any surroundings
    for name, at, marker in (
        ("went", gone, {"symbol": "x", "line": white}),
        (f"fewer than {FEW_TOKENS} tokens", few, {"symbol": "circle-open", "line": {"width": 1.5}}),
    ):
        figure.add_scatter(
            name=name, mode="markers", x=[names[place] for place, _ in at], y=[number for _, number in at],
            marker={"size": min(9, row - 2), **marker}, hoverinfo="skip", showlegend=bool(at),
        )  # fmt: skip
    figure = _laid_out(figure, row * count + 130, len(records), bar)
    return figure.update_layout(
        coloraxis={"cmin": 0, "cmax": math.log10(max(most, 10))},
        legend={"x": 0, "xanchor": "left"},
        xaxis={"type": "category", "dtick": -(-len(records) // 40), "categoryarray": names},
        yaxis={
            "title": {"text": "expert"},
            "dtick": max(1, count // 16),
            "range": [count - 0.5, -0.5],
            "autorange": False,
        },
    )


def losses(steps: Sequence[Mapping[str, float]]) -> Figure:
    """The loss in training: `step` and `loss` of each mean that was kept."""
    figure = go.Figure()
    figure.add_scatter(
        x=[entry["step"] for entry in steps], y=[entry["loss"] for entry in steps], mode="lines+markers",
        hovertemplate="step %{x}: %{y:.4g}<extra></extra>",
    )  # fmt: skip
    return figure.update_layout(
        height=260,
        xaxis=_numbered("step", round(max((entry["step"] for entry in steps), default=0))),
        yaxis={"title": {"text": "loss"}},
    )


def weights(histogram: Histogram, after: str = "pruned") -> Figure:
    """The weights of a linear that are not zero, before and after, as shares of all its weights."""
    figure = go.Figure()
    for name, counts in (("dense", histogram.before), (after, histogram.after)):
        # A trace without points takes its colour all the same, so that dense and pruned have theirs in every plot.
        figure.add_scatter(
            name=name, x=histogram.centres if counts else [], y=counts.shares if counts else [], mode="lines",
            line={"shape": "hvh", "width": 1.5}, fill="tozeroy", hovertemplate="%{y:.3%}",
            showlegend=histogram.before is not None,
        )  # fmt: skip
    return figure.update_layout(
        height=220,
        hovermode="x unified",
        xaxis={"title": {"text": "weight"}, "zeroline": False, "hoverformat": ".4f"},
        yaxis={"tickformat": ".1~%", "rangemode": "tozero"},
        margin={"t": 28},
    )


def tasks(models: Mapping[str, Sequence[Score]], chance: float = 1.96) -> Figure | None:
    """Figures between 0 and 1 of one or more models, with bars of 95 % confidence; None where there are none."""
    rows: dict[str, None] = {}
    shown: dict[str, list[Score]] = {}
    for name, scores in models.items():
        shown[name] = [score for score in scores if 0 <= score.value <= 1]
        rows.update(dict.fromkeys(map(score_name, shown[name])))
    kept = list(rows)[:TASKS_SHOWN]
    if not kept:
        return None
    figure = go.Figure()
    lines = [name for name, scores in shown.items() if scores]
    for name, scores in shown.items():
        drawn = [score for score in scores if score_name(score) in kept]
        shift = 0.0 if len(lines) < 2 or not scores else 0.2 * (2 * lines.index(name) / (len(lines) - 1) - 1)
        errors = [chance * (score.stderr or 0.0) for score in drawn]
        told = [f"{escape(score_name(score))}: {escape(str(score))}" for score in drawn]
        figure.add_scatter(
            name=escape(name), mode="markers", x=[score.value for score in drawn],
            y=[kept.index(score_name(score)) + shift for score in drawn], text=told,
            error_x={"type": "data", "array": errors, "thickness": 1.5, "width": 3}, marker={"size": 9},
            hovertemplate="%{text}<extra>%{fullData.name}</extra>", showlegend=bool(scores) and len(lines) > 1,
        )  # fmt: skip
    return figure.update_layout(
        height=34 * len(kept) + 110,
        xaxis={"title": {"text": "score"}, "zeroline": False},
        yaxis={
            "tickvals": list(range(len(kept))), "ticktext": _labels(kept), "automargin": True,
            "range": [len(kept) - 0.5, -0.5], "showgrid": False, "zeroline": False,
        },
    )  # fmt: skip


def score_name(score: Score) -> str:
    """What a figure is called: its task and metric."""
    return f"{score.task} {score.metric}" + ("" if score.filter == "none" else f" ({score.filter})")


def time(blocks: Sequence[BlockRecord]) -> Figure:
    """The seconds for each block, by what they were spent on."""
    phases = dict.fromkeys(phase for block in blocks for phase in block.seconds)
    figure = go.Figure()
    for phase in phases:
        figure.add_bar(
            name=escape(phase), x=list(range(len(blocks))), y=[block.seconds.get(phase, 0.0) for block in blocks],
            hovertemplate="%{y:.2f} s",
        )  # fmt: skip
    return figure.update_layout(
        height=260,
        legend={"traceorder": "normal"},
        barmode="stack",
        bargap=0.15,
        hovermode="x unified",
        xaxis=_numbered("block", len(blocks)),
        yaxis={"title": {"text": "seconds"}, "zeroline": False},
    )


def memory(blocks: Sequence[BlockRecord]) -> Figure:
    """The most memory that the process had held when it was through with each block."""
    figure = go.Figure()
    device = [block.peak_device_memory for block in blocks if block.peak_device_memory is not None]
    for name, bytes_held in (("GPU", device), ("host", [block.peak_memory for block in blocks])):
        figure.add_scatter(
            name=name, x=list(range(len(bytes_held))), y=[held / 2**30 for held in bytes_held], mode="lines",
            line={"shape": "hv"}, text=[size(held) for held in bytes_held], hovertemplate="%{text}",
            showlegend=bool(device),
        )  # fmt: skip
    return figure.update_layout(
        height=260,
        hovermode="x unified",
        xaxis=_numbered("block", len(blocks)),
        yaxis={"title": {"text": "GiB"}, "rangemode": "tozero", "zeroline": False},
    )


def _labels(names: Sequence[str]) -> list[str]:
    """Names as plotly's text, in which marks of HTML would be obeyed."""
    return [escape(name, quote=False) for name in names]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic scale: 1, 2 and 5, or over many decades 1 alone."""
    steps = (1, 2, 5) if high < 200 * low else (1,)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 1 else [float(f"{low:.2g}"), float(f"{high:.2g}")]


def _numbered(title: str, count: int, **how: Any) -> dict[str, Any]:
    """An axis of whole numbers below `count`: plotly by itself would put halves between few, and round them."""
    step = next(size for power in range(10) for size in (10**power, 2 * 10**power, 5 * 10**power) if count <= 20 * size)
    return {"title": {"text": title, **how}, "tickformat": "d", "tick0": 0, "dtick": step}


FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif'


def theme(dark: bool) -> dict[str, Any]:
    """Colours and manners of all plots, for light or dark surroundings, as one of plotly's templates."""
    text, muted, line, ground = ("#e4e6ea", "#a2a9b4", "#343a43", "#1d2127") if dark else (
        "#1f2328", "#59636e", "#e3e6ea", "#f4f5f7")  # fmt: skip
    colours = (
        ["#8b94a1", "#5cc8c0", "#e0b565", "#8ea6dc", "#c79abf", "#b3bf6b"]
        if dark
        else ["#9aa3ae", "#0f7f7b", "#d19a35", "#6d86c2", "#a9749f", "#7f8c2d"]
    )
    scale = (
        ["#20303a", "#1f5a66", "#2f8f8b", "#8bbf86", "#f3dd8b"]
        if dark
        else ["#f1efe2", "#bfdccb", "#6db7b0", "#22808a", "#123f5a"]
    )
    axis = {
        "gridcolor": line, "linecolor": line, "zerolinecolor": line, "ticks": "", "fixedrange": True,
        "title": {"font": {"color": muted, "size": 12}, "standoff": 8}, "tickfont": {"color": muted},
    }  # fmt: skip
    layout = {
        "font": {"family": FONT, "size": 12, "color": text},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": colours,
        "coloraxis": {
            "colorscale": [[place / (len(scale) - 1), colour] for place, colour in enumerate(scale)],
            "colorbar": {"tickfont": {"color": muted}, "tickcolor": muted},
        },
        "xaxis": axis,
        "yaxis": axis,
        "margin": {"l": 52, "r": 12, "t": 36, "b": 44},
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "font": {"size": 12}},
        "hoverlabel": {"bgcolor": ground, "bordercolor": line, "font": {"color": text, "size": 12}, "align": "left"},
        "dragmode": False,
    }
    bars: list[dict[str, Any]] = [{"marker": {"line": {"width": 0}}}]
    return {"layout": layout, "data": {"bar": bars}}
