"""The page of a sweep or a search: sparsity against quality, a line for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
import yaml

from llmprune.report import tables
from llmprune.report.comparison import Comparison
from llmprune.report.frame import Beside, Plot, fill
from llmprune.report.record import short_name

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Told apart by the colour-blind, on light and on dark ground (after Okabe and Ito)."""

SIDES = {"perplexity": "value", "divergence": "kl"}
"""What is drawn, and which of its figures."""
TITLES = {"perplexity": "perplexity", "divergence": "KL(dense ‖ sparse), nats per token"}


def plots_of(told: Mapping[str, Any]) -> list[Plot]:
    """Perplexity and divergence over the zeros in the linears, on logarithmic scales, as far as they were measured.

    Each method has a line through its unstructured points, and a mark for each N:M pattern; what a search has promised
    is a line across.

    Args:
        told: a sweep or a search as plain data, see `Sweep.to_dict` and `Search.to_dict`.
    """
    models = {model["name"]: model for model in told["models"]}
    shown = [part for part in SIDES if any(models[point["name"]][part] for point in told["points"])]
    return [Plot(f"{part}-curve", TITLES[part], _figure(told, models, part), _caption(told, part)) for part in shown]


def page(told: Mapping[str, Any]) -> bytes:
    """A page, as its file holds it, with the picture and the figures, which needs nothing from anywhere."""
    found = Comparison.read(told)
    return fill(
        "curve.html",
        name=short_name(told["model"]),
        searched="promises" in told,
        found=_found(told),
        plots=plots_of(told),
        compared=Beside.of(found),
        scores=tables.score_rows(found.models),
        recipe=yaml.safe_dump(told["recipe"], sort_keys=False, allow_unicode=True),
        versions=told["versions"],
    )


def _figure(told: Mapping[str, Any], models: Mapping[str, Any], part: str) -> Any:
    key, drawn, values = SIDES[part], go.Figure(), []
    methods = list(dict.fromkeys(point["method"] for point in told["points"]))
    for number, method in enumerate(methods):
        points = [point for point in told["points"] if point["method"] == method]
        for grouped in (False, True):
            chosen = [point for point in points if (":" in point["pattern"]) == grouped]
            chosen = [point for point in chosen if models[point["name"]][part] is not None]
            if chosen:
                drawn.add_trace(_trace(chosen, models, part, key, method, number, grouped))
                values += [models[point["name"]][part][key] for point in chosen]
    dense = models[told["dense"]][part]
    across = [] if dense is None else [(dense[key], "dense", "dash", "#888888", "right")]
    across += [(bound, "target", "dot", "#D55E00", "left") for bound in told.get("limits", {}).get(part, ())]
    for value, word, dash, colour, side in across:
        values.append(value)
        drawn.add_hline(value, line={"dash": dash, "color": colour})
        # On a logarithmic axis a line stands at its value, and words at its logarithm.
        place = {"x": int(side == "right"), "xref": "x domain", "xanchor": side, "y": math.log10(value)}
        drawn.add_annotation(text=f"{word} {value:.4g}", showarrow=False, yanchor="bottom", **place)
    values = [value for value in values if value > 0]
    span = _span([math.log10(value) for value in values], 0.1)
    drawn.update_yaxes(title={"text": TITLES[part]}, type="log", range=span, **_ticks(values))
    zeros = [models[point["name"]]["linears_sparsity"] for point in told["points"]]
    drawn.update_xaxes(title={"text": "zeros in the linears"}, tickformat=".0%", range=_span(zeros, 0.05))
    return drawn.update_layout(height=440, margin={"l": 60})


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
    name, colour = escape(f"{method}, N:M" if grouped else method), COLOURS[number % len(COLOURS)]
    errors = [model[part].get("stderr") for model in chosen]
    known = any(error is not None for error in errors)
    return go.Scatter(
        x=[model["linears_sparsity"] for model in chosen],
        y=[model[part][key] for model in chosen],
        error_y={"array": [error or 0 for error in errors], "thickness": 1} if known else None,
        mode="markers+text" if grouped else "lines+markers",
        text=[escape(point["pattern"]) for point in points] if grouped else None,
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
    """What is told of a point under the pointer; plotly obeys marks of HTML in it."""
    lines = [f"<b>{escape(point['method'])} {escape(point['pattern'])}</b>"]
    lines.append(f"zeros: {model['linears_sparsity']:.2%} of the linears, {model['sparsity']:.2%} of all weights")
    if model["perplexity"]:
        lines.append(f"perplexity {model['perplexity']['value']:.2f}")
    if apart := model["divergence"]:
        error = "" if apart["stderr"] is None else f" ± {apart['stderr']:.4f}"
        lines.append(f"KL {apart['kl']:.4f}{error} nats, the same token {apart['agreement']:.2%}")
    for score in model["scores"]:
        error = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
        lines.append(f"{escape(score['task'])} {escape(score['metric'])} {score['value']:.4f}{error}")
    lines += [
        f"{escape(verdict['promise'])} {'holds' if verdict['holds'] else 'does not hold'}"
        for verdict in point.get("verdicts", ())
    ]
    return "<br>".join(lines)


def _caption(told: Mapping[str, Any], part: str) -> str:
    read = next(model[part] for model in told["models"] if model[part])
    caption = f"On {short_name(read['text'])}, context {read['length']:,}, {read['tokens']:,} tokens."
    if "promises" in told:
        caption += " Filled points keep what was promised, open ones do not."
    return caption


def _found(told: Mapping[str, Any]) -> str:
    """What was found, in short."""
    if "promises" in told:
        found = (point["pattern"] for point in told["points"] if point["name"] == told["chosen"])
        return f"{next(found, 'No sparsity that was asked for')} keeps {', '.join(told['promises'])}."
    methods, patterns = (list(dict.fromkeys(point[key] for point in told["points"])) for key in ("method", "pattern"))
    return f"{', '.join(methods)} at {', '.join(patterns)}."


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
