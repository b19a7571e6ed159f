"""Where a model comes from: a Hub name, a local folder or a local `.gguf` file, brought to a local folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from yaml import YAMLError

from llmprune.errors import LLMPruneError, UserError
from llmprune.model import convert, download, quantised
from llmprune.model.files import has_safetensors
from llmprune.progress import Progress, of_first
from llmprune.recipe import DTYPES

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What a model's card says that goes for a pruned one as well."""

HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
"""A name there, and perhaps a branch, a tag or a commit."""

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """A model on this machine.

    Attributes:
        name: as it was asked for.
        folder: holds config.json, safetensors and the tokenizer.
        revision: the commit on the Hub, the sha256 of a `.gguf`, or None for a folder.
        base: for the card of what comes of it: its `name` on the Hub, and of its own card what is in `CARRIED`.
        trusted: code that comes with the model is run.
        origin: what was done to make its weights plain, in words; None where they are as they came.
    """

    name: str
    folder: Path
    revision: str | None = None
    base: Mapping[str, Any] = field(default_factory=dict)
    trusted: bool = False
    origin: str | None = None


def resolve(
    model: str | Path,
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
    most: int | None = None,
    as_is: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Find the model, downloading or converting it where needed.

    Args:
        model: `owner/name` or `owner/name@revision` on the Hub, a folder, or a `.gguf` file. What exists on disk wins.
        dtype: what a `.gguf` or a quantised model is dequantised to; `auto` is bfloat16. Others keep their own.
        trust_remote_code: run code that comes with the model.
        most: bytes of memory that a conversion may take, where that needs the whole model; by default what is free.
        as_is: leave a quantised model quantised.
        progress: where to show how far a conversion is.

    Raises:
        UserError: there is no such model, it is quantised in a way that cannot be undone, a package for reading it is
            missing, or there is no room for a conversion.
        Failure: it could not be downloaded or converted.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    name, path, shown = str(model), Path(model).expanduser(), of_first(progress)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name} is a file, but not a .gguf: give a model folder, a .gguf file or a Hub name")
        path = path.resolve()
        return convert.from_gguf(Source(str(path), path.parent), dtype, most, shown)
    if path.is_dir():
        source = Source(name, path.resolve(), base=_of_card(path / "README.md"), trusted=trust_remote_code)
    else:
        named = HUB_NAME.fullmatch(name)
        if named is None or name.startswith((".", "~")) or path.suffix == ".gguf":
            raise UserError(f"no model at {name}: no such folder or file, and it is not a Hub name (owner/name)")
        source = _from_hub(name, named["name"], named["revision"], trust_remote_code, as_is)
    return convert.unpickled(source, shown) if as_is else convert.plain(source, dtype, most, shown)


def _from_hub(asked: str, name: str, revision: str | None, trusted: bool, as_is: bool) -> Source:
    folder = download.fetch(name, revision, ["config.json"])
    if not as_is and (found := quantised.quantisation(folder)):
        quantised.check(found, asked)  # before all the weights come
    commit = folder.name
    download.whole(name, commit, trusted)
    base = {"name": name, **_of_card(download.card(name, folder))}
    return Source(asked, folder, commit, base, trusted)


def _of_card(path: Path | None) -> dict[str, Any]:
    """What a model's card says that goes for a pruned one as well; nothing where it cannot be read."""
    if path is None or not path.is_file():
        return {}
    try:
        told = metadata_load(path) or {}
    except (OSError, ValueError, YAMLError):
        return {}
    kept = {key: told[key] for key in CARRIED if isinstance(told.get(key), (str, list))}
    return {key: list(map(str, value)) if isinstance(value, list) else value for key, value in kept.items()}


def present(name: str, revision: str | None, dtype: str = "auto", *, trust_remote_code: bool = False) -> Source | None:
    """A model that was resolved before, if it is still on this machine; nothing is downloaded or converted.

    Args:
        name, revision: as a `Source` had them.
        dtype, trust_remote_code: as for `resolve`.
    """
    path = Path(name).expanduser()
    found: Source | None
    try:
        if path.is_dir():
            found = Source(name, path.resolve(), revision, trusted=trust_remote_code)
        elif path.suffix == ".gguf":
            found = convert.of_gguf(Source(name, path.parent, revision), dtype)
        elif folder := download.cached(name.partition("@")[0], revision, trust_remote_code):
            found = Source(name, folder, revision, trusted=trust_remote_code)
        else:
            return None
        found = convert.made_before(found, dtype)
    except LLMPruneError:  # what lies there is no model that could be resolved
        return None
    there = found is not None and has_safetensors(found.folder) and (found.folder / "config.json").is_file()
    return found if there else None
