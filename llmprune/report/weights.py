"""How the weights of some linears are distributed, in a pruned checkpoint and in the dense model it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmprune import memory
from llmprune.errors import LLMPruneError, UserError, unknown
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.linears import Linear, find_linears
from llmprune.model.source import Source
from llmprune.parts import some_rows
from llmprune.planning import matches
from llmprune.report.record import LinearRecord
from llmprune.report.tables import kind

BINS = 81
"""An odd number, so that one of them lies around zero."""

WIDTH = 4.0
"""A histogram reaches so many standard deviations to each side."""

SHOWN, MOST = 4, 12
"""Linears that are looked at when none are named, and the most that are."""

FEW = 2**18
"""Weights that are picked out at a time: the places of those that are not zero take 16 bytes each."""


@dataclass(frozen=True)
class Counts:
    """Of one matrix.

    Attributes:
        shares: the weights in each bin, as fractions of all weights of the matrix; zeros are in none.
        zeros: the fraction of zeros.
        outside: the fraction that lies beyond the last bin on either side.
    """

    shares: tuple[float, ...]
    zeros: float
    outside: float


@dataclass(frozen=True)
class Histogram:
    """The weights of one linear before and after.

    Attributes:
        name: the linear.
        edge: the bins, `BINS` of the same width, reach from −edge to edge.
        after: in the pruned checkpoint.
        before: in the dense model; None where it is not at hand.
    """

    name: str
    edge: float
    after: Counts
    before: Counts | None

    @property
    def centres(self) -> list[float]:
        """The middle of each bin."""
        return [self.edge * ((2 * place + 1) / BINS - 1) for place in range(BINS)]


def choose(records: Sequence[LinearRecord], globs: Sequence[str]) -> list[str]:
    """Names of linears to look at: those that are asked for, or of each kind the one with the largest error.

    Raises:
        UserError: there is none of that name.
    """
    if globs:
        found = [record.name for record in records if any(matches(glob, record.name) for glob in globs)]
        if not found:
            raise unknown("linear", globs[0], (record.name for record in records))
        return found[:MOST]
    worst: dict[str, LinearRecord] = {}
    for record in records:
        if record.kept is None:
            best = worst.setdefault(kind(record.name), record)
            if (record.relative_error or 0.0) > (best.relative_error or 0.0):
                worst[kind(record.name)] = record
    ranked = sorted(worst.values(), key=lambda record: -(record.relative_error or 0.0))
    return [record.name for record in ranked[:SHOWN]]


def weigh(
    out: Path,
    source: Source | None,
    names: Sequence[str],
    trusted: bool = False,
    kept: Sequence[int] | None = None,
) -> list[Histogram]:
    """Read one linear after the other, from the pruned checkpoint and, where it is at hand, the dense one.

    Args:
        kept: where blocks were taken out of the dense one, the numbers in it of those that are left.

    Raises:
        UserError: the checkpoint has no such linear.
        Failure: a file is missing or broken.
    """
    if not names:
        return []
    pruned = Checkpoint(Source(str(out), out.resolve(), trusted=trusted), "cpu")
    linears = _linears(pruned, set(names))
    dense = None
    if source is not None:
        try:
            dense = Checkpoint(source, "cpu")
        except LLMPruneError:  # what lies there now is no model, or no longer that one: as if it were not there
            dense = None
    there = {}
    if dense is not None:
        were = dict(enumerate(dense.blocks))
        old = _old_names(names, pruned.blocks, [were.get(number, "") for number in kept] if kept else pruned.blocks)
        found = _linears(dense, set(old.values()))
        there = {name: found[was] for name, was in old.items() if was in found}
    made = []
    for name in names:
        if name not in linears:
            raise UserError(f"{out} has no linear {name}, which its llmprune.json tells of")
        edge = before = None  # never both at a time: experts of a block may be one tensor
        if dense is not None and name in there and there[name].shape == linears[name].shape:
            edge, before = _counted(dense, there[name])
        edge, after = _counted(pruned, linears[name], edge)
        made.append(Histogram(name, edge, after, before))
    return made


def _old_names(names: Sequence[str], blocks: Sequence[str], were: Sequence[str]) -> dict[str, str]:
    """The names in the dense model of some linears, by their own."""
    old = dict(zip(blocks, were, strict=False))
    found = {}
    for name in names:
        block = next((block for block in old if name.startswith(f"{block}.")), None)
        found[name] = name if block is None else old[block] + name.removeprefix(block)
    return found


def _linears(checkpoint: Checkpoint, wanted: set[str]) -> dict[str, Linear]:
    found = (linear for name in checkpoint.blocks for linear in find_linears(checkpoint.block(name), name))
    return {linear.name: linear for linear in found if linear.name in wanted}


def _counted(checkpoint: Checkpoint, linear: Linear, edge: float | None = None) -> tuple[float, Counts]:
    """Read one linear and count its weights; how far the bins reach is as it needs where that is not said."""
    matrix = linear.view(checkpoint.read_parameter(linear.parameter))
    edge = WIDTH * _deviation(matrix) if edge is None else edge
    counts = _count(matrix, edge)
    del matrix
    memory.give_back()
    return edge, counts


def _deviation(matrix: Tensor) -> float:
    """The root mean square of what is not zero; 1 where all is."""
    total = sum(float(rows.float().square().sum()) for rows in some_rows(matrix))
    count = sum(int(rows.count_nonzero()) for rows in some_rows(matrix))
    return (total / count) ** 0.5 if total > 0 else 1.0


def _count(matrix: Tensor, edge: float) -> Counts:
    bins = torch.zeros(BINS, dtype=torch.float64)
    nonzero = 0
    for rows in some_rows(matrix, FEW):
        weights = rows[rows != 0].float()
        nonzero += weights.numel()
        bins += torch.histc(weights, BINS, -edge, edge).double()
    total = matrix.numel()
    inside = float(bins.sum())
    return Counts(tuple((bins / total).tolist()), 1 - nonzero / total, (nonzero - inside) / total)
