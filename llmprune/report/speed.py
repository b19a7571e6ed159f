"""What was measured of the speed and the memory of checkpoints, as data: returned by `speed`, kept as speed.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmprune.report.record import every, taken
from llmprune.report.tables import size

Phase = Literal["prefill", "decode"]

PHASES: tuple[Phase, ...] = ("prefill", "decode")

Verdict = Literal["faster", "slower", "no difference beyond noise", "not known"]


@dataclass(frozen=True)
class Spread:
    """A figure that was measured once in every round.

    Attributes:
        median: over the rounds.
        low, high: the quartiles.
        values: of each round, in order.
    """

    median: float
    low: float
    high: float
    values: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], list(values))
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, list(values))


@dataclass
class Timed:
    """A model's speed and memory.

    Attributes:
        name: a short one.
        path: as it was asked for.
        dense: whether the others are compared with it.
        parameters: of the model in memory, those that are tied counted once.
        file_bytes: of its safetensors files.
        weight_bytes: of its parameters in memory, on the device.
        dtype: of most of them.
        cache: the class of the cache that transformers made.
        cache_bytes: that cache after the last token, for all sequences.
        cache_bytes_per_token: the same for each token in it, the mean; where a window or a state bounds the cache, a
            longer sequence has less for each.
        base_memory: resident bytes of its process before it was loaded: python, torch and transformers.
        peak_memory: the most resident bytes that its process had, from its start over loading to the last round.
        peak_device_memory: the most that torch had allocated on the GPU in the meantime, None without one.
        first_token: seconds from the call to the first new token: the prefill, and what comes with it.
        prefill: tokens of the prompts in a second until then, those of all sequences.
        decode: new tokens in a second after the first, those of all sequences; None where there is only one.
    """

    name: str
    path: str
    shards: dict[str, str]
    dense: bool
    parameters: int
    file_bytes: int
    weight_bytes: int
    dtype: str
    cache: str
    cache_bytes: int
    cache_bytes_per_token: float
    base_memory: int
    peak_memory: int
    peak_device_memory: int | None
    first_token: Spread
    prefill: Spread
    decode: Spread | None

    def rate(self, phase: Phase) -> Spread | None:
        """Tokens per second in a phase."""
        return self.prefill if phase == "prefill" else self.decode

    @classmethod
    def read(cls, data: Any) -> Timed:
        """The same from plain data.

        Raises:
            ValueError: something is missing in it.
        """
        found = taken(cls, data, "a model")
        for name in ("first_token", "prefill", "decode"):
            if data[name] is not None:
                setattr(found, name, taken(Spread, data[name], name))
        return found


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the dense model a model is.

    Attributes:
        model: its name.
        phase: `prefill` or `decode`.
        ratio: the geometric mean over the rounds of the model's tokens per second by the dense model's; above 1 it is
            faster.
        low, high: its interval; None for one round. All intervals of a result hold together at its level.
        verdict: `faster` or `slower` where the interval leaves 1.
    """

    model: str
    phase: Phase
    ratio: float
    low: float | None
    high: float | None
    verdict: Verdict

    def __str__(self) -> str:
        span = "" if self.low is None else f" ({self.low:.3g} to {self.high:.3g})"
        return f"{self.ratio:.3g}{span}, {self.verdict}"


@dataclass
class Speed:
    """Checkpoints that have taken turns at generating.

    Attributes:
        how: what was timed, in words.
        prompt_tokens, new_tokens, batch: the tokens of each prompt and of each answer, and how many sequences at once.
        rounds: how often each model was timed; a first round was thrown away.
        order: which model was first when, in words.
        text, seed: where the prompts are from; `tokens_sha256` is the hash of their tokens.
        device, device_name: the kind, and its name as the system or the driver tells it.
        threads: that torch computes with on the CPU.
        models: all, the dense one first.
        ratios: of each other model to it, phase by phase.
        level: at which all intervals hold together.
        notes: what the reader should know.
        versions: of everything that took part.
        seconds: the time of all of it, loading included.
    """

    how: str
    prompt_tokens: int
    new_tokens: int
    batch: int
    rounds: int
    order: str
    text: str
    seed: int
    tokens_sha256: str
    device: str
    device_name: str
    threads: int
    models: list[Timed]
    ratios: list[Ratio]
    level: float
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def read(cls, data: Any) -> Speed:
        """The same from plain data.

        Raises:
            ValueError: something is missing in it.
        """
        found = taken(cls, data, "the speed")
        found.models = [Timed.read(entry) for entry in found.models]
        found.ratios = every(Ratio, found.ratios, "ratio")
        return found

    @property
    def dense(self) -> Timed:
        """The model that the others are compared with."""
        return self.models[0]

    def own(self, shards: Mapping[str, str]) -> Timed | None:
        """The entry that is a checkpoint.

        Args:
            shards: the sha256 of the files that hold its weights, by name.
        """
        return next((model for model in self.models[1:] if model.shards == shards), None)

    def ratio(self, model: Timed, phase: Phase) -> Ratio | None:
        """How a model compares with the dense one in a phase, None where that was not measured."""
        return next((entry for entry in self.ratios if (entry.model, entry.phase) == (model.name, phase)), None)

    @property
    def where(self) -> str:
        """All that gives the figures a meaning, in a line."""
        threads = f", {self.threads} threads" if self.device == "cpu" else ""
        dtypes = ", ".join(dict.fromkeys(model.dtype for model in self.models))
        parts = [f"{self.device_name}{threads}", dtypes, f"batch {self.batch}", f"{self.prompt_tokens:,} prompt tokens"]
        parts += [f"{self.new_tokens:,} new tokens", f"{self.rounds} rounds"]
        versions = ", ".join(f"{name} {self.versions[name]}" for name in ("torch", "transformers"))
        return "; ".join([*parts, versions])


# -- for people ------------------------------------------------------------------------------------------------------


def tables_of(found: Speed) -> list[Table]:
    """One table of speed, one of memory, and one of ratios where models are compared."""
    speed = _table("Speed", "model", "prefill, tokens/s", "first token, ms", "decode, tokens/s")
    for model in found.models:
        first = spread(model.first_token, 1000)
        speed.add_row(model.name, spread(model.prefill), first, "-" if model.decode is None else spread(model.decode))
    on_gpu = any(model.peak_device_memory is not None for model in found.models)
    heads = ("model", "parameters", "files", "weights", "cache", "a token", "peak")
    memory = _table("Memory", *heads, *(("on the GPU",) if on_gpu else ()))
    for model in found.models:
        caches = (model.cache_bytes, model.cache_bytes_per_token)
        sizes = (model.file_bytes, model.weight_bytes, *caches, model.peak_memory)
        row = [model.name, f"{model.parameters / 1e6:,.4g} M", *map(size, sizes)]
        if on_gpu:
            row.append("-" if model.peak_device_memory is None else size(model.peak_device_memory))
        memory.add_row(*row)
    made = [speed, memory]
    if found.ratios:
        against = _table(f"Against {found.dense.name}", "model", "phase", "times as fast", "interval", "verdict")
        for entry in found.ratios:
            span = "-" if entry.low is None else f"{entry.low:.3f} to {entry.high:.3f}"
            against.add_row(entry.model, entry.phase, f"{entry.ratio:.3f}", span, entry.verdict)
        made.append(against)
    return made


def lines(found: Speed) -> list[str]:
    """What belongs to the tables: where and how it was measured, and how noise was judged."""
    base = max(model.base_memory for model in found.models)
    told = [
        f"measured on: {found.where}",
        f"measured by: {found.how}; {found.order}; medians, and quartiles in brackets",
        f"peak: resident memory of a process that loads and generates, of which {size(base)} before it loads",
    ]
    if found.ratios and found.rounds > 1:
        count = len(found.ratios)
        many = f"all {count} intervals together hold" if count > 1 else "the interval holds"
        told.append(f"{many} at {found.level:.0%}, of the ratio within each round; a verdict needs one that leaves 1")
    elif found.ratios:
        told.append("one round tells nothing of noise: ask for more (--rounds)")
    return told + [f"note: {note}" for note in found.notes]


def spread(found: Spread, factor: float = 1.0) -> str:
    """A median and its quartiles."""
    low, median, high = (_figure(factor * value) for value in (found.low, found.median, found.high))
    return median if len(found.values) == 1 else f"{median} ({low} .. {high})"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="left" if head in ("model", "phase", "verdict") else "right", overflow="fold")
    return table
