"""The files of a model folder, and the folder where models are kept that were downloaded or converted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from llmprune.errors import Failure, UserError

NOT_COPIED = re.compile(
    r".*\.(safetensors|bin|pt|pth|h5|msgpack|onnx|gguf|ot|tflite|index\.json)"
    r"|README\.md|report\.html|llmprune.*|recipe\.yaml|allocation\.yaml|\..*"
)
"""Files of a model folder that are not carried along."""

CHAT_TEMPLATES = "additional_chat_templates"
"""Where transformers keeps chat templates beside the main one."""

CACHE_VARIABLE = "LLMPRUNE_CACHE"

SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_folder() -> Path:
    """Where converted and downloaded models are kept: $LLMPRUNE_CACHE, or llmprune in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmprune"


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def content_sha256(path: Path) -> str:
    """A file's sha256; in the Hub's cache the name of a large file is its sha256 already."""
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and SHA256.fullmatch(blob.name) else sha256_of(path)


def listed(listing: Path) -> list[str]:
    """The files that an index of weights names.

    Raises:
        OSError: it cannot be read.
        ValueError: it is broken.
    """
    try:
        names = json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return sorted(set(map(str, names)))


def side_files(folder: Path) -> list[str]:
    """What goes with the weights: config, tokenizer, chat templates, generation config, licence, code, ..."""
    found = [path.name for path in folder.iterdir() if path.is_file() and not NOT_COPIED.fullmatch(path.name)]
    found += [str(path.relative_to(folder)) for path in (folder / CHAT_TEMPLATES).glob("*.jinja")]
    return sorted(found)


def copy_side_files(folder: Path, into: Path) -> None:
    """Copy what goes with the weights."""
    for name in side_files(folder):
        (into / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, into / name)


def has_safetensors(folder: Path) -> bool:
    """Whether a folder holds weights in safetensors; those of an adapter are none of a model."""
    return any(not path.name.startswith("adapter_") for path in folder.glob("*.safetensors"))


@contextlib.contextmanager
def drafted(folder: Path, name: str, size: int) -> Iterator[Path | None]:
    """A folder beside `folder` to write into, which takes its place at the end; None where it is there already.

    Processes wait for one another; what one that was killed left behind is cleared away.

    Args:
        name: the model's.
        size: bytes that will be written.

    Raises:
        UserError: the disk has no room for that.
        Failure: it could not be written.
    """
    if folder.is_dir():
        yield None
        return
    place = folder.parent
    draft = place / f".{folder.name}.draft"
    hint = f"another folder can be chosen with {CACHE_VARIABLE}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / f".{folder.name}.lock"):
            if folder.is_dir():
                yield None
                return
            shutil.rmtree(draft, ignore_errors=True)
            free = shutil.disk_usage(place).free
            if free < size:
                raise UserError(
                    f"no space left to convert {name} in {place}: it needs {size / 1e9:.2f} GB, and "
                    f"{free / 1e9:.2f} GB are free; {hint}"
                )
            draft.mkdir()
            try:
                yield draft
                draft.rename(folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise Failure(f"converting {name} in {place} failed: {error}; {hint}") from None
