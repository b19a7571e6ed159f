"""Prune, recover and measure by one recipe; the dense, the pruned and the recovered model end up side by side.

FOLDER holds `pruned` and `recovered`, each a plain checkpoint, comparison.json, request.json, which says what the two
are of, and what has been measured so far.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llmprune import distributed, memory, pipeline
from llmprune.errors import UserError, unknown
from llmprune.evaluate import perplexity
from llmprune.evaluate.compare import RESULT, Asked, Reference, side_by_side
from llmprune.evaluate.pieces import holding, write_json
from llmprune.model.source import Source
from llmprune.model.writer import EVALUATION, INDEX, JOURNAL, REPORT, difference
from llmprune.points import DENSE, Titled, read
from llmprune.progress import Progress, of_first
from llmprune.recipe import Evaluation, Recipe, build, read_yaml
from llmprune.recover.options import Training
from llmprune.recover.run import RECORD, check_text, recover
from llmprune.report.comparison import Comparison
from llmprune.report.record import Report

PRUNED, RECOVERED, REQUEST = "pruned", "recovered", "request.json"


@dataclass(frozen=True)
class Recovery:
    """How what was pruned is trained.

    Attributes:
        data: the text, as for `recover`.
        distill: the model whose answers are the aim: true for the one that is pruned, or another.
        training: everything else.
    """

    data: str
    distill: bool | str = False
    training: Training = field(default_factory=Training)

    @classmethod
    def from_dict(cls, values: Any) -> Recovery:
        """From the section `recover` of a recipe, which has the options of `Training` beside `data` and `distill`.

        Raises:
            UserError: an unknown key, or a value that makes no sense.
        """
        given = dict(_section(values, "recover"))
        own = build(_Named, {key: given.pop(key) for key in ("data", "distill") if key in given}, "recover")
        made = cls(own.data, own.distill, Training.read(given))
        made.training.weights(bool(made.distill))
        return made

    def teacher(self, model: str | Path) -> str | Path | None:
        """The model whose answers are the aim, where `model` is the one that is pruned; None for none."""
        return model if self.distill is True else self.distill or None


@dataclass(frozen=True)
class _Named:
    data: str
    distill: bool | str = False


@dataclass(frozen=True)
class Measuring:
    """What the models are measured by.

    Attributes:
        text, length: for perplexity and divergence; null for neither.
        tasks, shots, limit, include_path, batch: see `tasks.evaluate`.
    """

    text: str | None = "wikitext2"
    length: int | None = None
    tasks: tuple[str, ...] = ()
    shots: int | None = None
    limit: float | None = None
    include_path: tuple[str, ...] = ()
    batch: int | None = None

    def asked(self, recipe: Recipe) -> Asked:
        """The same where and as the recipe runs models."""
        where = (recipe.device, recipe.dtype, recipe.trust_remote_code)
        evaluation = Evaluation(self.text, self.length)
        return Asked(evaluation, self.tasks, self.shots, self.limit, self.include_path, self.batch, *where)


@dataclass(frozen=True)
class Course:
    """A recipe with a section for each step.

    Attributes:
        prune: as for `prune`.
        recover: None where nothing is trained.
        evaluate: what all are measured by.
    """

    prune: Recipe = field(default_factory=Recipe)
    recover: Recovery | None = None
    evaluate: Measuring = field(default_factory=Measuring)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Course:
        """From plain data.

        Raises:
            UserError: an unknown key, or a value that makes no sense; the message names it.
        """
        sections = ("prune", "recover", "evaluate")
        for key in values:
            if key not in sections:
                raise unknown("section", str(key), sections)
        trained = values.get("recover")
        return cls(
            build(Recipe, _section(values.get("prune"), "prune"), "prune").settled(),
            None if trained is None else Recovery.from_dict(trained),
            build(Measuring, _section(values.get("evaluate"), "evaluate"), "evaluate"),
        )

    @classmethod
    def read(cls, path: str | Path) -> Course:
        """From a YAML file.

        Raises:
            UserError: as `from_dict`, or the file cannot be read.
        """
        try:
            return cls.from_dict(read_yaml(path, "recipe"))
        except UserError as error:
            raise UserError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None


@dataclass(frozen=True)
class Done:
    """What came of a course.

    Attributes:
        pruned, recovered: the folders of the checkpoints; None where nothing was trained.
        comparison: the dense model and these, side by side.
    """

    pruned: Path
    recovered: Path | None
    comparison: Comparison

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        recovered = None if self.recovered is None else str(self.recovered)
        return {"pruned": str(self.pruned), "recovered": recovered, **self.comparison.to_dict()}


def run(
    model: str | Path,
    *,
    out: str | Path,
    recipe: Course | Mapping[str, Any] | str | Path,
    restart: bool = False,
    progress: Progress | None = None,
) -> Done:
    """Prune a model, train what was pruned within its zeros, and measure both beside the dense model.

    The text and the tasks are found, the dense model is measured and the text of the training is drawn before anything
    is pruned. Stopped at any moment, the same call goes on from there. What is measured may be another the next time.

    Args:
        model: a Hub name, a folder, or a `.gguf` file.
        out: the folder, see above.
        recipe: a `Course`, plain data, or a YAML file.
        restart: do away with what an earlier call has made in `out`.
        progress: where to show how far the work is.

    Raises:
        UserError: the request makes no sense for this model, or the folder holds something else; nothing was done.
        Failure: a step could not be finished.
    """
    began = time.monotonic()
    if isinstance(recipe, str | Path):
        recipe = Course.read(recipe)
    course = recipe if isinstance(recipe, Course) else Course.from_dict(recipe)
    memory.frugal()
    folder, shown = Path(out).expanduser().absolute(), of_first(progress)
    asked, trained = course.evaluate.asked(course.prune), course.recover
    with torch.no_grad(), distributed.joined():
        pipeline.plan(model, recipe=course.prune, progress=shown, look=False)
        with holding(folder):
            distributed.share(None)  # the first rank has made it
            with distributed.first():
                opened = asked.open(model, shown)
            reference, source = Reference(opened, asked, folder, shown), opened.source
            _check(folder, reference, course, restart)
            if trained is not None:
                with distributed.first(), shown.waiting("reading the text of the recovery"):
                    if distributed.is_first():
                        check_text(reference.checkpoint, trained.training, trained.data)
            measured = [reference.measure(reference.checkpoint, DENSE)]
            if (dense := measured[0].figures.perplexity) is not None:
                perplexity.check(dense, str(model), asked.evaluation)
            places = [folder / PRUNED]
            if restart or not _finished(places[0]):
                words = Titled(shown, "pruning: ")
                pipeline.prune(source.name, out=places[0], recipe=course.prune, restart=restart, progress=words)
            if trained is not None:
                places.append(folder / RECOVERED)
                if restart or not _finished(places[1]):
                    options = {**asdict(trained.training), "trust_remote_code": course.prune.trust_remote_code}
                    with torch.enable_grad():
                        recover(
                            places[0], out=places[1], data=trained.data, distill=trained.teacher(source.name),
                            restart=restart, progress=Titled(shown, "recovering: "), **options,
                        )  # fmt: skip
            for place in places:
                if not all(distributed.gather((place / INDEX).is_file())):
                    raise UserError(f"{place} is not seen by every rank: choose a folder that is, or use one machine")
                measured.append(reference.measure(asked.open(place, shown), place.name))
            reference.finish()
            comparison = side_by_side(measured, asked.evaluation.text)
            comparison.seconds = round(time.monotonic() - began, 3)
            with distributed.first():
                if distributed.is_first():
                    _tell(folder, places, comparison, source, shown)
    return Done(places[0], places[1] if trained is not None else None, comparison)


def _section(values: Any, name: str) -> Mapping[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise UserError(f"{name} must be a mapping of keys to values, not {values!r}")
    return values


def _finished(place: Path) -> bool:
    """Whether a step has come to its end in a folder; the first rank says so for all."""
    there = any((place / name).is_file() for name in (REPORT, RECORD)) and not (place / JOURNAL).exists()
    return bool(distributed.share(there if distributed.is_first() else None))


def _check(folder: Path, reference: Reference, course: Course, restart: bool) -> None:
    """See that what the folder holds is of the same request, and say there what it is of.

    Raises:
        UserError: it is of another; the message names the first difference.
    """
    if not distributed.is_first():
        return
    path = folder / REQUEST
    recovery = None if course.recover is None else asdict(course.recover)
    request = {"files": reference.files, "prune": replace(course.prune, max_memory=None).to_dict(), "recover": recovery}
    told = json.loads(json.dumps(request))
    before = read(path)
    if before is not None and before["recover"] is None and not restart:
        before["recover"] = told["recover"]  # what was pruned can still be trained
    if before is None and any((folder / name).exists() for name in (PRUNED, RECOVERED)):
        raise UserError(f"{folder} holds checkpoints, but does not say what they are of: choose another folder")
    if before is not None and not restart and (other := difference(before, told)):
        raise UserError(
            f"{folder} holds what came of {other}: give the same to go on with it, choose another folder, or begin "
            "anew with --restart"
        )
    write_json(path, told)


def _tell(folder: Path, places: list[Path], comparison: Comparison, source: Source, shown: Progress) -> None:
    """Write the comparison, also beside each checkpoint, and draw their pages anew with it."""
    told = comparison.to_dict()
    write_json(folder / RESULT, told)
    for place in places:
        write_json(place / EVALUATION / RESULT, told)
        with shown.waiting("drawing the report"):
            pipeline.draw_page(Report.read(read(place / REPORT) or {}, place), source)
