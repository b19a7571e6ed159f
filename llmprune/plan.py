"""The plan: every linear with its method and pattern, worked out and checked before any work. User errors end here."""

from __future__ import annotations

import fnmatch
import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmprune import allocate, distributed, named, solvers
from llmprune.after import After, read_after
from llmprune.allocate import Allocator, Improver
from llmprune.allocation import LEFT_DENSE, Known, target
from llmprune.budget import Needs, Room, Schedule, Work, batch_size
from llmprune.errors import UserError, unknown
from llmprune.model.blocks import Chain, hidden_of, kinds, probe, probe_length
from llmprune.model.channels import Channels, find_channels
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.linears import Linear, find_linears
from llmprune.model.skeleton import decoder_prefix
from llmprune.model.survey import Survey
from llmprune.model.watch import Input, Stage
from llmprune.patterns import NM, Unstructured, parse
from llmprune.permute import moves
from llmprune.recipe import Recipe
from llmprune.reconstruct.block import Reconstructor as BlockReconstructor
from llmprune.solvers import Solver
from llmprune.stats import LEVELS
from llmprune.stats import Needs as Level

DEFAULT_LENGTH = 2048

UNSEEN_EXPERTS = "experts that transformers does not let run one by one: NOT pruned"


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
    pattern: Unstructured | NM
    after: After
    kept: str | None = None
    rule: int | None = None
    allocated: bool = False
    asymmetric: float = 0.0

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
        """Whether any method, or the allocation, asks for calibration."""
        return self.calibrates or (self.budget is not None and self.budget.allocator.needs == "norms")

    @property
    def calibrates(self) -> bool:
        """Whether any method asks for calibration."""
        return any(choice.needs != "nothing" for choice in self.pruned)

    @property
    def fit(self) -> BlockReconstructor | None:
        """What fits whole blocks, None where nothing does."""
        return next((choice.after.block for choice in self.pruned), None)

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model's hidden states are taken through the blocks beside those of the pruned one."""
        return self.fit is not None or any(stage.beside for stages in self.schedule.stages for stage in stages)

    @property
    def known(self) -> list[Known]:
        """The linears that share the budget."""
        return _known(self.blocks)

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
            "allocated": self.budget is None or self.budget.targets is not None,
            "linears": [
                {
                    "name": choice.linear.name,
                    "shape": list(choice.linear.shape),
                    "method": choice.method if choice.kept is None else None,
                    "pattern": str(choice.pattern) if choice.kept is None and not self.open(choice) else None,
                    "permuted": choice.linear.name in moved,
                    "kept": choice.kept,
                    "rule": choice.rule,
                }
                for choice in self.choices
            ],
        }


def make_plan(checkpoint: Checkpoint, recipe: Recipe, had: Room) -> Plan:
    """Decide for every linear, check shapes, try the first block of each kind on a few tokens, and fit it into memory.

    Args:
        had: the memory that it is to fit into.

    Raises:
        UserError: a pattern that does not divide, a rule that matches nothing, a model that cannot be walked, ...
    """
    budget = _budget(recipe)
    default = _resolve(recipe, None, budget)
    rules = [_resolve(recipe, number, budget) for number in range(len(recipe.rules))]
    after = read_after(recipe, {name: solver for name, solver, _ in (default, *rules)})
    surveys: dict[int, Survey] = {}
    movable: dict[int, list[Channels]] = {}

    by_file = budget is not None and budget.allocator.needs == "nothing"  # which may ask for anything
    permutes = recipe.permute and (by_file or any(isinstance(entry[2], NM) for entry in (default, *rules)))

    def study(number: int, run: Callable[[], Any]) -> Any:
        name = checkpoint.blocks[number]
        block = checkpoint.block(name)
        linears = find_linears(block, name)
        surveys[number] = Survey(linears, probe_length(checkpoint))
        if permutes:
            try:
                movable[number] = find_channels(block, name, linears, lambda: hidden_of(run()))
            except Exception as error:
                raise UserError(
                    f"permute: a trial of {name} to see which channels may change places failed with "
                    f"{type(error).__name__}: {error}; leave it out (--set permute=false)"
                ) from error
        with surveys[number].watching(block, name):
            return run()

    chain = probe(checkpoint, study)
    blocks: list[tuple[Choice, ...]] = []
    writers: list[tuple[str, ...]] = []
    channels: list[tuple[Channels, ...]] = []
    for number, kind in enumerate(kinds(checkpoint)):
        survey, like = surveys[kind], checkpoint.blocks[kind]
        called = {name.removeprefix(like) for moment in survey.moments for group in moment for name in group}
        checkpoint.check_revertible(number)
        name = checkpoint.blocks[number]
        writers.append(tuple(name + known.removeprefix(like) for known in survey.writers))
        channels.append(tuple(one.renamed(like, name) for one in movable.get(kind, ())))
        choices = []
        for linear in find_linears(checkpoint.block(name), name):
            rule = next((place for place, entry in enumerate(recipe.rules) if matches(entry.match, linear.name)), None)
            method, solver, pattern = default if rule is None else rules[rule]
            kept = None
            if any(matches(pattern_, linear.name) for pattern_ in recipe.ignore):
                kept = "ignored"
            elif rule is not None and recipe.rules[rule].skip:
                kept = f"skipped by rule {rule + 1}"
            own = rule is not None and recipe.rules[rule].sparsity is not None
            place = None if rule is None else rule + 1
            choice = Choice(linear, method, solver, pattern, after, kept, place, budget is not None and not own)
            if kept is None and choice.needs != "nothing" and linear.name.removeprefix(name) not in called:
                choice = replace(choice, kept="its inputs cannot be seen: its weight is read without calling it")
            aims = choice.fits and linear.expert is None and (not writers[number] or linear.name in writers[number])
            share = recipe.calibration.asymmetric if aims else 0.0
            choices.append(replace(choice, allocated=choice.allocated and choice.kept is None, asymmetric=share))
        blocks.append(tuple(choices))
    _check_names(checkpoint, recipe, blocks)
    if budget is not None:
        if not any(choice.allocated for block in blocks for choice in block):
            raise UserError(f"allocation {budget.name} has nothing to allocate: each linear is left out, or has a rule")
        if budget.allocator.needs == "nothing":
            budget = replace(budget, targets=budget.allocator.allocate(_known(blocks), budget.sparsity or 0.0))
            blocks = _settled(blocks, budget)
    _check_shapes(budget, blocks)
    works = []
    for number, kind in enumerate(kinds(checkpoint)):
        survey, like, name = surveys[kind], checkpoint.blocks[kind], checkpoint.blocks[number]
        moments = [
            [[name + known.removeprefix(like) for known in group] for group in moment] for moment in survey.moments
        ]
        dense = survey.again or not recipe.calibration.true_sequential
        seen = _moments(blocks[number], moments, writers[number])
        works.append(_work(number, blocks[number], seen, survey, dense))
    if not any(choice.kept is None for block in blocks for choice in block):
        raise UserError("nothing is left to prune: every linear is ignored, skipped or cannot be pruned")
    aiming = any(choice.asymmetric and choice.kept is None for block in blocks for choice in block)
    if recipe.calibration.asymmetric and not aiming:
        raise UserError(
            "calibration.asymmetric changes what kept weights are fitted to, and nothing fits them here (experts are "
            "never fitted that way): take a method such as sparsegpt or alps, or add --reconstruct cg"
        )

    length = sequence_length(checkpoint, recipe.calibration.length)
    look = budget.allocator.needs if budget is not None else "nothing"
    data = any(choice.kept is None and choice.needs != "nothing" for block in blocks for choice in block)
    text = None if recipe.evaluate.text is None else sequence_length(checkpoint, recipe.evaluate.length)
    samples = -(-recipe.calibration.samples // distributed.size())
    together = (0, 0)
    if budget is not None and isinstance(budget.allocator, Improver):
        sequences = min(recipe.calibration.samples, -(-budget.allocator.tokens // length))
        mine = -(-sequences // distributed.size())
        together = mine, budget.allocator.together(mine, sequences)
    drawn = samples if data or look == "norms" else 0
    needs = Needs(checkpoint, works, drawn, length, text, after.block is not None, look, together, bool(permutes))
    schedule = needs.schedule(min(samples, batch_size(checkpoint, length)), had)
    weights = sum(info.numel for info in checkpoint.index.values())
    others = _others(checkpoint, blocks)
    made = Plan(tuple(blocks), chain, weights, others, schedule, had, budget, tuple(writers), tuple(channels))
    _check_permuted(made, recipe)
    return made


def _check_permuted(plan: Plan, recipe: Recipe) -> None:
    """See that a permutation that was asked for finds something to permute."""
    if recipe.permute is not True or any(map(plan.permuted, range(len(plan.blocks)))):
        return
    groups = any(isinstance(choice.pattern, NM) for choice in plan.pruned)
    why = (
        "no channels of this model's pruned linears can change places without changing what its blocks return"
        if groups
        else "only N:M patterns such as 2:4 have groups that it could make better, and no linear gets one"
    )
    raise UserError(f"permute has nothing to do: {why}; leave it out")


def allocated(plan: Plan, targets: Mapping[str, str]) -> Plan:
    """The plan with the targets that were found for the linears that share the budget.

    It is laid out as before, and takes no more memory.
    """
    assert plan.budget is not None
    budget = replace(plan.budget, targets=targets)
    blocks = _settled(plan.blocks, budget)
    left = {choice.linear.name for block in blocks for choice in block if choice.kept == LEFT_DENSE}
    stages = tuple(tuple(_without(part, left)) for part in plan.schedule.stages)
    return replace(plan, blocks=tuple(blocks), schedule=replace(plan.schedule, stages=stages), budget=budget)


def _without(stages: Sequence[Stage], left: set[str]) -> Iterator[Stage]:
    for stage in stages:
        kept = [
            replace(entry, linears=tuple(name for name in entry.linears if name not in left)) for entry in stage.inputs
        ]
        if inputs := tuple(entry for entry in kept if entry.linears):
            yield replace(stage, inputs=inputs)


def _settled(blocks: Sequence[tuple[Choice, ...]], budget: Budget) -> list[tuple[Choice, ...]]:
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


def _known(blocks: Sequence[tuple[Choice, ...]]) -> list[Known]:
    return [
        Known(choice.linear.name, number, choice.linear.shape, choice.pattern.scope)
        for number, block in enumerate(blocks)
        for choice in block
        if choice.allocated
    ]


def _budget(recipe: Recipe) -> Budget | None:
    """How the recipe's sparsity is to be divided; None where it is not."""
    allocator, spec = allocate.load(recipe.allocation), recipe.allocation
    name = named.name_of(spec)
    if name == "uniform":
        return None
    if allocator.needs == "nothing":
        return Budget(str(getattr(allocator, "path", name)), allocator, None)
    patterns = tuple(
        pattern for text in getattr(allocator, "patterns", ()) if isinstance(pattern := target(text, "row"), NM)
    )
    asked = parse(recipe.sparsity)
    if isinstance(asked, NM):
        raise UserError(
            f"allocation {name} divides a sparsity such as 40%, not {asked}: to choose which linears get {asked}, ask "
            f"for the sparsity of all together, and add --set 'allocation.patterns=[{asked}, dense]'"
        )
    return Budget(name, allocator, asked.sparsity, patterns)


def sequence_length(checkpoint: Checkpoint, asked: int | None) -> int:
    """The asked length, checked against what the model can take; by default 2048 or as much as it takes.

    Raises:
        UserError: the model takes less.
    """
    longest = checkpoint.max_length
    if asked is None:
        return min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    if longest is not None and asked > longest:
        raise UserError(
            f"sequences of {asked:,} tokens are longer than {checkpoint.source.name} can take ({longest:,}): "
            f"ask for at most that (--length {longest})"
        )
    return asked


def matches(pattern: str, name: str) -> bool:
    """Whether a glob, or `re:` and a regular expression, matches a whole name."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise UserError(f"{pattern!r} is not a valid regular expression: {error}") from None
    return fnmatch.fnmatchcase(name, pattern)


def _resolve(recipe: Recipe, number: int | None, budget: Budget | None) -> tuple[str, Solver, Unstructured | NM]:
    rule = recipe.rules[number] if number is not None else None
    where = "" if number is None else f"rule {number + 1}: "
    try:
        method = rule.method if rule is not None and rule.method is not None else recipe.method
        solver = solvers.load(method)
        scope = (rule.scope if rule is not None else None) or recipe.scope or solver.scope
        sparsity = rule.sparsity if rule is not None and rule.sparsity is not None else recipe.sparsity
        pattern = parse(sparsity, scope)  # type: ignore[arg-type]
        if budget is not None and (rule is None or rule.sparsity is None):
            if budget.patterns:
                pattern = budget.patterns[0]
            elif isinstance(pattern, NM):  # a plan file goes before it, and may ask for anything
                pattern = Unstructured(pattern.sparsity, scope)  # type: ignore[arg-type]
        return named.name_of(method), solver, pattern
    except UserError as error:
        raise UserError(f"{where}{error}") from None


def _check_names(checkpoint: Checkpoint, recipe: Recipe, blocks: list[tuple[Choice, ...]]) -> None:
    linears = [choice.linear.name for block in blocks for choice in block]
    modules = [name for name, _ in checkpoint.model.named_modules()]
    patterns = [("ignore", pattern) for pattern in recipe.ignore]
    patterns += [(f"rule {number}", rule.match) for number, rule in enumerate(recipe.rules, 1)]
    for where, pattern in patterns:
        # Outer modules (lm_head) may be named too; they are left alone anyway.
        known = linears if where != "ignore" else linears + modules
        if not any(matches(pattern, name) for name in known):
            raise unknown(f"name in {where}, it matches no linear:", pattern, {_tail(name) for name in linears})


def _tail(name: str) -> str:
    return f"*.{name.rsplit('.', 1)[-1]}"


def _check_shapes(budget: Budget | None, blocks: list[tuple[Choice, ...]]) -> None:
    for choice in (choice for block in blocks for choice in block if choice.kept is None):
        may = budget.patterns if choice.allocated and budget is not None and budget.patterns else (choice.pattern,)
        for pattern in may:
            group, features = pattern.group, choice.linear.shape[1]
            if features % group:
                by = f" (rule {choice.rule})" if choice.rule else ""
                raise UserError(
                    f"{pattern} needs in_features divisible by {group}; "
                    f"{choice.linear.name} has {features}{by}: "
                    f"leave it out with --ignore '{_tail(choice.linear.name)}', or choose another pattern"
                )


def _others(checkpoint: Checkpoint, blocks: list[tuple[Choice, ...]]) -> dict[str, int]:
    """Weights that no linear covers, told apart by where they are."""
    held = {choice.linear.parameter for block in blocks for choice in block}
    found: dict[str, int] = {}

    def add(kind: str, key: str) -> None:
        found[kind] = found.get(kind, 0) + checkpoint.index[key].numel

    for key in checkpoint.outer_keys:
        parameter = checkpoint.targets(key)[0]
        decoder = decoder_prefix(checkpoint.model)
        inside = parameter.startswith(decoder) or parameter.count(".") == 1
        part = parameter.removeprefix(decoder) if inside else ".".join(parameter.split(".")[:2])
        add(f"outside the blocks: {part}", key)
    for keys in checkpoint.block_keys:
        for key in keys:
            if not held.intersection(checkpoint.targets(key)):
                matrix = len(checkpoint.index[key].shape) > 1 and "expert" in key
                add(UNSEEN_EXPERTS if matrix else "in the blocks, but no linear: norms, biases, routers, ...", key)
    for key in checkpoint.unclaimed_keys:
        add("claimed by no module: copied as it is", key)
    return found


def _moments(
    choices: Sequence[Choice], moments: Sequence[Sequence[Sequence[str]]], writers: Sequence[str]
) -> tuple[tuple[Input, ...], ...]:
    """What the linears that are pruned are given, by moments, in the order in which it comes about.

    Args:
        moments: names of linears in that order, those that share an input together. Linears that are in none of them,
            because their weight is read without calling them, come first: what they do may come before anything else.
    """
    pruned = {choice.linear.name: choice for choice in choices if choice.kept is None}
    known = {name for moment in moments for group in moment for name in group}
    found = []
    for moment in [[[name] for name in pruned if name not in known], *moments]:
        inputs = []
        for group in moment:
            if names := tuple(name for name in group if name in pruned):
                needs = max((pruned[name].needs for name in names), key=LEVELS.index)
                first = pruned[names[0]].linear
                stream, aims = first.name in writers, any(pruned[name].asymmetric for name in names)
                beside = first.shape[0 if stream else 1] if aims else 0
                inputs.append(Input(names, first.shape[1], needs, beside, stream))
        if inputs:
            found.append(tuple(inputs))
    return tuple(found)


def _work(
    number: int, choices: Sequence[Choice], moments: tuple[tuple[Input, ...], ...], survey: Survey, dense: bool
) -> Work:
    if dense and moments:
        moments = (tuple(entry for moment in moments for entry in moment),)
    chosen = {choice.linear.name: choice for choice in choices}
    rows, buffers = {}, {}
    for entry in (entry for moment in moments for entry in moment):
        counts = [chosen[name].linear.shape[0] for name in entry.linears]
        independent = all(chosen[name].row_independent for name in entry.linears)
        rows[entry] = sum(counts) if independent else max(counts)
        buffers[entry] = functools.reduce(operator.or_, (chosen[name].solver.buffers for name in entry.linears))
    widest = max((max(choice.linear.shape) for choice in choices), default=0)
    largest = max((choice.linear.numel for choice in choices), default=0)
    experts = any(choice.linear.expert is not None for choice in choices)
    after = max((choice.after.room for choice in choices), default=0)
    return Work(number, moments, rows, buffers, dense, survey.again, survey.held, widest, largest, experts, after)
