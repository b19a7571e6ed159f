"""Writes the pruned checkpoint: one block is one shard (or a few), and OUT never holds a half-written file.

A shard is written under a temporary name, flushed to disk and renamed; then a line is added to the journal
(`llmprune.journal.jsonl`, one JSON object a line). The first line is the header: `format` (1), `fingerprint`, all that
the result depends on, and `side_files`, which are copied. Every further line is a committed shard: `shard`, `bytes`,
`sha256`, `block` (its number, null for what surrounds the blocks), and with the last shard of a block `linears`, the
records of its linears. `close` writes the report, which makes the run a finished one, and takes the journal away.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmprune.errors import Failure, UserError
from llmprune.model.checkpoint import Checkpoint, LoadedBlock
from llmprune.model.source import sha256_of
from llmprune.recipe import parse_size

JOURNAL = "llmprune.journal.jsonl"
REPORT = "llmprune.json"
INDEX = "model.safetensors.index.json"
JOURNAL_FORMAT = 1

_NOT_COPIED = re.compile(
    r".*\.(safetensors|bin|pt|pth|h5|msgpack|onnx|gguf|ot|tflite|index\.json)|README\.md|llmprune.*|recipe\.yaml|\..*"
)
CHAT_TEMPLATES = "additional_chat_templates"
"""Where transformers keeps chat templates beside the main one."""

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Shard:
    """A file to be written: its name, the checkpoint's keys in it, and the block it belongs to."""

    name: str
    keys: tuple[str, ...]
    block: int | None


def layout(checkpoint: Checkpoint, shard_size: str) -> list[Shard]:
    """Which key goes into which file: each block by itself, then the rest; larger groups are split.

    What surrounds the blocks is split into files no larger than a block, so that it takes no more memory either.
    """
    limit = parse_size(shard_size)
    blocks = max(sum(checkpoint.index[key].nbytes for key in keys) for keys in checkpoint.block_keys)
    groups: list[tuple[int | None, list[str]]] = [*enumerate(checkpoint.block_keys)]
    groups.append((None, [*checkpoint.outer_keys, *sorted(checkpoint.unclaimed_keys)]))
    parts: list[tuple[int | None, list[str]]] = []
    for block, keys in groups:
        room = 0
        for key in keys:
            size = checkpoint.index[key].nbytes
            if not parts or parts[-1][0] != block or size > room:
                parts.append((block, []))
                room = limit if block is not None else min(limit, blocks)
            parts[-1][1].append(key)
            room -= size
    names = (f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1))
    return [Shard(name, tuple(keys), block) for name, (block, keys) in zip(names, parts, strict=True)]


class Writer:
    """Writes one run into OUT.

    Attributes:
        out: the folder.
        shards: the files to be written.
        side_files: what is copied from the source.
        hashes: file name to sha256, of the shards committed so far.
    """

    def __init__(
        self, out: str | Path, checkpoint: Checkpoint, shard_size: str, fingerprint: Mapping[str, Any], restart: bool
    ) -> None:
        """Take the folder, and write the journal's header; `check_out` tells beforehand whether it can be had."""
        self.out = check_out(out, checkpoint, restart)
        self.shards = layout(checkpoint, shard_size)
        self.side_files = side_files(checkpoint.source.folder)
        self.hashes: dict[str, str] = {}
        self._checkpoint = checkpoint
        self._bytes = 0
        with self._failing("the journal"):
            self.out.mkdir(parents=True, exist_ok=True)
            clear(self.out)
            header = {"format": JOURNAL_FORMAT, "fingerprint": dict(fingerprint), "side_files": self.side_files}
            self._append(header)

    def commit_block(self, number: int, block: LoadedBlock, changed: set[str], linears: list[dict[str, Any]]) -> None:
        """Write a block: its pruned parameters from memory, everything else from the files, equal to the bit."""
        tensors = self._checkpoint.written_block(number, block, changed)
        shards = [shard for shard in self.shards if shard.block == number]
        for shard in shards:
            self._commit(shard, tensors, linears if shard is shards[-1] else None)

    def finish(self) -> None:
        """Write what surrounds the blocks, the index and the side files; only the report is missing then."""
        for shard in self.shards:
            if shard.block is None:
                tensors = self._checkpoint.read(shard.keys)
                self._checkpoint.check_finite(tensors)
                self._commit(shard, tensors, None)
        weight_map = {key: shard.name for shard in self.shards for key in shard.keys}
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(weight_map.items()))}
        with self._failing("the side files"):
            for name in self.side_files:
                (self.out / name).parent.mkdir(exist_ok=True)
                self._replace(name, functools.partial(shutil.copyfile, self._checkpoint.source.folder / name))
            self._write_text(INDEX, json.dumps(index, indent=2))

    def close(self, report: dict[str, Any]) -> None:
        """Write llmprune.json, which makes the run a finished one, and take the journal away."""
        with self._failing("the report"):
            self._write_text(REPORT, json.dumps(report, indent=2, allow_nan=False))
            (self.out / JOURNAL).unlink(missing_ok=True)

    def _write_text(self, name: str, text: str) -> None:
        self._replace(name, lambda draft: draft.write_text(text + "\n", encoding="utf-8"))

    def _commit(self, shard: Shard, tensors: Mapping[str, Tensor], linears: list[dict[str, Any]] | None) -> None:
        chosen = {key: tensors[key] for key in shard.keys}
        with self._failing(shard.name):
            path = self._replace(shard.name, lambda draft: save_file(chosen, draft, metadata={"format": "pt"}))
            self.hashes[shard.name] = sha256_of(path)
            self._bytes += sum(tensor.nbytes for tensor in chosen.values())
            line: dict[str, Any] = {
                "shard": shard.name,
                "bytes": path.stat().st_size,
                "sha256": self.hashes[shard.name],
            }
            line["block"] = shard.block
            if linears is not None:
                line["linears"] = linears
            self._append(line)

    def _replace(self, name: str, write: Any) -> Path:
        path = self.out / name
        draft = path.with_name(f".{path.name}.draft")
        try:
            write(draft)
            draft.chmod(0o644)
            _sync(draft)
            draft.rename(path)
            _sync(path.parent)
        finally:
            draft.unlink(missing_ok=True)
        return path

    def _append(self, line: dict[str, Any]) -> None:
        with (self.out / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
            reason = "no space left on the disk" if full else str(error)
            done = f"; {len(self.hashes)} finished shards stay there, begin anew with --restart" if self.hashes else ""
            raise Failure(f"writing {what} to {self.out} failed: {reason}{done}") from None


def check_out(out: str | Path, checkpoint: Checkpoint, restart: bool) -> Path:
    """See that a run can be written to a folder; nothing is changed.

    Raises:
        UserError: it holds another run or other files, cannot be written to, or the disk is too small.
    """
    folder = Path(out).expanduser().absolute()
    if folder.resolve() == checkpoint.source.folder:
        raise UserError(f"{out} is the model itself; write the result to another folder")
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"{out} is a file; -o takes a folder")
        ours = [name for name in (REPORT, JOURNAL) if (folder / name).exists()]
        if ours and not restart:
            kind = "a finished" if ours[0] == REPORT else "an unfinished"
            raise UserError(f"{out} holds {kind} run of llmprune: choose another folder, or begin anew with --restart")
        if not ours and any(folder.iterdir()):
            raise UserError(f"{out} is not empty, and what it holds was not written by llmprune: choose another folder")
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"{place} is a file, so that there can be no folder {out}")
    if not os.access(place, os.W_OK):
        raise UserError(f"{place} cannot be written to")
    needed = sum(info.nbytes for info in checkpoint.index.values())
    freed = sum(path.stat().st_size for path in _written(folder)) if folder.is_dir() else 0
    free = shutil.disk_usage(place).free + freed
    if free < needed:
        raise UserError(f"no space left for {out}: it needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
    return folder


def side_files(folder: Path) -> list[str]:
    """What goes with the weights: config, tokenizer, chat templates, generation config, licence, ..."""
    found = [path.name for path in folder.iterdir() if path.is_file() and not _NOT_COPIED.fullmatch(path.name)]
    found += [str(path.relative_to(folder)) for path in (folder / CHAT_TEMPLATES).glob("*.jinja")]
    return sorted(found)


def clear(folder: Path) -> None:
    """Remove what an earlier run of ours wrote into a folder, and nothing else; what marks it as ours goes last."""
    for path in sorted(_written(folder), key=lambda path: path.name in (REPORT, JOURNAL)):
        path.unlink()


def _written(folder: Path) -> list[Path]:
    marks = [folder / name for name in (REPORT, JOURNAL) if (folder / name).is_file()]
    if not marks:
        return []
    names = {INDEX}
    for mark in marks:
        try:
            told = json.loads(
                mark.read_text(encoding="utf-8").splitlines()[0] if mark.name == JOURNAL else mark.read_text()
            )
            names.update(str(name) for name in told.get("side_files", ()))
        except (ValueError, IndexError, AttributeError):
            continue
    found = [folder / name for name in names if (folder / name).is_file()]
    drafts = (path for path in folder.iterdir() if path.name[0] == "." and path.suffix == ".draft")
    return [*found, *drafts, *(path for path in folder.iterdir() if _SHARD.fullmatch(path.name)), *marks]


def fingerprint_files(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Each source file with its size and the sha256 of its header, which names all its tensors."""
    files = sorted({info.file for info in checkpoint.index.values()})
    found = {}
    for path in files:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            found[path.name] = {"bytes": path.stat().st_size, "header": hashlib.sha256(file.read(size)).hexdigest()}
    return found


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
