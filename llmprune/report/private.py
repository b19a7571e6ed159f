"""What a report tells of this machine, the paths of folders, and the same report without them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprune.allocate import PLAN_FILES
from llmprune.data import SUFFIXES
from llmprune.model.source import COMMIT, HUB_NAME

RECORDS = (
    *("llmprune.json", "llmprune.recovery.json", "config.json"),
    *("eval.json", "comparison.json", "speed.json", "generations.json", "sweep.json", "search.json"),
)
"""Files with plain data that may tell of paths, by their names in any folder."""

ANSWERS = "generations.json"
"""What models said may look like a path, and is none."""

TOKENIZER = "tokenizer_config.json"
"""Of it only what it says of its own place is looked at: a chat template may look like anything."""

OWN_PLACE = ("name_or_path", "_name_or_path")

PLACES = ("model", "path", "source", "text", "dense", "out", "distilled_from", *OWN_PLACE)
"""Keys of values that are a path, or the name of a model or a text on the Hub; see `_is_path`."""

_FILES = (*SUFFIXES, *PLAN_FILES, ".gguf")

_INSIDE = re.compile(r"(?<![\w.~/-])(?:/[\w.+@-]+){2,}")
"""An absolute path in the middle of a text, of two parts or more."""


class Names:
    """Names for paths: of each its last part, or as many as tell it from the others.

    Made of all records of a folder at once, so that a path has one name in all of them.
    """

    def __init__(self, records: Mapping[str, Any], near: Sequence[Path] = (Path(),)) -> None:
        """Find the paths.

        Args:
            records: the plain data of each file, by its path in the folder.
            near: folders in which a relative path may lie.
        """
        bases = [base.resolve() for base in near]
        values = [found for name, data in records.items() if Path(name).name != ANSWERS for found in _values(data)]
        told = {text for text, key, beside in values if _is_path(text, key, beside, bases)} - _public(values)
        places = {path: _place(path, bases) for path in told}
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


Value = tuple[str, str, Mapping[str, Any]]
"""A text, its key, and the mapping that it stands in."""


def _values(data: Any, key: str = "", beside: Mapping[str, Any] | None = None) -> Iterator[Value]:
    """All texts in plain data; those in a mapping that is an allocation have that for their key."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _values(value, key if key == "allocation" else name, data)
    elif isinstance(data, list):
        for value in data:
            yield from _values(value, key, beside)
    elif isinstance(data, str):
        yield data, key, beside or {}


def _is_path(text: str, key: str, beside: Mapping[str, Any], bases: Sequence[Path]) -> bool:
    """Whether a text is a path, of which only a name may be told.

    Anywhere that is one that is absolute, or said to begin at home, here or above. Under a key of `PLACES` it is also
    one that has not the form of a name on the Hub (owner/name, owner/name@revision), ends as a file of texts, of an
    allocation or of a model does, or leads to something; a model with a revision is on the Hub where that is a commit,
    and nowhere else. An allocation is no name on the Hub.
    """
    if "/" not in text or "\n" in text:
        return False
    if text.startswith(("/", "~/", "./", "../")) or key == "allocation":
        return True
    if key not in PLACES:
        return False
    if key == "model" and "revision" in beside:
        return not _is_commit(beside["revision"])
    there = any(_exists(base / text) for base in bases)
    return there or text[0] in "~." or text.lower().endswith(_FILES) or not HUB_NAME.fullmatch(text)


def _is_commit(revision: Any) -> bool:
    return isinstance(revision, str) and COMMIT.fullmatch(revision) is not None


def _public(values: Sequence[Value]) -> set[str]:
    """What is known to be a name on the Hub, even if a folder here is called the same."""
    models = (text for text, key, beside in values if key == "model" and _is_commit(beside.get("revision")))
    bases = (beside["base"].get("name") for _, _, beside in values if isinstance(beside.get("base"), dict))
    return {name for text in (*models, *map(str, bases)) for name in (text, text.partition("@")[0])}


def _place(path: str, bases: Sequence[Path]) -> Path:
    """Where a path leads; a relative one to where something is, or else from here."""
    try:
        whole = Path(path).expanduser()
    except RuntimeError:  # nobody of that name has a home here
        whole = Path(path)
    return next((base / whole for base in bases if _exists(base / whole)), whole).resolve()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # it is too long for a path
        return False
