"""Files of a model on the Hub, which are checked to be what the Hub has."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from llmprune.errors import Failure, LLMPruneError, UserError
from llmprune.model.files import SHA256, cache_folder, has_safetensors, listed, sha256_of

FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
"""What belongs to the weights of a model; other files are not downloaded."""

CODE = ["*.py"]

COPIES = [
    *("*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model"),
    *("consolidated*.json", "adapter_*.json", "*.index.*.json", "*.fp16.json", "*.fp32.json"),
]
"""The same model once more in a subfolder, and what belongs to `VARIANTS`."""

VARIANTS = [
    *("model.*.safetensors", "pytorch_model.*.bin", "*.fp16.*", "*.fp32.*"),
    *("consolidated*", "adapter_*"),
]
"""The same weights in another precision or layout, and those of adapters; no index of the model names them."""


@dataclass(frozen=True)
class Format:
    """How a model's weights may lie in a repository.

    Attributes:
        single: the file that has all of them, which goes before an index.
        listing: the index, which names the files.
        any: where there is no index, files that are taken unless they are among `VARIANTS`.
    """

    single: str
    listing: str
    any: str

    def shards(self, folder: Path) -> list[str]:
        """The files that the index in a folder names; none without one, or with one that is broken."""
        try:
            return listed(folder / self.listing)
        except (OSError, ValueError):  # what reads the weights says what is wrong
            return []


SAFETENSORS = Format("model.safetensors", "model.safetensors.index.json", "*.safetensors")

PICKLES = Format("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin")

Get = Callable[[Sequence[str], Sequence[str]], Path]
"""Brings the files that fit some globs, but for those that fit others; returns the folder that they are in."""


def whole(name: str, revision: str | None, trusted: bool = False) -> Path:
    """Download all that a model needs to be loaded: its safetensors, or its pickles where it has none.

    Args:
        name: owner/name.
        trusted: code that comes with it as well.

    Returns:
        The folder of that commit in the Hub's cache.

    Raises:
        UserError, Failure: as `fetch`.
    """
    return _whole(lambda wanted, unwanted: fetch(name, revision, wanted, unwanted), trusted)


def _whole(get: Get, trusted: bool) -> Path:
    """As `read_index` and transformers choose: the one file, or else those of the index, or else what there is."""
    beside = [*FILES, *(CODE if trusted else ())]
    folder = get(beside, COPIES)
    for kind in (SAFETENSORS, PICKLES):
        get([*beside, kind.single], COPIES)
        if not (folder / kind.single).is_file():
            shards = [glob.escape(shard) for shard in kind.shards(folder)]
            get([*beside, *(shards or [kind.any])], COPIES if shards else [*COPIES, *VARIANTS])
        if has_safetensors(folder):
            break
    return folder


def fetch(name: str, revision: str | None, wanted: Sequence[str], unwanted: Sequence[str] = COPIES) -> Path:
    """Download files of a model, and see that they are what the Hub has.

    Args:
        name: owner/name.
        wanted: which files, as globs.
        unwanted: which of them are left out, likewise.

    Returns:
        The folder of that commit in the Hub's cache; its name is the commit.

    Raises:
        UserError: there is no such model, or it may not be read.
        Failure: it could not be downloaded, or a file is not what the Hub has; that is taken out of the cache.
    """
    doing = f"downloading {name}"
    try:
        folder = _snapshot(name, revision, wanted, unwanted)
        _check(name, folder, wanted, unwanted)
    except LLMPruneError:
        raise
    except GatedRepoError as error:
        raise hub.failed(error, name, doing) from None
    except RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision!r} on the Hub") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"no model {name!r}: there is no such folder here, and no such model on the Hub that you may read "
            f"(a private one needs {hub.LOG_IN})"
        ) from None
    except Exception as error:  # those of hf_xet are of no kind of their own
        raise hub.failed(error, name, doing) from None
    return folder


def card(name: str, folder: Path) -> Path | None:
    """The model's card, which tells its licence; a model without one, or one that cannot be had now, is fine too."""
    try:
        return Path(hf_hub_download(name, "README.md", revision=folder.name))
    except (HTTPError, OSError, EntryNotFoundError):
        return None


def cached(name: str, revision: str | None, trusted: bool = False) -> Path | None:
    """The folder of a model in the Hub's cache, if `whole` has brought it there before."""
    try:
        folder = _whole(lambda wanted, unwanted: _snapshot(name, revision, wanted, unwanted, here=True), trusted)
    except (HFValidationError, OSError):
        return None
    # Of what an older client has downloaded it is not known which files there are.
    single, shards = (folder / SAFETENSORS.single).is_file(), SAFETENSORS.shards(folder)
    return folder if single or all((folder / shard).is_file() for shard in shards) else None


def _snapshot(
    name: str, revision: str | None, wanted: Sequence[str], unwanted: Sequence[str], here: bool = False
) -> Path:
    """The folder of a commit in the Hub's cache, with all files that are wanted.

    Args:
        here: nothing is downloaded; `OSError` where a file is missing.
    """
    chosen, others = list(wanted), list(unwanted)
    return Path(
        snapshot_download(name, revision=revision, allow_patterns=chosen, ignore_patterns=others, local_files_only=here)
    )


def _check(name: str, folder: Path, wanted: Sequence[str], unwanted: Sequence[str]) -> None:
    files = [path.name for path in folder.glob("*") if path.is_symlink()]
    chosen = filter_repo_objects(files, allow_patterns=list(wanted), ignore_patterns=list(unwanted))
    found = [folder / file for file in chosen]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        harmed = [path for path, good in zip(found, pool.map(_is_whole, found), strict=True) if not good]
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
