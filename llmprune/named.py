"""Loads what a recipe names: a room is a package, a name is a file in it, and its options are a dataclass's fields."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from llmprune.errors import UserError, unknown
from llmprune.recipe import build


def names(path: Iterable[str]) -> list[str]:
    """Every name there is in a room.

    Args:
        path: the package's `__path__`.
    """
    return sorted(module.name for module in pkgutil.iter_modules(path))


def load(package: str, path: Iterable[str], kind: str, spec: str | Mapping[str, Any], class_name: str) -> Any:
    """Make what a recipe asks for: a name, or a mapping of `name` and options.

    Args:
        package, path: the room's `__name__` and `__path__`.
        kind: what it holds, for messages: `method`, ...
        spec: what the recipe says.
        class_name: the dataclass that each file of the room defines.

    Raises:
        UserError: an unknown name or option (the answer names the nearest one), or a value that is out of range.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    known = names(path)
    if not isinstance(name, str):
        raise UserError(f"{kind} {spec!r} has no name; known: {', '.join(known)}")
    if name not in known:
        raise unknown(kind, name, known)
    named: type[Any] = getattr(importlib.import_module(f"{package}.{name}"), class_name)
    if options and not fields(named):
        raise UserError(f"{kind} {name} has no options, but {next(iter(options))!r} was given")
    try:
        return build(named, options, f"{kind} {name}")
    except ValueError as error:
        raise UserError(f"{kind} {name}: {error}") from None
