"""Keeps what was measured, piece by piece, so that work that was cut off goes on, and none is done twice.

A piece is kept under the hash of all that it depends on: other files, other options or another version never meet it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune import distributed
from llmprune.errors import Failure, UserError
from llmprune.model.checkpoint import Checkpoint

FOLDER = ".pieces"
LOCK = ".llmprune.lock"


class Pieces:
    """Pieces of work in a folder. Only the first rank reads and writes them; what it finds is told to all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    def of(self, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The piece that depends on nothing but the key: as it was kept, or made now and kept.

        Args:
            key: plain data.
            make: called on every rank; gives plain data.
        """
        path = self.folder / f"{digest(key)}.json"
        kept = distributed.share(_read(path) if distributed.is_first() else None)
        if kept is not None:
            return kept["is"]
        made = make()
        if distributed.is_first():
            write_json(path, {"of": dict(key), "is": made})
        return made


class States:
    """What leaves the last block of the dense model, kept in files until all are compared with it.

    So that model is run once however many are compared with it. Each rank keeps what it has run itself.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], batches: int) -> None:
        self._key = digest({**key, "ranks": distributed.size()})[:16]
        self._parent = folder / FOLDER
        self._folder = self._parent / f"states-{self._key}-{distributed.rank()}"
        self._batches = batches

    @property
    def whole(self) -> bool:
        """Whether every rank has kept all of its own."""
        there = all(self._file(number).is_file() for number in range(self._batches))
        return all(distributed.gather(there))

    def keep(self, stream: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """Keep what passes."""
        for number, states in stream:
            path = self._file(number)
            with writing(path) as draft:
                save_file({"states": states.detach().cpu().contiguous()}, draft)
            yield number, states

    def read(self, checkpoint: Checkpoint) -> Iterator[tuple[int, Tensor]]:
        """As `final_states` of that checkpoint gave them; its outer weights are loaded meanwhile."""
        checkpoint.load_outer(head=True)
        try:
            for number in range(self._batches):
                yield number, load_file(self._file(number))["states"].to(checkpoint.device)
        finally:
            checkpoint.unload()

    def forget(self) -> None:
        """Remove them, and those that a run with other ranks has left."""
        for path in self._parent.glob("states-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:06d}.safetensors"


def digest(key: Mapping[str, Any]) -> str:
    """The hash of plain data."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


ONWARD = "; what was measured is kept, and the same command goes on from there"


def write_json(path: Path, data: Any, onward: str = ONWARD) -> None:
    """Write plain data; the file is never there by half.

    Args:
        onward: what to tell beside, where it cannot be written.

    Raises:
        Failure: it cannot be written.
    """
    with writing(path, onward) as draft:
        draft.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def writing(path: Path, onward: str = ONWARD) -> Iterator[Path]:
    """A draft that takes the place of a file at the end.

    Args:
        onward: see `write_json`.

    Raises:
        Failure: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.rename(path)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        reason = "no space left on the disk" if full else error
        raise Failure(f"writing {path} failed: {reason}{onward}") from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Make a folder for results, to the exclusion of other processes, before any work.

    Raises:
        UserError: it cannot be had.
    """
    if not distributed.is_first():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"results cannot be written to {folder}: {error.strerror} (--out)") from None
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another run of llmprune is writing to {folder}: wait for its end, or choose another"
        ) from None
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def _read(path: Path) -> dict[str, Any] | None:
    """A piece; None where there is none, or one that cannot be read."""
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept if "is" in kept else None
    except (OSError, ValueError, TypeError):
        return None
