"""Text for calibration and evaluation, and the token batches drawn from it."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llmprune.errors import Failure, UserError, first_line, unknown
from llmprune.model.files import sha256_of
from llmprune.tokenise import token_ids

Part = Literal["calibration", "evaluation"]

JOINT = "\n\n"
"""Stands between documents, as in the pruning papers."""


COLUMN = "text"
"""Where the text stands in most data sets."""


@dataclass(frozen=True)
class HubText:
    """A text on the Hub.

    Attributes:
        name, config, split, column: of the data set.
        file: the one file of it that is enough.
        documents: how many of its documents are enough.
        joint: its rows are the lines of one text, with this between them; None where each is a document.
        revision: of the data set, where it is not the newest.
    """

    name: str
    config: str | None
    split: str
    column: str = COLUMN
    file: str | None = None
    documents: int | None = None
    joint: str | None = None
    revision: str | None = None


def _treebank(split: str) -> HubText:
    """The Penn Treebank without its rare words. What the Hub made of it is read, as its own form is a program."""
    return HubText(
        "ptb-text-only/ptb_text_only",
        None,
        split,
        "sentence",
        file=f"penn_treebank/{split}/*.parquet",
        joint=" ",
        revision="refs/convert/parquet",
    )


NAMED: dict[str, dict[Part, HubText]] = {
    "c4": {
        "calibration": HubText("allenai/c4", "en", "train", file="en/c4-train.00000-of-01024.json.gz"),
        "evaluation": HubText(
            "allenai/c4", "en", "validation", file="en/c4-validation.00000-of-00008.json.gz", documents=1100
        ),
    },
    "wikitext2": {
        "calibration": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train", joint=JOINT),
        "evaluation": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test", joint=JOINT),
    },
    "ptb": {"calibration": _treebank("train"), "evaluation": _treebank("test")},
}

RECORDS = (".jsonl", ".json", ".json.gz", ".jsonl.gz", ".parquet")
"""How the files end that hold a text in records."""

SUFFIXES = (".txt", ".raw", ".md", *RECORDS)

_HELD_OUT = 4
"""Every fourth topic of the built-in text is held out for evaluation."""


def documents(
    source: str,
    part: Part = "calibration",
    *,
    config: str | None = None,
    split: str | None = None,
    column: str | None = None,
) -> Iterator[str]:
    """The documents of a text, in their own order.

    Args:
        source: `builtin`, `c4`, `wikitext2`, `ptb`, a Hub data set `owner/name`, or a local file.
        part: which part of a named text.
        config, split, column: of a Hub data set; a column also of a local file of records, by default `text`.

    Raises:
        UserError: there is no such text, or it cannot be read as one.
        Failure: the Hub cannot be reached.
    """
    check(source)
    path = Path(source).expanduser()
    if path.is_file():
        yield from _local(path, column or COLUMN)
    elif source == "builtin":
        yield from builtin(part)
    else:
        yield from _hub(_on_hub(source, part, config, split, column))


def origin(source: str, part: Part, *, config: str | None = None, split: str | None = None) -> tuple[str, ...]:
    """Where a text comes from, in words that are equal for two that are the same text; see `documents`.

    Files are the same where they hold the same; what of a text is in another one is not seen.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return "file", sha256_of(path)
    if source == "builtin":
        return "builtin", part
    text = _on_hub(source, part, config, split, None)
    return "hub", text.name, text.config or "", text.split


def size_of(source: str, joined: bool = False) -> int:
    """Bytes of the local file of a text that is held as a whole; 0 where it is none, or packed.

    Args:
        joined: whether documents are put together, so that records are held as well.
    """
    path = Path(source).expanduser()
    plain = not path.name.lower().endswith(RECORDS) or (joined and path.suffix.lower() in (".json", ".jsonl"))
    return path.stat().st_size if plain and path.is_file() else 0


def _on_hub(source: str, part: Part, config: str | None, split: str | None, column: str | None) -> HubText:
    if source in NAMED:
        named = NAMED[source][part]
        if config is not None or split is not None:
            named = replace(named, config=config or named.config, split=split or named.split, file=None)
        return replace(named, column=column or named.column)
    default = "train" if part == "calibration" else "test"
    return HubText(source, config, split or default, column or COLUMN)


def check(source: str) -> None:
    """See, without reading anything, that a text may exist.

    Raises:
        UserError: it is neither a file, nor a known name, nor the name of a Hub data set.
    """
    path = Path(source).expanduser()
    if path.is_file() or source == "builtin" or source in NAMED:
        return
    if source.endswith(SUFFIXES) or source.startswith((".", "/", "~")) or path.is_dir():
        raise UserError(f"no text file at {source}; give a file that ends in {', '.join(SUFFIXES)}")
    if source.count("/") != 1:
        raise unknown("text", source, ["builtin", *NAMED, "owner/name", "a local file"])


def builtin(part: Part) -> list[str]:
    """The reference manual that comes with CPython, one document a topic; the two parts share no topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python lacks the module pydoc_data, which holds the built-in text; give a text file instead"
        ) from None
    ordered = sorted(topics)
    held_out = ordered[::_HELD_OUT]
    return [topics[topic] for topic in ordered if (topic in held_out) == (part == "evaluation")]


def hash_tokens(ids: Tensor) -> str:
    """The sha256 of token ids as little-endian int64 bytes."""
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Tokens:
    """Token sequences for calibration.

    Attributes:
        ids: (samples, length) int64.
        sha256: of the ids as little-endian int64 bytes: equal text, tokenizer and seed give equal hashes.
    """

    ids: Tensor
    sha256: str

    @classmethod
    def of(cls, ids: Tensor) -> Tokens:
        """Wrap token ids (samples, length) with their hash."""
        ids = ids.to(torch.int64).contiguous()
        return cls(ids, hash_tokens(ids))

    def batches(self, size: int) -> list[Tensor]:
        """Split into batches of at most `size` sequences."""
        return list(torch.split(self.ids, size))


def sequences(tokens: int, samples: int, length: int) -> int:
    """How many whole sequences of a length it takes to look at so many tokens; all of the samples at the most."""
    return min(samples, -(-tokens // length))


def draw(
    texts: Iterable[str],
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    source: str,
    cap: int | None = None,
) -> Tokens:
    """Draw token sequences: the documents are shuffled by the seed, joined by blank lines, tokenised and cut.

    A text of a single document is cut into sequences, and these are shuffled instead. Of a text that is much larger
    than needed (forty characters a token, and a thousand documents) only the beginning is read.

    Args:
        source: what the text is called.
        cap: see `token_ids`.

    Raises:
        UserError: too little text, or so much that the cap would not hold.
    """
    needed = samples * length
    pile: list[str] = []
    characters = 0
    for text in texts:
        if text and not text.isspace():  # without a copy of it
            pile.append(text)
            characters += len(text)
        if characters >= 40 * needed and len(pile) >= 1000:
            break
    order = random.Random(seed)
    if len(pile) == 1:
        ids = token_ids(tokenizer, pile[0], source, cap=cap)
        rows = ids[: len(ids) // length * length].view(len(ids) // length, length)
        places = list(range(len(rows)))
        order.shuffle(places)
        rows = rows[places[:samples]]
    else:
        order.shuffle(pile)
        ids = torch.empty(0, dtype=torch.int32)
        for start in range(0, len(pile), 64):
            if len(ids) >= needed:
                break
            chunk = JOINT.join(pile[start : start + 64]) + JOINT
            more = token_ids(tokenizer, chunk, source, special=start == 0, enough=needed - len(ids), cap=cap)
            ids = torch.cat([ids, more])
        rows = ids[: len(ids) // length * length].view(len(ids) // length, length)[:samples]
    if len(rows) < samples:
        fewer = f"fewer (--samples {len(rows)}) or " if len(rows) else ""
        raise UserError(
            f"{source} has {len(ids):,} tokens, but {samples} samples of {length:,} tokens need {needed:,}: "
            f"ask for {fewer}shorter ones, or give more text"
        )
    return Tokens.of(rows)


def _local(path: Path, column: str) -> Iterator[str]:
    readers: dict[str, Callable[[], Iterator[str]]] = {
        ".parquet": lambda: _parquet(path, column),
        ".jsonl": lambda: _records(path, column),
        ".json": lambda: _records(path, column),
        ".json.gz": lambda: _records(path, column),
        ".jsonl.gz": lambda: _records(path, column),
    }
    name = path.name.lower()
    suffix = next((suffix for suffix in sorted(readers, key=len, reverse=True) if name.endswith(suffix)), None)
    try:
        if suffix is None:
            yield path.read_text(encoding="utf-8")
        else:
            yield from readers[suffix]()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _records(path: Path, column: str) -> Iterator[str]:
    """JSON lines, or one JSON list of records."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        first = file.read(4096).lstrip()[:1]
        file.seek(0)
        try:
            if first == "[":
                for number, record in enumerate(json.load(file), 1):
                    yield _field(record, column, f"{path} record {number}")
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _field(json.loads(line), column, f"{path} line {number}")
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON lines: {error}") from None


def _field(record: Any, column: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a record of named fields")
    if column not in record:
        advice = "--set calibration.column=NAME or evaluate.column=NAME, or --text-column NAME for `eval` and `compare`"
        raise UserError(f"{where}: {unknown('column', column, record)}; choose with {advice}")
    if not isinstance(record[column], str):
        raise UserError(f"{where}: {column!r} is not text")
    # Half a surrogate pair, which JSON can carry, is no character that a tokenizer takes.
    return str(record[column]).encode("utf-8", "replace").decode("utf-8")


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        if column not in table.schema_arrow.names:
            raise unknown(f"column of {path}", column, table.schema_arrow.names)
        batches = table.iter_batches(columns=[column])
        values = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
        for number, value in enumerate(values, 1):
            yield _field({column: value}, column, f"{path} row {number}")
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file that can be read: {error}") from None


def _hub(text: HubText) -> Iterator[str]:
    import datasets
    from huggingface_hub.errors import HTTPError

    options: dict[str, Any] = {"split": text.split, "streaming": True}
    if text.file:
        options["data_files"] = {text.split: text.file}
    elif text.config:
        options["name"] = text.config
    if text.revision:
        options["revision"] = text.revision
    advice = "where there is no network, name a local file, or `builtin` for the built-in text"
    try:
        rows = datasets.load_dataset(text.name, **options)
        found = (_field(row, text.column, text.name) for row in itertools.islice(rows, text.documents))
        if text.joint is not None:
            yield text.joint.join(found)
        else:
            yield from found
    except UserError:
        raise
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, HTTPError, OSError) as error:
        raise Failure(f"the data set {text.name} cannot be read from the Hub: {first_line(error)}; {advice}") from None
    except ValueError as error:
        raise UserError(f"the data set {text.name} (config {text.config}, split {text.split}): {error}") from None
