"""Every linear gets the same sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llmprune.allocate import Needs
from llmprune.allocation import Known, Seen


@dataclass(frozen=True)
class Allocator:
    """The recipe's sparsity for every linear.

    Where that is no whole number of weights of a row, as with 60 % of 576 inputs, which are 345.6, the plan rounds down
    in some linears and up in others, so that the model has what is asked. The published code always rounds down.
    """

    needs: ClassVar[Needs] = "nothing"

    def look(self, block: Sequence[Seen]) -> Sequence[Any]:
        return [None] * len(block)

    def allocate(self, linears: Sequence[Known], sparsity: float) -> Mapping[str, str]:
        return dict.fromkeys((linear.name for linear in linears), f"{sparsity * 100:.12g}%")
