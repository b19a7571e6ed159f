"""The picture of a sweep or a search: sparsity against quality, a line for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Told apart by the colour-blind, on light and on dark ground (after Okabe and Ito)."""

SIDES = (("perplexity", "value"), ("divergence", "kl"))
TITLES = {"perplexity": "perplexity", "divergence": "KL(dense ‖ sparse), nats per token"}


def figure(told: Mapping[str, Any]) -> Any:
    """A plotly figure of a sweep: perplexity and divergence over the zeros in the linears, on logarithmic scales.

    Each method has a line through its unstructured points, and a mark for each N:M pattern; what a search has promised
    is a line across. The ground is left clear, so that the page's own shows through.

    Args:
        told: a sweep or a search as plain data, see `Sweep.to_dict` and `Search.to_dict`.
    """
    models = {model["name"]: model for model in told["models"]}
    shown = [(part, key) for part, key in SIDES if any(models[point["name"]][part] for point in told["points"])]
    drawn = make_subplots(cols=max(1, len(shown)), horizontal_spacing=0.11)
    methods = list(dict.fromkeys(point["method"] for point in told["points"]))
    for column, (part, key) in enumerate(shown, 1):
        for number, method in enumerate(methods):
            points = [point for point in told["points"] if point["method"] == method]
            for grouped in (False, True):
                chosen = [point for point in points if (":" in point["pattern"]) == grouped]
                chosen = [point for point in chosen if models[point["name"]][part] is not None]
                if chosen:
                    trace = _trace(chosen, models, part, key, method, number, grouped)
                    trace.showlegend = column == 1
                    drawn.add_trace(trace, 1, column)
        dense = models[told["dense"]][part]
        values = [models[point["name"]][part][key] for point in told["points"] if models[point["name"]][part]]
        if dense is not None:
            values.append(dense[key])
            drawn.add_hline(dense[key], line={"dash": "dash", "color": "#888888"}, row=1, col=column)
            # On a logarithmic axis a line stands at its value, and words at its logarithm.
            place = {"x": 1, "xref": "x domain", "xanchor": "right", "y": math.log10(dense[key]), "yanchor": "bottom"}
            drawn.add_annotation(text=f"dense {dense[key]:.4g}", showarrow=False, row=1, col=column, **place)
        for bound in told.get("limits", {}).get(part, ()):
            values.append(bound)
            drawn.add_hline(bound, line={"dash": "dot", "color": "#D55E00"}, row=1, col=column)
            place = {"x": 0, "xref": "x domain", "xanchor": "left", "y": math.log10(bound), "yanchor": "bottom"}
            drawn.add_annotation(text=f"target {bound:.4g}", showarrow=False, row=1, col=column, **place)
        values = [value for value in values if value > 0]
        drawn.update_yaxes(range=_span([math.log10(value) for value in values], 0.1), row=1, col=column)
        zeros = [models[point["name"]]["linears_sparsity"] for point in told["points"]]
        drawn.update_xaxes(range=_span(zeros, 0.05), row=1, col=column)
        drawn.update_yaxes(title=TITLES[part], type="log", **_ticks(values), row=1, col=column)
        drawn.update_xaxes(title="zeros in the linears", tickformat=".0%", row=1, col=column)
    drawn.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 14},
        legend={"orientation": "h", "y": -0.16, "yanchor": "top", "x": 0},
        margin={"l": 70, "r": 20, "t": 30, "b": 90},
        hoverlabel={"align": "left"},
    )
    grid = {"gridcolor": "rgba(128,128,128,0.25)", "linecolor": "#888888", "zeroline": False, "ticks": "outside"}
    drawn.update_xaxes(**grid)
    drawn.update_yaxes(**grid)
    return drawn


def page(told: Mapping[str, Any]) -> str:
    """A page with the picture alone, which needs nothing from anywhere."""
    drawn = figure(told)
    drawn.update_layout(title={"text": _heading(told), "font": {"size": 16}}, margin={"t": 90}, paper_bgcolor="white")
    html: str = drawn.to_html(full_html=True, include_plotlyjs=True, default_height="640px")
    return html


def _trace(
    points: Sequence[Mapping[str, Any]],
    models: Mapping[str, Any],
    part: str,
    key: str,
    method: str,
    number: int,
    grouped: bool,
) -> Any:
    chosen = [models[point["name"]] for point in points]
    name, colour = f"{method}, N:M" if grouped else method, COLOURS[number % len(COLOURS)]
    errors = [model[part].get("stderr") for model in chosen]
    known = any(error is not None for error in errors)
    return go.Scatter(
        x=[model["linears_sparsity"] for model in chosen],
        y=[model[part][key] for model in chosen],
        error_y={"array": [error or 0 for error in errors], "thickness": 1} if known else None,
        mode="markers+text" if grouped else "lines+markers",
        text=[point["pattern"] for point in points] if grouped else None,
        textposition="middle left" if number % 2 else "middle right",
        marker={
            "symbol": "diamond-open" if grouped else _symbols(points),
            "size": 12 if grouped else 8,
            "color": colour,
            "line": {"width": 2, "color": colour},
        },
        line={"color": colour},
        name=name,
        legendgroup=name,
        hovertext=[_words(point, model) for point, model in zip(points, chosen, strict=True)],
        hoverinfo="text",
    )


def _symbols(points: Sequence[Mapping[str, Any]]) -> str | list[str]:
    """Of a search, points that keep what was promised are told from those that don't."""
    if not any("holds" in point for point in points):
        return "circle"
    return ["circle" if point["holds"] else "circle-open" for point in points]


def _words(point: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """What is told of a point under the pointer."""
    lines = [f"<b>{point['method']} {point['pattern']}</b>"]
    lines.append(f"zeros: {model['linears_sparsity']:.2%} of the linears, {model['sparsity']:.2%} of all weights")
    if model["perplexity"]:
        lines.append(f"perplexity {model['perplexity']['value']:.2f}")
    if apart := model["divergence"]:
        error = "" if apart["stderr"] is None else f" ± {apart['stderr']:.4f}"
        lines.append(f"KL {apart['kl']:.4f}{error} nats, the same token {apart['agreement']:.2%}")
    for score in model["scores"]:
        error = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
        lines.append(f"{score['task']} {score['metric']} {score['value']:.4f}{error}")
    lines += [
        f"{verdict['promise']} {'holds' if verdict['holds'] else 'does not hold'}"
        for verdict in point.get("verdicts", ())
    ]
    return "<br>".join(lines)


def _heading(told: Mapping[str, Any]) -> str:
    read = next((model["perplexity"] for model in told["models"] if model["perplexity"]), None)
    where = "" if read is None else f"<br>{read['text']}, context {read['length']:,}, {read['tokens']:,} tokens"
    return f"{told['model']}: sparsity against quality{where}{_answer(told)}"


def _answer(told: Mapping[str, Any]) -> str:
    """What a search found, in short."""
    if "promises" not in told:
        return ""
    found = (point["pattern"] for point in told["points"] if point["name"] == told["chosen"])
    return f"<br>{next(found, 'no sparsity that was asked for')} keeps {', '.join(told['promises'])}"


def _span(values: Sequence[float], least: float) -> tuple[float, float] | None:
    """From a little below the lowest to a little above the highest, however near they are to each other."""
    if not values:
        return None
    room = max(least, 0.08 * (max(values) - min(values)))
    return min(values) - room, max(values) + room


def _ticks(values: Sequence[float]) -> dict[str, list[Any]]:
    """Where a logarithmic axis has round numbers, few enough to be read; left to plotly where all values are near."""
    if not values:
        return {}
    least, most = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 2, 5) if most - least <= 4 else (1,)
    found = [step * 10.0**power for power in range(least, most + 1) for step in steps]
    ticks = [tick for tick in found if min(values) / 1.2 <= tick <= max(values) * 1.2]
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]} if len(ticks) > 2 else {}
