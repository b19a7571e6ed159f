"""Evolve: an allocation is bettered step by step, by how near the pruned model's answers come to the dense model's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy

from llmprune.allocate import Allocator as Start
from llmprune.allocate import Measure, Needs, load
from llmprune.allocation import Fitted, Known, Seen, counted, target
from llmprune.evolution import PART, evolved, quarter
from llmprune.progress import Progress

_SWITCHES = 3


@dataclass(frozen=True)
class Allocator(Fitted):
    """An evolutionary search in the manner of EvoPress (arXiv:2410.14649), from another allocation on.

    In each generation the best allocation so far has offspring that differ from it by one to three switches: some zeros
    of one linear go to another, so that the total stays; with `patterns`, two linears of one size exchange theirs. An
    allocation is as good as KL(dense ‖ pruned) of the next token is small on calibration text, for the model that
    Wanda's masks make of it, see `answers` and `evolution`. What comes out is never worse by that measure than what it
    began with; the method itself, and what follows it, has no part in it.

    Args:
        start: the allocation that it begins with, `global` or `owl`.
        generations, offspring: how many, and of how many each.
        tokens: calibration tokens that are looked at, in whole sequences.
        step: the most zeros that a switch moves, as a fraction of the mean size of a linear.
        seed: draws the switches and the parts of the text.
    """

    needs: ClassVar[Needs] = "norms"

    most: float = 0.95
    start: str = "global"
    generations: int = 40
    offspring: int = 16
    tokens: int = 16384
    step: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("generations", "offspring", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.step <= 1:
            raise ValueError(f"step must lie in (0, 1], not {self.step}")
        if self.start not in ("global", "owl"):
            raise ValueError(f"start must be global or owl, not {self.start!r}")

    def look(self, block: Sequence[Seen]) -> Sequence[Any]:
        return self._first.look(block)

    def allocate(self, linears: Sequence[Known], sparsity: float) -> Mapping[str, str]:
        return self._first.allocate(linears, sparsity)

    def improve(
        self,
        linears: Sequence[Known],
        sparsity: float,
        targets: Mapping[str, str],
        measure: Measure,
        sequences: int,
        progress: Progress,
    ) -> Mapping[str, str]:
        chance = random.Random(self.seed)

        def offspring(parent: Mapping[str, str]) -> list[Mapping[str, str]]:
            return list(self._offspring(linears, sparsity, dict(parent), chance))

        title = "bettering the allocation"
        return evolved(targets, offspring, measure, sequences, self.generations, chance, progress, title)

    def together(self, mine: int, sequences: int) -> int:
        return max(quarter(self.offspring) * mine, self.offspring * min(mine, quarter(sequences)))

    @property
    def looked_at(self) -> float:
        """How often the text is gone through."""
        return 1 + self.generations * (self.offspring / PART + quarter(self.offspring))

    @property
    def _first(self) -> Start:
        bounds = {"least": self.least, "most": self.most, "patterns": list(self.patterns)}
        return load({"name": self.start, **bounds})

    def _offspring(
        self, linears: Sequence[Known], sparsity: float, parent: dict[str, str], chance: random.Random
    ) -> Iterator[dict[str, str]]:
        """Others than the parent, and than each other."""
        known = [parent]
        for _ in range(self.offspring):
            switches = min(chance.randint(1, _SWITCHES), chance.randint(1, _SWITCHES))
            one = (
                self._exchanged(linears, parent, switches, chance)
                if self.patterns
                else self._switched(linears, sparsity, parent, switches, chance)
            )
            if one not in known:
                known.append(one)
                yield one

    def _switched(
        self, linears: Sequence[Known], sparsity: float, parent: dict[str, str], switches: int, chance: random.Random
    ) -> dict[str, str]:
        """Zeros of some linears have gone to others."""
        sizes = [linear.numel for linear in linears]
        zeros = [size * _share(parent[linear.name], linear) for size, linear in zip(sizes, linears, strict=True)]
        for _ in range(switches if len(linears) > 1 else 0):
            giver, taker = chance.sample(range(len(linears)), 2)
            moved = min(
                chance.random() * self.step * sum(sizes) / len(sizes),
                zeros[giver] - self.least * sizes[giver],
                self.most * sizes[taker] - zeros[taker],
            )
            if moved > 0:
                zeros[giver] -= moved
                zeros[taker] += moved
        return counted(linears, sparsity, numpy.array(zeros) / numpy.array(sizes))

    def _exchanged(
        self, linears: Sequence[Known], parent: dict[str, str], switches: int, chance: random.Random
    ) -> dict[str, str]:
        """Some linears have the patterns of others of their size."""
        child = dict(parent)
        for _ in range(switches):
            one = chance.choice(linears)
            others = [
                other.name for other in linears if other.numel == one.numel and child[other.name] != child[one.name]
            ]
            if others:
                other = chance.choice(others)
                child[one.name], child[other] = child[other], child[one.name]
        return child


def _share(text: str, linear: Known) -> float:
    pattern = target(text, linear.scope)
    return 0.0 if pattern is None else pattern.sparsity
