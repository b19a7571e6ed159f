"""Points of a curve of sparsity against quality: each is a model that is pruned, measured, and kept as figures.

What sweeps and searches have in common. FOLDER holds `points/NAME.json` for each point that is done, with the report of
its run, and, while it is at work on a point, FOLDER/NAME with its weights.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from llmprune import distributed, memory, pipeline
from llmprune.errors import UserError
from llmprune.evaluate import perplexity
from llmprune.evaluate.compare import Asked, Measured, Reference
from llmprune.evaluate.pieces import holding, write_json, writing
from llmprune.model.writer import INDEX, JOURNAL, REPORT, clear, difference
from llmprune.planning import make_plan
from llmprune.progress import Progress
from llmprune.recipe import Evaluation, Recipe

T = TypeVar("T")

POINTS, REQUEST = "points", "request.json"
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

    @classmethod
    def of(cls, method: str, pattern: str, target: float, kept: bool = False) -> Point:
        """A point by its own name."""
        return cls(f"{method}-{pattern.removesuffix('%').replace(':', '-')}", method, pattern, target, kept)


@dataclass
class Work:
    """What brings points to their end in a folder.

    Attributes:
        what: a `sweep` or a `search`, for messages.
        folder: with all that comes of it.
        base: the recipe that the points share, without an evaluation.
        asked: what is measured.
        reference: the dense model.
        dense: its figures.
    """

    what: str
    folder: Path
    base: Recipe
    asked: Asked
    reference: Reference
    dense: Measured
    progress: Progress

    def bring(self, point: Point, title: str) -> dict[str, Any]:
        """Bring a point to its end, from wherever it is; its weights are left in FOLDER/NAME where it had to be pruned.

        Args:
            title: stands before what is shown of the work.

        Returns:
            Its record: `point`, `measured` and `report`, as plain data.
        """
        path = self.folder / POINTS / f"{point.name}.json"
        done = distributed.share(read(path) if distributed.is_first() else None)
        if done is None or (point.kept and not done["point"]["kept"]):
            report = self.prune(point, title)
            opened = self.asked.open(self.folder / point.name, Titled(self.progress, title))
            measured = self.reference.measure(opened, point.name)
            done = {"point": asdict(point), "measured": measured.to_dict(), "report": report}
            if distributed.is_first():
                write_json(path, done)
        return done

    def prune(self, point: Point, title: str) -> dict[str, Any]:
        """Prune to FOLDER/NAME, unless it is there already; returns the report of the finished run."""
        place, recipe = self.folder / point.name, recipe_of(self.base, point)
        report = distributed.share(read(place / REPORT) if distributed.is_first() else None)
        unfinished = distributed.share((place / JOURNAL).is_file())
        if report is None or unfinished:
            source = self.reference.checkpoint.source.name
            report = pipeline.prune(source, out=place, recipe=recipe, progress=Titled(self.progress, title)).to_dict()
            if report["revision"] != (measured := self.reference.checkpoint.source.revision):
                raise UserError(
                    f"{source} has moved from {measured} to {report['revision']} on the Hub since the dense model was "
                    f"measured: name the one that is meant, as in {source.split('@')[0]}@{measured}"
                )
        elif other := other_recipe(report, recipe):
            raise UserError(f"{place} holds a finished run with {other}: choose another folder for the {self.what}")
        if not all(distributed.gather((place / INDEX).is_file())):
            raise UserError(f"{place} is not seen by every rank: choose a folder that is, or run on one machine")
        return report

    def remove(self, name: str) -> None:
        """Take a point's weights away; its figures stay."""
        place = self.folder / name
        if distributed.is_first() and place.is_dir():
            clear(place)
            with contextlib.suppress(OSError):  # somebody else's files are in it
                place.rmdir()

    def records(self) -> list[dict[str, Any]]:
        """Those of all points that are done, by this call and by earlier ones; every rank is told."""
        paths = sorted((self.folder / POINTS).glob("*.json")) if distributed.is_first() else []
        found = [record for path in paths if path.name != REQUEST and (record := read(path)) is not None]
        return distributed.share(found)


@contextlib.contextmanager
def working(
    model: str | Path,
    out: str | Path,
    what: str,
    base: Recipe,
    common: Mapping[str, Any],
    asked: Asked,
    points: Sequence[Point],
    shown: Progress,
) -> Iterator[Work]:
    """Plan points, take hold of the folder, and measure the dense model.

    Args:
        what: a `sweep` or a `search`, for messages.
        base: the recipe that the points share, without an evaluation.
        common: what of it is the same for all points that the folder may ever have, as plain data.
        points: those that are planned, so that no mistake shows after hours.

    Raises:
        UserError: a point makes no sense for this model, or the folder holds something else; nothing was done.
    """
    memory.frugal()
    folder = Path(out).expanduser().absolute()
    with torch.no_grad(), distributed.joined():
        tokens = _plan(model, base, points, what, shown)
        with measured_in(folder, model, asked, shown) as reference:
            _check(folder, {"recipe": common, "calibration tokens": tokens, **reference.request()}, what)
            dense = reference.measure(reference.checkpoint, DENSE)
            if dense.figures.perplexity is not None:
                perplexity.check(dense.figures.perplexity, str(model), asked.evaluation)
            yield Work(what, folder, base, asked, reference, dense, shown)


@contextlib.contextmanager
def measured_in(folder: Path, model: str | Path, asked: Asked, shown: Progress) -> Iterator[Reference]:
    """Take hold of a folder for results, and open the dense model that others will be measured beside.

    Raises:
        UserError: the folder cannot be had, not every rank sees it, or the text or a task cannot be had.
    """
    with holding(folder):
        distributed.share(None)  # the first rank has made it
        if not all(distributed.gather(folder.is_dir())):
            raise UserError(f"{folder} is not seen by every rank: choose a folder that is, or run on one machine")
        with distributed.first():
            opened = asked.open(model, shown)
        yield Reference(opened, asked, folder, shown)


def measuring(
    base: Recipe,
    tasks: Sequence[str],
    shots: int | None,
    limit: float | None,
    include_path: Sequence[str | Path],
    batch: int | None,
    unsafe_code: bool,
) -> Asked:
    """What is measured of each point: on the recipe's text, by default `wikitext2`, and by tasks."""
    evaluation = base.evaluate if base.evaluate.text is not None else replace(base.evaluate, text="wikitext2")
    how = tuple(tasks), shots, limit, tuple(map(str, include_path)), batch, unsafe_code
    return Asked(evaluation, *how, base.device, base.dtype, base.trust_remote_code)


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


def write(result: Path, page: Path, told: Mapping[str, Any]) -> None:
    """Write the figures of all points, and draw them."""
    from llmprune.report import curve

    write_json(result, told)
    with writing(page) as draft:
        draft.write_bytes(curve.page(told))


def evaluation_of(chosen: Evaluation) -> dict[str, Any]:
    """What was measured on, as plain data."""
    return {name: value for name, value in vars(chosen).items() if value is not None}


def recipe_of(base: Recipe, point: Point) -> Recipe:
    """A point's own recipe, with the options that the shared one has for its method."""
    chosen = base.method
    method = chosen if isinstance(chosen, dict) and chosen.get("name") == point.method else point.method
    return replace(base, method=method, sparsity=point.pattern)


def other_recipe(report: Mapping[str, Any], recipe: Recipe) -> str:
    """The first key in which the recipe of a finished run is another, in words; the memory changes nothing."""
    return difference(report["recipe"], replace(recipe, max_memory=report["recipe"]["max_memory"]).to_dict())


def shared(base: Recipe) -> dict[str, Any]:
    """What all points share of the recipe, as plain data; the memory changes nothing in the result."""
    found = replace(base, max_memory=None).to_dict()
    for name in ("sparsity", "evaluate", *(("method",) if isinstance(base.method, str) else ())):
        del found[name]
    return found


def read(path: Path) -> dict[str, Any] | None:
    """The plain data of a file; None where there is none, or it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return None


def _plan(model: str | Path, base: Recipe, points: Sequence[Point], what: str, progress: Progress) -> str | None:
    """Plan the points; returns the hash of the calibration tokens."""
    checkpoint, first = pipeline.plan(model, recipe=recipe_of(base, points[0]), progress=progress, look=False)
    if first.budget is not None and first.budget.sparsity is None and len({point.pattern for point in points}) > 1:
        rest = "sweep over one, or methods" if what == "sweep" else "there is nothing to search for"
        raise UserError(f"a plan file says how sparse each linear is, whatever the sparsity: {rest}")
    plans = [first]
    with progress.waiting("planning all points"):
        for point in points[1:]:
            try:
                plans.append(make_plan(checkpoint, recipe_of(base, point), first.room))
            except UserError as error:
                raise UserError(f"{point.method} {point.pattern}: {error}") from None
        needing = [made for made in plans if made.needs_data]
        if not needing:
            return None
        length, cap = needing[0].schedule.length, first.room.cap
        tokens = pipeline.draw(checkpoint, base, length, cap) if distributed.is_first() else None
        return distributed.share(tokens.sha256 if tokens is not None else None)


def _check(folder: Path, request: dict[str, Any], what: str) -> None:
    """See that the folder holds nothing but points of the same request.

    Raises:
        UserError: it is another request's; the message names the first difference.
    """
    if not distributed.is_first():
        return
    path = folder / POINTS / REQUEST
    before = read(path)
    if before is not None:
        known = before["calibration tokens"]  # methods that need none leave them open
        asked = {**request, "calibration tokens": request["calibration tokens"] or known}
        before["calibration tokens"] = known or request["calibration tokens"]
        if other := difference(before, json.loads(json.dumps(asked))):
            raise UserError(
                f"{folder} holds a {what} with {other}: give the same to go on with it, or choose another folder"
            )
        request = asked
    if request != before:
        write_json(path, request)
