"""The trade-off between sparsity and quality: each method at each sparsity is pruned, measured, and kept as figures.

FOLDER holds sweep.json and sweep.html, `points/NAME.json` for each point that is done, with the report of its run, and,
while it is at work on a point, FOLDER/NAME with its weights.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from llmprune import distributed, memory, pipeline
from llmprune.errors import UserError
from llmprune.evaluate import perplexity
from llmprune.evaluate.compare import Asked, Measured, Reference, side_by_side
from llmprune.evaluate.pieces import holding, write_json, writing
from llmprune.model.writer import INDEX, JOURNAL, REPORT, clear, difference
from llmprune.patterns import parse
from llmprune.plan import make_plan
from llmprune.progress import Progress, of_first
from llmprune.recipe import Evaluation, Recipe, assemble
from llmprune.report.comparison import Comparison

T = TypeVar("T")

RESULT, PAGE, POINTS, REQUEST = "sweep.json", "sweep.html", "points", "request.json"
DENSE = "dense"


@dataclass(frozen=True)
class Point:
    """One method at one sparsity.

    Attributes:
        name: of its folder: `wanda-50`, `wanda-2-4`.
        method, pattern: `wanda`; `50%` or `2:4`.
        target: the fraction of zeros that the pattern asks for.
        kept: whether its weights are to stay.
    """

    name: str
    method: str
    pattern: str
    target: float
    kept: bool = False


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
        tasks, shots, limit, include_path, batch: what is measured besides; see `tasks.evaluate`.
        keep_models: keep the weights of each point in `out`/NAME.
        progress: where to show how far the work is.

    Raises:
        UserError: a point makes no sense for this model, or the folder holds something else; nothing was done.
    """
    began = time.monotonic()
    base = assemble(recipe, options)
    evaluation = base.evaluate if base.evaluate.text is not None else replace(base.evaluate, text="wikitext2")
    own = tuple(map(str, include_path))
    asked = Asked(evaluation, tuple(tasks), shots, limit, own, batch, base.device, base.dtype, base.trust_remote_code)
    base = replace(base, evaluate=Evaluation())
    points = _points(base, sparsity, method, keep_models)
    folder, shown = Path(out).expanduser().absolute(), of_first(progress)
    memory.frugal()
    with torch.no_grad(), distributed.joined():
        tokens = _plan(model, base, points, shown)
        with holding(folder):
            distributed.share(None)  # the first rank has made it
            if not all(distributed.gather(folder.is_dir())):
                raise UserError(f"{out} is not seen by every rank: choose a folder that is, or run on one machine")
            with distributed.first():
                opened = asked.open(model, shown)
            reference = Reference(opened, asked, folder, shown)
            _check(folder, {"recipe": _shared(base), "calibration tokens": tokens, **reference.request()})
            dense = reference.measure(reference.checkpoint, DENSE)
            if dense.figures.perplexity is not None:
                perplexity.check(dense.figures.perplexity, str(model), evaluation)
            for number, point in enumerate(points, 1):
                title = Titled(shown, f"{number} of {len(points)}, {point.method} {point.pattern}: ")
                _bring(folder, point, _recipe(base, point), reference, asked, title)
            reference.finish()
            told = distributed.share(_told(folder, points) if distributed.is_first() else None)
            assert told is not None
            measured = [dense, *(Measured.read(entry["measured"]) for entry in told)]
            comparison = side_by_side(measured, evaluation.text)
            comparison.seconds = round(time.monotonic() - began, 3)
            shared = {**_shared(base), "evaluate": evaluation_of(evaluation)}
            source = reference.checkpoint.source
            made = Sweep(source.name, source.revision, shared, [Point(**entry["point"]) for entry in told], comparison)
            if distributed.is_first():
                write(folder, made)
    return made


def write(folder: Path, made: Sweep) -> None:
    """Write the results and draw them."""
    from llmprune.report import curve

    write_json(folder / RESULT, made.to_dict())
    with writing(folder / PAGE) as draft:
        draft.write_text(curve.page(made.to_dict()), encoding="utf-8")


class Titled:
    """Shows the progress of another with words before each title."""

    def __init__(self, progress: Progress, words: str) -> None:
        self._progress, self._words = progress, words

    def over(self, items: Sequence[T], title: str) -> Iterator[T]:
        """Go through the items."""
        return self._progress.over(items, self._words + title)

    def waiting(self, title: str) -> contextlib.AbstractContextManager[None]:
        """Show that something goes on."""
        return self._progress.waiting(self._words + title)

    def block(self, record: Mapping[str, Any]) -> None:
        """Show what a block took."""
        self._progress.block(record)


def evaluation_of(chosen: Evaluation) -> dict[str, Any]:
    """What was measured on, as plain data."""
    return {name: value for name, value in vars(chosen).items() if value is not None}


def _points(base: Recipe, sparsity: Sequence[str | float], method: Sequence[str], kept: bool) -> list[Point]:
    """All pairs, each once, in order."""
    if not sparsity or not method:
        raise UserError("a sweep needs at least one sparsity and one method")
    patterns = {str(pattern): pattern.sparsity for pattern in map(parse, sparsity)}
    found = []
    for name in dict.fromkeys(method):
        for pattern, target in patterns.items():
            written = pattern.removesuffix("%").replace(":", "-")
            found.append(Point(f"{name}-{written}", name, pattern, target, kept))
    return found


def _recipe(base: Recipe, point: Point) -> Recipe:
    """A point's own recipe, with the options that the shared one has for its method."""
    chosen = base.method
    method = chosen if isinstance(chosen, dict) and chosen.get("name") == point.method else point.method
    return replace(base, method=method, sparsity=point.pattern)


def _shared(base: Recipe) -> dict[str, Any]:
    """What all points share of the recipe, as plain data; the memory changes nothing in the result."""
    shared = replace(base, max_memory=None).to_dict()
    for name in ("sparsity", "evaluate", *(("method",) if isinstance(base.method, str) else ())):
        del shared[name]
    return shared


def _plan(model: str | Path, base: Recipe, points: Sequence[Point], progress: Progress) -> str | None:
    """Plan all points, so that no mistake shows after hours; returns the hash of the calibration tokens."""
    checkpoint, first = pipeline.plan(model, recipe=_recipe(base, points[0]), progress=progress, look=False)
    if first.budget is not None and first.budget.sparsity is None and len({point.pattern for point in points}) > 1:
        raise UserError("a plan file says how sparse each linear is, whatever the sparsity: sweep over one, or methods")
    plans = [first]
    with progress.waiting("planning all points"):
        for point in points[1:]:
            try:
                plans.append(make_plan(checkpoint, _recipe(base, point), first.room))
            except UserError as error:
                raise UserError(f"{point.method} {point.pattern}: {error}") from None
        needing = [made for made in plans if made.needs_data]
        if not needing:
            return None
        tokens = pipeline.draw(checkpoint, base, needing[0].schedule.length) if distributed.is_first() else None
        return distributed.share(tokens.sha256 if tokens is not None else None)


def _check(folder: Path, request: dict[str, Any]) -> None:
    """See that the folder holds nothing but points of the same request.

    Raises:
        UserError: it is another request's; the message names the first difference.
    """
    if not distributed.is_first():
        return
    path = folder / POINTS / REQUEST
    before = _read(path)
    if before is not None:
        known = before["calibration tokens"]  # methods that need none leave them open
        asked = {**request, "calibration tokens": request["calibration tokens"] or known}
        before["calibration tokens"] = known or request["calibration tokens"]
        if other := difference(before, json.loads(json.dumps(asked))):
            raise UserError(
                f"{folder} holds a sweep with {other}: give the same to go on with it, or choose another folder"
            )
        request = asked
    if request != before:
        write_json(path, request)


def _bring(folder: Path, point: Point, recipe: Recipe, reference: Reference, asked: Asked, progress: Titled) -> None:
    """Bring a point to its end, from wherever it is."""
    place, record = folder / point.name, folder / POINTS / f"{point.name}.json"
    done = distributed.share(_read(record) if distributed.is_first() else None)
    if done is None or (point.kept and not done["point"]["kept"]):
        report = _pruned(reference.checkpoint.source.name, place, recipe, progress)
        if not all(distributed.gather((place / INDEX).is_file())):
            raise UserError(f"{place} is not seen by every rank: choose a folder that is, or run on one machine")
        measured = reference.measure(asked.open(place, progress), point.name)
        done = {"point": asdict(point), "measured": measured.to_dict(), "report": report}
        if distributed.is_first():
            write_json(record, done)
    if distributed.is_first() and not done["point"]["kept"] and place.is_dir():
        clear(place)
        with contextlib.suppress(OSError):  # somebody else's files are in it
            place.rmdir()


def _pruned(model: str, place: Path, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """The report of a point's finished run, which may be there already."""
    report = distributed.share(_read(place / REPORT) if distributed.is_first() else None)
    unfinished = distributed.share((place / JOURNAL).is_file())
    if report is None or unfinished:
        return pipeline.prune(model, out=place, recipe=recipe, progress=progress).to_dict()
    if other := difference(report["recipe"], replace(recipe, max_memory=report["recipe"]["max_memory"]).to_dict()):
        raise UserError(f"{place} holds a finished run with {other}: choose another folder for the sweep")
    return report


def _told(folder: Path, points: Sequence[Point]) -> list[dict[str, Any]]:
    """All points that are done, those of this call and of earlier ones."""
    records = [_read(path) for path in sorted((folder / POINTS).glob("*.json")) if path.name != REQUEST]
    found = [record for record in records if record is not None]
    methods = list(dict.fromkeys([*(point.method for point in points), *(entry["point"]["method"] for entry in found)]))

    def order(record: dict[str, Any]) -> tuple[Any, ...]:
        point = record["point"]
        return methods.index(point["method"]), ":" in point["pattern"], point["target"], point["name"]

    return sorted(found, key=order)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return None
