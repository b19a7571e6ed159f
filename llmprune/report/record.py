"""The report of a run, as data: it is returned by `prune`, written as llmprune.json, and printed by `--json`."""

from __future__ import annotations

import hashlib
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy
import numpy.typing
import torch
import transformers
from torch import Tensor
from torch.nn import functional

import llmprune
from llmprune.allocation import LEFT_DENSE
from llmprune.parts import some_rows

T = TypeVar("T")

FEW_TOKENS = 64
"""Fewer calibration tokens tell little of what they reach: it is noted."""

_EXPERT = re.compile(r"(.+\.\d+\..*experts.*)\.(\d+)\.[^.]+")
"""The name of an expert's linear, in a block: the module that holds it, and its number."""


@dataclass(frozen=True)
class LinearRecord:
    """What became of one linear.

    Attributes:
        name, shape: the linear, (out_features, in_features).
        method, pattern, scope: what was done; None where it was left dense. One that has fewer inputs than it had has a
            method, by which these were chosen, and no pattern: what is left of it is dense.
        kept: why it was left dense, or None.
        sparsity: the fraction of zeros in the written weight.
        relative_error: ‖(Ŵ−W)X‖² / ‖WX‖² on the calibration inputs, before whole blocks are fitted; None where no
            inputs were seen. W is what was aimed at: the dense weight, or with asymmetric calibration its target.
        error_from: `gram` (all tokens) or `sample` (estimated on some of the tokens).
        tokens: calibration tokens that reached it.
        damping: the relative damping that the factorisation took.
        note: anything out of the ordinary.
        mask_sha256: of the mask, packed to bits row by row.
        permuted: its input channels have changed places, with the rows of the linears that make them.
        course: where anything followed the method, the relative error after each step, by name.
    """

    name: str
    shape: tuple[int, int]
    method: str | None = None
    pattern: str | None = None
    scope: str | None = None
    kept: str | None = None
    sparsity: float = 0.0
    relative_error: float | None = None
    error_from: str | None = None
    tokens: int = 0
    damping: float | None = None
    note: str | None = None
    mask_sha256: str | None = None
    permuted: bool = False
    course: dict[str, float] | None = None

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> LinearRecord:
        """A record from the plain data of a journal or a report."""
        return cls(**{**data, "shape": tuple(data["shape"])})


@dataclass(frozen=True)
class ExpertsRecord:
    """What became of the experts of a block.

    Attributes:
        name: the module that holds them.
        kept: the numbers of those that stay, in the dense model.
        tokens: of the calibration that were sent to each.
        few: the numbers of those that fewer than `FEW_TOKENS` reached, so that little is known of them.
    """

    name: str
    kept: list[int]
    tokens: list[int]
    few: list[int]

    @classmethod
    def of(cls, name: str, kept: Sequence[int], tokens: Sequence[int]) -> ExpertsRecord:
        """A record from what was seen."""
        return cls(name, [*kept], [*tokens], [place for place, count in enumerate(tokens) if count < FEW_TOKENS])


@dataclass(frozen=True)
class BlockRecord:
    """How a block was worked on.

    Attributes:
        name: the block.
        seconds: for `read`, `capture`, `solve`, `propagate` and `write`, where channels change places `permute`, and
            where blocks are fitted `fit`, and for the dense model's states, which go beside, `dense`; writing goes on
            beside the next block.
        peak_memory: the most that the process had held when the block was solved, in bytes.
        peak_device_memory: the same for a GPU.
        away_before, away: the mean over the calibration's tokens of ‖f(x; Ŵ) − f(x₀; W)‖² / ‖f(x₀; W)‖² (as
            `activations.apart` takes it), of what the pruned block returns behind the pruned blocks before it and the
            dense block behind the dense ones, before and after its weights were fitted; None where blocks are not. A
            fit that looks ahead minimises more.
        drift: the same distance of the block as it was written, on the first batch of each rank; None where nothing
            was calibrated. Where hidden channels went, in those that are left, as for the two before.
        experts: where experts went, what became of each module of them.
        batch: sequences per forward; None where nothing was calibrated.
    """

    name: str
    seconds: dict[str, float]
    peak_memory: int
    peak_device_memory: int | None = None
    away_before: float | None = None
    away: float | None = None
    drift: float | None = None
    experts: list[ExpertsRecord] | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with all that gives it a meaning.

    Attributes:
        value: exp of the mean negative log likelihood per predicted token.
        text: what it was measured on.
        length: the context length; windows of that many tokens.
        windows: how many; a shorter rest is left out.
        tokens: tokens predicted (length − 1 per window, where they don't overlap).
        seconds: how long it took.
        stride: tokens from one window to the next, None where they don't overlap.
    """

    value: float
    text: str
    length: int
    windows: int
    tokens: int
    seconds: float
    stride: int | None = None

    def __str__(self) -> str:
        step = "that do not overlap" if self.stride is None else f"with stride {self.stride:,}"
        windows = f"{self.windows:,} windows {step}" if self.windows > 1 else "1 window"
        return f"{self.value:.2f} ({self.text}, context {self.length:,}, {windows}, {self.tokens:,} predicted tokens)"


@dataclass(frozen=True)
class Divergence:
    """How far a model is from its dense original on a text.

    Attributes:
        kl: the Kullback-Leibler divergence of what the model says of the next token from what the dense one says,
            KL(dense ‖ model) in nats, the mean over all predicted tokens.
        stderr: its standard error over the windows; None for one window.
        agreement: how often both hold the same token for the most likely.
        text, length, windows, tokens, seconds: as in `Perplexity`.
    """

    kl: float
    stderr: float | None
    agreement: float
    text: str
    length: int
    windows: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        error = "" if self.stderr is None else f" ± {self.stderr:.5f}"
        told = f"{self.text}, context {self.length:,}, {self.tokens:,} tokens"
        return f"KL {self.kl:.5f}{error} nats, the same token {self.agreement:.2%} ({told})"


@dataclass(frozen=True)
class Score:
    """One figure of a task.

    Attributes:
        task: its name.
        metric: as lm-eval names it: `acc`, `acc_norm`, `perplexity`, ...
        filter: what the answers went through; `none` in most tasks.
        value, stderr: the figure and its standard error, None where there is none.
        documents: how many it is the mean over.
        shots: solved examples before each question.
        higher_is_better: None where lm-eval does not say.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    documents: int
    shots: int
    higher_is_better: bool | None

    def __str__(self) -> str:
        error = "" if self.stderr is None else f" ± {self.stderr:.4f}"
        return f"{self.task} {self.metric} {self.value:.4f}{error} ({self.documents:,} documents, {self.shots} shots)"


@dataclass
class Report:
    """A finished run.

    Attributes:
        out: where the checkpoint is.
        model, revision: where it came from.
        origin: how its weights were made plain before (`dequantised from fp8 to bfloat16`); None where they were plain.
        recipe: the whole recipe as plain data.
        linears: every linear, in order.
        blocks: every block, in order.
        resumed: how many blocks an earlier process had finished, from which this one went on; None where it began anew.
        batch: sequences per forward that the run began with; None where nothing was calibrated.
        weights: all weights of the checkpoint.
        kept_blocks: where blocks were taken out, the numbers in the dense model of those that are left.
        widths: where blocks became narrower, by the config's name for it what each number was and is.
        hidden_channels: where hidden channels went, the numbers in the dense model of those that are left.
        dense_blocks, dense_weights: of the dense model, where the model has become smaller.
        calibration: source, samples, length, seed and the sha256 of the tokens; None where no data was needed.
        dense, sparse: perplexity before and after, if asked for.
        seconds: time per phase and in total, of the process that finished the run.
        peak_memory: peak resident bytes of the process from the plan on, without what it takes to make a quantised or
            pickled model plain before, which has a check of its own; `peak_device_memory` of the GPU.
        predicted_memory: what the plan said it would be.
        ranks: how many processes worked together.
        shards: file name to sha256.
        side_files: what was copied from the source.
        base: what the model's own card says and this one's must: `name` on the Hub, `license`, ...
        earlier: where the model was itself made by llmprune, what is told of those runs, the first first: those of the
            keys of llmprune.json that say what was made of what and how, and `changed`, whether the weights were
            changed by something else before this run began.
        versions: of everything that took part.
        recovery: how the weights were trained after that, as plain data; None where they were not. The records of
            linears, but for their masks, are of the weights before.
        page_problem: why report.html could not be drawn; llmprune.json, which was written before, never has it.
    """

    out: Path
    model: str
    revision: str | None
    recipe: dict[str, Any]
    weights: int
    linears: list[LinearRecord] = field(default_factory=list)
    blocks: list[BlockRecord] = field(default_factory=list)
    resumed: int | None = None
    batch: int | None = None
    calibration: dict[str, Any] | None = None
    dense: Perplexity | None = None
    sparse: Perplexity | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    predicted_memory: int = 0
    ranks: int = 1
    origin: str | None = None
    peak_device_memory: int | None = None
    shards: dict[str, str] = field(default_factory=dict)
    side_files: list[str] = field(default_factory=list)
    base: dict[str, Any] = field(default_factory=dict)
    earlier: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    page_problem: str | None = None
    kept_blocks: list[int] | None = None
    dense_blocks: int | None = None
    dense_weights: int | None = None
    recovery: dict[str, Any] | None = None
    widths: dict[str, list[int]] | None = None
    hidden_channels: list[int] | None = None

    @property
    def narrowed(self) -> str:
        """What became narrower, in words; empty where nothing did."""
        return narrowed(self.widths or {})

    @property
    def shortened(self) -> str:
        """Which blocks were taken out, in words; empty where none were."""
        return "" if self.kept_blocks is None else shortened(self.kept_blocks, self.dense_blocks or 0)

    @property
    def allocation(self) -> str:
        """The name of the allocation, or the plan file."""
        return allocation_of(self.recipe)

    @property
    def pruned(self) -> list[LinearRecord]:
        """The linears that were pruned."""
        return [record for record in self.linears if record.kept is None]

    @property
    def left_dense(self) -> list[LinearRecord]:
        """The linears that share the sparsity, and that the allocation left dense."""
        return [record for record in self.linears if record.kept == LEFT_DENSE]

    @property
    def solved(self) -> list[LinearRecord]:
        """The linears that a method has worked on: those that were pruned, and those that have fewer inputs."""
        return [record for record in self.linears if record.method is not None]

    @property
    def experts(self) -> list[ExpertsRecord]:
        """What is known of experts, in order: as it was recorded, or where none went, by what reached their linears."""
        if recorded := [told for block in self.blocks for told in block.experts or ()]:
            return recorded
        reached: dict[str, dict[int, int]] = {}
        for record in self.linears:
            if found := _EXPERT.fullmatch(record.name):
                known, number = reached.setdefault(found[1], {}), int(found[2])
                counted = record.tokens or record.note  # one that was looked at and that nothing reached is noted
                known[number] = max(known.get(number, -1), record.tokens if counted else -1)
        return [
            ExpertsRecord.of(name, sorted(known), [known[number] for number in sorted(known)])
            for name, known in reached.items()
            if max(known.values()) > 0 and min(known.values()) >= 0 and sorted(known) == list(range(len(known)))
        ]

    @property
    def smaller(self) -> str:
        """How the model is smaller than the dense one, in words; empty where it has as many weights."""
        return smaller(vars(self))

    @property
    def sparsity(self) -> float:
        """The fraction of zeros over the pruned linears and those that the allocation left dense."""
        covered = [*self.pruned, *self.left_dense]
        return _mean_sparsity(covered, sum(map(_numel, covered)))

    @property
    def model_sparsity(self) -> float:
        """The zeros of the pruned linears as a fraction of all weights of the model."""
        return _mean_sparsity(self.pruned, self.weights)

    @classmethod
    def read(cls, data: Mapping[str, Any], out: Path) -> Report:
        """A report from the plain data of llmprune.json, of a checkpoint that is in `out` now.

        Raises:
            ValueError: it lacks something; the message says what.
        """
        made = taken(cls, {**data, "out": out}, "it")
        made.linears = [taken(LinearRecord, entry, f"linear {place}") for place, entry in enumerate(made.linears)]
        made.blocks = [_block(entry, f"block {place}") for place, entry in enumerate(made.blocks)]
        made.dense = taken(Perplexity, data["dense"], "dense") if data.get("dense") else None
        made.sparse = taken(Perplexity, data["sparse"], "sparse") if data.get("sparse") else None
        return made

    def add_block(self, record: Mapping[str, Any]) -> None:
        """Take in the plain data of a block and its linears, as the journal has it."""
        self.linears += map(LinearRecord.read, record["linears"])
        self.blocks.append(_block(record, "a block"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = asdict(self)
        data["out"] = str(self.out)
        if self.page_problem is None:
            del data["page_problem"]
        data["linears"] = [
            {key: value for key, value in asdict(record).items() if value is not None} for record in self.linears
        ]
        return {
            "llmprune": self.versions.get("llmprune"),
            "sparsity": self.sparsity,
            "model_sparsity": self.model_sparsity,
            **data,
        }


def _block(data: Any, where: str) -> BlockRecord:
    """A block's record from plain data."""
    made = taken(BlockRecord, data, where)
    return replace(made, experts=every(ExpertsRecord, made.experts, "module")) if made.experts else made


def taken(kind: type[T], data: Any, where: str) -> T:
    """One of these records from plain data that may be of another version: keys that are not known are passed over.

    Raises:
        ValueError: a key is missing that has no default.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is not a mapping")
    known = fields(kind)  # type: ignore[arg-type]
    needed = [field.name for field in known if field.default is MISSING and field.default_factory is MISSING]
    if missing := [name for name in needed if name not in data]:
        raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}")
    return kind(**{field.name: data[field.name] for field in known if field.name in data})


def maybe(kind: type[T], data: Any, where: str) -> T | None:
    """As `taken`; None where there is none."""
    return taken(kind, data, where) if data else None


def every(kind: type[T], data: Any, where: str) -> list[T]:
    """As `taken`, of a list of them."""
    if not isinstance(data, list):
        raise ValueError(f"a list of {where}s is expected")
    return [taken(kind, entry, f"{where} {place}") for place, entry in enumerate(data)]


def allocation_of(recipe: Mapping[str, Any]) -> str:
    """The allocation that a recipe, as plain data, names; `uniform` in those that are older than allocations.

    Of a plan file it is the file's name, because the folder that it lay in is nobody else's business.
    """
    return Path(allocation_named(recipe)).name


def allocation_named(recipe: Mapping[str, Any]) -> str:
    """The same, of a plan file with the folder that it lay in."""
    chosen = recipe.get("allocation") or "uniform"
    return str(chosen.get("path") or chosen.get("name")) if isinstance(chosen, Mapping) else str(chosen)


def shortened(kept: Sequence[int], total: int) -> str:
    """Which blocks a model does without, in words."""
    gone = sorted(set(range(total)).difference(kept))
    return f"{len(kept)} of {total} blocks, without {', '.join(map(str, gone))}"


def narrowed(widths: Mapping[str, Sequence[int]]) -> str:
    """Which numbers of a config are smaller than they were, in words."""
    return ", ".join(f"{name} {now:,} of {was:,}" for name, (was, now) in widths.items())


def smaller(run: Mapping[str, Any]) -> str:
    """How a model is smaller than the dense one, by the keys of its report; empty where it has as many weights."""
    kept, widths = run.get("kept_blocks"), run.get("widths")
    parts = [shortened(kept, run["dense_blocks"])] if kept else []
    return "; ".join([*parts, *([narrowed(widths)] if widths else [])])


def short_name(name: str) -> str:
    """The name of a model or text; of a path its last part, for the rest tells of somebody's machine."""
    path = Path(name)
    local = path.is_absolute() or name.startswith(("~", ".")) or (len(path.parts) > 2 and "@" not in path.parts[1])
    return path.name if local else name


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "llmprune": llmprune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
    }


def mask_sha256(weight: Tensor) -> str:
    """The hash of where an (out, in) weight is not zero, packed to bits row by row."""
    digest = hashlib.sha256()
    for rows in some_rows(weight):  # whole bytes of bits
        digest.update(packed(rows != 0).tobytes())
    return digest.hexdigest()


def packed(mask: Tensor) -> numpy.typing.NDArray[numpy.uint8]:
    """A bool mask of any shape as bits, the first of eight the highest; packed on the device that it is on."""
    if mask.device.type == "cpu":
        return numpy.packbits(mask.contiguous().numpy())
    eights = functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=mask.device)
    bits: numpy.typing.NDArray[numpy.uint8] = (eights * places).sum(1, dtype=torch.uint8).cpu().numpy()
    return bits


def _numel(record: LinearRecord) -> int:
    return record.shape[0] * record.shape[1]


def _mean_sparsity(records: list[LinearRecord], total: int) -> float:
    return sum(record.sparsity * _numel(record) for record in records) / max(total, 1)
