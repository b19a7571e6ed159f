"""What a report tells of this machine, the paths of folders, and the same report without them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RECORDS = (
    *("llmprune.json", "llmprune.recovery.json", "config.json"),
    *("eval.json", "comparison.json", "speed.json", "generations.json", "sweep.json", "search.json"),
)
"""Files with plain data that may tell of paths, by their names in any folder."""

ANSWERS = "generations.json"
"""What models said may look like a path, and is none."""

_INSIDE = re.compile(r"(?<![\w.~/-])(?:/[\w.+@-]+){2,}")
"""An absolute path in the middle of a text, of two parts or more."""


class Names:
    """Names for paths: of each its last part, or as many as tell it from the others.

    Made of all records of a folder at once, so that a path has one name in all of them.
    """

    def __init__(self, records: Mapping[str, Any]) -> None:
        """Find the paths.

        Args:
            records: the plain data of each file, by its path in the folder.
        """
        told = {path for name, data in records.items() if Path(name).name != ANSWERS for path in _paths(data)}
        places = {path: Path(path).expanduser().resolve() for path in told}
        names = {place: place.name for place in places.values() if place.name}
        for parts in range(2, max((len(place.parts) for place in names), default=0)):
            found = list(names.values())
            names |= {
                place: "/".join(place.parts[1:][-parts:]) for place, name in names.items() if found.count(name) > 1
            }
        self._names = {path: names[place] for path, place in places.items() if place in names}
        longest = "|".join(re.escape(path) for path in sorted(self._names, key=len, reverse=True))
        self._known = re.compile(rf"(?<![\w.~/-])(?:{longest})(?![\w-])") if longest else None

    def __call__(self, data: Any, answers: bool = False) -> Any:
        """Plain data with names instead of paths.

        Args:
            answers: they were not looked for in it; only those that are known from elsewhere are taken out.
        """
        if isinstance(data, dict):
            return {key: self(value, answers) for key, value in data.items()}
        if isinstance(data, list):
            return [self(value, answers) for value in data]
        if not isinstance(data, str):
            return data
        if self._known is not None:
            data = self._known.sub(lambda found: self._names[found[0]], data)
        return data if answers else _INSIDE.sub(lambda found: Path(found[0]).name, data)


def _paths(data: Any) -> Iterator[str]:
    """All texts in plain data that are a path and no name: absolute, or said to begin at home, here or above."""
    if isinstance(data, dict):
        for value in data.values():
            yield from _paths(value)
    elif isinstance(data, list):
        for value in data:
            yield from _paths(value)
    elif isinstance(data, str) and data.startswith(("/", "~/", "./", "../")) and "\n" not in data:
        yield data
