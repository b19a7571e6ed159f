"""What a report tells of this machine: paths of its folders, which others are not to read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from markupsafe import escape

from llmprune.errors import UserError
from llmprune.model.writer import ALLOCATION, EVALUATION, PAGE, REPORT

ANSWERS = f"{EVALUATION}/generations.json"
"""What was said by models may look like a path, and is none."""

RECORDS = (REPORT, *(f"{EVALUATION}/{name}.json" for name in ("eval", "comparison", "speed")))
"""Files with paths among their values."""

OWN_SCRIPTS = re.compile(r"(<script>.*?</script>)", re.DOTALL)
"""The programs of a page, whose hashes stand in it; its data is in scripts with a type."""


def without_paths(folder: Path) -> dict[str, str]:
    """The files of a report in which paths of this machine stand, as they are without them.

    An absolute path that is a value in a record becomes its last part wherever it stands in these files, and what is
    left of the home folder `~`. Relative ones stay.

    Args:
        folder: that llmprune wrote.

    Returns:
        Name to text, of those files alone that are not the same.

    Raises:
        UserError: a record is no JSON.
    """
    told = {
        name: path.read_text(encoding="utf-8")
        for name in (*RECORDS, ANSWERS, ALLOCATION, PAGE)
        if (path := folder / name).is_file()
    }
    found = {str(folder.absolute()), str(folder.resolve())}
    for name in RECORDS:
        try:
            found.update(_paths(json.loads(told.get(name, "{}"))))
        except ValueError as error:
            raise UserError(f"{folder / name} cannot be used: {error}") from None
    names = {path: Path(path).name for path in found}
    with suppress(RuntimeError):  # nobody's home
        names.setdefault(str(Path.home()), "~")
    names = {path: name for path, name in names.items() if Path(path).name}  # not the root, nor a home that is it
    named = {
        name: "".join(part if OWN_SCRIPTS.fullmatch(part) else _named(part, names) for part in OWN_SCRIPTS.split(text))
        for name, text in told.items()
    }
    return {name: text for name, text in named.items() if text != told[name]}


def _paths(value: Any) -> Iterator[str]:
    """All texts in plain data that are an absolute path."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, str) and "\n" not in value and Path(value).is_absolute():
        yield value


def _named(text: str, names: dict[str, str]) -> str:
    """Each path by its name: as it is, as JSON writes it, and as HTML does."""
    forms = {form(path): form(name) for path, name in names.items() for form in (str, _json, _ascii, _html)}
    longest = "|".join(re.escape(path) for path in sorted(forms, key=len, reverse=True))
    whole = re.compile(rf"(?:(?<=\\n)|(?<![\w.~/-]))(?:{longest})(?![\w-])")
    return whole.sub(lambda found: forms[found[0]], text)


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _ascii(text: str) -> str:
    return json.dumps(text)[1:-1]


def _html(text: str) -> str:
    return str(escape(text))
