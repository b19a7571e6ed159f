"""The targets that stand in a plan file, such as OUT/allocation.yaml of an earlier run, perhaps edited since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llmprune.allocate import Needs
from llmprune.allocation import DENSE, Known, Seen
from llmprune.errors import UserError
from llmprune.patterns import parse
from llmprune.recipe import read_yaml

DEFAULT = "default"


@dataclass(frozen=True)
class Allocator:
    """What a file says, whatever that comes to over all linears: the recipe's sparsity is not looked at.

    The file is a YAML mapping of the linears' names to `43.2%`, `0.432`, `2:4`, or `dense` (or `0`); the key `default`
    is for all linears that it does not name. A rule's own sparsity goes before the file's.

    Args:
        path: the file.
    """

    needs: ClassVar[Needs] = "nothing"

    path: str

    def look(self, block: Sequence[Seen]) -> Sequence[Any]:
        return [None] * len(block)

    def allocate(self, linears: Sequence[Known], sparsity: float) -> Mapping[str, str]:
        entries = {str(name): self._target(name, value) for name, value in read_yaml(self.path, "allocation").items()}
        default = entries.pop(DEFAULT, None)
        missing = [linear.name for linear in linears if linear.name not in entries]
        if missing and default is None:
            more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
            raise UserError(
                f"allocation {self.path} says nothing of {missing[0]}{more}: add it, or a line `{DEFAULT}: 50%`"
            )
        return {**entries, **dict.fromkeys(missing, default or DENSE)}

    def _target(self, name: object, value: object) -> str:
        text = str(value).strip()
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(f"allocation {self.path}: {name} must be 43.2%, 2:4 or {DENSE}, not {value!r}")
        if text in (DENSE, "0", "0%", "0.0"):
            return DENSE
        try:
            parse(text)
        except UserError as error:
            raise UserError(f"allocation {self.path}: {name}: {error}") from None
        return text
