"""Rooms in which every file is a thing to choose by name: the name is the file's, the options are its dataclass's."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from types import ModuleType
from typing import Any

from llmprune.errors import UserError, unknown
from llmprune.recipe import build


def names(room: ModuleType) -> list[str]:
    """Every name that can be chosen in a room."""
    return sorted(module.name for module in pkgutil.iter_modules(room.__path__))


def name_of(chosen: str | Mapping[str, Any]) -> str:
    """The name in what a recipe says: a name, or a mapping of `name` and options."""
    return chosen if isinstance(chosen, str) else str(chosen.get("name"))


def load(room: ModuleType, cls: str, kind: str, chosen: str | Mapping[str, Any]) -> Any:
    """Make what a recipe asks for.

    Args:
        room: the package whose files are chosen from.
        cls: the name of the dataclass in each of them.
        kind: what it is, for messages.
        chosen: a name, or a mapping of `name` and options.

    Raises:
        UserError: an unknown name or option (the answer names the nearest one), or a value that is out of range.
    """
    options = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
    name = options.pop("name", None)
    known = names(room)
    if not isinstance(name, str):
        raise UserError(f"{kind} {chosen!r} has no name; known: {', '.join(known)}")
    if name not in known:
        raise unknown(kind, name, known)
    made = getattr(importlib.import_module(f"{room.__name__}.{name}"), cls)
    if options and not fields(made):
        raise UserError(f"{kind} {name} has no options, but {next(iter(options))!r} was given")
    try:
        return build(made, options, f"{kind} {name}")
    except ValueError as error:
        raise UserError(f"{kind} {name}: {error}") from None
