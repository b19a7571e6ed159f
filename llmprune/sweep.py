"""The trade-off between sparsity and quality: each method at each sparsity is pruned, measured, and kept as figures.

FOLDER holds sweep.json, sweep.html, and what `points` says.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmprune import distributed
from llmprune.errors import UserError
from llmprune.evaluate.compare import Measured, side_by_side
from llmprune.patterns import parse
from llmprune.points import Point, evaluation_of, measuring, shared, working, write
from llmprune.progress import Progress, of_first
from llmprune.recipe import Evaluation, Recipe, assemble
from llmprune.report.comparison import Comparison

RESULT, PAGE = "sweep.json", "sweep.html"


@dataclass
class Sweep:
    """The points, with their figures beside those of the dense model.

    Attributes:
        model, revision: what was pruned.
        recipe: what all points share.
        points: in the order of their methods and sparsities, also those of earlier commands with the same folder.
        comparison: the figures; a point's are those of the model of its name.
    """

    model: str
    revision: str | None
    recipe: dict[str, Any]
    points: list[Point]
    comparison: Comparison

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: that of the comparison, and what the points are."""
        asked = {"model": self.model, "revision": self.revision, "recipe": self.recipe}
        return {**asked, "points": [asdict(point) for point in self.points], **self.comparison.to_dict()}


def sweep(
    model: str | Path,
    *,
    out: str | Path,
    sparsity: Sequence[str | float],
    method: Sequence[str],
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    tasks: Sequence[str] = (),
    shots: int | None = None,
    limit: float | None = None,
    include_path: Sequence[str | Path] = (),
    batch: int | None = None,
    unsafe_code: bool = False,
    keep_models: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Sweep:
    """Prune a model with each method to each sparsity, and measure what it costs.

    Every point is planned before any work. The dense model is measured once. The same call goes on where it was cut
    off; with other lists of sparsities and methods it adds points to those that the folder has.

    Args:
        model: a Hub name, a folder, or a `.gguf` file.
        out: the folder for the results.
        sparsity, method: the points are all pairs of them.
        recipe, **options: what all points share, as for `prune`; `evaluate` is the text that is measured on, by default
            `wikitext2`. Where the recipe has options for a method, the points of that method have them too. A cap on
            the memory holds for the pruning, not for the measuring.
        tasks, shots, limit, include_path, batch, unsafe_code: what is measured besides; see `tasks.evaluate`.
        keep_models: keep the weights of each point in `out`/NAME.
        progress: where to show how far the work is.

    Raises:
        UserError: a point makes no sense for this model, or the folder holds something else; nothing was done.
    """
    began = time.monotonic()
    base = assemble(recipe, options).settled()
    asked = measuring(base, tasks, shots, limit, include_path, batch, unsafe_code)
    base = replace(base, evaluate=Evaluation())
    points = _points(base, sparsity, method, keep_models)
    with working(model, out, "sweep", base, shared(base), asked, points, of_first(progress)) as work:
        for number, point in enumerate(points, 1):
            record = work.bring(point, f"{number} of {len(points)}, {point.method} {point.pattern}: ")
            if not record["point"]["kept"]:
                work.remove(point.name)
        work.reference.finish()
        told = _in_order(work.records(), points)
        measured = [work.dense, *(Measured.read(entry["measured"]) for entry in told)]
        comparison = side_by_side(measured, asked.evaluation.text)
        comparison.seconds = round(time.monotonic() - began, 3)
        recipe_told = {**shared(base), "evaluate": evaluation_of(asked.evaluation)}
        source = work.reference.checkpoint.source
        made = Sweep(source.name, source.revision, recipe_told, [Point(**entry["point"]) for entry in told], comparison)
        if distributed.is_first():
            write(work.folder / RESULT, work.folder / PAGE, made.to_dict())
    return made


def _points(base: Recipe, sparsity: Sequence[str | float], method: Sequence[str], kept: bool) -> list[Point]:
    """All pairs, each once, in order."""
    if not sparsity or not method:
        raise UserError("a sweep needs at least one sparsity and one method")
    patterns = {str(pattern): pattern.sparsity for pattern in map(parse, sparsity)}
    return [Point.of(name, *pattern, kept) for name in dict.fromkeys(method) for pattern in patterns.items()]


def _in_order(found: list[dict[str, Any]], points: Sequence[Point]) -> list[dict[str, Any]]:
    """The records of all points that are done, those of this call and of earlier ones."""
    methods = list(dict.fromkeys([*(point.method for point in points), *(entry["point"]["method"] for entry in found)]))

    def order(record: dict[str, Any]) -> tuple[Any, ...]:
        point = record["point"]
        return methods.index(point["method"]), ":" in point["pattern"], point["target"], point["name"]

    return sorted(found, key=order)
