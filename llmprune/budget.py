"""Fits the work into memory: how much runs at once, where the activations lie, which statistics are held together.

What each phase takes is told from shapes and from a trial run of a few tokens, before any work. Leaner choices are made
only where the room asks for them; all but the size of the batches leave the result the same to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from llmprune import distributed, memory
from llmprune.errors import UserError
from llmprune.model.activations import Place
from llmprune.model.checkpoint import Checkpoint, Footprint
from llmprune.model.cpu import AT_ONCE, widens
from llmprune.model.survey import Held
from llmprune.model.watch import Input, Stage
from llmprune.model.widths import experts_per_token
from llmprune.recipe import format_size
from llmprune.solvers import Buffers
from llmprune.stats import PANEL, SAMPLE_TOKENS

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens that run through a block at once on a kind of device; whole sequences, at least one."""

FREE_SHARE = 0.9
"""The part of the free memory that is counted on where the user names no cap."""

GROWTH = 120 * 2**20
"""What a process takes on top of what it has when the plan is made: code that runs for the first time, threads, rows of
attention scores, memory that was freed in pieces and cannot be given back. Measured on Linux with the CPU build of
torch 2.13."""

EXPERTS = 80 * 2**20
"""What experts take besides: code for their many shapes, see `memory.frugal`, and more pieces. Measured as well."""

SAMPLE = 1
"""Batches of each rank on which it is measured how far the pruned model's states drift from the dense one's."""

CHOOSE = "choose"
"""The phase in which blocks and hidden channels are chosen that a model does without."""

PRUNE = "prune"
"""All that comes after that, up to the last block."""

LOSS_TOKENS = 256
"""Tokens whose scores over the whole vocabulary are held at once in an evaluation."""

LOOKED_AT = 96 * 2**20
"""What looking at some rows of a weight for an allocation takes: copies of them in float32 and float64."""

EVIDENCE = 2 * 4096
"""Bytes that an allocation remembers of a linear, and once more while it decides."""

_DEALT = 6 * 4 * 1024
"""Bytes for each channel that is dealt to N:M groups: scores of 1,024 rows, copies of them, and their sums by pairs."""

_DEALER = 40 * 2**20
"""What scipy takes that deals them, from then on. Measured."""

TOKEN_BYTES = 128
"""What the text takes from which one calibration token is drawn."""

READ_BYTES, WINDOW_BYTES = 8, 8
"""What a byte of a file that is one text takes at the most: while it is read, as a character and as the id of a token,
and as long as the windows of an evaluation are held."""

SMALL_FILE = 2**20
"""Bytes of such a file that `GROWTH` has room for, as for the pieces in which it is tokenised."""


def batch_tokens(checkpoint: Checkpoint) -> int:
    """How many tokens run through a block at once, where there is room."""
    return BATCH_TOKENS.get(checkpoint.device.type, BATCH_TOKENS["cpu"])


def batch_size(checkpoint: Checkpoint, length: int, fitted: bool = False) -> int:
    """How many sequences of a length run through a block at once, where there is room.

    Args:
        fitted: whether blocks are fitted. A step of that takes one batch, so that it is as large on any device.
    """
    return max(1, (BATCH_TOKENS["cpu"] if fitted else batch_tokens(checkpoint)) // length)


def windows_at_once(checkpoint: Checkpoint, length: int, spare: int) -> int:
    """How many windows of an evaluation go through a block before the next one is read.

    Args:
        spare: bytes that may be taken beyond the first batch of them; a quarter of what is free is the most.
    """
    size, batch = _width(checkpoint) * length, batch_size(checkpoint, length)
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
        base: what this process held when work was first laid out in it; None where that is now.
        batches: of a run that is gone on with, the sequences per forward that it began with in `CHOOSE` and `PRUNE`.
    """

    host: int
    device: int | None
    capped: bool
    base: int | None = None
    batches: Mapping[str, int] = field(default_factory=dict)

    @property
    def cap(self) -> int | None:
        """What the user allows of the host; None where that is not said."""
        return self.host if self.capped else None

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


def _width(checkpoint: Checkpoint) -> int:
    """Bytes of a token's hidden state."""
    return checkpoint.hidden_size * checkpoint.dtype.itemsize


@dataclass(frozen=True)
class Work:
    """What is to be done in one block.

    Attributes:
        number: the block.
        moments: what the linears that are pruned are given, in the order in which it comes about; what is there before
            any of its linears is run stands together.
        rows: for each input, the rows of weights that are solved at once.
        buffers: for each input, what its methods take while they solve.
        dense: whether all is collected from the block as it was.
        again: whether a linear is run more than once, so that all must be collected in one run.
        held: what a sequence holds that stands still before some linear.
        widest: features of the widest tensor that flows inside the block.
        largest: elements of its largest weight matrix.
        inside: channels of its widest expert; 0 where there are none.
        after: bytes that what follows the methods takes, besides masks and weights; 0 where nothing does.
    """

    number: int
    moments: tuple[tuple[Input, ...], ...]
    rows: Mapping[Input, int]
    buffers: Mapping[Input, Buffers]
    dense: bool
    again: bool
    held: Held
    widest: int
    largest: int
    inside: int
    after: int = 0

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs in order."""
        return tuple(entry for moment in self.moments for entry in moment)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One for each moment."""
        return tuple(map(self.stage, self.moments))

    def stage(self, inputs: Sequence[Input]) -> Stage:
        """What collects some of the inputs together."""
        return Stage(tuple(inputs), self.dense, self.again)

    def with_before(self, entry: Input, held: int = 0, solving: int = 0) -> tuple[int, int]:
        """What a pass takes for its statistics, and while it is solved, with one more input before those that it has.

        Inputs are solved in their order and then let go, so that those after it are still held when it is its turn.
        """
        held += _held(entry)
        return held, max(solving, held + _solving(entry, self.rows[entry], self.buffers[entry], self.after))


@dataclass(frozen=True)
class Schedule:
    """How the work is laid out.

    Attributes:
        batch: sequences per forward.
        length: tokens per calibration sequence.
        batches: how many of them this process runs.
        place: where the activations lie between two blocks.
        overlap: whether a block is written while the next one is read and captured.
        stages: per block, what is collected together and then solved. Where the block has to stay dense, what is run
            last comes first: what has been pruned stands behind everything that is still to be captured.
        held: how many batches may stand still in the middle of a block; the others are run anew for each stage.
        base: what the process held when this was laid out.
        memory: the estimated peak of each phase.
    """

    batch: int
    length: int
    batches: int = 0
    place: Place = "host"
    overlap: bool = True
    stages: tuple[tuple[Stage, ...], ...] = ()
    held: int = 0
    base: int = 0
    memory: dict[str, Peak] = field(default_factory=dict)

    @property
    def most_stages(self) -> int:
        """The stages of the block that has the most of them."""
        return max(map(len, self.stages))

    @property
    def peak(self) -> Peak:
        """The most that any phase takes."""
        most = Peak()
        for peak in self.memory.values():
            most |= peak
        return most


def abreast(checkpoint: Checkpoint, schedule: Schedule, sequences: int, had: Room) -> tuple[Schedule, int]:
    """How many shorter models may go through the blocks together, and the schedule with the memory that this takes.

    Args:
        schedule: its phase `choose` holds one of them.
        sequences: what each is measured on, on this rank.
    """
    phase, each = schedule.memory[CHOOSE], 2 * sequences * schedule.length * _width(checkpoint)
    apart = had.device is not None
    spare = (had.device or 0) - phase.device if apart else had.host - phase.host
    if not had.capped:
        spare = min(spare, (had.device or 0) // 4 if apart else memory.available() // 4)
    count = min(len(checkpoint.blocks), 1 + max(0, spare) // each)
    more = (count - 1) * each
    peak = phase + (Peak(device=more) if apart else Peak(more))
    return replace(schedule, memory={**schedule.memory, CHOOSE: peak}), count


class Needs:
    """What the phases of a run take."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        blocks: Sequence[Work],
        samples: int,
        length: int,
        text: int | None,
        fitted: int = 0,
        look: Literal["nothing", "weights", "norms"] = "nothing",
        together: tuple[int, int] = (0, 0),
        permuted: bool = False,
        shortened: tuple[int, int] = (0, 0),
        base: int | None = None,
        narrowed: bool = False,
        foresees: bool = False,
        passes: bool = False,
        drawn: tuple[str, int] = ("", 0),
        evaluated: tuple[str, int] = ("", 0),
    ) -> None:
        """Take in the work.

        Args:
            samples: calibration sequences of this process; 0 where no data is needed.
            length: tokens of each.
            text: context length of an evaluation, None without.
            fitted: how many blocks are run at once while one is fitted to the dense model's states; 0 where none is.
            look: what an allocation is shown of the dense blocks.
            together: how many sequences an allocation measures on, and the most that go through the model at a time.
            permuted: whether channels change places.
            shortened: how many sequences blocks are chosen on that go, and how many are drawn for it; 0 where these
                blocks are known.
            base: what the process holds before any of it; by default what it holds now.
            narrowed: whether a smaller copy of each block takes its place.
            foresees: whether units of all blocks are chosen by what the dense model's loss feels of them.
            passes: whether the calibration text goes through the dense model before, to choose hidden channels.
            drawn, evaluated: the file that is read as one text, for calibration and for an evaluation, and its bytes.
        """
        counted, windows = (max(0, size - SMALL_FILE) for _, size in (drawn, evaluated))
        read = (drawn[0], READ_BYTES * counted), (evaluated[0], WINDOW_BYTES // 2 * windows)  # besides the windows
        self._file, self._read = max(read, key=lambda file: file[1])
        self._tokens = TOKEN_BYTES * samples * length
        self._foresees, self._passes = foresees, passes
        self._narrowed = narrowed
        self._together, self._permuted, self._shortened = together, permuted, shortened
        self._checkpoint, self._blocks, self._samples, self._length = checkpoint, blocks, samples, length
        self._text, self._fitted, self._look = text, fitted, look
        self._beside = any(stage.beside for work in blocks for stage in work.stages)  # the dense model's way
        shape = checkpoint.shape
        self._gone = shape.gone if samples and shape is not None else ()
        self._wide = 1.0 if shape is None or shape.wide is None else shape.wide / checkpoint.hidden_size
        self._apart = checkpoint.device.type != "cpu"
        self._width = _width(checkpoint)
        self._vocabulary = int(checkpoint.config.get_text_config().vocab_size)
        self._sizes = [checkpoint.footprint(keys) for keys in checkpoint.block_keys]
        self._outer, self._whole = (checkpoint.footprint(checkpoint.outer(head)) for head in (False, True))
        others = [*checkpoint.outer_keys, *checkpoint.unclaimed_keys]
        self._largest = max([checkpoint.index[key].nbytes for key in others] + [size.stored for size in self._sizes])
        experts = any(work.inside for work in blocks)
        self._held = memory.current() if base is None else base
        self._base = Peak(self._held + GROWTH + (EXPERTS if experts else 0) + WINDOW_BYTES * windows)

    def schedule(self, batch: int, had: Room, before: int | None = None) -> Schedule:
        """The fastest schedule that fits.

        Args:
            batch: sequences per forward where there is room.
            before: those that are taken if at all possible, so that a run goes on as it began.

        Raises:
            UserError: none fits; the message names the smallest cap that can hold.
        """
        sizes = [batch]
        while sizes[-1] > 1 and (had.capped or self._apart):  # else the batches stay as they are
            sizes.append(sizes[-1] // 2)
        for tried in ([before], sizes) if before is not None else (sizes,):
            if (made := self._fastest(tried, had)) is not None:
                return made
        *_, leanest = self._options(sizes[-1:])
        least = self._packed(leanest, None)
        error = UserError(_too_small(least, had, self._file if self._read > self._tokens else None))
        error.least = least.peak.host
        raise error

    def _fastest(self, sizes: Sequence[int], had: Room) -> Schedule | None:
        """The fastest schedule that fits, with batches of one of these sizes; None where none does."""
        options = list(self._options(sizes))
        for option in options:
            if had.holds(option.peak):
                return option
        fitting = [fitted for option in options if (fitted := self._with_fewer(option, had)) is not None]
        if fitting:
            return max(fitting, key=lambda option: option.held * option.batch)  # the fastest of those that hold as many
        packed = self._packed(options[-1], had)
        return packed if had.holds(packed.peak) else None

    def _options(self, sizes: Sequence[int]) -> Iterator[Schedule]:
        """From the fastest to the leanest."""
        places: list[tuple[Place, bool]] = [("host", True), ("host", False), ("disk", False)]
        if self._apart:
            places.insert(0, ("device", True))
        stages = tuple(work.stages for work in self._blocks)
        for batch in sizes:
            batches = -(-self._samples // batch)
            for place, overlap in places:
                made = Schedule(batch, self._length, batches, place, overlap, stages, batches, self._held)
                yield self._measured(made)

    def _measured(self, option: Schedule) -> Schedule:
        return replace(option, memory=self._phases(option))

    def _with_fewer(self, option: Schedule, had: Room) -> Schedule | None:
        """With as many batches that stand still as fit, None where it does not fit without any."""
        best, too_many = None, option.held
        fewest = -1
        while too_many - fewest > 1:
            tried = self._measured(replace(option, held=(fewest + too_many) // 2))
            if had.holds(tried.peak + (Peak(_SLACK, _SLACK) if tried.held else Peak())):
                best, fewest = tried, tried.held
            else:
                too_many = tried.held
        return best

    def _packed(self, option: Schedule, had: Room | None) -> Schedule:
        """With no batch that stands still, and as few stages as there can be; without room one for each input."""
        stages = tuple(self._stages(work, option, had) for work in self._blocks)
        return self._measured(replace(option, held=0, stages=stages))

    def _stages(self, work: Work, option: Schedule, had: Room | None) -> tuple[Stage, ...]:
        if work.again:
            return work.stages
        beside = self._base + self._kept(option) + self._loaded(work)
        flow = self._flow(work, option.batch, option.length)
        stages: list[list[Input]] = []
        for moment in work.moments:
            here: list[list[Input]] = []
            held = solving = 0
            for entry in reversed(moment):
                held, solving = work.with_before(entry, held, solving)
                if here and had is not None and had.holds(beside + self._near(max(held + flow, solving))):
                    here[-1].insert(0, entry)
                else:
                    here.append([entry])
                    held, solving = work.with_before(entry)
            stages += here
        return tuple(map(work.stage, stages))

    # -- what is held --------------------------------------------------------------------------------------------------

    def _phases(self, option: Schedule) -> dict[str, Peak]:
        capture = solve = write = behind = Peak()
        for work, stages in zip(self._blocks, option.stages, strict=True):
            size = self._sizes[work.number]
            loaded = self._loaded(work)
            flow = self._flow(work, option.batch, option.length) if self._samples else 0
            still = self._still(work, option)
            beside = behind if self._apart else Peak()  # the block before is on the disk else, see `prune_blocks`
            capture |= behind + loaded + Peak(size.reading)  # while it is read
            for stage in stages:
                held = solving = 0
                for entry in reversed(stage.inputs):
                    held, solving = work.with_before(entry, held, solving)
                capture |= behind + loaded + self._near(still + held + flow)
                solve |= beside + loaded + self._near(still + solving)
            write |= loaded + Peak(size.converted)
            if self._narrowed:  # while one is made of the other, at the most as large
                write |= beside + loaded + self._placed(size)
            if self._permuted:
                dealt = _DEALT * work.widest
                capture |= behind + loaded + self._near(max(flow + 4 * work.widest, dealt))
            for gone in self._gone:  # the dense model's states go through blocks that went
                through = self._wider(self._near(self._flow(replace(work, moments=()), option.batch, option.length)))
                capture |= behind + loaded + self._placed(gone) + (Peak(gone.reading) | through)
            if self._fitted:
                solve |= beside + loaded + self._fitting(work, option)
            behind = Peak(size.stored) if option.overlap else Peak()
        kept, dealer = self._kept(option), Peak(_DEALER if self._permuted else 0)
        found = {"capture": kept + capture, "solve": kept + solve, "write": kept + write, "copy": Peak(self._largest)}
        if self._samples or self._read:
            found["tokens"] = Peak(self._tokens + self._read)
        if self._samples:
            found["embed"] = kept + self._wider(self._embedding(option))
        if self._look != "nothing":
            found["allocate"] = self._looking(option) | self._answering(option, *self._together)
        sequences, drawn = self._shortened
        if sequences:
            found[CHOOSE] = self._answering(option, sequences, sequences) | Peak(TOKEN_BYTES * drawn * self._length)
        if self._passes:
            found[CHOOSE] = found.get(CHOOSE, Peak()) | self._passing(option)
        if self._foresees:
            found["foresee"] = self._foreseeing(replace(option, batch=1))
        if self._text is not None:
            found["evaluate"] = self._evaluation(self._text)
        for phase in {"capture", "solve", "write", "copy", "evaluate"} & set(found):
            found[phase] += dealer
        return {phase: self._base + peak for phase, peak in found.items()}

    def _near(self, size: int) -> Peak:
        """Memory where the blocks are run."""
        return Peak(device=size) if self._apart else Peak(size)

    def _placed(self, size: Footprint) -> Peak:
        """Weights as the files hold them, on the host, and as they are run."""
        return Peak(size.stored) + self._near(size.copied)

    def _loaded(self, work: Work) -> Peak:
        size = self._sizes[work.number]
        return self._placed(size) + (self._near(max(size.stored, size.copied)) if self._beside else Peak())

    def _kept(self, option: Schedule) -> Peak:
        """The activations of all batches, and the dense model's of all or a sample of them."""
        follow = self._samples if self._fitted or self._beside else min(SAMPLE * option.batch, self._samples)
        size = math.ceil((self._samples + follow * self._wide) * self._width) * self._length
        return {"device": Peak(device=size), "host": Peak(size), "disk": Peak()}[option.place]

    def _still(self, work: Work, option: Schedule) -> int:
        """What the batches hold that stand still in the middle of a block."""
        if work.dense:
            return 0
        sequences = min(option.held * option.batch, self._samples)
        apart = option.place == "disk" or (self._apart and option.place == "host")
        stream = option.length * self._width
        each = work.held.size(option.length) + (stream if apart else 0)
        return sequences * (2 * (each + stream) if self._beside else each)

    def _flow(self, work: Work, sequences: int, length: int) -> int:
        """What is under way inside a block that runs, and what its statistics need to take it in."""
        run, tokens = self._checkpoint.dtype.itemsize, sequences * length
        each = max(8 * self._width + 3 * run * work.widest, work.held.token + 4 * self._width) + length * work.held.pair
        taken = max((_TAKEN[entry.needs] * entry.features + _beside(entry) for entry in work.inputs), default=0)
        size = int(tokens * (each + taken)) + run * work.largest
        if widens(self._checkpoint.device, self._checkpoint.dtype):
            size += 4 * (2 * tokens * work.widest + min(AT_ONCE, work.largest))
        return size

    def _fitting(self, work: Work, option: Schedule) -> Peak:
        """Weights with their gradients and both moments, and what a batch leaves behind for its way back."""
        most = self._near(24 * self._weights(work) + self._behind(work, option))
        for further in self._blocks[work.number + 1 : work.number + self._fitted]:
            size = self._sizes[further.number]
            passing = self._near(self._widened(further) + self._behind(further, option))
            most += self._placed(size) + (passing | Peak(size.reading))
        return most

    def _weights(self, work: Work) -> int:
        """How many a block has."""
        return sum(self._checkpoint.index[key].numel for key in self._checkpoint.block_keys[work.number])

    def _widened(self, work: Work) -> int:
        """A copy of a block's weights in float32, where it is run in that for the sake of its gradient."""
        return 4 * self._weights(work) if widens(self._checkpoint.device, self._checkpoint.dtype) else 0

    def _behind(self, work: Work, option: Schedule) -> int:
        """What a batch that runs through a block leaves behind for its way back."""
        tokens = option.batch * option.length
        hidden = self._checkpoint.hidden_size
        inside = float(_BEHIND_WIDEST * work.widest)
        if work.inside:  # a token goes to several experts
            sent = experts_per_token(self._checkpoint.config.get_text_config())
            inside = max(inside, sent * (_SENT_WIDTH * hidden + _SENT_INSIDE * work.inside))
        return int(tokens * 4 * (inside + _BEHIND_WIDTH * hidden)) + int(4 * option.length * tokens * work.held.pair)

    def _passing(self, option: Schedule) -> Peak:
        """One dense block after the other, through which all batches go."""
        most = Peak()
        for work in self._blocks:
            flow = self._flow(replace(work, moments=()), option.batch, option.length)
            most |= self._loaded(work) + (Peak(self._sizes[work.number].reading) | self._near(flow))
        return self._kept(option) + (most | self._embedding(option)) | self._trial()

    def _trial(self) -> Peak:
        """A block in float32 beside what the files hold of it, on the host: does a slimmer one return the same?"""
        most = Peak()
        for work in self._blocks:
            size = self._sizes[work.number]
            most |= Peak(size.stored + size.reading + 4 * self._weights(work))
        return most

    def _wider(self, peak: Peak) -> Peak:
        """What something takes in the dense model, by what it takes in one with fewer hidden channels."""
        return Peak(math.ceil(peak.host * self._wide), math.ceil(peak.device * self._wide))

    def _embedding(self, option: Schedule) -> Peak:
        """What surrounds the blocks, and a batch that is embedded."""
        return self._placed(self._outer) + self._near(4 * option.batch * option.length * self._width)

    def _looking(self, option: Schedule) -> Peak:
        """One dense block after the other: its weights, and where they are asked for the norms of its inputs."""
        most = Peak()
        for work in self._blocks:
            size = LOOKED_AT + (0 if self._look == "norms" else 3 * 4 * work.largest)
            if self._look == "norms":
                taken = _TAKEN["norms"] * option.batch * option.length * work.widest
                sums = 4 * sum(entry.features for entry in work.inputs)
                size = max(size, self._flow(replace(work, moments=()), option.batch, option.length) + taken) + sums
            most |= self._loaded(work) + Peak(self._sizes[work.number].reading)
            most |= self._loaded(work) + self._near(size)
        if self._look == "weights":
            return most
        known = EVIDENCE * sum(len(entry.linears) for work in self._blocks for entry in work.inputs)
        return most + self._kept(option) + Peak(known) + self._norms

    def _answering(self, option: Schedule, sequences: int, together: int) -> Peak:
        """One block after the other in many versions, one at a time, and the states that pass through them.

        Args:
            sequences: how many there are, as the dense model takes them.
            together: how many go through the blocks at a time.
        """
        if not sequences:
            return Peak()
        most = self._head
        for work in self._blocks:
            size = max(4 * 4 * work.largest, self._flow(replace(work, moments=()), 1, option.length))
            most |= self._loaded(work) + Peak(self._sizes[work.number].stored) + self._near(size)
        states = (2 * together + 2 * sequences) * option.length * self._width
        return most + self._near(states) + self._norms

    def _foreseeing(self, option: Schedule) -> Peak:
        """One block after the other, through which a sequence goes there and its gradient back; states are in files."""
        most = self._head
        for work in self._blocks:
            there = self._flow(replace(work, moments=()), 1, option.length)
            most |= self._loaded(work) + Peak(self._sizes[work.number].reading) + self._near(there)
            most |= self._loaded(work) + self._near(self._widened(work) + self._behind(work, option))
        return most + self._near(4 * 4 * option.length * self._checkpoint.hidden_size)

    @property
    def _head(self) -> Peak:
        """The outer weights, and what the scores of some tokens are compared in, there and back."""
        scores = LOSS_TOKENS * self._vocabulary * (2 * self._checkpoint.dtype.itemsize + 4 * 4)
        return self._placed(self._whole) + self._near(scores)

    @property
    def _norms(self) -> Peak:
        """Those of the inputs of all linears."""
        return self._near(4 * sum(entry.features for work in self._blocks for entry in work.inputs))

    def _evaluation(self, length: int) -> Peak:
        """One batch of windows that goes through the largest block, or comes out at the end."""
        batch = batch_size(self._checkpoint, length)
        scores = LOSS_TOKENS * self._vocabulary * self._checkpoint.dtype.itemsize
        parts = 3 * 4 * LOSS_TOKENS * self._vocabulary
        most = self._placed(self._whole) + self._near(2 * scores + parts)
        for work in self._blocks:
            most |= self._loaded(work) + Peak(self._sizes[work.number].reading)
            most |= self._loaded(work) + self._near(self._flow(replace(work, moments=()), batch, length))
        return most + Peak(batch * length * self._width)


_BEHIND_WIDEST, _BEHIND_WIDTH = 6, 24
"""Tensors in float32 that a block leaves behind for a gradient: of its widest inside, and of the hidden size."""

_SENT_WIDTH, _SENT_INSIDE = 2.25, 3.25
"""Those that an expert leaves behind for a token that is sent to it: of the hidden size, and of its channels."""


def _held(entry: Input) -> int:
    """Bytes of an input's statistics while they are collected; of a Gram half is, in numbers twice as wide."""
    each = entry.features + PANEL if entry.needs == "gram" else SAMPLE_TOKENS
    return 4 * entry.features * (each + 2 * entry.beside)


_TAKEN = {"nothing": 0, "norms": 8, "gram": 12}
"""Bytes a token and feature that taking inputs into statistics needs: float32 copies of them."""


def _beside(entry: Input) -> int:
    """Bytes a token that taking in what the dense model gives beside it needs: what is kept of it, and copies."""
    return 12 * entry.features + 8 * entry.beside if entry.beside else 0


def _solving(entry: Input, rows: int, buffers: Buffers, after: int) -> int:
    """Bytes that solving the linears of an input needs besides its statistics, and what follows that."""
    weights, square = 4 * rows * entry.features, 4 * entry.features**2 if entry.needs == "gram" else 0
    changing = buffers.factor * square + buffers.weights * weights
    # What the method found, what takes its place and the masks; what it held of the Gram stays with the statistics.
    following = int(after + buffers.factor * square + 3.25 * weights) if after else 0
    aiming = 3 * square + weights if entry.beside else 0
    return int(1.5 * weights) + max(buffers.factorising * square, changing, following, aiming)


_SLACK = 2**24
"""What a cap that is named to be the smallest is more than that: no two processes begin alike."""


def _too_small(least: Schedule, had: Room, file: str | None) -> str:
    phase = max(least.memory, key=lambda name: least.memory[name].host)
    if had.device is not None and least.peak.device > had.device:
        return (
            f"the GPU has {format_size(had.device)} free, and this model needs {format_size(least.peak.device)} of "
            "it at the least: use one with more, shorter sequences (--length), or --device cpu"
        )
    smallest = format_size(least.peak.host + _SLACK)
    if had.capped and phase == "tokens" and file is not None:
        return (
            f"--max-memory is {format_size(had.host)}, but reading {file} as one text takes more: the smallest that "
            f"can hold is {smallest}; or give a shorter text"
        )
    if had.capped:
        return (
            f"--max-memory is {format_size(had.host)}, but the phase {phase!r} of this model takes more: the smallest "
            f"that can hold is {smallest}"
        )
    return (
        f"{format_size(had.host)} of memory can be had, but this model needs {smallest} at the least (in the phase "
        f"{phase!r}); say --max-memory {smallest} to try it all the same"
    )
