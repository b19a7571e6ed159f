"""What is known of a pruned checkpoint: its llmprune.json, and what was found out later, in its folder `evaluation`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llmprune.errors import UserError
from llmprune.model.source import Source, present
from llmprune.model.writer import EVALUATION, JOURNAL, REPORT
from llmprune.report.record import Divergence, Perplexity, Report, Score, taken

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluated:
    """What `llmprune eval -o OUT/evaluation` found.

    Attributes:
        model: what was evaluated, as it was asked for.
        perplexity, divergence: None where they were not asked for.
        against: the dense model of the divergence.
        scores, means: what tasks told.
    """

    model: str
    perplexity: Perplexity | None
    divergence: Divergence | None
    against: str | None
    scores: list[Score]
    means: dict[str, float]


@dataclass(frozen=True)
class Compared:
    """One model of a comparison.

    Attributes:
        name, path: as it is called, and where it is.
        dense: whether it is what the others are compared with.
        sparsity: zeros as a fraction of all weights.
        perplexity, divergence, scores: None or empty where they were not asked for.
    """

    name: str
    path: str
    dense: bool
    sparsity: float | None
    perplexity: Perplexity | None
    divergence: Divergence | None
    scores: list[Score]


@dataclass(frozen=True)
class Difference:
    """How a model differs from the dense one in one figure, paired document by document.

    Attributes:
        model, task, metric, filter: the figure; of the task `perplexity` it is the loss in nats for each token.
        difference, stderr: model minus dense, and its standard error.
        documents: how many it is the mean over.
        p: how often chance alone makes a difference as large.
        beyond_noise: whether it counts as one; None where that could not be told.
    """

    model: str
    task: str
    metric: str
    difference: float
    filter: str = "none"
    stderr: float | None = None
    documents: int = 0
    p: float | None = None
    beyond_noise: bool | None = None


@dataclass(frozen=True)
class Comparison:
    """What `llmprune compare -o OUT/evaluation` found."""

    models: list[Compared]
    differences: list[Difference]


@dataclass(frozen=True)
class Generation:
    """What two models go on with after one prompt.

    Attributes:
        prompt: what they were given.
        sparse, dense: what they answered; None where the dense model was not at hand.
        tokens: the most that they were let say.
    """

    prompt: str
    sparse: str
    dense: str | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Results:
    """All that is known of a checkpoint.

    Attributes:
        report: of the run that wrote it.
        evaluated, compared, generations: what was found out later, if anything.
    """

    report: Report
    evaluated: Evaluated | None = None
    comparison: Comparison | None = None
    generations: list[Generation] = field(default_factory=list)


def read_results(out: Path) -> Results:
    """Read what lies in a folder that llmprune wrote.

    Raises:
        UserError: it holds no report of llmprune, or a file in it cannot be read.
    """
    if not (out / REPORT).is_file():
        unfinished = "; its run has not finished" if (out / JOURNAL).exists() else ""
        raise UserError(f"no {REPORT} in {out}: it was not written by llmprune{unfinished}")
    report = _read(out / REPORT, lambda data: Report.read(data, out), "it may be of another version of llmprune")
    folder = out / EVALUATION
    again = "make it again, or take it away"
    return Results(
        report,
        _read(folder / "eval.json", _evaluated, again) if (folder / "eval.json").is_file() else None,
        _read(folder / "comparison.json", _comparison, again) if (folder / "comparison.json").is_file() else None,
        read_generations(out),
    )


def find_dense(report: Report, trusted: bool = False) -> Source | None:
    """The dense model of a run, if it is still on this machine; nothing is downloaded or converted."""
    dtype = str(report.recipe.get("dtype", "auto"))
    return present(report.model, report.revision, dtype, trust_remote_code=trusted)


def read_generations(out: Path) -> list[Generation]:
    """What is kept of the answers of a checkpoint and its dense original; none where nothing is.

    Raises:
        UserError: the file cannot be read.
    """
    path = out / EVALUATION / "generations.json"
    if not path.is_file():
        return []
    return _read(path, lambda data: _all(Generation, data, "answer"), "make it again, or take it away")


def _read(path: Path, build: Callable[[Any], T], advice: str) -> T:
    try:
        return build(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be used: {error} ({advice})") from None


def _evaluated(data: Mapping[str, Any]) -> Evaluated:
    apart, tasks = data.get("divergence"), data.get("tasks") or {}
    return Evaluated(
        str(data.get("model")),
        _maybe(Perplexity, data.get("perplexity"), "perplexity"),
        _maybe(Divergence, apart, "divergence"),
        apart.get("dense") if apart else None,
        _all(Score, tasks.get("scores") or [], "score"),
        dict(tasks.get("means") or {}),
    )


def _comparison(data: Mapping[str, Any]) -> Comparison:
    models = [
        Compared(
            str(entry.get("name")),
            str(entry.get("path")),
            bool(entry.get("dense")),
            entry.get("sparsity"),
            _maybe(Perplexity, entry.get("perplexity"), "perplexity"),
            _maybe(Divergence, entry.get("divergence"), "divergence"),
            _all(Score, entry.get("scores") or [], "score"),
        )
        for entry in data.get("models") or []
    ]
    return Comparison(models, _all(Difference, data.get("differences") or [], "difference"))


def _maybe(kind: type[T], data: Any, where: str) -> T | None:
    return taken(kind, data, where) if data else None


def _all(kind: type[T], data: Any, where: str) -> list[T]:
    if not isinstance(data, list):
        raise ValueError(f"a list of {where}s is expected")
    return [taken(kind, entry, f"{where} {place}") for place, entry in enumerate(data)]
