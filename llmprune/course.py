"""Prune, recover and measure by one recipe; the dense, the pruned and the recovered model end up side by side.

FOLDER holds `pruned` and `recovered`, each a plain checkpoint, comparison.json, request.json, which says what the two
are of, and what has been measured so far.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llmprune import distributed, memory, pipeline
from llmprune.errors import Interrupted, UserError, unknown
from llmprune.evaluate import perplexity
from llmprune.evaluate.compare import RESULT, Asked, Reference, side_by_side
from llmprune.evaluate.pieces import write_json
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import Source
from llmprune.model.writer import EVALUATION, JOURNAL, REPORT, check_room, clear, difference
from llmprune.points import DENSE, Titled, measured_in, read
from llmprune.progress import Progress, of_first
from llmprune.recipe import Evaluation, Recipe, assemble, build, check_said, read_yaml
from llmprune.recover.options import Training
from llmprune.recover.run import RECORD, WORK, check_request, clear_recovery, recover
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
        if "trust_remote_code" in given:
            raise UserError("recover.trust_remote_code: say it in the section prune, it holds for all")
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
        max_perplexity: a dense model worse than this counts as broken and is not pruned; null for no bound.
        tasks, shots, limit, include_path, batch, unsafe_code: see `tasks.evaluate`.
    """

    text: str | None = "wikitext2"
    length: int | None = None
    max_perplexity: float | None = 1000.0
    tasks: tuple[str, ...] = ()
    shots: int | None = None
    limit: float | None = None
    include_path: tuple[str, ...] = ()
    batch: int | None = None
    unsafe_code: bool = False

    def asked(self, recipe: Recipe) -> Asked:
        """The same where and as the recipe runs models."""
        how = self.tasks, self.shots, self.limit, self.include_path, self.batch, self.unsafe_code
        evaluation = Evaluation(self.text, self.length, max_perplexity=self.max_perplexity)
        return Asked(evaluation, *how, recipe.device, recipe.dtype, recipe.trust_remote_code)


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

    @property
    def training(self) -> Training:
        """How what was pruned is trained, with code of the model's own where pruning has that."""
        training = Training() if self.recover is None else self.recover.training
        return replace(training, trust_remote_code=self.prune.trust_remote_code)

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
        given = _section(values.get("prune"), "prune")
        plain = {key: value for key, value in given.items() if key != "quality"}
        recipe = build(Recipe, plain, "prune")
        if "quality" in given:  # it stands for the keys that the section does not have
            recipe = assemble(None, given)
        check_said(recipe.settled(), given)
        return cls(
            recipe.settled(),
            Recovery.from_dict(values["recover"]) if "recover" in values else None,
            build(Measuring, _section(values.get("evaluate"), "evaluate"), "evaluate"),
        )

    @classmethod
    def read(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> Course:
        """From a YAML file.

        Args:
            changes: dotted keys (`recover.steps`) to other values than those of the file.

        Raises:
            UserError: as `from_dict`, or the file cannot be read.
        """
        values = json.loads(json.dumps(read_yaml(path, "recipe"), default=str))
        for key, value in (changes or {}).items():
            *parents, last = key.split(".")
            place = values
            for parent in parents:
                place = place.setdefault(parent, {})
                if not isinstance(place, dict):
                    raise UserError(f"recipe key {key!r}: {parent} has no keys below it")
            place[last] = value
        try:
            return cls.from_dict(values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Done:
    """What came of a course.

    Attributes:
        pruned, recovered: the folders of the checkpoints; None where nothing was trained.
        comparison: the dense model and these, side by side.
        page_problems: why a report.html could not be drawn, by folder.
    """

    pruned: Path
    recovered: Path | None
    comparison: Comparison
    page_problems: dict[Path, str] = field(default_factory=dict)

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
    asked = course.evaluate.asked(course.prune)
    with torch.no_grad(), distributed.joined(), _onward(restart):
        checkpoint, _ = pipeline.plan(model, recipe=course.prune, progress=shown, look=False)
        if folder.resolve() == checkpoint.source.folder:
            raise UserError(f"{out} is the model itself; write the results to another folder")
        with measured_in(folder, model, asked, shown) as reference:
            opened, request = reference.checkpoint, _request(reference, course)
            with distributed.first(), shown.waiting("planning the recovery"):
                if distributed.is_first():
                    _check(folder, request, restart)
                    _check_ahead(folder, opened, course, model)
            measured = [reference.measure(opened, DENSE)]
            if (dense := measured[0].figures.perplexity) is not None:
                perplexity.check(dense, str(model), asked.evaluation)
            with distributed.first():
                if distributed.is_first():
                    _begin(folder, request, restart)
            places = _make(folder, course, opened.source, shown)
            measured += [reference.measure(asked.open(place, shown), place.name) for place in places]
            reference.finish()
            comparison = side_by_side(measured, asked.evaluation.text)
            comparison.seconds = round(time.monotonic() - began, 3)
            problems: dict[Path, str] = {}
            with distributed.first():
                if distributed.is_first():
                    problems = _tell(folder, places, comparison, opened.source, shown)
        recovered = places[1] if course.recover is not None else None
        return Done(places[0], recovered, comparison, distributed.share(problems))


@contextmanager
def _onward(restart: bool) -> Iterator[None]:
    """Say how to go on after a stop where the command itself would begin anew."""
    try:
        yield
    except Interrupted as error:
        if not restart:
            raise
        raise Interrupted(f"{error}; leave --restart out then") from None


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


def _request(reference: Reference, course: Course) -> dict[str, Any]:
    """What the checkpoints are of, as plain data; nothing in it that does not change them."""
    recovery = None
    if course.recover is not None:
        recovery = asdict(course.recover)
        del recovery["training"]["save_every"]
    request = {"files": reference.files, "prune": replace(course.prune, max_memory=None).to_dict(), "recover": recovery}
    told: dict[str, Any] = json.loads(json.dumps(request))
    return told


def _check(folder: Path, request: Mapping[str, Any], restart: bool) -> None:
    """See that what the folder holds is of the same request.

    Raises:
        UserError: it is of another; the message names the first difference.
    """
    pruned, recovered, before = (folder / PRUNED).exists(), (folder / RECOVERED).exists(), read(folder / REQUEST)
    if not (pruned or recovered):
        return
    if before is None:
        raise UserError(f"{folder} holds checkpoints, but does not say what they are of: choose another folder")
    if restart:
        return
    parts = ("files", "prune") if request["recover"] is None or not recovered else ("files", "prune", "recover")
    if other := difference({part: before[part] for part in parts}, {part: request[part] for part in parts}):
        other = other.replace("recover.training.", "recover.")
        alone = other.startswith("another recover")
        rest = f"take {folder / RECOVERED} away to train anew, or begin all" if alone else "or begin"
        raise UserError(
            f"{folder} holds what came of {other}: give the same to go on with it, choose another folder, {rest} anew "
            "with --restart"
        )


def _check_ahead(folder: Path, dense: Checkpoint, course: Course, model: str | Path) -> None:
    """See before hours of pruning that what comes out of it can be trained, and that there is room.

    Raises:
        UserError: it cannot be.
    """
    there = [path for name in (PRUNED, RECOVERED) for path in (folder / name).rglob("*") if path.is_file()]
    check_room(folder, folder, dense, there, copies=1 if course.recover is None else 2)
    if course.recover is not None:
        if course.recover.training.hidden_weight and course.prune.width.hidden is not None:
            raise UserError(
                "recover.hidden_weight compares the hidden states with the dense model's, which are wider than"
                " those of a model without some hidden channels (prune.width.hidden): leave one of them out"
            )
        check_request(model, course.recover.data, course.recover.teacher(model), course.training)
    dense.forget_tokenizer()


def _begin(folder: Path, request: Mapping[str, Any], restart: bool) -> None:
    """Do away with earlier results where that is asked for, and then say what those to come are of."""
    if restart:
        (folder / RESULT).unlink(missing_ok=True)
        clear_recovery(folder / RECOVERED)
        clear(folder / PRUNED)
    told = dict(request)
    if told["recover"] is None and (folder / RECOVERED).exists():  # it stays, and is still of what it was
        told["recover"] = (read(folder / REQUEST) or {}).get("recover")
    write_json(folder / REQUEST, told)


def _make(folder: Path, course: Course, source: Source, shown: Progress) -> list[Path]:
    """Prune and recover, as far as that is not done; returns the folders of the checkpoints."""
    places = [folder / PRUNED]
    _tidy()
    if not _finished(places[0]):
        pipeline.prune(source.name, out=places[0], recipe=course.prune, progress=Titled(shown, "pruning: "))
    if course.recover is not None:
        places.append(folder / RECOVERED)
        if not _finished(places[1]):
            with torch.enable_grad():
                recover(
                    places[0],
                    out=places[1],
                    data=course.recover.data,
                    distill=course.recover.teacher(source.name),
                    progress=Titled(shown, "recovering: "),
                    **asdict(course.training),
                )
        elif distributed.is_first():  # stopped between the two
            shutil.rmtree(places[1] / WORK, ignore_errors=True)
    _tidy()
    return places


def _tidy() -> None:
    """Give back the memory of one step before the next is laid out."""
    gc.collect()  # trainers and optimisers stand in circles of references
    memory.give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tell(folder: Path, places: list[Path], comparison: Comparison, source: Source, shown: Progress) -> dict[Path, str]:
    """Write the comparison, also beside each checkpoint, and draw their pages anew with it; returns what went wrong."""
    told, problems = comparison.to_dict(), {}
    write_json(folder / RESULT, told)
    for place in places:
        write_json(place / EVALUATION / RESULT, told)
        with shown.waiting("drawing the report"):
            report = Report.read(read(place / REPORT) or {}, place)
            pipeline.draw_page(report, source)
            if report.page_problem is not None:
                problems[place] = report.page_problem
    return problems
