"""Checkpoints side by side, as data: what `compare` returns, writes as comparison.json and prints with `--json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from llmprune.report.record import Divergence, Perplexity, Score, every, maybe, taken


@dataclass
class Compared:
    """One checkpoint and its figures.

    Attributes:
        name: short, and no other's in the comparison.
        path: as it was asked for.
        dense: whether it is the one that the others are compared with.
        bytes: size of its safetensors files.
        weights: elements of all its tensors.
        sparsity: zeros as a fraction of all weights.
        linears_sparsity: the same over the weights that can be pruned.
        shards: the sha256 of the files that hold its weights, by name.
        perplexity, divergence: on the text, if there is one; the divergence is from the dense model.
        scores: of the tasks.
        means: the mean accuracy of each named set of tasks.
    """

    name: str
    path: str
    dense: bool
    bytes: int
    weights: int
    sparsity: float
    linears_sparsity: float
    shards: dict[str, str]
    perplexity: Perplexity | None = None
    divergence: Divergence | None = None
    scores: list[Score] = field(default_factory=list)
    means: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def read(cls, data: Any) -> Compared:
        """The same from plain data.

        Raises:
            ValueError: something is missing in it.
        """
        found = taken(cls, data, "a model")
        found.perplexity = maybe(Perplexity, data["perplexity"], "perplexity") if "perplexity" in data else None
        found.divergence = maybe(Divergence, data["divergence"], "divergence") if "divergence" in data else None
        found.scores = every(Score, data.get("scores", []), "score")
        return found


@dataclass(frozen=True)
class Difference:
    """How one figure of a model differs from the dense one's, measured on the same documents.

    Attributes:
        model: its name.
        task, metric, filter: of a `Score`; for the perplexity `perplexity`, `nats` and `none`: the mean loss per token.
        difference: the model's figure less the dense one's.
        stderr: its standard error over the paired documents; None where it is not known.
        documents: how many pairs; windows of the text for the perplexity.
        p: of the paired test, before it is adjusted; None where the figure is no mean over documents.
        adjusted: p by Holm over all differences of the comparison that have one.
        beyond_noise: whether the adjusted p is below the level.
        test: `mcnemar` (exact, answers that are right or wrong) or `t` (paired).
    """

    model: str
    task: str
    metric: str
    filter: str
    difference: float
    stderr: float | None
    documents: int
    p: float | None
    adjusted: float | None = None
    beyond_noise: bool | None = None
    test: str | None = None


@dataclass
class Comparison:
    """Checkpoints side by side.

    Attributes:
        dense: the name of the one that the others are compared with.
        text: what the perplexity was measured on, None for none.
        models: all, the dense one first.
        differences: of each other model from it, figure by figure.
        judged: how it was decided which are beyond noise: `level`, `adjusted` and `tests`, how many were looked at.
        notes: what could not be compared, and why.
        versions: of everything that took part.
        seconds: the time of this process.
    """

    dense: str
    text: str | None
    models: list[Compared]
    differences: list[Difference]
    judged: dict[str, Any]
    notes: list[str]
    versions: dict[str, str]
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def read(cls, data: Any) -> Comparison:
        """The same from plain data.

        Raises:
            ValueError: something is missing in it.
        """
        found = taken(cls, data, "the comparison")
        found.models = [Compared.read(entry) for entry in found.models]
        found.differences = every(Difference, found.differences, "difference")
        return found

    def own(self, shards: Mapping[str, str]) -> tuple[Compared | None, Compared | None]:
        """The entries that are a checkpoint, and the dense model.

        Args:
            shards: the sha256 of the files that hold its weights, by name.
        """
        dense = next((model for model in self.models if model.dense), None)
        return next((model for model in self.models if not model.dense and model.shards == shards), None), dense
