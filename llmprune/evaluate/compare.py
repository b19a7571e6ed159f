"""Several checkpoints beside the dense one: sizes, zeros, perplexity, divergence, tasks, and what is beyond noise.

The dense model is measured once, and what leaves its last block is kept in files until all others are compared with it.
Every piece of work is kept in the folder of the results under the hash of the model's files, of the tokens, the options
and the versions, so that the same command goes on where it was cut off, and a longer one takes over what is there.

Differences are paired: over the documents of a task (see `paired`), and over the windows of the text for the loss that
the perplexity is made of. Windows follow each other in a text and are not independent of one another, so that the
standard error over them is a little too small; documents of a task are taken for independent. With every comparison
the number of differences grows among which one may look large by chance: their p are adjusted by Holm's method over
all of them, and one is beyond noise where the adjusted p is below 0.05. A figure that is no mean over documents, such
as F1 or that of a group of tasks, has a difference, but nobody can tell its noise: p and verdict are None.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llmprune import distributed, memory
from llmprune.errors import Failure, NotFinite, UserError
from llmprune.evaluate import divergence, perplexity
from llmprune.evaluate.paired import LEVEL, figure_of, holm, paired
from llmprune.evaluate.pieces import Pieces, States, holding, write_json
from llmprune.evaluate.stream import final_states
from llmprune.model import blocks
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.files import sha256_of
from llmprune.model.source import resolve
from llmprune.model.writer import fingerprint_files
from llmprune.planning import sequence_length
from llmprune.progress import Progress, of_first
from llmprune.recipe import Evaluation
from llmprune.report.comparison import Compared, Comparison, Difference
from llmprune.report.inspect import count
from llmprune.report.record import Score, versions

RESULT = "comparison.json"

Files = dict[str, str]
"""Names and hashes of a model's files."""


@dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        evaluation: the text, and how it is cut; without a text there is no perplexity and no divergence.
        tasks, shots, limit, include_path, batch, unsafe_code: as for `tasks.evaluate`.
        device, dtype, trust_remote_code: as in a recipe.
    """

    evaluation: Evaluation = field(default_factory=Evaluation)
    tasks: tuple[str, ...] = ()
    shots: int | None = None
    limit: float | None = None
    include_path: tuple[str, ...] = ()
    batch: int | None = None
    unsafe_code: bool = False
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.evaluation.stride is not None:
            raise UserError("models are compared on windows that do not overlap: leave the stride out")

    def open(self, model: str | Path, progress: Progress) -> Checkpoint:
        """A checkpoint on the device and in the dtype of the comparison."""
        source = resolve(model, self.dtype, trust_remote_code=self.trust_remote_code, progress=progress)
        return Checkpoint(source, distributed.local_device(self.device), self.dtype)


@dataclass
class Measured:
    """A model's figures, and what they are made of.

    Attributes:
        figures: what is shown.
        tokens: the hash of the tokens that its perplexity is of.
        losses: what it lost on each window, in nats per predicted token.
        documents: see `tasks.documents`.
        notes: what could not be measured or compared.
    """

    figures: Compared
    tokens: str | None
    losses: list[float]
    documents: dict[str, list[dict[str, Any]]]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Measured:
        """The same from plain data."""
        return cls(**{**data, "figures": Compared.read(data["figures"])})


def compare(
    dense: str | Path,
    models: Sequence[str | Path],
    *,
    text: str | Evaluation | None = None,
    length: int | None = None,
    tasks: Sequence[str] = (),
    shots: int | None = None,
    limit: float | None = None,
    include_path: Sequence[str | Path] = (),
    batch: int | None = None,
    unsafe_code: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure several models beside the dense one.

    Args:
        dense: what they are compared with: a Hub name, a folder, or a `.gguf` file.
        models: one or more others. Where one makes other tokens of the text, or has another vocabulary, its divergence
            is left out, and its perplexity is of its own tokens and not compared. Where what it says is not finite,
            that is noted, and the others are measured all the same.
        text, length: for perplexity and divergence; see `perplexity`. By default a context that all of them can take.
        tasks, shots, limit, include_path, batch, unsafe_code: for the tasks; see `tasks.evaluate`.
        device, dtype, trust_remote_code: as in a recipe.
        out: the folder for comparison.json, and for what is done, so that the same call goes on from there.
        progress: where to show how far the work is.

    Raises:
        UserError: a model, the text or a task cannot be had. What was measured by then is kept in `out`.
        NotFinite: what the dense model says is not finite.
    """
    began = time.monotonic()
    if not models:
        raise UserError("one model alone cannot be compared: name at least one beside the dense one")
    evaluation = Evaluation.of(text, length)
    own, where = tuple(map(str, include_path)), (str(device), str(dtype), trust_remote_code)
    asked = Asked(evaluation, tuple(tasks), shots, limit, own, batch, unsafe_code, *where)
    shown = of_first(progress)
    with torch.no_grad(), distributed.joined(), _folder(out) as folder:
        with distributed.first():
            opened = [asked.open(model, shown) for model in (dense, *models)]
            if evaluation.text is not None:
                shortest = min(sequence_length(checkpoint, evaluation.length) for checkpoint in opened)
                asked = replace(asked, evaluation=replace(evaluation, length=shortest))
        reference = Reference(opened.pop(0), asked, folder, shown)
        names = short_names([str(dense), *map(str, models)])
        measured = [reference.measure(reference.checkpoint, names[0])]
        while opened:
            measured.append(reference.measure(opened.pop(0), names[len(measured)]))
        made = side_by_side(measured, evaluation.text)
        made.seconds = round(time.monotonic() - began, 3)
        if out is not None and distributed.is_first():
            write_json(folder / RESULT, made.to_dict())
        reference.finish()
    return made


class Reference:
    """A dense model that others are measured beside; it is run once for all of them.

    Attributes:
        checkpoint: the dense model.
        text: what its tokenizer makes of the text, None without a text.
        files: the hashes of its files.
    """

    def __init__(self, dense: Checkpoint, asked: Asked, folder: Path, progress: Progress) -> None:
        self.checkpoint = dense
        self._asked, self._progress = asked, progress
        self._pieces, self._folder = Pieces(folder), folder
        self.text: perplexity.Text | None = None
        with distributed.first(), progress.waiting("reading the text"):
            if asked.evaluation.text is not None:
                self.text = perplexity.read_text(self.checkpoint, asked.evaluation)
                self.checkpoint.check_tokens(self.text.windows)
        self._tasks = self._find_tasks() if asked.tasks else {}
        self.files = self._hash(self.checkpoint)

    def measure(self, checkpoint: Checkpoint, name: str) -> Measured:
        """All that was asked for of a model, the dense one among them."""
        dense = checkpoint is self.checkpoint
        files = self.files if dense else self._hash(checkpoint)
        with self._progress.waiting(f"counting the zeros of {name}"):
            sizes = self._pieces.of({"sizes": files, "versions": _made_by()}, lambda: vars(count(checkpoint)))
        shards = {file: sha256 for file, sha256 in files.items() if file.endswith(".safetensors")}
        measured = Measured(Compared(name, checkpoint.source.name, dense, **sizes, shards=shards), None, [], {})
        if self.text is not None:
            self._read_to(measured, checkpoint, files, self.text)
        for task, key in self._tasks.items():
            made_from = {**key, **self._run(checkpoint), "files": files}
            known = {(score.task, score.metric, score.filter) for score in measured.figures.scores}
            if any(name == task for name, _, _ in known):  # it was in a group
                continue
            told = self._pieces.of(made_from, functools.partial(self._task, checkpoint, task))
            found = [Score(**score) for score in told["scores"]]
            measured.figures.scores += [one for one in found if (one.task, one.metric, one.filter) not in known]
            measured.documents.update(told["documents"])
            measured.notes += [f"{figure} of {name} is not finite, and left out" for figure in told["broken"]]
        if self._tasks:
            from llmprune.evaluate.tasks import means

            measured.figures.means = means(self._asked.tasks, measured.figures.scores)
        return measured

    def request(self) -> dict[str, Any]:
        """All that the figures depend on, beside the models that are compared with this one."""
        text = self.text.sha256 if self.text is not None else None
        return {**self._run(self.checkpoint), "files": self.files, "evaluation text": text, "tasks": self._tasks}

    def finish(self) -> None:
        """All are measured: what was kept of the dense model's states goes."""
        if self.text is not None:
            self._states(self.text).forget()

    # -- the text ----------------------------------------------------------------------------------------------------

    def _read_to(
        self, measured: Measured, checkpoint: Checkpoint, files: dict[str, str], dense_text: perplexity.Text
    ) -> None:
        """Put the perplexity and the divergence into what was measured."""
        name, figures = measured.figures.name, measured.figures
        text, other = self._own_text(checkpoint, dense_text)
        if other:
            alike = text.sha256 == dense_text.sha256
            rest = "" if alike else ", and a perplexity of its own tokens, which is not compared"
            measured.notes.append(f"{other}: no divergence{rest}")
        key = {"tokens": text.sha256, "files": files, **self._run(checkpoint)}
        title = f"evaluating {name}"
        if other or checkpoint is self.checkpoint:
            kept = self._pieces.of({"losses": key}, lambda: self._losses(checkpoint, text, title, keep=not other))
        else:
            made_from = {"apart": key, "dense": self.files}
            kept = self._pieces.of(made_from, lambda: self._apart(checkpoint, text, title))
        if "broken" in kept:
            measured.notes.append(f"{kept['broken']}; it has no perplexity here")
            return
        if "divergence" in kept:
            sums = torch.tensor([kept["divergence"], kept["agreeing"]], dtype=torch.float64).T
            figures.divergence = divergence.figure(sums, text, kept["seconds"])
        losses = torch.tensor(kept["losses"], dtype=torch.float64)
        figures.perplexity = perplexity.figure(losses, text, name, kept["seconds"])
        measured.tokens = text.sha256
        measured.losses = (losses / (text.windows.shape[1] - 1)).tolist()

    def _own_text(self, checkpoint: Checkpoint, text: perplexity.Text) -> tuple[perplexity.Text, str]:
        """The text as a model reads it, and how its tokens differ from the dense model's, in words; empty if not."""
        if checkpoint is self.checkpoint:
            return text, ""
        other = divergence.other_tokens(self.checkpoint, checkpoint)
        if not other and divergence.read_alike(self.checkpoint, checkpoint):
            return text, ""
        own = perplexity.read_text(checkpoint, self._asked.evaluation)
        if not other and own.sha256 != text.sha256:
            other = f"{checkpoint.source.name} and {self.checkpoint.source.name} make other tokens of {text.name}"
        return own, other

    def _losses(self, checkpoint: Checkpoint, text: perplexity.Text, title: str, keep: bool) -> dict[str, Any]:
        began = time.monotonic()
        through = self._states(text).keep if keep else None
        found = perplexity.losses(checkpoint, text, self._progress, title, keep=through)
        return self._sound(checkpoint, began, losses=found)

    def _apart(self, checkpoint: Checkpoint, text: perplexity.Text, title: str) -> dict[str, Any]:
        began = time.monotonic()
        checkpoint.check_tokens(text.windows)
        states = self._states(text)
        if not states.whole:
            self._losses(self.checkpoint, text, "evaluating the dense model again", keep=True)
        groups = perplexity.batched(self.checkpoint, text)
        batches = [text.windows[group] for group in groups]
        chain, dense_chain = blocks.probe(checkpoint), blocks.probe(self.checkpoint)
        stream = final_states(checkpoint, chain, batches, self._progress, title, memory.available() // 4)
        dense = self.checkpoint, dense_chain, states.read(self.checkpoint)
        sums = divergence.apart(dense, (checkpoint, chain, stream), text, groups)
        kl, agreeing, losses = sums.T
        return self._sound(checkpoint, began, losses=losses, divergence=kl, agreeing=agreeing)

    def _sound(self, checkpoint: Checkpoint, began: float, **sums: torch.Tensor) -> dict[str, Any]:
        """Sums over each window as plain data; `broken` says why there are none.

        Raises:
            NotFinite: they are the dense model's, and not finite.
        """
        seconds = round(time.monotonic() - began, 3)
        if all(bool(values.isfinite().all()) for values in sums.values()):
            return {**{name: values.tolist() for name, values in sums.items()}, "seconds": seconds}
        broken = f"what {checkpoint.source.name} says of the text is not finite"
        if checkpoint is self.checkpoint:
            raise NotFinite(f"{broken}; try --dtype float32")
        return {"broken": broken, "seconds": seconds}

    def _states(self, text: perplexity.Text) -> States:
        key = {"tokens": text.sha256, "files": self.files, **self._run(self.checkpoint)}
        return States(self._folder, key, len(perplexity.batched(self.checkpoint, text)))

    # -- the tasks ---------------------------------------------------------------------------------------------------

    def _find_tasks(self) -> dict[str, dict[str, Any]]:
        """The tasks that are run one after the other, each with all that its figures depend on beside the model."""
        import lm_eval

        from llmprune.evaluate import tasks

        asked = self._asked
        with self._progress.waiting("finding the tasks"), tasks.calm():
            self._manager, names = tasks.find(asked.tasks, list(asked.include_path))
        options = {name: getattr(asked, name) for name in ("shots", "limit", "batch")}
        options["own"] = [distributed.share(_hash_folder(Path(folder))) for folder in asked.include_path]
        # Groups come first: a task that was in one of them is not run again.
        names = sorted(dict.fromkeys(names), key=set(self._manager.all_subtasks).__contains__)
        return {name: {"task": name, **options, "lm_eval": lm_eval.__version__} for name in names}

    def _task(self, checkpoint: Checkpoint, task: str) -> dict[str, Any]:
        from llmprune.evaluate import tasks

        asked = self._asked
        try:
            told = tasks.evaluate(
                checkpoint.source.folder,  # by its name, a branch on the Hub may have moved since the files were hashed
                [task],
                shots=asked.shots,
                limit=asked.limit,
                include_path=asked.include_path,
                batch=asked.batch,
                unsafe_code=asked.unsafe_code,
                device=asked.device,
                dtype=asked.dtype,
                trust_remote_code=asked.trust_remote_code,
                samples=True,
                manager=self._manager,
                progress=self._progress,
            )
        except NotFinite:
            if checkpoint is self.checkpoint:
                raise
            return {"scores": [], "broken": [task], "documents": {}}
        scores = [vars(score) for score in told.scores]
        return {"scores": scores, "broken": told.broken, "documents": tasks.documents(told.raw)}

    # -- what all depends on -----------------------------------------------------------------------------------------

    def _hash(self, checkpoint: Checkpoint) -> Files:
        with self._progress.waiting(f"hashing the files of {checkpoint.source.name}"):
            return distributed.share(fingerprint_files(checkpoint) if distributed.is_first() else {})

    def _run(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {"device": checkpoint.device.type, "dtype": str(checkpoint.dtype), "versions": _made_by()}


def _made_by() -> dict[str, str]:
    known = versions()
    return {name: known[name] for name in ("llmprune", "torch", "transformers")}


def side_by_side(measured: Sequence[Measured], text: str | None) -> Comparison:
    """What was measured, with the differences of all from the first, which is the dense one."""
    dense, *others = measured
    found = [difference for model in others for difference in _differences(dense, model)]
    adjusted = iter(holm([difference.p for difference in found if difference.p is not None]))
    judged = [
        difference
        if difference.p is None
        else replace(difference, adjusted=(p := next(adjusted)), beyond_noise=p < LEVEL)
        for difference in found
    ]
    rule = {"level": LEVEL, "adjusted": "holm", "tests": sum(difference.p is not None for difference in found)}
    notes = [note for model in measured for note in model.notes]
    figures = [model.figures for model in measured]
    return Comparison(dense.figures.name, text, figures, judged, rule, notes, versions())


def _differences(dense: Measured, model: Measured) -> Iterator[Difference]:
    name = model.figures.name
    if dense.tokens is not None and dense.tokens == model.tokens:
        found = paired(dense.losses, model.losses, [1.0] * len(dense.losses))
        yield Difference(name, "perplexity", "nats", "none", **vars(found))
    before = {(score.task, score.metric, score.filter): score for score in dense.figures.scores}
    for score in model.figures.scores:
        first = before.get((score.task, score.metric, score.filter))
        if first is None:
            continue
        place = name, score.task, score.metric, score.filter
        ours, theirs, weights = _pairs(dense, model, score)
        kind = figure_of(ours, weights, first.value) if weights else None
        if kind is not None and kind is figure_of(theirs, weights, score.value):
            yield Difference(*place, **vars(paired(ours, theirs, weights, kind)))
        else:
            yield Difference(*place, score.value - first.value, None, score.documents, None)


def _pairs(dense: Measured, model: Measured, score: Score) -> tuple[list[float], list[float], list[float]]:
    """What both models have for each document of a score, and the documents' weights; none where these are no numbers.

    Raises:
        Failure: they are not the same documents.
    """
    sides = []
    for measured in (dense, model):
        told = [entry for entry in measured.documents.get(score.task, ()) if entry["filter"] == score.filter]
        sides.append({entry["id"]: entry for entry in told})
    first, second = sides
    if {number: entry["hash"] for number, entry in first.items()} != {n: entry["hash"] for n, entry in second.items()}:
        raise Failure(
            f"the documents of {score.task} are not the same for {dense.figures.name} and {model.figures.name}: its "
            "data has changed meanwhile; choose another folder"
        )
    found: tuple[list[float], list[float], list[float]] = ([], [], [])
    for number, entry in first.items():
        pair = [_weighed(side["values"].get(score.metric)) for side in (entry, second[number])]
        if pair[0] is None or pair[1] is None or pair[0][1] != pair[1][1]:
            return [], [], []
        for column, value in zip(found, (pair[0][0], pair[1][0], pair[0][1]), strict=True):
            column.append(value)
    return found


def _weighed(value: Any) -> tuple[float, float] | None:
    """A document's value and weight; None where it is something else."""
    if isinstance(value, bool | int | float):
        return float(value), 1.0
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, int | float) for part in value):
        return float(value[0]), float(value[1])
    return None


def short_names(paths: Sequence[str]) -> list[str]:
    """Short names for models, each of them once."""
    short = [Path(path).name or path for path in paths]
    names: list[str] = []
    for path, last in zip(paths, short, strict=True):
        name = last if short.count(last) == 1 else path
        again = sum(earlier == path for earlier in paths[: len(names)])
        names.append(f"{name} ({again + 1})" if again else name)
    return names


def _hash_folder(folder: Path) -> Files:
    """The hash of each file in a folder of tasks, data among them."""
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    """The folder for the results; a temporary one where none was asked for."""
    if out is not None:
        folder = Path(out).expanduser().absolute()
        with holding(folder):
            yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="llmprune-") as name:
            yield Path(name)
