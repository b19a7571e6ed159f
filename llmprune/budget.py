"""Fits the work into memory: how much runs at once, where the activations lie, which statistics are held together.

What each phase takes is told from shapes alone, before any work. Leaner choices are made only where the room asks for
them; all but the size of the batches leave the result the same to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from llmprune import distributed, memory
from llmprune.errors import UserError
from llmprune.model.activations import Place
from llmprune.model.checkpoint import Checkpoint, Footprint
from llmprune.model.linears import Input
from llmprune.recipe import format_size
from llmprune.stats import SAMPLE_TOKENS

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens that run through a block at once on a kind of device; whole sequences, at least one."""

FREE_SHARE = 0.9
"""The part of the free memory that is counted on where the user names no cap."""

GROWTH = 96 * 2**20
"""What a process takes on top of what it has when the plan is made: code that runs for the first time, threads, rows of
attention scores, memory that was freed in pieces. Measured on Linux with the CPU build of torch 2.13."""

EXPERTS = 64 * 2**20
"""What experts take besides: code for their many shapes, see `memory.frugal`, and more pieces. Measured as well."""

LOSS_TOKENS = 256
"""Tokens whose losses are computed at once in an evaluation."""

TOKEN_BYTES = 128
"""What the text takes from which one calibration token is drawn."""


def batch_size(checkpoint: Checkpoint, length: int) -> int:
    """How many sequences of a length run through a block at once, where there is room."""
    return max(1, BATCH_TOKENS.get(checkpoint.device.type, BATCH_TOKENS["cpu"]) // length)


def windows_at_once(checkpoint: Checkpoint, length: int, spare: int) -> int:
    """How many windows of an evaluation go through a block before the next one is read.

    Args:
        spare: bytes that may be taken beyond the first batch of them; a quarter of what is free is the most.
    """
    size, batch = checkpoint.hidden_size * checkpoint.dtype.itemsize * length, batch_size(checkpoint, length)
    return max(1, min(memory.available() // 4, batch * size + spare) // size // batch) * batch


@dataclass(frozen=True)
class Peak:
    """Bytes on the host, and on a device that has memory of its own."""

    host: int = 0
    device: int = 0

    def __add__(self, other: Peak) -> Peak:
        return Peak(self.host + other.host, self.device + other.device)

    def __or__(self, other: Peak) -> Peak:
        return Peak(max(self.host, other.host), max(self.device, other.device))


@dataclass(frozen=True)
class Room:
    """Bytes that may be taken.

    Attributes:
        host: resident memory of this process.
        device: None where the blocks run on the host.
        capped: whether the user said how much the host gives.
    """

    host: int
    device: int | None
    capped: bool

    def holds(self, peak: Peak) -> bool:
        """Whether a peak fits."""
        return peak.host <= self.host and (self.device is None or peak.device <= self.device)


def room(checkpoint: Checkpoint, cap: int | None) -> Room:
    """The user's cap, or what can be had, and what is free on the device.

    The ranks of one machine share its memory, and every rank is given what the poorest has.
    """
    host = cap if cap is not None else int(memory.available() * FREE_SHARE)
    host = host // distributed.local_size() + (0 if cap is not None else memory.current())
    free = torch.cuda.mem_get_info(checkpoint.device)[0] if checkpoint.device.type == "cuda" else None
    least = distributed.smallest(int(free * FREE_SHARE)) if free is not None else None
    return Room(distributed.smallest(host), least, cap is not None)


@dataclass(frozen=True)
class Work:
    """What is to be done in one block.

    Attributes:
        number: the block.
        inputs: what the linears that are pruned are given, in the order in which it comes about.
        rows: for each of them, the rows of weights that are solved at once.
        whole: whether all must be captured in one pass.
        widest: features of the widest tensor that flows inside the block.
        largest: elements of its largest weight matrix.
        experts: whether it has any.
    """

    number: int
    inputs: tuple[Input, ...]
    rows: tuple[int, ...]
    whole: bool
    widest: int
    largest: int
    experts: bool


@dataclass(frozen=True)
class Schedule:
    """How the work is laid out.

    Attributes:
        batch: sequences per forward.
        length: tokens per calibration sequence.
        place: where the activations lie between two blocks.
        overlap: whether a block is written while the next one is read and captured.
        passes: per block, the inputs whose statistics are collected together, and whose linears are then solved. What
            is run last comes first: what has been pruned stands behind everything that is still to be captured.
        memory: the estimated peak of each phase.
    """

    batch: int
    length: int
    place: Place = "host"
    overlap: bool = True
    passes: tuple[tuple[tuple[Input, ...], ...], ...] = ()
    memory: dict[str, Peak] = field(default_factory=dict)

    @property
    def most_passes(self) -> int:
        """The passes of the block that needs the most of them."""
        return max(map(len, self.passes))

    @property
    def peak(self) -> Peak:
        """The most that any phase takes."""
        most = Peak()
        for peak in self.memory.values():
            most |= peak
        return most


class Needs:
    """What the phases of a run take."""

    def __init__(
        self, checkpoint: Checkpoint, blocks: Sequence[Work], samples: int, length: int, text: int | None
    ) -> None:
        """Take in the work.

        Args:
            samples: calibration sequences of this process; 0 where no data is needed.
            length: tokens of each.
            text: context length of an evaluation, None without.
        """
        self._checkpoint, self._blocks, self._samples, self._length = checkpoint, blocks, samples, length
        self._text = text
        self._apart = checkpoint.device.type != "cpu"
        self._width = checkpoint.hidden_size * checkpoint.dtype.itemsize
        self._vocabulary = int(checkpoint.config.get_text_config().vocab_size)
        self._sizes = [checkpoint.footprint(keys) for keys in checkpoint.block_keys]
        self._outer, self._whole = (checkpoint.footprint(checkpoint.outer(head)) for head in (False, True))
        others = [*checkpoint.outer_keys, *checkpoint.unclaimed_keys]
        self._largest = max([checkpoint.index[key].nbytes for key in others] + [size.stored for size in self._sizes])
        experts = any(work.experts for work in blocks)
        self._base = Peak(memory.current() + GROWTH + (EXPERTS if experts else 0))

    def schedule(self, batch: int, had: Room) -> Schedule:
        """The fastest schedule that fits.

        Args:
            batch: sequences per forward where there is room.

        Raises:
            UserError: none fits; the message names the smallest cap that can hold.
        """
        for option in self._options(batch, had):
            if had.holds(option.peak):
                return option
        packed = self._with(option, [self._packed(work, option, had) for work in self._blocks])
        if had.holds(packed.peak):
            return packed
        least = self._with(option, [self._packed(work, option, None) for work in self._blocks])
        raise UserError(_too_small(least, had))

    def _options(self, batch: int, had: Room) -> Iterator[Schedule]:
        """From the fastest to the leanest; without a cap the batches on a CPU stay as they are."""
        places: list[tuple[Place, bool]] = [("host", True), ("host", False), ("disk", False)]
        if self._apart:
            places.insert(0, ("device", True))
        together = [(work.inputs,) if work.inputs else () for work in self._blocks]
        while True:
            for place, overlap in places:
                yield self._with(Schedule(batch, self._length, place, overlap), together)
            if batch == 1 or not (had.capped or self._apart):
                return
            batch //= 2

    def _with(self, option: Schedule, passes: Sequence[tuple[tuple[Input, ...], ...]]) -> Schedule:
        made = replace(option, passes=tuple(passes))
        return replace(made, memory=self._phases(made))

    def _packed(self, work: Work, option: Schedule, had: Room | None) -> tuple[tuple[Input, ...], ...]:
        """As few passes as there can be, each as large as fits; without room one for each input."""
        if work.whole:
            return (work.inputs,) if work.inputs else ()
        beside = self._base + self._kept(option) + self._loaded(work)
        flow = self._flow(work, option.batch * option.length)
        passes: list[list[Input]] = []
        held = solving = 0
        for entry, rows in zip(reversed(work.inputs), reversed(work.rows), strict=True):
            held, solving = _with_before(entry, rows, held, solving)
            if passes and had is not None and had.holds(beside + self._near(max(held + flow, solving))):
                passes[-1].insert(0, entry)
            else:
                passes.append([entry])
                held, solving = _with_before(entry, rows)
        return tuple(map(tuple, passes))

    # -- what is held --------------------------------------------------------------------------------------------------

    def _phases(self, option: Schedule) -> dict[str, Peak]:
        tokens = option.batch * option.length
        capture = solve = write = behind = Peak()
        for work, passes in zip(self._blocks, option.passes, strict=True):
            size, rows = self._sizes[work.number], dict(zip(work.inputs, work.rows, strict=True))
            loaded = self._loaded(work)
            flow = self._flow(work, tokens) if self._samples else 0
            capture |= behind + loaded + Peak(size.reading)  # while it is read
            for entries in passes:
                held = solving = 0
                for entry in reversed(entries):
                    held, solving = _with_before(entry, rows[entry], held, solving)
                capture |= behind + loaded + self._near(held + flow)
                solve |= loaded + self._near(solving)
            write |= loaded + Peak(size.converted)
            behind = Peak(size.stored) if option.overlap else Peak()
        kept = self._kept(option)
        found = {"capture": kept + capture, "solve": kept + solve, "write": kept + write, "copy": Peak(self._largest)}
        if self._samples:
            found["tokens"] = Peak(TOKEN_BYTES * self._samples * self._length)
            found["embed"] = kept + self._placed(self._outer) + self._near(4 * tokens * self._width)
        if self._text is not None:
            found["evaluate"] = self._evaluation(self._text)
        return {phase: self._base + peak for phase, peak in found.items()}

    def _near(self, size: int) -> Peak:
        """Memory where the blocks are run."""
        return Peak(device=size) if self._apart else Peak(size)

    def _placed(self, size: Footprint) -> Peak:
        """Weights as the files hold them, on the host, and as they are run."""
        return Peak(size.stored) + self._near(size.copied)

    def _loaded(self, work: Work) -> Peak:
        return self._placed(self._sizes[work.number])

    def _kept(self, option: Schedule) -> Peak:
        """The activations of all batches."""
        size = self._samples * self._length * self._width
        return {"device": Peak(device=size), "host": Peak(size), "disk": Peak()}[option.place]

    def _flow(self, work: Work, tokens: int) -> int:
        """What is under way inside a block that runs, and what its statistics need to take it in."""
        run = self._checkpoint.dtype.itemsize
        taken = max((_TAKEN[entry.needs] * entry.features for entry in work.inputs), default=0)
        return tokens * (8 * self._width + 3 * run * work.widest + taken) + run * work.largest

    def _evaluation(self, length: int) -> Peak:
        """One batch of windows that goes through the largest block, or comes out at the end."""
        tokens = batch_size(self._checkpoint, length) * length
        scores = length * self._vocabulary * self._checkpoint.dtype.itemsize
        parts = 3 * 4 * LOSS_TOKENS * self._vocabulary
        most = self._placed(self._whole) + self._near(2 * scores + parts)
        for work in self._blocks:
            most |= self._loaded(work) + Peak(self._sizes[work.number].reading)
            most |= self._loaded(work) + self._near(self._flow(replace(work, inputs=()), tokens))
        return most + Peak(tokens * self._width)


def _held(entry: Input) -> int:
    """Bytes of an input's statistics."""
    return 4 * entry.features * (entry.features if entry.needs == "gram" else SAMPLE_TOKENS)


_TAKEN = {"nothing": 0, "norms": 8, "gram": 12}
"""Bytes a token and feature that taking inputs into statistics needs: float32 copies of them."""


def _solving(entry: Input, rows: int) -> int:
    """Bytes that solving the linears of an input needs besides its statistics."""
    weights, square = 4 * rows * entry.features, 4 * entry.features**2 if entry.needs == "gram" else 0
    return int(1.5 * weights) + max(2 * square, square + 3 * weights)


_SLACK = 2**24
"""What a cap that is named to be the smallest is more than that: no two processes begin alike."""


def _with_before(entry: Input, rows: int, held: int = 0, solving: int = 0) -> tuple[int, int]:
    """What a pass takes for its statistics, and while it is solved, with one more input before those that it has.

    Inputs are solved in their order and then let go, so that those after it are still held when it is its turn.
    """
    held += _held(entry)
    return held, max(solving, held + _solving(entry, rows))


def _too_small(least: Schedule, had: Room) -> str:
    phase = max(least.memory, key=lambda name: least.memory[name].host)
    if had.device is not None and least.peak.device > had.device:
        return (
            f"the GPU has {format_size(had.device)} free, and this model needs {format_size(least.peak.device)} of "
            "it at the least: use one with more, shorter sequences (--length), or --device cpu"
        )
    smallest = format_size(least.peak.host + _SLACK)
    if had.capped:
        return (
            f"--max-memory is {format_size(had.host)}, but the phase {phase!r} of this model takes more: the smallest "
            f"that can hold is {smallest}"
        )
    return (
        f"{format_size(had.host)} of memory can be had, but this model needs {smallest} at the least (in the phase "
        f"{phase!r}); say --max-memory {smallest} to try it all the same"
    )
