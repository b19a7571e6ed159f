"""The highest unstructured sparsity that keeps a promise about quality, and the checkpoint that keeps it.

A search is a sweep that chooses its points itself (see `grid`): each is pruned as `prune` would, and measured beside
the dense model. Whatever the curve is like, the answer is a point that was measured and that holds.

FOLDER holds search.json, search.html, FOLDER/model, the checkpoint of the answer, and what `points` says.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmprune import data, distributed, pipeline
from llmprune.errors import Failure, UserError
from llmprune.evaluate import perplexity
from llmprune.evaluate.compare import RESULT as COMPARISON
from llmprune.evaluate.compare import Asked, Measured, Reference, side_by_side
from llmprune.evaluate.pieces import write_json
from llmprune.grid import Grid, bracket, next_place
from llmprune.model.writer import EVALUATION, REPORT
from llmprune.patterns import Unstructured, parse
from llmprune.points import (
    DENSE,
    Point,
    Titled,
    Work,
    evaluation_of,
    measuring,
    other_recipe,
    read,
    recipe_of,
    shared,
    working,
    write,
)
from llmprune.progress import Progress, of_first
from llmprune.promise import Promise, Verdict
from llmprune.recipe import Evaluation, Recipe, assemble
from llmprune.report.comparison import Comparison
from llmprune.report.record import Report

RESULT, PAGE, MODEL = "search.json", "search.html", "model"


@dataclass
class Search:
    """What a search found.

    Attributes:
        model, revision: what was pruned.
        recipe: what all points share.
        promises: as they were asked for.
        between, resolution: where it looked.
        points: in the order of their sparsity, also those of earlier commands with the same folder.
        verdicts: for each point by name, one for each promise.
        chosen: the name of the highest point that keeps all promises; None where no point does.
        checkpoint: the folder with its weights.
        bounded: whether a higher point between the two sparsities is known to break a promise.
        confirmed: the chosen point on a text that no choice saw: `dense` and `model`, their figures, and `verdicts`.
        comparison: the figures; a point's are those of the model of its name.
    """

    model: str
    revision: str | None
    recipe: dict[str, Any]
    promises: list[str]
    between: tuple[str, str]
    resolution: str
    points: list[Point]
    verdicts: dict[str, list[Verdict]]
    chosen: str | None
    checkpoint: str | None
    bounded: bool
    confirmed: dict[str, Any] | None
    comparison: Comparison

    def holds(self, point: Point) -> bool:
        """Whether a point keeps all promises."""
        return spent(self.verdicts[point.name]) <= 1

    @property
    def answer(self) -> str:
        """The result in a sentence or two."""
        asked = ", ".join(self.promises)
        if self.chosen is None:
            low = parse(self.between[0]).sparsity - 1e-6
            first = min((point for point in self.points if point.target >= low), key=lambda point: point.target)
            told = "; ".join(str(verdict) for verdict in self.verdicts[first.name] if not verdict.holds)
            return (
                f"no sparsity from {self.between[0]} to {self.between[1]} keeps {asked}: {first.pattern} gives {told}"
            )
        point = next(point for point in self.points if point.name == self.chosen)
        told = "; ".join(map(str, self.verdicts[point.name]))
        rest = f"a higher one was not looked for, {self.between[1]} is the end of --between"
        if self.bounded:
            higher = (other for other in self.points if other.target > point.target and not self.holds(other))
            rest = f"{min(higher, key=lambda other: other.target).pattern} does not"
        return f"{point.pattern} keeps {asked} ({told}); {rest}"

    @property
    def confirmation(self) -> str:
        """What the second text tells, in a sentence; nothing where there is none."""
        if self.confirmed is None:
            return ""
        kept = "; ".join(
            f"{verdict['promise']} {'holds' if verdict['holds'] else 'does not hold'}"
            for verdict in self.confirmed["verdicts"]
        )
        model, dense = self.confirmed["model"], self.confirmed["dense"]
        return (
            f"on {self.confirmed['text']}, which no choice saw: perplexity {model['perplexity']['value']:.4g}, dense "
            f"{dense['perplexity']['value']:.4g}, KL {model['divergence']['kl']:.4g} nats, the same token "
            f"{model['divergence']['agreement']:.2%}" + (f" ({kept})" if kept else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: that of the comparison, what the points are, and which keep the promises."""
        points = [
            {**asdict(point), "holds": self.holds(point), "verdicts": list(map(_plain, self.verdicts[point.name]))}
            for point in self.points
        ]
        limits: dict[str, list[float]] = {"perplexity": [], "divergence": []}
        for made in self.verdicts[self.points[0].name]:
            part = {"perplexity": "perplexity", "kl": "divergence"}.get(made.figure)
            if part is not None:
                limits[part].append(made.bound)
        told = {name: getattr(self, name) for name in ("model", "revision", "recipe", "promises", "resolution")}
        told.update({"between": list(self.between), "chosen": self.chosen, "checkpoint": self.checkpoint})
        told.update({"bounded": self.bounded, "answer": self.answer, "limits": limits, "confirmed": self.confirmed})
        return {**told, "points": points, **self.comparison.to_dict()}


def search(
    model: str | Path,
    *,
    out: str | Path,
    target: str | Sequence[str],
    between: Sequence[str | float] = ("10%", "90%"),
    resolution: str | float = "1%",
    confirm: str | None = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    tasks: Sequence[str] = (),
    shots: int | None = None,
    limit: float | None = None,
    include_path: Sequence[str | Path] = (),
    batch: int | None = None,
    unsafe_code: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Search:
    """Find the highest unstructured sparsity that keeps promises about quality.

    The same call goes on where it was cut off; with another target or other sparsities it uses the points that the
    folder has. The checkpoint of the answer is left in `out`/model; where no point keeps the promises none is left, and
    `chosen` of the result is None.

    Args:
        model: a Hub name, a folder, or a `.gguf` file.
        out: the folder for the results.
        target: one or more promises, which all must hold: `ppl+5%`, `ppl<=20`, `kl<=0.05`, `agreement>=90%`,
            `arc_easy-1se`, `arc_easy-0.02`; see `Promise`.
        between: the lowest and the highest sparsity that may be chosen.
        resolution: the answer is a multiple of it.
        confirm: a second text, on which the dense model and the answer are measured, and which no choice sees.
        recipe, **options: what all points share, as for `prune`; `evaluate` is the text that is measured on, by default
            `wikitext2`; it must not be the calibration text. A sparsity in the recipe is not used. A cap on the memory
            holds for the pruning, not for the measuring.
        tasks, shots, limit, include_path, batch, unsafe_code: what is measured besides, and how; see `tasks.evaluate`.
        progress: where to show how far the work is.

    Raises:
        UserError: the request makes no sense for this model, or the folder holds something else; nothing was done.
        Failure: the work could not be finished.
    """
    began = time.monotonic()
    promises = [Promise.read(text) for text in dict.fromkeys([target] if isinstance(target, str) else target)]
    if not promises:
        raise UserError("a search needs at least one target to keep, such as ppl+5%")
    grid = Grid.read(between, resolution)
    base = assemble(recipe, options).settled()
    if base.sparsity is not None and not isinstance(parse(base.sparsity), Unstructured):
        raise UserError(
            f"the recipe's sparsity is {base.sparsity}, and of that there is only one: prune to it, or leave it out of "
            "the recipe, and the search finds an unstructured sparsity"
        )
    named = [*tasks, *(promise.task for promise in promises if promise.task)]
    asked = measuring(base, list(dict.fromkeys(named)), shots, limit, include_path, batch, unsafe_code)
    second = None
    if confirm is not None:
        data.check(confirm)
        other = replace(asked.evaluation, text=confirm, config=None, split=None, column=None)
        second = replace(asked, evaluation=other, tasks=())
    _check_texts(base, asked, second)
    base = replace(base, evaluate=Evaluation())
    ends = [_point(base, grid, number) for number in dict.fromkeys((grid.low, grid.high))]
    common = {**shared(base), "method": base.method}
    with working(model, out, "search", base, common, asked, ends, of_first(progress)) as work:
        _check_place(work, second)
        _judge(promises, work.dense, work.dense)  # what cannot be promised of this model is told before any pruning
        seen, brought = _look(work, promises, grid), 0
        while (number := next_place(seen.known, grid)) is not None:
            point, brought = _point(base, grid, number), brought + 1
            work.bring(point, f"point {brought}, {point.method} {point.pattern}: ")
            seen = _look(work, promises, grid)
            _tidy(work, seen.best)
        checkpoint = _leave(work, seen)
        comparison = side_by_side([work.dense, *seen.measured], asked.evaluation.text)
        comparison.notes += _notes(seen)
        confirmed = _confirm(work, second, seen, promises) if second is not None and seen.best is not None else None
        work.reference.finish()
        comparison.seconds = round(time.monotonic() - began, 3)
        source = work.reference.checkpoint.source
        made = Search(
            source.name,
            source.revision,
            {**common, "evaluate": evaluation_of(asked.evaluation)},
            [promise.written for promise in promises],
            (str(grid.pattern(grid.low)), str(grid.pattern(grid.high))),
            str(grid.pattern(1)),
            seen.points,
            seen.verdicts,
            seen.best.name if seen.best is not None else None,
            checkpoint,
            bracket(seen.known)[1] is not None,
            confirmed,
            comparison,
        )
        if distributed.is_first():
            write(work.folder / RESULT, work.folder / PAGE, made.to_dict())
    return made


def spent(verdicts: Sequence[Verdict]) -> float:
    """How much of the promise that is nearest to its bound is spent."""
    return max(verdict.spent for verdict in verdicts)


@dataclass
class Seen:
    """What the points that are done tell.

    Attributes:
        points: in the order of their sparsity.
        measured: their figures, in the same order.
        verdicts: by their names.
        known: the places of those that may be chosen, and what is spent there.
        best: the highest of these that keeps all promises.
    """

    points: list[Point]
    measured: list[Measured]
    verdicts: dict[str, list[Verdict]]
    known: dict[float, float]
    best: Point | None


def _look(work: Work, promises: Sequence[Promise], grid: Grid) -> Seen:
    """Judge all points that the folder has."""
    told = sorted(work.records(), key=lambda record: (record["point"]["target"], record["point"]["name"]))
    points = [Point(**record["point"]) for record in told]
    measured = [Measured.read(record["measured"]) for record in told]
    verdicts = {found.figures.name: _judge(promises, work.dense, found) for found in measured}
    places = {grid.place(point.target): point for point in points}
    inside = {place: point for place, point in places.items() if grid.low <= place <= grid.high}
    known = {place: spent(verdicts[point.name]) for place, point in inside.items()}
    best, _ = bracket(known)
    return Seen(points, measured, verdicts, known, None if best is None else inside[best])


def _point(base: Recipe, grid: Grid, number: int) -> Point:
    pattern = grid.pattern(number)
    return Point.of(_method(base), str(pattern), pattern.sparsity)


def _method(base: Recipe) -> str:
    return base.method if isinstance(base.method, str) else str(base.method.get("name"))


def _judge(promises: Sequence[Promise], dense: Measured, model: Measured) -> list[Verdict]:
    differences = side_by_side([dense, model], None).differences
    return [promise.judge(dense.figures, model.figures, differences) for promise in promises]


def _check_texts(base: Recipe, asked: Asked, second: Asked | None) -> None:
    """See that no text is measured on that was seen before.

    Raises:
        UserError: one is the calibration text, or the second is the first.
    """
    chosen = base.calibration
    used = data.origin(chosen.source, "calibration", config=chosen.config, split=chosen.split)
    first = _origin(asked.evaluation)
    if first == used:
        raise UserError(
            f"{asked.evaluation.text} is the calibration text, on which a pruned model looks better than it is: "
            "measure on another one (--evaluate), or calibrate on another one (--calibration)"
        )
    if second is not None and _origin(second.evaluation) in (first, used):
        raise UserError(
            f"{second.evaluation.text} cannot confirm anything: it is the text that was measured or calibrated on; "
            "give one that no choice saw (--confirm)"
        )


def _origin(chosen: Evaluation) -> tuple[str, ...]:
    assert chosen.text is not None
    return data.origin(chosen.text, "evaluation", config=chosen.config, split=chosen.split)


def _check_place(work: Work, second: Asked | None) -> None:
    """See that the checkpoint can be left in the folder, and that there is a second text where one was asked for.

    Raises:
        UserError: it is not so.
    """
    place, points = work.folder / MODEL, [Point(**record["point"]) for record in work.records()]
    with distributed.first():
        if distributed.is_first() and place.exists():
            report = read(place / REPORT)
            if report is None or all(other_recipe(report, recipe_of(work.base, point)) for point in points):
                raise UserError(f"{place} is not what a search left there: choose another folder")
        if second is not None:
            perplexity.read_text(work.reference.checkpoint, second.evaluation)


def _tidy(work: Work, best: Point | None) -> None:
    """Make the weights of the best point FOLDER/model, where they are there, and take away those of all others."""
    if not distributed.is_first():
        return
    own = re.compile(rf"{re.escape(_method(work.base))}-[\d.]+")
    for place in sorted(path for path in work.folder.iterdir() if own.fullmatch(path.name)):
        if best is None or place.name != best.name:
            work.remove(place.name)
        elif place.is_dir():
            work.remove(MODEL)
            try:
                place.rename(work.folder / MODEL)
            except OSError as error:
                raise Failure(f"{place} cannot be renamed to {work.folder / MODEL}: {error.strerror}") from None


def _leave(work: Work, seen: Seen) -> str | None:
    """See that FOLDER/model is the best point's checkpoint, with its figures and its report, or nothing.

    Returns:
        The folder, where there is one.
    """
    _tidy(work, seen.best)
    place = work.folder / MODEL
    if seen.best is None:
        work.remove(MODEL)
        return None
    report = read(place / REPORT) if distributed.is_first() else None
    if distributed.share(report is None or bool(other_recipe(report, recipe_of(work.base, seen.best)))):
        work.prune(seen.best, f"the answer, {seen.best.method} {seen.best.pattern}: ")  # its weights had been removed
        _tidy(work, seen.best)
    measured = seen.measured[seen.points.index(seen.best)]
    measured.figures.path = str(place)
    if distributed.is_first():
        told = Report.read(read(place / REPORT) or {}, place)
        write_json(place / REPORT, told.to_dict())  # it says where it is
        write_json(place / EVALUATION / COMPARISON, side_by_side([work.dense, measured], None).to_dict())
        with work.progress.waiting("drawing the report"):
            pipeline.draw_page(told, work.reference.checkpoint.source)
    distributed.share(None)
    return str(place)


def _notes(seen: Seen) -> list[str]:
    """What is to be said of the curve."""
    if seen.best is None:
        return []
    lower = [point for point in seen.points if point.target < seen.best.target]
    broken = [point.pattern for point in lower if spent(seen.verdicts[point.name]) > 1]
    told = f"{seen.best.pattern} keeps what {', '.join(broken)} does not: near the bound, noise decides"
    return [told] if broken else []


def _confirm(work: Work, second: Asked, seen: Seen, promises: Sequence[Promise]) -> dict[str, Any]:
    """Measure the dense model and the chosen checkpoint on the second text."""
    assert seen.best is not None
    shown = Titled(work.progress, "confirming: ")
    reference = Reference(work.reference.checkpoint, second, work.folder, shown)
    dense = reference.measure(reference.checkpoint, DENSE)
    model = reference.measure(second.open(work.folder / MODEL, shown), seen.best.name)
    kept = [promise for promise in promises if promise.figure != "task"]
    verdicts = [_plain(verdict) for verdict in _judge(kept, dense, model)]
    figures = {"dense": dense.figures.to_dict(), "model": model.figures.to_dict()}
    return {"text": second.evaluation.text, **figures, "verdicts": verdicts}


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {**asdict(verdict), "holds": verdict.holds}
