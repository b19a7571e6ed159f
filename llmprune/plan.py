"""The plan: every linear with its method and pattern; `planning` makes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llmprune.after import After
from llmprune.allocate import Allocator
from llmprune.allocation import LEFT_DENSE, Known, target
from llmprune.budget import Room, Schedule
from llmprune.errors import unknown
from llmprune.model.activations import Place
from llmprune.model.blocks import Chain
from llmprune.model.channels import Channels
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.linears import Linear
from llmprune.model.watch import Stage
from llmprune.model.width import Narrow
from llmprune.patterns import NM, Columns, Unstructured
from llmprune.permute import moves
from llmprune.reconstruct.block import Reconstructor as BlockReconstructor
from llmprune.solvers import Solver
from llmprune.stats import LEVELS
from llmprune.stats import Needs as Level
from llmprune.structured.depth import Shortening
from llmprune.structured.experts import Chooser
from llmprune.structured.knowing import Knowing
from llmprune.structured.width import Foreseeing

NOT_ASKED = "no sparsity is asked for"
"""Why a linear is left dense in a model that gets smaller otherwise."""

UNSEEN = (
    "its inputs cannot be seen: its weight is read without calling it, or it is an expert in code of the model's own "
    "that the few tokens of the trial did not reach"
)
"""Why one is left dense by a method that has to see inputs."""


@dataclass(frozen=True)
class Choice:
    """What is to happen to one linear.

    Attributes:
        linear: the linear.
        method: the method's name.
        solver: the method with its options.
        pattern: where zeros will stand.
        after: what follows the method.
        kept: why it is left dense instead; None when it is pruned.
        rule: the number of the rule that decided, from 1; None for the recipe's own choice.
        allocated: its sparsity is the allocation's to choose; until that is done, `pattern` stands for what may come.
        asymmetric: how far it aims at the dense model's outputs; 0 where its own on its inputs are the aim.
    """

    linear: Linear
    method: str
    solver: Solver
    pattern: Unstructured | NM | Columns
    after: After
    kept: str | None = None
    rule: int | None = None
    allocated: bool = False
    asymmetric: float = 0.0

    @property
    def fitted(self) -> bool:
        """Whether it is fitted where its block is; all of it where no sparsity is asked for."""
        return self.after.block is not None and self.kept in (None, NOT_ASKED)

    @property
    def row_independent(self) -> bool:
        """Whether its rows can be solved apart, and together with those of others."""
        return self.solver.row_independent and self.pattern.row_independent

    @property
    def fits(self) -> bool:
        """Whether it chooses kept weights anew, by the Gram."""
        return self.needs == "gram" and (self.solver.updates or bool(self.after.reconstructors))

    @property
    def products(self) -> float:
        """About how many products of its weight with a matrix of the Gram's size take as long as solving it does."""
        looks = 2 * (1 + len(self.after.names)) if self.needs == "gram" else 0  # at its error
        return self.solver.products + self.after.products + looks + (3 if self.asymmetric else 0)

    @property
    def needs(self) -> Level:
        """The most that any part of it must know of the inputs."""
        return max((self.solver.needs, self.after.needs), key=LEVELS.index)


@dataclass(frozen=True)
class Budget:
    """How the recipe's sparsity is divided among the linears that have none of their own.

    Attributes:
        name: of the allocation.
        allocator: the allocation with its options.
        sparsity: the fraction of zeros that is asked over all of them; None where a plan file says it.
        patterns: what each may get, where that is given; else they are unstructured, or as a plan file says.
        targets: what each gets, by its name; None until that is found out.
    """

    name: str
    allocator: Allocator
    sparsity: float | None
    patterns: tuple[NM, ...] = ()
    targets: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Slimming:
    """Hidden channels go.

    Attributes:
        width: how many there are.
        kept: how many of them stay.
        weights: of the model before they go.
        batch, place: how the dense model is run to choose them; see `Schedule`.
        way: see `way_to_slim`.
    """

    width: int
    kept: int
    weights: int
    batch: int
    place: Place
    way: int


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        blocks: per block, its linears with what happens to them.
        chain: how hidden states pass between blocks.
        weights: all weights of the checkpoint.
        others: weights that are in no linear: their kind to their number.
        schedule: how the work is laid out so that it fits into memory.
        room: the memory that it was laid out for.
        budget: how the sparsity is divided; None where every linear gets the recipe's.
        writers: per block, the modules whose outputs are added to the hidden states as they are.
        channels: per block, the input channels that may change places for the sake of N:M groups.
        shortening: the blocks that are still to be taken out of the model; None where none are, or where that is done.
        slimming: how many hidden channels the model has left; None where all are.
        ranked: the budget within which it is still to be ranked how many channels and heads go, in words; empty where
            that is known.
        abreast: how many shorter models may be measured together to choose them.
        narrow: the model with narrower blocks that comes of it; None where they keep their widths.
        sender: how experts are chosen, where some go.
    """

    blocks: tuple[tuple[Choice, ...], ...]
    chain: Chain
    weights: int
    others: dict[str, int]
    schedule: Schedule
    room: Room
    budget: Budget | None = None
    writers: tuple[tuple[str, ...], ...] = ()
    channels: tuple[tuple[Channels, ...], ...] = ()
    shortening: Shortening | None = None
    slimming: Slimming | None = None
    abreast: int = 1
    narrow: Narrow | None = None
    sender: Chooser | None = None
    ranked: str = ""

    def written(self, checkpoint: Checkpoint) -> Checkpoint:
        """What is written of the model that the plan is for."""
        return checkpoint if self.narrow is None else self.narrow.checkpoint

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """By the config's name for it, each number that is less: what it was and is, as far as that is known."""
        slim = {} if self.slimming is None else {"hidden_size": (self.slimming.width, self.slimming.kept)}
        return {**slim, **(self.narrow.widths if self.narrow is not None and not self.ranked else {})}

    @property
    def choices(self) -> list[Choice]:
        """All linears in order."""
        return [choice for block in self.blocks for choice in block]

    @property
    def pruned(self) -> list[Choice]:
        """The linears that will be pruned."""
        return [choice for choice in self.choices if choice.kept is None]

    @property
    def covered(self) -> float:
        """The fraction of the checkpoint's weights that lie in pruned linears."""
        return sum(choice.linear.numel for choice in self.pruned) / max(self.weights, 1)

    @property
    def needs_data(self) -> bool:
        """Whether any method, the allocation, or the choice of blocks or hidden channels asks for calibration."""
        chooses = self.slimming is not None or (self.shortening is not None and self.shortening.given is None)
        return self.calibrates or chooses or (self.budget is not None and self.budget.allocator.needs == "norms")

    @property
    def calibrates(self) -> bool:
        """Whether any method asks for calibration."""
        routed = self.narrow is not None and self.narrow.routed
        return routed or self.fit is not None or any(choice.needs != "nothing" for choice in self.pruned)

    @property
    def fit(self) -> BlockReconstructor | None:
        """What fits whole blocks, None where nothing does."""
        return next((choice.after.block for choice in self.choices if choice.fitted), None)

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model's hidden states are taken through the blocks beside those of the pruned one."""
        return self.fit is not None or any(stage.beside for stages in self.schedule.stages for stage in stages)

    @property
    def aims(self) -> float:
        """How far linears aim at the dense model's outputs; 0 where none does."""
        return max((choice.asymmetric for choice in self.pruned), default=0.0)

    @property
    def foresight(self) -> Foreseeing | None:
        """What chooses units of all blocks before the first is pruned; None where nothing does, or where it has."""
        return next((choice.solver for choice in self.pruned if isinstance(choice.solver, Foreseeing)), None)

    @property
    def known(self) -> list[Known]:
        """The linears that share the budget."""
        return known_of(self.blocks)

    @property
    def spare(self) -> int:
        """Bytes of the host that an evaluation may take beyond what it needs."""
        needed = self.schedule.memory.get("evaluate")
        return 0 if needed is None else max(0, self.room.host - needed.host)

    @property
    def uncovered(self) -> dict[str, float]:
        """What is left dense, as fractions of all weights: reason or kind of weight to share."""
        left: dict[str, float] = {}
        for choice in self.choices:
            if choice.kept is not None:
                left[choice.kept] = left.get(choice.kept, 0) + choice.linear.numel / self.weights
        for kind, count in self.others.items():
            left[kind] = count / self.weights
        return dict(sorted(left.items(), key=lambda item: -item[1]))

    def permuted(self, number: int) -> list[tuple[Channels, NM]]:
        """What of a block changes places, with the pattern of its linear."""
        patterns = {
            choice.linear.name: choice.pattern
            for choice in self.blocks[number]
            if choice.kept is None and isinstance(choice.pattern, NM)
        }
        here = self.channels[number] if self.channels else ()
        found = [(channels, patterns[channels.linear]) for channels in here if channels.linear in patterns]
        return [(channels, pattern) for channels, pattern in found if moves(channels, pattern)]

    @property
    def moved(self) -> set[str]:
        """The names of linears whose input channels change places."""
        return {channels.linear for number in range(len(self.blocks)) for channels, _ in self.permuted(number)}

    def open(self, choice: Choice) -> bool:
        """Whether a linear's sparsity is still to be found out."""
        return choice.allocated and self.budget is not None and self.budget.targets is None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        moved = self.moved
        return {
            "weights": self.weights,
            "covered": self.covered,
            "uncovered": self.uncovered,
            "memory": {phase: peak.host for phase, peak in self.schedule.memory.items()},
            "peak_memory": self.schedule.peak.host,
            "device_memory": {phase: peak.device for phase, peak in self.schedule.memory.items() if peak.device},
            "peak_device_memory": self.schedule.peak.device or None,
            "batch": self.schedule.batch,
            "length": self.schedule.length,
            "activations": self.schedule.place if self.needs_data else None,
            "overlap": self.schedule.overlap,
            "stages": self.schedule.most_stages,
            "held": self.schedule.held if self.needs_data else None,
            "allocation": self.budget.name if self.budget is not None else "uniform",
            "blocks": None if self.shortening is None else self.shortening.to_dict(),
            "widths": {name: list(width) for name, width in self.widths.items()} or None,
            "ranked": self.ranked or None,
            "allocated": self.budget is None or self.budget.targets is not None,
            "fit": None if self.fit is None else asdict(self.fit),
            "linears": [
                {
                    "name": choice.linear.name,
                    "shape": list(choice.linear.shape),
                    "method": choice.method if choice.kept is None else None,
                    "then": list(choice.after.names) if choice.kept is None else [],
                    "asymmetric": choice.asymmetric if choice.kept is None else None,
                    "pattern": str(choice.pattern) if choice.kept is None and not self.open(choice) else None,
                    "permuted": choice.linear.name in moved,
                    "kept": choice.kept,
                    "rule": choice.rule,
                }
                for choice in self.choices
            ],
        }


def allocated(plan: Plan, targets: Mapping[str, str]) -> Plan:
    """The plan with the targets that were found for the linears that share the budget.

    It is laid out as before, and takes no more memory.
    """
    assert plan.budget is not None
    budget = replace(plan.budget, targets=targets)
    blocks = settled(plan.blocks, budget)
    left = {choice.linear.name for block in blocks for choice in block if choice.kept == LEFT_DENSE}
    stages = tuple(tuple(_without(part, left)) for part in plan.schedule.stages)
    return replace(plan, blocks=tuple(blocks), schedule=replace(plan.schedule, stages=stages), budget=budget)


def foreseen(plan: Plan, gone: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan with the units that were chosen to go, see `foresee`."""

    def knowing(choice: Choice) -> Choice:
        if choice.kept is not None or not isinstance(choice.solver, Foreseeing):
            return choice
        found = gone[choice.linear.name]
        return replace(choice, solver=Knowing(frozenset(found["units"]), found["tokens"]))

    return replace(plan, blocks=tuple(tuple(map(knowing, block)) for block in plan.blocks))


def _without(stages: Sequence[Stage], left: set[str]) -> Iterator[Stage]:
    for stage in stages:
        kept = [
            replace(entry, linears=tuple(name for name in entry.linears if name not in left)) for entry in stage.inputs
        ]
        if inputs := tuple(entry for entry in kept if entry.linears):
            yield replace(stage, inputs=inputs)


def settled(blocks: Sequence[tuple[Choice, ...]], budget: Budget) -> list[tuple[Choice, ...]]:
    """All choices, those that share the budget with what they get.

    Raises:
        UserError: there is a target for a linear that the model has not, or one that is no pattern.
    """
    assert budget.targets is not None
    names = {choice.linear.name for block in blocks for choice in block}
    for name in budget.targets:
        if name not in names:
            raise unknown(f"linear in allocation {budget.name}", name, names)

    def settled(choice: Choice) -> Choice:
        if not choice.allocated:
            return choice
        pattern = target(targets[choice.linear.name], choice.pattern.scope)
        return replace(choice, kept=LEFT_DENSE) if pattern is None else replace(choice, pattern=pattern)

    targets = budget.targets
    return [tuple(map(settled, block)) for block in blocks]


def known_of(blocks: Sequence[tuple[Choice, ...]]) -> list[Known]:
    """Those of some blocks' linears that share the budget."""
    return [
        Known(choice.linear.name, number, choice.linear.shape, choice.pattern.scope)
        for number, block in enumerate(blocks)
        for choice in block
        if choice.allocated
    ]
