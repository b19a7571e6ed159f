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

    Counts are truncated within each row or matrix, as the published code of the methods does it: of rows of 576 inputs
    70 % are 403 zeros, which is 69.97 %.
    """

    needs: ClassVar[Needs] = "nothing"

    def look(self, block: Sequence[Seen]) -> Sequence[Any]:
        return [None] * len(block)

    def allocate(self, linears: Sequence[Known], sparsity: float) -> Mapping[str, str]:
        return dict.fromkeys((linear.name for linear in linears), f"{sparsity * 100:.12g}%")
