"""Solves the linears of a block: dealt to the ranks, as few matrices as can be, checked and recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune import distributed, memory, solvers
from llmprune.after import After
from llmprune.errors import Failure, SingularGram
from llmprune.model.checkpoint import Checkpoint, LoadedBlock
from llmprune.model.linears import find_linears
from llmprune.model.watch import Input
from llmprune.model.width import Narrow
from llmprune.parts import not_finite, some_rows, zeros
from llmprune.patterns import Pattern
from llmprune.plan import Choice
from llmprune.report.record import FEW_TOKENS, LinearRecord, mask_sha256
from llmprune.solvers import Solver
from llmprune.stats import LinearStats, Needs, ratio
from llmprune.structured.knowing import Knowing

Losses = tuple[float, float]


def solve_stage(
    checkpoint: Checkpoint,
    block: LoadedBlock,
    inputs: tuple[Input, ...],
    choices: tuple[Choice, ...],
    stats: dict[str, LinearStats],
) -> dict[str, LinearRecord]:
    """Solve the linears that are given these inputs, and put the pruned weights into the block, on every rank.

    Args:
        stats: by the names of the linears, the same on all ranks; those of an input are let go as soon as its linears
            are solved.

    Returns:
        What became of each linear; on the first rank alone.
    """
    tasks = _tasks(inputs, choices, distributed.size())
    owners = distributed.deal([task.cost for task in tasks], distributed.size())
    found: dict[str, list[_Found]] = {}
    seen = {name: _Seen(one.tokens, one.needs == "gram") for name, one in stats.items()}
    freed = 0
    for entry in inputs:
        shared = stats[entry.linears[0]]
        for name in entry.linears:
            del stats[name]
        for task, owner in zip(tasks, owners, strict=True):
            if task.input is entry and owner == distributed.rank():
                for name, result in _solve(checkpoint, block, task, shared).items():
                    found.setdefault(name, []).append(result)
                freed += 4 * entry.features * (entry.features + 4 * (task.rows[1] - task.rows[0]))
        del shared
        if freed > memory.MUCH:
            memory.give_back()
            freed = 0
    memory.give_back()
    for task, owner in zip(tasks, owners, strict=True):
        for _, rows, _ in task.parts(block.state.__getitem__):
            distributed.broadcast(rows, owner)
    block.refresh({choice.linear.parameter for task in tasks for choice in task.choices})
    everything = distributed.gather(found)
    if not distributed.is_first():
        return {}
    done = {}
    for choice in choices:
        if (name := choice.linear.name) in seen:
            weight = choice.linear.view(block.near(choice.linear.parameter))
            check(weight, choice)
            done[name] = _record(choice, weight, seen[name], [one for part in everything for one in part.get(name, ())])
    return done


@dataclass(frozen=True)
class _Task:
    """Linears that share their input, their method and their pattern, and are solved as one matrix by one rank.

    Attributes:
        rows: the part of the matrix of all of them that is solved, as (start, end).
    """

    input: Input
    choices: tuple[Choice, ...]
    rows: tuple[int, int]

    @property
    def cost(self) -> float:
        """About how many operations it takes: where a Gram is needed, to factorise it and to update all rows by it."""
        width, rows = float(self.input.features), self.rows[1] - self.rows[0]
        products = self.choices[0].products
        return (width**3 if products else 0.0) + (2 * products * width + 50) * rows * width

    def parts(self, parameter: Callable[[str], Tensor]) -> Iterator[tuple[Choice, Tensor, slice]]:
        """Each linear, those rows of its weight that belong here, and where they are among `rows`.

        Args:
            parameter: gives a parameter by its name.
        """
        start, end = self.rows
        place = 0
        for choice in self.choices:
            first, last = max(start, place), min(end, place + choice.linear.shape[0])
            if first < last:
                weight = choice.linear.view(parameter(choice.linear.parameter))
                yield choice, weight[first - place : last - place], slice(first - start, last - start)
            place += choice.linear.shape[0]


@dataclass(frozen=True)
class _Seen:
    """How many tokens the statistics of a linear are from, and whether they have a Gram."""

    tokens: int
    gram: bool


@dataclass(frozen=True)
class _Found:
    """What solving some rows of a linear told.

    Attributes:
        losses: see `LinearStats.losses`; of what the method made, and after each step that followed.
        damping: what the factorisation took.
    """

    losses: list[Losses | None]
    damping: float | None
    note: str | None


def _tasks(inputs: tuple[Input, ...], choices: tuple[Choice, ...], ranks: int) -> list[_Task]:
    """What there is to solve, cut up so that it can be dealt to the ranks."""
    whole: list[_Task] = []
    chosen = {choice.linear.name: choice for choice in choices}
    for entry in inputs:
        stacks: dict[object, list[Choice]] = {}
        for choice in (chosen[name] for name in entry.linears):
            key = (choice.solver, choice.pattern, choice.asymmetric) if choice.row_independent else choice.linear.name
            stacks.setdefault(key, []).append(choice)
        for stack in stacks.values():
            rows = sum(choice.linear.shape[0] for choice in stack)
            whole.append(_Task(entry, tuple(stack), (0, rows)))
    fair = sum(task.cost for task in whole) / ranks
    return [part for task in whole for part in _cut(task, math.ceil(task.cost / fair))]


def _cut(task: _Task, parts: int) -> Iterator[_Task]:
    """The task by rows, where these don't depend on each other."""
    rows = task.rows[1]
    parts = min(parts, rows) if task.choices[0].row_independent else 1
    for part in range(parts):
        yield replace(task, rows=(rows * part // parts, rows * (part + 1) // parts))


def _solve(checkpoint: Checkpoint, block: LoadedBlock, task: _Task, stats: LinearStats) -> dict[str, _Found]:
    """Prune the rows of a task in the block; returns what that told, by the linears' names."""
    parts = list(task.parts(block.state.__getitem__))
    dense = torch.empty(task.rows[1] - task.rows[0], task.input.features, device=checkpoint.device)
    for _, weight, rows in task.parts(block.near):
        dense[rows] = weight.to(checkpoint.device)  # and there to float32: what is carried over is half as large
    name = ", ".join(choice.linear.name for choice, _, _ in parts)
    like = task.choices[0]
    solver, note = usable(like.solver, like.needs, stats, name)
    after = like.after if stats.tokens or like.needs == "nothing" else After()
    losses: dict[str, list[Losses | None]] = {choice.linear.name: [] for choice, _, _ in parts}
    pruned = dense
    try:
        if like.asymmetric and stats.tokens:
            dense = stats.target(dense, like.asymmetric, slice(*task.rows) if task.input.stream else None)
        for pruned in _followed(dense, stats, like.pattern, solver, after):
            if 4 * stats.features**2 >= memory.MUCH:
                memory.give_back()  # what a method held in pieces, before whole products are held
            for choice, _, rows in parts:
                losses[choice.linear.name].append(stats.losses(dense[rows], pruned[rows]))
    except SingularGram as error:
        raise Failure(f"{name}: {error}") from None
    note = note or _damped(solver, stats)
    found = {}
    for choice, weight, rows in parts:
        weight.copy_(pruned[rows]).add_(0.0)  # no zero is written as -0
        found[choice.linear.name] = _Found(losses[choice.linear.name], stats.damping, note)
    return found


def _followed(dense: Tensor, stats: LinearStats, pattern: Pattern, solver: Solver, after: After) -> Iterator[Tensor]:
    """The pruned weight (rows, in) as the method leaves it, and after each step that follows."""
    pruned = solver.solve(dense, stats, pattern)
    yield pruned
    # A mask that the method fitted its weights to can be the better one: each row has the best of both.
    first = pruned.clone() if after.refiners and solver.updates else None
    for place, improved in enumerate(_improved(dense, pruned, stats, pattern, after), 1):
        if place == len(after.names) and first is not None:
            worse = stats.row_losses(dense, improved) > stats.row_losses(dense, first)
            improved[worse] = first[worse]
        yield improved


def _improved(dense: Tensor, pruned: Tensor, stats: LinearStats, pattern: Pattern, after: After) -> Iterator[Tensor]:
    """The weight (rows, in) after each refinement of its mask and each reconstruction; in the place of `pruned`."""
    keep = pruned != 0
    for _, refiner in after.refiners:
        before, keep = keep, refiner.refine(dense, keep, stats, pattern)
        for place, back, kept, weight in zip(*map(some_rows, (pruned, keep & ~before, keep, dense)), strict=True):
            place.copy_(torch.where(back, weight, place)).masked_fill_(~kept, 0.0)
        yield pruned
    for _, reconstructor in after.reconstructors:
        pruned.copy_(reconstructor.reconstruct(dense, pruned, keep, stats))
        yield pruned


def usable(solver: Solver, needs: Needs, stats: LinearStats, name: str) -> tuple[Solver, str | None]:
    """The solver for a linear with these statistics, and a note where that is out of the ordinary.

    A linear that no token reached (an expert that was never chosen) is pruned by magnitude.

    Raises:
        Failure: the statistics are not finite.
    """
    if not bool(torch.isfinite(stats.squares).all()):
        raise Failure(f"the calibration inputs of {name} hold NaN or infinite values; try --dtype float32")
    if needs == "nothing":
        return solver, None
    if isinstance(solver, Knowing):
        return solver, _known(solver.tokens)
    if stats.tokens == 0:
        return solvers.load("magnitude"), "no calibration token reached it: pruned by magnitude"
    few = stats.features if needs == "gram" else FEW_TOKENS
    return solver, f"only {stats.tokens:,} calibration tokens reached it" if stats.tokens < few else None


def _known(tokens: int) -> str | None:
    """A note on a linear whose units were chosen before, when so many tokens reached it."""
    if not tokens:
        return "no token reached it when its units were chosen: by magnitude"
    return f"only {tokens:,} tokens reached it when its units were chosen" if tokens < FEW_TOKENS else None


def check(weight: Tensor, choice: Choice) -> None:
    """See that a pruned weight, as it will be written, is finite and has its zeros.

    Raises:
        Failure: it is not, or has not.
    """
    name = choice.linear.name
    if not_finite(weight):
        raise Failure(f"pruning {name} gave NaN or infinite weights; try a larger damping (--set method.damping=0.1)")
    if not choice.pattern.holds(weight):
        raise Failure(f"pruning {name} did not reach {choice.pattern}; this is a mistake in {choice.method}, report it")


def narrower(
    narrow: Narrow, number: int, block: LoadedBlock, choices: tuple[Choice, ...], experts: Mapping[str, Tensor]
) -> LoadedBlock:
    """A block of the narrower model, with what its linears have left once they are solved.

    Args:
        experts: (experts,) bool, those that stay, by the names of the modules that hold them.
    """
    here = {choice.linear.name: choice.linear for choice in choices}
    staying = {
        name: cuts.pattern.staying(here[name].view(block.state[here[name].parameter]))
        for name, cuts in narrow.cuts[number].items()
    }
    return narrow.take(number, block, {**staying, **experts})


def as_narrower(
    block: LoadedBlock, records: Sequence[LinearRecord], experts: Mapping[str, Tensor]
) -> list[LinearRecord]:
    """The records of the linears of a block that has become narrower: smaller matrices, and no zeros are promised.

    Args:
        records: of the linears in the block as it was.
        experts: see `narrower`; those that stay are counted anew.
    """
    places = {
        f"{module}.{old}.": f"{module}.{new}."
        for module, stays in experts.items()
        for new, old in enumerate(stays.nonzero()[:, 0].tolist())
    }
    gone = {f"{module}.{old}." for module, stays in experts.items() for old in (~stays).nonzero()[:, 0].tolist()}
    linears = {linear.name: linear for linear in find_linears(block.module, block.name)}
    found = []
    for record in records:
        expert, part = record.name.rpartition(".")[0] + ".", record.name.rpartition(".")[2]
        if expert in gone:
            continue
        name = places.get(expert, expert) + part
        weight = linears[name].view(block.state[linears[name].parameter])
        if not_finite(weight):
            raise Failure(f"{name} has NaN or infinite weights; try a larger damping (--set width.by.damping=0.1)")
        kept = record.kept or f"narrower: {record.pattern}"
        share = zeros(weight) / weight.numel()
        plain = replace(record, name=name, shape=linears[name].shape, kept=kept, sparsity=share)
        found.append(replace(plain, pattern=None, scope=None, mask_sha256=None))
    return found


def renewed(block: LoadedBlock, choices: tuple[Choice, ...], done: dict[str, LinearRecord]) -> dict[str, LinearRecord]:
    """The records of linears whose kept weights have changed since; a weight that came to zero is one of the zeros."""
    found = dict(done)
    for choice in choices:
        if (record := done.get(choice.linear.name)) is not None:
            weight = choice.linear.view(block.near(choice.linear.parameter))
            check(weight, choice)
            sparsity = zeros(weight) / weight.numel()
            found[record.name] = replace(record, sparsity=sparsity, mask_sha256=mask_sha256(weight))
    return found


def _damped(solver: Solver, stats: LinearStats) -> str | None:
    asked = getattr(solver, "damping", None)
    if asked is None or stats.damping is None or stats.damping == asked:
        return None
    return f"damped by {stats.damping:g} instead of {asked:g}: its Gram could not be factorised otherwise"


def _record(choice: Choice, written: Tensor, seen: _Seen, found: list[_Found]) -> LinearRecord:
    note = next((one.note for one in found if one.note), None)
    errors = [_error(step) for step in zip(*(one.losses for one in found), strict=True)]
    error = errors[-1]
    if error is not None and not math.isfinite(error):
        error, note = None, "its relative error is too large for float32"
    course = dict(zip((choice.method, *choice.after.names), errors, strict=False))
    return LinearRecord(
        name=choice.linear.name,
        shape=choice.linear.shape,
        method=choice.method,
        pattern=str(choice.pattern),
        scope=choice.pattern.scope,
        sparsity=zeros(written) / written.numel(),
        relative_error=error,
        error_from=None if error is None else "gram" if seen.gram else "sample",
        tokens=seen.tokens,
        damping=found[0].damping,
        note=note,
        mask_sha256=mask_sha256(written),
        course={name: value for name, value in course.items() if value is not None} if len(course) > 1 else None,
    )


def _error(parts: tuple[Losses | None, ...]) -> float | None:
    """The relative error of a linear from those of its rows."""
    known = [part for part in parts if part is not None]
    return ratio(*(sum(values) for values in zip(*known, strict=True))) if known else None
