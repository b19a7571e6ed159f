"""What is known of a pruned checkpoint: its llmprune.json, and what was found out later, in its folder `evaluation`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llmprune.errors import UserError
from llmprune.model.index import hash_weights
from llmprune.model.source import Source, present
from llmprune.model.writer import EVALUATION, JOURNAL, REPORT
from llmprune.report.comparison import Comparison
from llmprune.report.record import Divergence, Perplexity, Report, Score, every, maybe
from llmprune.report.speed import Speed

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluated:
    """What `llmprune eval -o OUT/evaluation` found.

    Attributes:
        model: what was evaluated, as it was asked for.
        shards: the sha256 of the files that hold its weights, by name.
        perplexity, divergence: None where they were not asked for.
        against: the dense model of the divergence.
        scores, means: what tasks told.
    """

    model: str
    shards: dict[str, str]
    perplexity: Perplexity | None
    divergence: Divergence | None
    against: str | None
    scores: list[Score]
    means: dict[str, float]


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
        shards: the sha256 of the files that hold its weights now, by name; what was measured of others is not its own.
        evaluated, comparison, generations, speed: what was found out later, if anything.
    """

    report: Report
    shards: dict[str, str]
    evaluated: Evaluated | None = None
    comparison: Comparison | None = None
    generations: list[Generation] = field(default_factory=list)
    speed: Speed | None = None

    @property
    def changed(self) -> bool:
        """Whether the weights are others than the run wrote: somebody has trained them since."""
        return self.shards != self.report.shards


def read_results(out: Path, shards: dict[str, str] | None = None) -> Results:
    """Read what lies in a folder that llmprune wrote.

    Args:
        shards: see `Results`, where they are known already; else the files are read.

    Raises:
        UserError: it holds no report of llmprune, or a file in it cannot be read.
    """
    report = read_run(out)
    later = read_evaluated(out), read_comparison(out), read_generations(out), read_speed(out)
    return Results(report, hash_weights(out) if shards is None else shards, *later)


def read_run(out: Path) -> Report:
    """The report of the run that wrote a folder.

    Raises:
        UserError: there is none of llmprune, or it cannot be read.
    """
    if not (out / REPORT).is_file():
        unfinished = "; its run has not finished" if (out / JOURNAL).exists() else ""
        raise UserError(f"no {REPORT} in {out}: it was not written by llmprune{unfinished}")
    return _report(out, "it may be of another version of llmprune")


def read_beginning(source: Source) -> Report | None:
    """The report of the run that made the model which another begins with; None where llmprune did not make it.

    Raises:
        UserError: an llmprune.json lies there that cannot be read.
    """
    advice = "it may be of another version of llmprune; a copy of the model without this file can be pruned"
    return _report(source.folder, advice) if (source.folder / REPORT).is_file() else None


def find_dense(report: Report, trusted: bool = False) -> Source | None:
    """The dense model of a run, if it is still on this machine; nothing is downloaded or converted."""
    dtype = str(report.recipe.get("dtype", "auto"))
    return present(report.model, report.revision, dtype, trust_remote_code=trusted)


def read_evaluated(out: Path) -> Evaluated | None:
    """What `eval` found out later about a checkpoint, or about another if it was told to write it there.

    Raises:
        UserError: the file cannot be read.
    """
    return _later(out, "eval.json", _evaluated)


def read_comparison(out: Path) -> Comparison | None:
    """What `compare` found out later about a checkpoint.

    Raises:
        UserError: the file cannot be read.
    """
    return _later(out, "comparison.json", Comparison.read)


def read_generations(out: Path) -> list[Generation]:
    """What is kept of the answers of a checkpoint and its dense original; none where nothing is.

    Raises:
        UserError: the file cannot be read.
    """
    return _later(out, "generations.json", lambda data: every(Generation, data, "answer")) or []


def read_speed(out: Path) -> Speed | None:
    """What `speed` found out later about a checkpoint.

    Raises:
        UserError: the file cannot be read.
    """
    return _later(out, "speed.json", Speed.read)


def _later(out: Path, name: str, build: Callable[[Any], T]) -> T | None:
    path = out / EVALUATION / name
    return _read(path, build, "make it again, or take it away") if path.is_file() else None


def _report(out: Path, advice: str) -> Report:
    return _read(out / REPORT, lambda data: Report.read(data, out), advice)


def _read(path: Path, build: Callable[[Any], T], advice: str) -> T:
    try:
        return build(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be used: {error} ({advice})") from None


def _evaluated(data: Mapping[str, Any]) -> Evaluated:
    apart, tasks = data.get("divergence"), data.get("tasks") or {}
    if not isinstance(data.get("shards"), Mapping):
        raise ValueError("it does not say of which weights it is")
    return Evaluated(
        str(data.get("model")),
        dict(data["shards"]),
        maybe(Perplexity, data.get("perplexity"), "perplexity"),
        maybe(Divergence, apart, "divergence"),
        apart.get("dense") if apart else None,
        every(Score, tasks.get("scores") or [], "score"),
        dict(tasks.get("means") or {}),
    )
