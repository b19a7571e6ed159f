"""An allocation says how sparse each linear is to be; here it is fitted to the budget of the whole model, and kept.

Each linear has a target as people write it: `43.2%`, `2:4`, or `dense`. An allocator decides from what it knows of each
linear, see `allocate`; the text is what is stored, shown, and read again, so that it is exact: an unstructured sparsity
is a whole number of millionths, rounded up from the number of zeros that is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmprune.errors import UserError
from llmprune.parts import some_rows
from llmprune.patterns import NM, Scope, Unstructured, parse
from llmprune.recipe import to_yaml

DENSE = "dense"
LEFT_DENSE = "left dense by the allocation"

PARTS = 10**6
"""A sparsity is a whole number of parts of this size."""

Sparsities = NDArray[numpy.float64]


@dataclass(frozen=True)
class Seen:
    """A linear of the dense model, while its block is in memory.

    Attributes:
        weight: (out, in), of any float dtype; not to be changed.
        norms: (in,) float32, the root mean square of each input over the calibration tokens; None where no token was
            seen.
        device: where there is to be computed.
    """

    weight: Tensor
    norms: Tensor | None
    device: torch.device

    def saliency(self) -> Iterator[Tensor]:
        """Wanda's |W_ij|·‖X_j‖, some rows at a time, each (rows, in) float32; |W_ij| where no token was seen."""
        for rows in some_rows(self.weight):
            size = rows.to(self.device, torch.float32).abs()
            yield size if self.norms is None else size * self.norms


@dataclass(frozen=True)
class Known:
    """What an allocator knows of a linear when all have been seen.

    Attributes:
        name, block, shape: the linear, the number of its block, (out_features, in_features).
        scope: what its unstructured sparsity is counted over.
        evidence: what the allocator's `look` told.
    """

    name: str
    block: int
    shape: tuple[int, int]
    scope: Scope
    evidence: Any = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def steps(self) -> int:
        """How many sparsities it can have: weights of a row, or of the matrix as far as they can be told apart."""
        return min(self.shape[1] if self.scope == "row" else self.numel, PARTS)


@dataclass(frozen=True)
class Fitted:
    """What all allocations that are fitted to a budget share.

    Args:
        least, most: no linear becomes less or more sparse than that; what is cut off goes to the others.
        patterns: N:M patterns and `dense`; each linear gets one of them instead of a sparsity of its own.
    """

    least: float = 0.0
    most: float = 0.99
    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.least < self.most < 1:
            raise ValueError(f"least and most must be 0 <= least < most < 1, not {self.least} and {self.most}")
        for text in self.patterns:
            if text != DENSE and not isinstance(parse(text), NM):
                raise ValueError(f"patterns are N:M or {DENSE}, not {text!r}")
        if self.patterns and len({_sparsity(text) for text in self.patterns}) < 2:
            raise ValueError(f"patterns must be of at least two sparsities, such as [2:4, {DENSE}]")

    def fit(
        self,
        linears: Sequence[Known],
        sparsity: float,
        wish: Callable[[float], Sparsities],
        low: float,
        high: float,
    ) -> dict[str, str]:
        """The targets of all linears, such that their zeros are the asked fraction of all weights.

        Args:
            linears: all that share the budget.
            sparsity: the fraction of zeros, over all weights of these linears.
            wish: the sparsity of each linear at some level; none falls when the level rises. It may leave [0, 1].
            low, high: levels at which all wish for nothing, and for everything.

        Raises:
            UserError: the budget cannot be met within the bounds, or by the patterns.
        """
        sizes = numpy.array([linear.numel for linear in linears], dtype=float)
        least, most = (0.0, 1.0) if self.patterns else (self.least, self.most)
        if not least <= sparsity <= most:
            raise UserError(
                f"allocation: with each linear between {least:.2%} and {most:.2%} (least, most) a sparsity of "
                f"{sparsity:.2%} over all of them cannot be reached"
            )
        for _ in range(100):
            middle = (low + high) / 2
            reached = numpy.average(numpy.clip(wish(middle), least, most), weights=sizes)
            low, high = (middle, high) if reached < sparsity else (low, middle)
        if self.patterns:
            return _patterned(linears, sparsity, wish(high), self.patterns)
        return counted(linears, sparsity, numpy.clip(wish(high), least, most))


def counted(linears: Sequence[Known], sparsity: float, wished: Sparsities) -> dict[str, str]:
    """Targets for sparsities (linears,) in whole zeros: rounded down, then those with the largest rest get one more."""
    counts = [int(share * linear.steps + 1e-9) for share, linear in zip(wished, linears, strict=True)]
    step = [linear.numel / linear.steps for linear in linears]
    missing = sparsity * sum(linear.numel for linear in linears)
    missing -= sum(count * size for count, size in zip(counts, step, strict=True))
    remainders = [share * linear.steps - count for share, linear, count in zip(wished, linears, counts, strict=True)]
    order = sorted(range(len(linears)), key=lambda place: -remainders[place])
    for place in _fill([(at, step[at]) for at in order if counts[at] + 1 < linears[at].steps], missing):
        counts[place] += 1
    return {linear.name: _text(count, linear.steps) for linear, count in zip(linears, counts, strict=True)}


def _fill(steps: Sequence[tuple[int, float]], missing: float) -> list[int]:
    """What takes which of these steps: as many in order as fit, and then one more if that comes nearer.

    Args:
        steps: who takes it, and how many zeros it adds; somebody who has passed over a step takes no more.
        missing: zeros.
    """
    taken: list[int] = []
    passed: dict[int, float] = {}
    for who, size in steps:
        if who not in passed and size <= missing + 1e-6:
            taken.append(who)
            missing -= size
        else:
            passed.setdefault(who, size)
    last = min(passed, key=lambda who: abs(missing - passed[who]), default=None)
    return [*taken, last] if last is not None and abs(missing - passed[last]) < missing else taken


def _text(count: int, steps: int) -> str:
    return f"{-(-count * PARTS // steps) / (PARTS // 100):g}%" if count else DENSE


def _patterned(
    linears: Sequence[Known], sparsity: float, wished: Sparsities, patterns: Sequence[str]
) -> dict[str, str]:
    """One of the patterns for each linear.

    Each linear has the sparsity nearest to its wish, with all wishes shifted alike: linears go up from one sparsity to
    the next in the order of how far they wish to be beyond the middle of the two, as far as the budget goes, and what
    is left of it is filled with smaller ones. Where patterns are equally sparse, the linears that have them are dealt
    out evenly: those that wish for most get the strictest, which is the one with the smallest M.
    """
    levels: dict[float, list[str]] = {}
    for text in dict.fromkeys(patterns):
        levels.setdefault(_sparsity(text), []).append(text)
    rising = sorted(levels)
    if not rising[0] <= sparsity <= rising[-1]:
        raise UserError(
            f"allocation: {', '.join(patterns)} give {rising[0]:.2%} to {rising[-1]:.2%}, so that a sparsity of "
            f"{sparsity:.2%} over all linears cannot be reached"
        )
    places = [0] * len(linears)
    missing = sum((sparsity - rising[0]) * linear.numel for linear in linears)
    ups = [
        ((rising[up] + rising[up + 1]) / 2 - wished[place], place, up)
        for place in range(len(linears))
        for up in range(len(rising) - 1)
    ]
    steps = [(place, (rising[up + 1] - rising[up]) * linears[place].numel) for _, place, up in sorted(ups)]
    for place in _fill(steps, missing):
        places[place] += 1
    found: dict[str, str] = {}
    for level, equal in enumerate(rising):
        strict = sorted(levels[equal], key=_strictness)
        here = sorted((place for place in range(len(linears)) if places[place] == level), key=lambda at: -wished[at])
        total, before = sum(linears[place].numel for place in here), 0
        for place in here:
            found[linears[place].name] = strict[min(before * len(strict) // total, len(strict) - 1)]
            before += linears[place].numel
    return {linear.name: found[linear.name] for linear in linears}


def _sparsity(text: str) -> float:
    return 0.0 if text == DENSE else parse(text).sparsity


def _strictness(text: str) -> int:
    return 0 if text == DENSE else parse(text).group


def target(text: str, scope: Scope) -> Unstructured | NM | None:
    """The pattern that a target stands for, None for a linear that is to stay dense.

    Raises:
        UserError: it is none.
    """
    return None if text == DENSE else parse(text, scope)


def reached(linears: Sequence[Known], targets: Mapping[str, str]) -> float:
    """The fraction of zeros over all weights of these linears, as it will be written."""
    zeros = 0
    for linear in linears:
        pattern = target(targets[linear.name], linear.scope)
        zeros += 0 if pattern is None else pattern.count(linear.shape)
    return zeros / max(1, sum(linear.numel for linear in linears))


def spanned(patterns: Iterable[str]) -> str:
    """Patterns in few words: `31.25% .. 78.1%`, and each N:M."""
    known = list(dict.fromkeys(patterns))
    free = sorted((text for text in known if ":" not in text), key=lambda text: float(text.removesuffix("%")))
    told = [" .. ".join(dict.fromkeys((free[0], free[-1])))] if free else []
    return ", ".join([*told, *(text for text in known if ":" in text)])


def write(targets: Mapping[str, str], told: Sequence[str]) -> str:
    """The text of a plan file.

    Args:
        told: what it opens with.
    """
    return "".join(f"# {line}\n" for line in told) + to_yaml(targets)
