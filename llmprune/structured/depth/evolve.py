"""Evolve: a choice of blocks is bettered step by step, by how near the shorter model comes to the dense one."""

from __future__ import annotations

import random
from dataclasses import dataclass

from llmprune.evolution import PART, evolved, quarter
from llmprune.progress import Progress
from llmprune.structured.depth import Whole, influence

_EXCHANGES = 3


@dataclass(frozen=True)
class Chooser:
    """An evolutionary search over sets of blocks in the manner of EvoPress (arXiv:2410.14649), see `evolution`.

    It begins with those of the least influence. Offspring exchange one to three blocks that go for others; a choice is
    as good as KL(dense ‖ shorter) of the next token is small.

    Args:
        generations, offspring: how many, and of how many each.
        tokens: calibration tokens that are looked at, in whole sequences.
        seed: draws the exchanges and the parts of the text.
    """

    generations: int = 40
    offspring: int = 16
    tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("generations", "offspring", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def choose(self, whole: Whole, count: int, progress: Progress) -> frozenset[int]:
        """The best that was met."""
        chance = random.Random(self.seed)
        first = influence.Chooser(self.tokens).choose(whole, count, progress)

        def offspring(parent: frozenset[int]) -> list[frozenset[int]]:
            young = dict.fromkeys(_exchanged(parent, whole.blocks, chance) for _ in range(self.offspring))
            return [one for one in young if one != parent]

        title = "choosing blocks to do without"
        return evolved(first, offspring, whole.measure, whole.sequences, self.generations, chance, progress, title)

    def looked_at(self, blocks: int, count: int) -> float:
        """What is alike goes together: less than this."""
        return 2 + self.generations * (self.offspring / PART + quarter(self.offspring))


def _exchanged(parent: frozenset[int], blocks: int, chance: random.Random) -> frozenset[int]:
    """A choice in which one to three blocks stay that went, and others go."""
    others = sorted(set(range(blocks)) - parent)
    most = min(chance.randint(1, _EXCHANGES), chance.randint(1, _EXCHANGES), len(parent), len(others))
    back, gone = chance.sample(sorted(parent), most), chance.sample(others, most)
    return parent.difference(back).union(gone)
