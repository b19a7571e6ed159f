"""What all pages have: their style, plots by plotly that take the reader's theme, and that they need no network.

A page names the hashes of plotly and of the script that draws the plots, and forbids browsers to run or load anything
else. `frame.html` is the page around what a page has of its own, `parts.html` what several of them have.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup

from llmprune.report import plots, tables
from llmprune.report.comparison import Comparison

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plot:
    """A plot on a page, with what it says in words, and in a table."""

    name: str
    title: str
    figure: plots.Figure
    caption: str = ""
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    @property
    def json(self) -> Markup:
        """The figure as data inside a script element."""
        return _inside_script(self.figure.to_json())


@dataclass(frozen=True)
class Beside:
    """Checkpoints beside each other: headings and rows of two tables, and what belongs to them."""

    models: tables.Cells
    differences: tables.Cells
    notes: Sequence[str]

    @classmethod
    def of(cls, found: Comparison) -> Beside:
        """All of a comparison but the scores of its tasks."""
        return cls(tables.model_rows(found.models), tables.difference_rows(found), tables.comparison_notes(found))


def fill(template: str, **values: Any) -> bytes:
    """A page, as its file holds it.

    Plotly is put in last, as bytes: as text it is twice as large, and would be held several times.

    Args:
        template: the name of a file beside this one, which extends `frame.html`.
        values: what it asks for.
    """
    plotly_js, own_js, place = plotly.offline.get_plotlyjs().encode(), _file("frame.js"), secrets.token_hex()
    themes = {name: plots.theme(dark) for name, dark in (("light", False), ("dark", True))}
    page: str = (
        _environment()
        .get_template(template)
        .render(
            css=Markup(_file("frame.css")),
            themes=_inside_script(json.dumps(themes)),
            plotly_js=place,
            own_js=Markup(own_js),
            policy=" ".join(f"'sha256-{_hash(script)}'" for script in (plotly_js, own_js.encode())),
            **values,
        )
    )
    before, after = page.split(place)
    return b"".join([before.encode(), plotly_js, after.encode()])


@functools.cache
def _environment() -> jinja2.Environment:
    room = jinja2.FileSystemLoader(HERE)
    return jinja2.Environment(
        loader=room, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _inside_script(text: str) -> Markup:
    """JSON that cannot end the element it is in."""
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _hash(script: bytes) -> str:
    return base64.b64encode(hashlib.sha256(script).digest()).decode()
