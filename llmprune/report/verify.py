"""Checks a written checkpoint against its llmprune.json: are the zeros where they were promised?"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmprune.errors import Failure, UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.files import sha256_of
from llmprune.model.index import hash_weights
from llmprune.model.linears import Linear, find_linears
from llmprune.model.source import Source
from llmprune.model.writer import JOURNAL, REPORT
from llmprune.parts import zeros
from llmprune.patterns import Scope, parse
from llmprune.progress import Progress, Silent
from llmprune.report.record import mask_sha256


@dataclass
class Verdict:
    """What `verify` found.

    Attributes:
        folder: the checkpoint.
        linears: how many pruned linears were checked.
        problems: what is not as promised, one sentence each.
        changed: files whose bytes are no longer those that were written, which is fine after a recovery.
        shards: the sha256 of the files that hold the weights now, by name.
    """

    folder: Path
    linears: int = 0
    problems: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    shards: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every mask is as promised."""
        return not self.problems

    def raise_for_problems(self) -> None:
        """Raise a `Failure` unless all is well."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise Failure(f"{self.folder} does not hold what was promised: {self.problems[0]}{more}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "folder": str(self.folder),
            "ok": self.ok,
            "linears": self.linears,
            "problems": self.problems,
            "changed": self.changed,
        }


def verify(folder: str | Path, *, progress: Progress | None = None, trust_remote_code: bool = False) -> Verdict:
    """Read the checkpoint again, and compare each linear's mask and pattern with the report beside it.

    Raises:
        UserError: the folder holds no report of llmprune, or a model with code of its own that is not trusted.
        Failure: a file of the checkpoint is missing or broken.
    """
    place = Path(folder).expanduser()
    report = read_report(place)
    return compare(place, report["linears"], report["shards"], progress or Silent(), trust_remote_code)


def compare(
    folder: Path,
    linears: list[dict[str, Any]],
    shards: dict[str, str],
    progress: Progress,
    trusted: bool = False,
    device: str = "cpu",
) -> Verdict:
    """Read a written checkpoint, and compare it with the records of its linears and the hashes of its files.

    Args:
        device: where the weights are looked at.
    """
    checkpoint = Checkpoint(Source(str(folder), folder.resolve(), trusted=trusted), device)
    promised = {record["name"]: record for record in linears if record.get("pattern")}
    verdict = Verdict(folder, len(promised))
    for number, name in progress.over(list(enumerate(checkpoint.blocks)), "verifying"):
        block = checkpoint.load_block(number)
        for linear in find_linears(block.module, name):
            if record := promised.pop(linear.name, None):
                verdict.problems += _compare(linear, linear.view(block.near(linear.parameter)), record)
        del block
        checkpoint.unload_block(number)
    verdict.problems += [f"{name} is promised by {REPORT}, but the model has no such linear" for name in promised]
    verdict.shards = hash_weights(folder, sha256_of)
    verdict.changed = [name for name, written in shards.items() if verdict.shards.get(name) != written]
    return verdict


def read_report(folder: Path) -> dict[str, Any]:
    """The report that a finished run left in a folder, as plain data.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not (folder / REPORT).is_file():
        unfinished = "; its run has not finished" if (folder / JOURNAL).exists() else ""
        raise UserError(f"no {REPORT} in {folder}: it was not written by llmprune{unfinished}")
    try:
        report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        if not isinstance(report["linears"], list) or not isinstance(report["shards"], dict):
            raise TypeError("linears or shards are of the wrong kind")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / REPORT} cannot be read: {error}") from None
    return report


def _compare(linear: Linear, weight: Any, record: dict[str, Any]) -> list[str]:
    scope: Scope = record["scope"]
    pattern = parse(record["pattern"], scope)
    if tuple(record["shape"]) != tuple(weight.shape):
        return [f"{linear.name} has the shape {tuple(weight.shape)}, promised was {tuple(record['shape'])}"]
    share = zeros(weight) / weight.numel()
    if not pattern.holds(weight):
        return [f"{linear.name} does not hold {pattern}: it has {share:.2%} zeros"]
    if mask_sha256(weight) != record["mask_sha256"]:
        return [f"{linear.name} has another mask than was written, with {share:.2%} zeros ({pattern} still holds)"]
    return []
