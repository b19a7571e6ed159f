"""What has to be cut of a block's weights where a number of its config gets smaller, unit by unit."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmprune.errors import UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.linears import Linear, find_linears
from llmprune.model.widths import Changed, Number
from llmprune.patterns import Columns

_ROW = 16
"""Bytes of which the rows of an expert's weights are a multiple, for kernels that run all experts at once."""


@dataclass(frozen=True)
class Cut:
    """What of a parameter goes with the units of a linear's inputs.

    Attributes:
        parameter: its full name.
        expert: its place in a fused parameter.
        dim: of the parameter; never the first one of an expert's part.
        places: (units, each) along that dimension.
    """

    parameter: str
    expert: int | None
    dim: int
    places: Tensor = field(repr=False)


@dataclass(frozen=True)
class Cuts:
    """What goes with the inputs of a linear, unit by unit; its own columns are part of it. Or with experts.

    Attributes:
        name: of the linear, or of the module that holds the experts.
        pattern: how many units stay.
        cuts: of parameters.
        groups: as many units stay in each of so many parts; routers that choose a group first need that.
    """

    name: str
    pattern: Columns
    cuts: tuple[Cut, ...]
    groups: int = 1

    def staying(self, scores: Tensor) -> Tensor:
        """(units,) bool, the units that stay by (units,) scores."""
        count = self.pattern.units // self.groups
        part = Columns(self.pattern.kept // self.groups, count)
        return torch.cat([part.of_scores(each) for each in scores.view(self.groups, count)])


def width_step(whole: Checkpoint) -> int:
    """What widths should be a multiple of, at the least, so that any kernel takes them."""
    return max(1, _ROW // whole.dtype.itemsize)


_Layout = Callable[[int, int, tuple[int, ...]], Tensor]
"""The places (units, each) of all units, of which there are so many, along a dimension of some size.

A linear that makes several things side by side may hold them in sections; their sizes are relative to each other.
"""


@functools.lru_cache(4096)  # one for all experts
def _side_by_side(size: int, count: int, sections: tuple[int, ...] = ()) -> Tensor:
    """Each unit's lie together."""
    return torch.arange(size).view(count, -1)


@functools.lru_cache(4096)
def _in_sections(size: int, count: int, sections: tuple[int, ...]) -> Tensor:
    """One part of all units comes after the other: gate and up; queries, keys and values."""
    total = sum(sections)
    if len(sections) < 2 or size // count % total:
        return _side_by_side(size, count)
    parts, start = [], 0
    for share in sections:
        length = size * share // total
        parts.append(torch.arange(start, start + length).view(count, -1))
        start += length
    return torch.cat(parts, 1)


def ways_to_cut(
    whole: Checkpoint, found: Sequence[tuple[Number, list[Changed]]]
) -> Iterator[tuple[dict[str, Cuts], ...]]:
    """What has to be cut of each block for some numbers of the config, in each way in which weights may be laid out.

    Raises:
        UserError: what changes are not the inputs of linears and what makes them.
    """
    options = []
    for number, changed in found:
        ways = [
            [_cuts(whole, place, number, here, layout) for place, here in enumerate(changed)]
            for layout in (_side_by_side, _in_sections)
        ]
        options.append(ways if _differ(*ways) else ways[:1])
    for chosen in itertools.product(*options):
        yield tuple(
            {key: one for way in chosen for key, one in way[place].items()} for place in range(len(whole.blocks))
        )


def _differ(one: Sequence[Mapping[str, Cuts]], other: Sequence[Mapping[str, Cuts]]) -> bool:
    """Whether two ways to cut blocks are not the same."""

    def places(way: Sequence[Mapping[str, Cuts]]) -> list[int]:
        return [id(cut.places) for block in way for cuts in block.values() for cut in cuts.cuts]

    return places(one) != places(other)


def _cuts(whole: Checkpoint, place: int, number: Number, changed: Changed, layout: _Layout) -> dict[str, Cuts]:
    """What has to be cut of a block for one number of the config.

    Raises:
        UserError: what changes are not the inputs of linears and what makes them.
    """
    name = whole.blocks[place]
    linears = find_linears(whole.block(name), name)
    readers: dict[str, tuple[Linear, list[Cut]]] = {}
    makers: list[tuple[str, int | None, int, int]] = []
    for parameter, (old, new) in changed.items():
        held = [linear for linear in linears if linear.parameter == parameter]
        bias = [linear for linear in linears if linear.expert is not None and linear.bias_parameter == parameter]
        experts = sorted({linear.expert for linear in held or bias}, key=lambda expert: expert or 0) or [None]
        lead = int(experts[0] is not None)
        for dim in (dim for dim in range(len(old)) if old[dim] != new[dim]):
            _check_share(whole, parameter, old[dim], new[dim], number)
            if dim < lead:
                raise UserError(_no_cut(whole, parameter, number))
            inside = dim - lead
            inputs = bool(held) and inside == (0 if held[0].transposed else 1)
            for expert in experts:
                if not inputs:
                    makers.append((parameter, expert, dim, old[dim]))
                    continue
                mine = [linear for linear in held if linear.expert == expert]
                if len(mine) != 1:
                    raise UserError(_no_cut(whole, parameter, number))
                if expert is not None and new[dim] * whole.dtype.itemsize % _ROW:
                    raise UserError(
                        f"{number.words}: kernels for experts take widths that are a multiple of "
                        f"{_ROW // whole.dtype.itemsize}, and {new[dim]:,} is none"
                    )
                readers[mine[0].name] = mine[0], [Cut(parameter, expert, dim, _side_by_side(old[dim], number.count))]
    for parameter, expert, dim, size in makers:
        near = [key for key, (linear, _) in readers.items() if linear.expert == expert]
        if not near:
            raise UserError(_no_cut(whole, parameter, number))
        shared = {key: _shared(key, parameter) for key in near}
        best = [key for key in near if shared[key] == max(shared.values())]
        if len(best) != 1:
            raise UserError(_no_cut(whole, parameter, number))
        # What makes no more than one thing of each input has no sections.
        way = layout if size > readers[best[0]][0].shape[1] else _side_by_side
        readers[best[0]][1].append(Cut(parameter, expert, dim, way(size, number.count, number.sections)))
    if alone := next((key for key, (_, cuts) in readers.items() if len(cuts) < 2), None):
        raise UserError(_no_cut(whole, alone, number))
    pattern = Columns(number.kept, number.count, number.what)
    return {key: Cuts(key, pattern, tuple(cuts)) for key, (_, cuts) in readers.items()}


def expert_cuts(whole: Checkpoint, place: int, number: Number, changed: Changed) -> dict[str, Cuts]:
    """What goes of a block with experts.

    Raises:
        UserError: what changes are not the experts and their router.
    """
    name = whole.blocks[place]
    held = {linear.module for linear in find_linears(whole.block(name), name) if linear.expert is not None}
    if not changed:
        return {}
    if len(held) != 1:
        raise UserError(_no_cut(whole, next(iter(changed)), number))
    found = []
    for parameter, (old, new) in changed.items():
        dims = [dim for dim in range(len(old)) if old[dim] != new[dim]]
        if len(dims) != 1 or old[dims[0]] != number.count:
            raise UserError(_no_cut(whole, parameter, number))
        found.append(Cut(parameter, None, dims[0], _side_by_side(number.count, number.count)))
    module = held.pop()
    return {module: Cuts(module, Columns(number.kept, number.count, "experts"), tuple(found), number.groups)}


def _shared(one: str, other: str) -> int:
    """How many modules two names have in common, from the outermost on."""
    pairs = enumerate(zip(one.split("."), other.split("."), strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(one.count("."), other.count(".")))


def _check_share(whole: Checkpoint, parameter: str, old: int, new: int, number: Number) -> None:
    """See that a dimension holds the units, and loses as many as are asked."""
    if old % number.count or new != old // number.count * number.kept:
        raise UserError(_no_cut(whole, parameter, number))


def _no_cut(whole: Checkpoint, parameter: str, number: Number) -> str:
    return (
        f"{type(whole.model).__name__} cannot have {number.words}: {parameter} changes with their number in a way that "
        "is not known"
    )
