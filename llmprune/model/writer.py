"""Writes the pruned checkpoint: one block is one shard (or a few), and OUT never holds a half-written file.

A shard is written in a folder of drafts, flushed to disk and moved from there; then a line is added to the journal
(`llmprune.journal.jsonl`, one JSON object a line). The first line is the header: `format` (1), `fingerprint`, all that
the result depends on, `side_files`, which go with the weights, and what was found out of the dense model before the
first block (`FOUND`). Every further line is a committed shard: `shard`, `bytes`, `sha256`, `block` (its number, null
for what surrounds the blocks), and with the last shard of a block `record`, what became of the block and its linears.
`close` writes the report, which makes the run a finished one, and takes the journal away.

Whenever the process ends, what OUT holds is a whole number of shards and the lines that vouch for them, perhaps with a
torn last line, or with a shard whose line is missing: `recover` finds out how much of it can be used, once `find`
has seen that it is the same run.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmprune import distributed, memory
from llmprune.errors import Failure, UserError
from llmprune.model.checkpoint import Checkpoint, LoadedBlock
from llmprune.model.files import CHAT_TEMPLATES, NOT_COPIED, sha256_of, side_files
from llmprune.model.index import hash_files
from llmprune.progress import Progress
from llmprune.recipe import parse_size

JOURNAL = "llmprune.journal.jsonl"
REPORT = "llmprune.json"
PAGE = "report.html"
ALLOCATION = "allocation.yaml"
DRAFTS = ".llmprune.drafts"
"""Where a file lies until it is whole; with what a library leaves beside it when the process is killed."""

EVALUATION = "evaluation"
MEASURED = ("eval.json", "lm_eval.json", "comparison.json", "generations.json", "speed.json")
"""What is found out about a checkpoint later on, in its folder `EVALUATION`."""

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
LOCK = ".llmprune.lock"
JOURNAL_FORMAT = 1

FOUND = ("dense", "kept", "hidden", "ranking", "allocation", "gone", "batches")
"""What a journal's header may tell of the dense model.

Its perplexity; the numbers of the blocks and of the hidden channels that are left; how many channels and heads go where
that was ranked (`width`) and which (`gone`); the target of each linear; the units that go of linears' inputs; and the
sequences per forward that the run began with, see `Room`.
"""

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
    """Writes one run into OUT, or goes on with one that was cut off. Made by `writing`.

    Shards are written and hashed in the background, one at a time.

    Attributes:
        out: the folder.
        shards: the files to be written.
        side_files: what is copied from the source.
        hashes: file name to sha256, of the shards committed so far.
        records: of each finished block, as given to `commit_block`.
        found: what was found out before the first block, for the header, by its name there.
        onward: what to tell somebody whose run stops.
    """

    def __init__(self, out: Path, checkpoint: Checkpoint, shard_size: str, restart: bool) -> None:
        self.out = out
        self._begun = f"the same command{' without --restart' if restart else ''} goes on from there"
        self.onward = "the same command begins anew" if restart else self._begun
        self._shard_size = shard_size
        self.lay_out(checkpoint)
        self.side_files = side_files(checkpoint.source.folder)
        self.hashes: dict[str, str] = {}
        self.records: list[dict[str, Any]] = []
        self.found: dict[str, Any] = {}
        self._lines: list[dict[str, Any]] = []
        self._background = ThreadPoolExecutor(1, "llmprune-writer")
        self._pending: tuple[Future[None], Callable[[], None]] | None = None

    def lay_out(self, checkpoint: Checkpoint) -> None:
        """What is written is this checkpoint, from now on."""
        self._checkpoint, self.shards = checkpoint, layout(checkpoint, self._shard_size)

    def find(self, fingerprint: Mapping[str, Any]) -> bool:
        """Look for a run in OUT that this one goes on with; returns whether there is one.

        Raises:
            UserError: it is a run with another fingerprint; the message names what differs.
        """
        lines = read_journal(self.out / JOURNAL)
        if not lines:
            if any(_SHARD.fullmatch(path.name) for path in self.out.iterdir()):
                raise UserError(
                    f"the first line of {self.out / JOURNAL} cannot be read, so that the shards beside it are of an "
                    "unknown run: choose another folder, or begin anew with --restart"
                )
            return False
        header = lines[0]
        if other := difference(header.get("fingerprint"), json.loads(json.dumps(fingerprint))):
            raise UserError(
                f"{self.out} holds an unfinished run with {other}: give the same to go on with it, "
                "choose another folder, or begin anew with --restart"
            )
        self.found = {name: header[name] for name in FOUND if header.get(name) is not None}
        self._lines = lines
        return True

    def recover(self, progress: Progress) -> None:
        """Take up the run that was found.

        Shards are used up to the first that is missing or whose hash is not the journal's, and whole blocks only; the
        journal is cut back to them, and its header tells all that was found out. Of finished blocks the checkpoint
        reads its tensors from OUT from now on.
        """
        header, committed = {**self._lines[0], **self.found}, self._lines[1:]
        pairs = list(zip(self.shards, committed, strict=False))
        whole = 0
        for place, (shard, line) in enumerate(progress.over(pairs, "checking finished shards"), 1):
            path = self.out / shard.name
            if line.get("shard") != shard.name or not path.is_file() or sha256_of(path) != line.get("sha256"):
                break
            if shard.block is None or "record" in line:
                whole = place
        for shard, line in pairs[:whole]:
            self.hashes[shard.name] = line["sha256"]
            if "record" in line:
                self.records.append(line["record"])
            if shard.block is not None:
                self._checkpoint.read_from(self.out / shard.name, shard.keys)
        kept = "\n".join(json.dumps(line) for line in [header, *committed[:whole]])
        if (self.out / JOURNAL).read_bytes() != f"{kept}\n".encode():
            with self._failing("the journal"):
                self._write_text(JOURNAL, kept)

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Clear the folder of an earlier run, and write the journal's header; once more when more was found out.

        The journal that is there goes when the new one is whole: what an earlier header tells is not lost in between.
        """
        with self._failing("the journal"):
            clear(self.out, but=JOURNAL)
            header = {"format": JOURNAL_FORMAT, "fingerprint": dict(fingerprint), "side_files": self.side_files}
            self._write_text(JOURNAL, json.dumps({**header, **self.found}))
        self.onward = self._begun

    def commit_block(
        self,
        number: int,
        block: LoadedBlock,
        changed: set[str],
        record: dict[str, Any],
        told: Callable[[dict[str, Any]], None],
    ) -> None:
        """Write a block: its pruned parameters from memory, everything else from the files, equal to the bit.

        The files are written in the background; `settle` waits for them.

        Args:
            record: goes into the journal; the seconds that writing took are put into its `seconds`.
            told: is given the record by `settle`, when the block is on the disk.
        """
        self.settle()
        began = time.monotonic()
        tensors = self._checkpoint.written_block(number, block, changed)

        def write() -> None:
            shards = [shard for shard in self.shards if shard.block == number]
            for shard in shards:
                line = self._save(shard, tensors)
                if shard is shards[-1]:
                    record["seconds"]["write"] = round(time.monotonic() - began, 3)
                    line["record"] = record
                self._append(line)
            self.records.append(record)

        self._pending = self._background.submit(write), functools.partial(told, record)

    def settle(self) -> None:
        """Wait until the last block is on the disk.

        Raises:
            Failure: it could not be written.
        """
        if self._pending is not None:
            (writing, told), self._pending = self._pending, None
            writing.result()
            del writing
            memory.give_back()
            told()

    def finish(self, allocation: str | None = None) -> None:
        """Write what surrounds the blocks, the index and the side files; only the report is missing then.

        Args:
            allocation: the text of the plan file, where there is to be one.
        """
        self.settle()
        for shard in self.shards:
            if shard.block is None and shard.name not in self.hashes:
                tensors = self._checkpoint.read(shard.keys)
                self._checkpoint.check_finite(tensors)
                self._append(self._save(shard, tensors))
        weight_map = {key: shard.name for shard in self.shards for key in shard.keys}
        total = sum(self._checkpoint.index[key].nbytes for key in weight_map)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with self._failing("the side files"):
            shape = self._checkpoint.shape
            for name in self.side_files:
                (self.out / name).parent.mkdir(exist_ok=True)
                if name == CONFIG and shape is not None:
                    self._write_text(name, shape.config_json)
                else:
                    self._replace(name, functools.partial(shutil.copyfile, self._checkpoint.source.folder / name))
            if allocation is not None:
                self._write_text(ALLOCATION, allocation)
            self._write_text(INDEX, json.dumps(index, indent=2))

    def close(self, report: dict[str, Any]) -> None:
        """Write llmprune.json, which makes the run a finished one, and take the journal away."""
        with self._failing("the report"):
            self._write_text(REPORT, json.dumps(report, indent=2, allow_nan=False))
            (self.out / JOURNAL).unlink(missing_ok=True)

    def stop(self) -> None:
        """Let the block that is being written be the last; however often Ctrl-C is pressed, it is written first."""
        while True:
            try:
                self._background.shutdown(wait=True)
                return
            except KeyboardInterrupt:
                continue

    def _write_text(self, name: str, text: str) -> None:
        self._replace(name, lambda draft: draft.write_text(text + "\n", encoding="utf-8"))

    def _save(self, shard: Shard, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write a shard's file; returns its line for the journal."""
        chosen = {key: tensors[key] for key in shard.keys}
        with self._failing(shard.name):
            path = self._replace(shard.name, lambda draft: save_file(chosen, draft, metadata={"format": "pt"}))
            self.hashes[shard.name] = sha256_of(path)
            size = path.stat().st_size
        return {"shard": shard.name, "bytes": size, "sha256": self.hashes[shard.name], "block": shard.block}

    def _replace(self, name: str, write: Any) -> Path:
        path = self.out / name
        draft = self.out / DRAFTS / path.name
        try:
            draft.parent.mkdir(exist_ok=True)
            write(draft)
            draft.chmod(0o644)
            _sync(draft)
            draft.rename(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(draft.parent, ignore_errors=True)
        return path

    def _append(self, line: dict[str, Any]) -> None:
        with self._failing("the journal"), (self.out / JOURNAL).open("a", encoding="utf-8") as file:
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
            kept = f"; {len(self.records)} finished blocks stay in it, and {self.onward}"
            raise Failure(f"writing {what} to {self.out} failed: {reason}{kept if self.records else ''}") from None


class Elsewhere(Writer):
    """Stands for the writer on every rank but the first, which alone writes."""

    def __init__(self, out: Path) -> None:
        self.out, self.records, self.found = out, [], {}

    def lay_out(self, checkpoint: Checkpoint) -> None:
        """Do nothing."""

    def find(self, fingerprint: Mapping[str, Any]) -> bool:
        """There is nothing here."""
        return False

    def recover(self, progress: Progress) -> None:
        """Do nothing."""

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Do nothing."""

    def commit_block(self, *given: Any) -> None:
        """Do nothing."""

    def settle(self) -> None:
        """Do nothing."""

    def finish(self, allocation: str | None = None) -> None:
        """Do nothing."""

    def close(self, report: dict[str, Any]) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


@contextmanager
def writing(out: str | Path, checkpoint: Checkpoint, shard_size: str, restart: bool) -> Iterator[Writer]:
    """A writer for OUT, to the exclusion of other processes; a folder in which nothing came about is removed again.

    Raises:
        UserError: OUT cannot be had, or another process is writing to it.
    """
    if not distributed.is_first():
        yield Elsewhere(Path(out).expanduser().absolute())
        return
    folder = check_out(out, checkpoint, restart)
    with claimed(folder, out):
        check_out(out, checkpoint, restart)  # the state of things now that nobody else can change it
        shutil.rmtree(folder / DRAFTS, ignore_errors=True)
        writer = Writer(folder, checkpoint, shard_size, restart)
        try:
            yield writer
        finally:
            writer.stop()


@contextmanager
def claimed(folder: Path, out: str | Path) -> Iterator[None]:
    """A folder to the exclusion of other processes; one in which nothing came about is removed again.

    Args:
        out: how it was named, for messages.

    Raises:
        UserError: another process is writing to it.
        Failure: it cannot be had.
    """
    new = not folder.exists()
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another run of llmprune is writing to {out}: wait for its end, or choose another folder"
        ) from None
    except OSError as error:
        raise Failure(f"{out} cannot be written to: {error}") from None
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal up to the first that is torn; none where there is no journal, or no header in it.

    Raises:
        UserError: it is of another format.
    """
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_bytes().split(b"\n"):
            try:
                line = json.loads(text)
            except ValueError:
                break
            if not isinstance(line, dict):
                break
            lines.append(line)
    if lines and lines[0].get("format") != JOURNAL_FORMAT:
        raise UserError(
            f"{path} has the format {lines[0].get('format')}, this version of llmprune reads {JOURNAL_FORMAT}: "
            "go on with the version that began the run, or begin anew with --restart"
        )
    return lines


def batches_before(out: str | Path) -> dict[str, int]:
    """The sequences per forward that the unfinished run in a folder began with; empty where there is none.

    Raises:
        UserError: its journal is of another format.
    """
    lines = read_journal(Path(out).expanduser().absolute() / JOURNAL)
    return dict(lines[0].get("batches") or {}) if lines else {}


def difference(was: Any, now: Any, name: str = "") -> str:
    """The first place where two fingerprints differ, in words; empty where they are the same."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*now, *was])
        found = (difference(was.get(key), now.get(key), f"{name}.{key}" if name else key) for key in keys)
        return next((words for words in found if words), "")
    if was == now:
        return ""
    there, here = (text if len(text := json.dumps(value)) <= 200 else f"{text[:200]} ..." for value in (was, now))
    return f"another {name} ({there} there, {here} here)"


def check_out(out: str | Path, checkpoint: Checkpoint, restart: bool) -> Path:
    """See that a run can be written to a folder, or taken up there; nothing is changed.

    Raises:
        UserError: it holds another run or other files, cannot be written to, or the disk is too small.
    """
    folder = Path(out).expanduser().absolute()
    if folder.resolve() == checkpoint.source.folder:
        raise UserError(f"{out} is the model itself; write the result to another folder")
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"{out} is a file; -o takes a folder")
        finished, unfinished = (folder / REPORT).exists(), (folder / JOURNAL).exists()
        if finished and not unfinished and not restart:
            raise UserError(
                f"{out} holds a finished run of llmprune: choose another folder, or begin anew with --restart"
            )
        if not finished and not unfinished and any(path.name not in (LOCK, DRAFTS) for path in folder.iterdir()):
            raise UserError(f"{out} is not empty, and what it holds was not written by llmprune: choose another folder")
    check_room(folder, out, checkpoint, _written(folder) if folder.is_dir() else ())
    return folder


def check_room(
    folder: Path, out: str | Path, checkpoint: Checkpoint, replaced: Iterable[Path] = (), copies: int = 1
) -> None:
    """See that a checkpoint of this size can be written to a folder, which need not be there.

    Args:
        out: how it was named, for messages.
        replaced: files that go before.
        copies: checkpoints of this size.

    Raises:
        UserError: it cannot be written to, or the disk is too small.
    """
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"{place} is a file, so that there can be no folder {out}")
    if not os.access(place, os.W_OK):
        raise UserError(f"{place} cannot be written to")
    needed = copies * sum(info.nbytes for info in checkpoint.index.values())
    free = shutil.disk_usage(place).free + sum(path.stat().st_size for path in replaced)
    if free < needed:
        raise UserError(f"no space left for {out}: it needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")


def clear(folder: Path, but: str = "") -> None:
    """Remove what an earlier run of ours wrote into a folder, and nothing else; what marks it as ours goes last.

    Args:
        but: the name of a file that stays.
    """
    for path in sorted(_written(folder), key=lambda path: path.name in (REPORT, JOURNAL)):
        if path.name != but:
            path.unlink()
    for name in (CHAT_TEMPLATES, EVALUATION):
        with suppress(OSError):
            (folder / name).rmdir()


def _is_side_file(name: str) -> bool:
    """Whether a name in a report, which may be anybody's, is one that we give: inside the folder, and no weights."""
    path = Path(name)
    parts = path.parts
    inside = len(parts) == 1 or (len(parts) == 2 and parts[0] == CHAT_TEMPLATES and path.suffix == ".jinja")
    return inside and not path.is_absolute() and not NOT_COPIED.fullmatch(path.name)


def _written(folder: Path) -> list[Path]:
    marks = [folder / name for name in (REPORT, JOURNAL) if (folder / name).is_file()]
    if not marks:
        return []
    measured = [f"{EVALUATION}/{name}" for name in MEASURED]  # goes with what it is of
    names = {INDEX, PAGE, ALLOCATION, *measured}
    for mark in marks:
        try:
            told = json.loads(
                mark.read_text(encoding="utf-8").splitlines()[0] if mark.name == JOURNAL else mark.read_text()
            )
            names.update(str(name) for name in told.get("side_files", ()) if _is_side_file(str(name)))
        except (ValueError, IndexError, AttributeError, TypeError):
            continue
    found = [folder / name for name in names if (folder / name).is_file()]
    drafts = (path for path in folder.rglob(".*.draft") if path.parent in (folder, folder / CHAT_TEMPLATES))
    return [*found, *drafts, *(path for path in folder.iterdir() if _SHARD.fullmatch(path.name)), *marks]


def fingerprint_files(checkpoint: Checkpoint) -> dict[str, str]:
    """The sha256 of each file that the result depends on."""
    folder = checkpoint.source.folder
    weights = {info.file for info in checkpoint.index.values()}
    return hash_files(folder, weights | {folder / name for name in side_files(folder)})


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
