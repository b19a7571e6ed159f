"""Files of a model on the Hub, which are checked to be what the Hub has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from llmprune import hub
from llmprune.errors import Failure, UserError
from llmprune.model.files import SHA256, cache_folder, sha256_of

FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
"""What a model needs to be loaded; other weight formats that lie beside it are not downloaded."""

CODE = ["*.py"]

PICKLES = ["pytorch_model*"]

COPIES = ["*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model", "consolidated*", "*.fp16.*", "*.fp32.*"]
"""The same model once more, in another layout or precision, or in a subfolder."""


def fetch(name: str, revision: str | None, wanted: Sequence[str]) -> Path:
    """Download files of a model, and see that they are what the Hub has.

    Args:
        name: owner/name.
        wanted: which files, as globs; `COPIES` are left out.

    Returns:
        The folder of that commit in the Hub's cache; its name is the commit.

    Raises:
        UserError: there is no such model, or it may not be read.
        Failure: it could not be downloaded, or a file is not what the Hub has; that is taken out of the cache.
    """
    doing = f"downloading {name}"
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted), ignore_patterns=COPIES))
        _check(name, folder, wanted)
    except GatedRepoError as error:
        raise hub.failed(error, name, doing) from None
    except RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision!r} on the Hub") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"no model {name!r}: there is no such folder here, and no such model on the Hub that you may read "
            f"(a private one needs {hub.LOG_IN})"
        ) from None
    except (HTTPError, OSError, ValueError) as error:
        raise hub.failed(error, name, doing) from None
    return folder


def card(name: str, folder: Path) -> Path | None:
    """The model's card, which tells its licence; a model without one, or one that cannot be had now, is fine too."""
    try:
        return Path(hf_hub_download(name, "README.md", revision=folder.name))
    except (HTTPError, OSError, EntryNotFoundError):
        return None


def cached(name: str, revision: str | None) -> Path | None:
    """The folder of a model in the Hub's cache, if it was downloaded before."""
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (HFValidationError, OSError):
        return None


def _check(name: str, folder: Path, wanted: Sequence[str]) -> None:
    files = [path.name for path in folder.glob("*") if path.is_symlink()]
    chosen = [folder / file for file in filter_repo_objects(files, allow_patterns=list(wanted), ignore_patterns=COPIES)]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        harmed = [path for path, good in zip(chosen, pool.map(_is_whole, chosen), strict=True) if not good]
    for path in harmed:
        _discard(path)
    if harmed:
        raise Failure(
            f"{harmed[0].name} of {name} is not what the Hub says it is: its sha256 is another; it was taken out of "
            "the cache, and the same command downloads it again"
        )


def _is_whole(path: Path) -> bool:
    """Whether a large file in the Hub's cache has the sha256 that it is named by; the client compares sizes alone.

    What was found good is noted, so that it is read once.
    """
    digest = path.readlink().name
    if not SHA256.fullmatch(digest):
        return True  # a small file, which is kept in git
    status = path.stat()
    note = cache_folder() / "checked" / f"{digest}-{status.st_size}-{status.st_mtime_ns}"
    if note.exists():
        return True
    if sha256_of(path) != digest:
        return False
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    return True


def _discard(path: Path) -> None:
    """Remove a file from the Hub's cache, and all links that lead to it from there."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)
