"""Text from files, from the Hub and from Python itself, and the token sequences drawn from it."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import errors as hub

from llmprune import data
from llmprune.errors import Failure, UserError
from tests.families import tokenizer

TEXTS = ["First document.", "Zweites Dokument: äöü, 日本", "line one\nline two", "", "last"]


def lines(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": number, column: text}) + "\n" for number, text in enumerate(texts)).encode()


def parquet(path: Path, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def saved(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refused(source: Path | str, **options: str) -> str:
    with pytest.raises(UserError) as caught:
        list(data.documents(str(source), **options))
    return str(caught.value)


# Local files.


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.md", "no suffix", "a.unknown"])
def test_a_text_file_is_one_document(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path / name, "one\n\ntwo äöü\n".encode())
    assert list(data.documents(str(path))) == ["one\n\ntwo äöü\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL", "a.json.gz", "a.jsonl.gz", "A.Json.Gz"])
@pytest.mark.parametrize("column", ["text", "body"])
def test_json_lines(name: str, column: str, tmp_path: Path) -> None:
    content = lines(TEXTS, column)
    path = saved(tmp_path / name, gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert list(data.documents(str(path), column=column)) == TEXTS


def test_blank_lines_between_records(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jsonl", b'{"text": "a"}\n\n   \n{"text": "b"}')
    assert list(data.documents(str(path))) == ["a", "b"]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list(name: str, indent: int | None, tmp_path: Path) -> None:
    content = json.dumps([{"text": text} for text in TEXTS], indent=indent).encode()
    path = saved(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert list(data.documents(str(path))) == TEXTS


@pytest.mark.parametrize("column", ["text", "body"])
def test_parquet(column: str, tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", id=list(range(5)), **{column: TEXTS})
    assert list(data.documents(str(path), column=column)) == TEXTS


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "a.txt", b"home")
    assert list(data.documents("~/a.txt")) == ["home"]


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "builtin", b"a file of that name")
    assert list(data.documents("builtin")) == ["a file of that name"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "list.json", "a.parquet"])
def test_a_missing_column_names_the_nearest(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    records = [{"texts": "a", "url": "b"}]
    if name == "a.parquet":
        parquet(path, texts=["a"], url=["b"])
    elif name == "list.json":
        saved(path, json.dumps(records).encode())
    else:
        content = json.dumps(records[0]).encode()
        saved(path, gzip.compress(content) if name.endswith(".gz") else content)
    message = refused(path)
    assert str(path) in message
    assert "'text': did you mean 'texts'? known: texts, url" in message
    assert list(data.documents(str(path), column="texts")) == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": 5}\n', "line 2: 'text' is not text"),
        (b'{"text": "a"}\n{"text": null}\n', "line 2: 'text' is not text"),
        (b'{"text": "a"}\n\n["b"]\n', "line 3 is not a record of named fields"),
        (b'["a", "b"]', "record 1 is not a record of named fields"),
        (b'[{"text": "a"}, {"text": ["b"]}]', "record 2: 'text' is not text"),
        (b'{"text": "a"}\n{"text": "b"\n', "is not JSON lines: "),
        (b"plain words\n", "is not JSON lines: "),
        (b'[{"text": "a"},', "is not JSON lines: "),
    ],
)
def test_broken_records_say_where(content: bytes, message: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.json", content)
    found = refused(path)
    assert str(path) in found
    assert message in found


def test_a_parquet_row_without_text_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=["a"] * 70_000 + [None])
    message = refused(path)
    assert "'text' is not text" in message
    assert "row 70000" in message.replace(",", "") or "row 70001" in message.replace(",", "")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("before", [20, 30_000])
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b'\xff"}', "invalid start byte"),
        (b'\xc3"}', "invalid continuation byte"),
        (b"\xe6\x97", "unexpected end of data"),
    ],
)
def test_not_utf8(name: str, before: int, broken: bytes, reason: str, tmp_path: Path) -> None:
    content = b'{"text": "'.ljust(before, b"a") + broken
    path = saved(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert refused(path) == f"{path} is not UTF-8 text ({reason})"


@pytest.mark.parametrize("damage", ["not gzip", "cut", "cut header", "body", "checksum"])
def test_broken_gzip(damage: str, tmp_path: Path) -> None:
    whole = lines([f"document {number} {random.Random(number).random()}" for number in range(200)])
    packed = gzip.compress(whole)
    content = {
        "not gzip": whole,
        "cut": packed[: len(packed) // 2],
        "cut header": packed[:5],
        "body": packed[:10] + b"\xff" * 20 + packed[30:],
        "checksum": packed[:-8] + bytes(8),
    }[damage]
    path = saved(tmp_path / "a.json.gz", content)
    assert refused(path).startswith(f"cannot read {path}: ")


@pytest.mark.parametrize("damage", ["empty", "not parquet", "cut", "body"])
def test_broken_parquet(damage: str, tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=TEXTS * 100)
    whole = path.read_bytes()
    content = {
        "empty": b"",
        "not parquet": b"these are words, and no table of any kind",
        "cut": whole[: len(whole) // 2],
        "body": whole[:10] + b"\xff" * 60 + whole[70:],
    }[damage]
    assert str(path) in refused(saved(path, content))


@pytest.mark.parametrize("source", ["none.txt", "none.jsonl", "none.json.gz", "some/none.parquet", "./none", "/none/x"])
def test_a_missing_file(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(source).startswith(f"no text file at {source}; give a file that ends in .txt, ")


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    assert refused(tmp_path).startswith(f"no text file at {tmp_path}; ")


@pytest.mark.parametrize(("source", "near"), [("wikitext", "wikitext2"), ("bultin", "builtin"), ("c5", "c4")])
def test_an_unknown_name_names_the_nearest(source: str, near: str) -> None:
    assert f"unknown text {source!r}: did you mean {near!r}?" in refused(source)


@pytest.mark.parametrize("source", ["zzz", "a/b/c"])
def test_an_unknown_name_without_a_near_one(source: str) -> None:
    assert f"unknown text {source!r}: known: " in refused(source)


def test_what_is_held_as_a_whole_is_a_file_that_is_no_records(tmp_path: Path) -> None:
    sizes = {}
    for name in ("a.txt", "a", "a.json.gz", "a.parquet", "a.jsonl", "A.JSON"):
        path = saved(tmp_path / name, b"1234")
        sizes[name] = data.size_of(str(path)), data.size_of(str(path), joined=True)
    assert sizes == {
        "a.txt": (4, 4),
        "a": (4, 4),
        "a.json.gz": (0, 0),
        "a.parquet": (0, 0),
        "a.jsonl": (0, 4),
        "A.JSON": (0, 4),
    }
    assert data.size_of("builtin") == data.size_of("c4", joined=True) == data.size_of(str(tmp_path)) == 0


# The built-in text.


def test_builtin_parts_are_disjoint_and_together_are_all_topics() -> None:
    calibration, evaluation = data.builtin("calibration"), data.builtin("evaluation")
    assert calibration
    assert evaluation
    assert len(calibration) > len(evaluation)
    assert sorted(calibration + evaluation) == sorted(topics.values())
    assert not set(calibration) & set(evaluation)
    assert list(data.documents("builtin")) == calibration
    assert list(data.documents("builtin", "evaluation")) == evaluation


# Drawing.


def pile(count: int, seed: int = 0) -> list[str]:
    letters = random.Random(seed)
    return ["".join(letters.choices("abcdefgh .,!", k=letters.randint(5, 60))) for _ in range(count)]


def ids_of(text: str) -> list[int]:
    """What `tests.families.tokenizer` makes of ASCII, by its alphabet: `!` is 3, `~` is 96, blanks are unknown."""
    return [3 + ord(letter) - ord("!") if "!" <= letter <= "~" else 0 for letter in text]


def hash_of(ids: list[list[int]]) -> str:
    flat = [number for row in ids for number in row]
    return hashlib.sha256(struct.pack(f"<{len(flat)}q", *flat)).hexdigest()


def drawn(texts: list[str], samples: int = 8, length: int = 32, seed: int = 0) -> data.Tokens:
    return data.draw(iter(texts), tokenizer(), samples, length, seed, "the text")


@pytest.mark.parametrize("count", [2, 63, 64, 65, 200])
@pytest.mark.parametrize("seed", [0, 1])
def test_documents_are_shuffled_joined_and_cut(count: int, seed: int) -> None:
    texts = [text + "a" for text in pile(count)]
    order = texts.copy()
    random.Random(seed).shuffle(order)
    ids = ids_of("".join(text + "\n\n" for text in order))
    length = min(32, len(ids) // 8)
    tokens = drawn(texts, 8, length, seed)
    expected = [ids[start : start + length] for start in range(0, 8 * length, length)]
    assert tokens.ids.tolist() == expected
    assert tokens.ids.dtype == torch.int64
    assert tokens.sha256 == hash_of(expected)


def test_all_of_the_text_can_be_drawn() -> None:
    texts = ["abc", "defgh", "ij"]
    whole = sum(len(text) + 2 for text in texts)
    ids = drawn(texts, whole, 1).ids.flatten().tolist()
    assert sorted(ids) == sorted(ids_of("abcdefghij" + "\n" * 6))
    with pytest.raises(UserError):
        drawn(texts, whole + 1, 1)


def test_a_single_document_is_cut_and_the_cuts_are_shuffled() -> None:
    text = "".join(pile(40))
    ids = ids_of(text)
    cuts = [ids[start : start + 32] for start in range(0, len(ids) - 31, 32)]
    tokens = drawn([text], len(cuts), 32)
    assert sorted(tokens.ids.tolist()) == sorted(cuts)
    assert tokens.ids.tolist() != cuts
    assert tokens.sha256 == hash_of(tokens.ids.tolist())
    fewer = drawn([text], 5, 32).ids.tolist()
    assert fewer == tokens.ids.tolist()[:5]


@pytest.mark.parametrize("size", [2_000, 200_000])
def test_which_cuts_of_a_single_document_are_drawn(size: int) -> None:
    text = ("".join(pile(7_000)))[:size]
    ids, order = ids_of(text), random.Random(3)
    cuts = list(range(0, len(ids) - 31, 32))
    order.shuffle(cuts)
    assert drawn([text], 8, 32, 3).ids.tolist() == [ids[cut : cut + 32] for cut in cuts[:8]]


def test_of_long_documents_no_more_is_tokenised_than_is_needed() -> None:
    texts, given = ["".join(pile(7_000, seed)) for seed in range(3)], 0

    class Counting:
        is_fast, backend_tokenizer = True, tokenizer().backend_tokenizer

        def __call__(self, text: str, **options: Any) -> Any:
            nonlocal given
            given += len(text)
            return tokenizer()(text, **options)

    order = texts.copy()
    random.Random(0).shuffle(order)
    tokens = data.draw(texts, Counting(), 8, 32, 0, "the text")
    assert tokens.ids.flatten().tolist() == ids_of(order[0])[: 8 * 32]
    assert given < len(texts[0])


@pytest.mark.parametrize("texts", [pile(100), ["".join(pile(100))]], ids=["many", "single"])
def test_the_seed_decides(texts: list[str]) -> None:
    first, same, other = drawn(texts, seed=3), drawn(texts, seed=3), drawn(texts, seed=4)
    assert first.sha256 == same.sha256
    assert torch.equal(first.ids, same.ids)
    assert first.sha256 != other.sha256
    assert not torch.equal(first.ids, other.ids)


def test_drawing_leaves_other_random_numbers_alone() -> None:
    random.seed(5)
    expected = random.random()
    random.seed(5)
    drawn(pile(100), seed=9)
    assert random.random() == expected


def test_blank_documents_do_not_count() -> None:
    text = "".join(pile(40))
    assert drawn(["", "  \n", text, "\n"]).sha256 == drawn([text]).sha256
    texts = pile(100)
    assert drawn(["", *texts[:50], "  ", *texts[50:]]).sha256 == drawn(texts).sha256


def test_special_tokens_are_asked_for_once() -> None:
    asked = []

    def fake(text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        asked.append(add_special_tokens)
        return {"input_ids": [1] * add_special_tokens + [9] * len(text)}

    tokens = data.draw(pile(200), fake, 10, 500, 0, "the text")
    assert len(asked) > 1
    assert asked == [True] + [False] * (len(asked) - 1)
    assert tokens.ids.flatten().tolist() == [1] + [9] * 4999


@pytest.mark.parametrize(
    ("texts", "found", "enough"),
    [(["abc" * 20, "de" * 20], 104, 3), (["abc" * 33], 99, 3), (["a" * 32 * 9 + "b"], 289, 9)],
)
def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(
    texts: list[str], found: int, enough: int
) -> None:
    with pytest.raises(UserError) as caught:
        drawn(texts, 50, 32)
    message = str(caught.value)
    assert message.startswith(f"the text has {found:,} tokens, but 50 samples of 32 tokens need 1,600: ")
    assert f"--samples {enough})" in message
    assert drawn(texts, enough, 32).ids.shape == (enough, 32)


@pytest.mark.parametrize("texts", [[], ["", " "], ["too short"], ["too", "short"]])
def test_fewer_than_1_sample_is_not_suggested(texts: list[str]) -> None:
    with pytest.raises(UserError, match="need 64") as caught:
        drawn(texts, 2, 32)
    assert "--samples 0" not in str(caught.value)


@pytest.mark.parametrize(("size", "sizes"), [(3, [3, 3, 2]), (8, [8]), (100, [8]), (1, [1] * 8)])
def test_batches_are_all_sequences_in_order(size: int, sizes: list[int]) -> None:
    tokens = drawn(pile(100))
    batches = tokens.batches(size)
    assert [len(batch) for batch in batches] == sizes
    assert torch.equal(torch.cat(batches), tokens.ids)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_hash_is_of_little_endian_int64(dtype: torch.dtype) -> None:
    rows = [[1, 2, 300], [70_000, 5, 0]]
    assert data.Tokens.of(torch.tensor(rows, dtype=dtype)).sha256 == hash_of(rows)
    assert data.Tokens.of(torch.tensor(rows, dtype=dtype).T.contiguous().T).sha256 == hash_of(rows)


# The Hub.


class Loader:
    """Stands in for `datasets.load_dataset`: remembers what it was asked for, and gives rows or an error."""

    def __init__(self, rows: list[Any], late: BaseException | None = None, early: BaseException | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.rows, self.late, self.early = rows, late, early

    def __call__(self, path: str, name: str | None = None, **options: Any) -> Iterator[Any]:
        self.calls.append({"path": path, **({} if name is None else {"name": name}), **options})
        if self.early:
            raise self.early
        return self.stream()

    def stream(self) -> Iterator[Any]:
        yield from self.rows
        if self.late:
            raise self.late


def stub(monkeypatch: pytest.MonkeyPatch, *texts: str, **options: Any) -> Loader:
    loader = Loader([{"text": text, "sentence": text, "body": text.upper(), "id": 1} for text in texts], **options)
    monkeypatch.setattr(datasets, "load_dataset", loader)
    return loader


C4 = {"path": "allenai/c4", "streaming": True}
PTB = {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet", "streaming": True}
WIKITEXT = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "streaming": True}


@pytest.mark.parametrize(
    ("source", "part", "options", "call"),
    [
        (
            "c4",
            "calibration",
            {},
            {**C4, "split": "train", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}},
        ),
        (
            "c4",
            "evaluation",
            {},
            {**C4, "split": "validation", "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
        ),
        ("wikitext2", "calibration", {}, {**WIKITEXT, "split": "train"}),
        ("wikitext2", "evaluation", {}, {**WIKITEXT, "split": "test"}),
        ("wikitext2", "calibration", {"split": "validation"}, {**WIKITEXT, "split": "validation"}),
        (
            "wikitext2",
            "calibration",
            {"config": "wikitext-103-v1"},
            {**WIKITEXT, "name": "wikitext-103-v1", "split": "train"},
        ),
        ("ptb", "evaluation", {}, {**PTB, "split": "test", "data_files": {"test": "penn_treebank/test/*.parquet"}}),
        ("ptb", "calibration", {}, {**PTB, "split": "train", "data_files": {"train": "penn_treebank/train/*.parquet"}}),
        ("ptb", "evaluation", {"split": "validation"}, {**PTB, "split": "validation"}),
        ("owner/name", "calibration", {}, {"path": "owner/name", "split": "train", "streaming": True}),
        (
            "owner/name",
            "evaluation",
            {"config": "en", "split": "test"},
            {"path": "owner/name", "name": "en", "split": "test", "streaming": True},
        ),
    ],
)
def test_the_hub_is_asked_for_the_right_text(
    source: str, part: data.Part, options: dict[str, str], call: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = stub(monkeypatch, "a", "b")
    # The rows of WikiText and of the Penn Treebank are the lines of one text; those of the others are documents.
    texts = {"wikitext2": ["a\n\nb"], "ptb": ["a b"]}.get(source, ["a", "b"])
    assert list(data.documents(source, part, **options)) == texts
    assert loader.calls == [call]


@pytest.mark.parametrize("source", ["owner/name", "c4", "wikitext2"])
def test_the_column_of_a_hub_data_set(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "a", "b")
    assert data.JOINT.join(data.documents(source, column="body")) == "A\n\nB"


@pytest.mark.parametrize("options", [{"split": "validation"}, {"config": "de"}])
def test_another_split_or_config_of_c4_is_not_read_from_the_english_training_file(
    options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = stub(monkeypatch, "a")
    try:
        list(data.documents("c4", **options))
    except UserError:
        return
    assert "en/c4-train" not in str(loader.calls)


def test_only_as_much_as_is_needed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "a", "b", late=AssertionError("read too far"))
    texts = data.documents("owner/name")
    assert [next(texts), next(texts)] == ["a", "b"]


def test_a_missing_column_on_the_hub_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "a")
    assert "owner/name: unknown column 'boddy': did you mean 'body'?" in refused("owner/name", column="boddy")


def test_a_column_on_the_hub_that_is_not_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "a")
    assert refused("owner/name", column="id") == "owner/name: 'id' is not text"


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError, "Couldn't reach 'owner/name' on the Hub\nand more"),
        (TimeoutError, "timed out"),
        (OSError, "no route"),
        (hub.HTTPError, "[Errno -2] Name or service not known"),
        (
            datasets.exceptions.DatasetNotFoundError,
            "Dataset 'owner/name' doesn't exist on the Hub or cannot be accessed.",
        ),
    ],
)
def test_a_hub_that_cannot_be_reached_is_a_failure_with_advice(
    when: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, or while the rows are being read; `HTTPError` is the base of the errors of the Hub's HTTP client."""
    stub(monkeypatch, "a", **{when: error(message)})
    with pytest.raises(Failure) as caught:
        list(data.documents("owner/name"))
    told = str(caught.value)
    assert told.startswith(f"the data set owner/name cannot be read from the Hub: {message.splitlines()[0]}; ")
    assert "`builtin` for the built-in text" in told
    assert "\n" not in told


def test_an_unknown_config_or_split_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, early=ValueError("BuilderConfig 'xx' not found. Available: ['en']"))
    message = refused("owner/name", config="xx", split="test")
    assert message.startswith("the data set owner/name (config xx, split test): BuilderConfig 'xx' not found.")


def test_an_endless_text_is_read_only_as_far_as_needed() -> None:
    read = []

    def endless() -> Iterator[str]:
        for number in itertools.count():
            read.append(number)
            yield f"document {number} of a text without an end"

    tokens = data.draw(endless(), tokenizer(), 4, 16, 0, "endless")
    assert tokens.ids.shape == (4, 16)
    assert len(read) == 1000


def test_the_evaluation_part_of_c4_is_its_first_1100_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, *map(str, range(2000)))
    assert len(list(data.documents("c4", "evaluation"))) == 1100


@pytest.mark.parametrize("source", ["c5", "nowhere.jsonl", "./nowhere"])
def test_check_finds_wrong_names_without_reading(source: str) -> None:
    with pytest.raises(UserError):
        data.check(source)


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "broken \\ud83d here"}')
    assert list(data.documents(str(tmp_path / "a.jsonl"))) == ["broken ? here"]


def test_json_after_white_space_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf\n  [{"text": "one"}, {"text": "two"}]')
    assert list(data.documents(str(tmp_path / "a.json"))) == ["one", "two"]
