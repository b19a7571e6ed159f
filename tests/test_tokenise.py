"""A long text is tokenised in pieces, which are joined to what the tokenizer makes of it as a whole."""

from __future__ import annotations

import functools
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from llmprune import memory, tokenise
from llmprune.errors import UserError
from llmprune.recipe import parse_size
from llmprune.tokenise import encode, token_ids
from tests.families import make, tokenizer

PROSE = "\n\n".join(topics[name] for name in sorted(topics))
SPECIAL = ["<unk>", "<s>", "</s>"]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def wrapped(made: Tokenizer, around: bool = False) -> Any:
    """With a token before and one behind every text, where asked for."""
    if around:
        ids = [(name, made.token_to_id(name)) for name in SPECIAL[1:]]
        made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def trained(made: Tokenizer, trainer: Any, around: bool = False) -> Any:
    made.train_from_iterator([PROSE[:60_000], "aaaa" * 200, "1234567890" * 50, "    " * 50, "日本語の文" * 20], trainer)
    return wrapped(made, around)


def bytes_of_gpt2() -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(made, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet))


def bytes_of_llama_3() -> Any:
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet)
    return trained(made, trainer, around=True)


def llama_2() -> Any:
    """The text is one word; what is unknown is one token."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Trained on words, or it would learn the sentences by heart.
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.train_from_iterator([PROSE[:60_000]], trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL))
    plain = json.loads(made.to_str())
    plain["pre_tokenizer"] = None
    return wrapped(Tokenizer.from_str(json.dumps(plain)), around=True)


def by_threes() -> Any:
    """Digits are cut by threes, and two of them are one token where they are in one word."""
    digits = {digit: number for number, digit in enumerate([*SPECIAL, *"0123456789", "34"])}
    made = Tokenizer(models.BPE(vocab=digits, merges=[("3", "4")], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated")
    return wrapped(made)


def by_twos() -> Any:
    """Two letters are one token: a run of them is cut otherwise where it begins elsewhere."""
    letters = {letter: number for number, letter in enumerate([*SPECIAL, "a", "b", "aa"])}
    return wrapped(Tokenizer(models.BPE(vocab=letters, merges=[("a", "a")], unk_token="<unk>")))


def unigram(split: bool) -> Any:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>")
    found = trained(made, trainer)
    found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    return found


def wordpiece() -> Any:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(made, trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL), around=True)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "of the families": tokenizer,
    "GPT-2": bytes_of_gpt2,
    "Llama 3": bytes_of_llama_3,
    "Llama 2": llama_2,
    "by threes": by_threes,
    "Unigram of words": functools.partial(unigram, split=True),
    "Unigram of the whole": functools.partial(unigram, split=False),
    "WordPiece": wordpiece,
}

LETTERS = random.Random(0)
EMOJI = "😀👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈👍🏽"
SNIPPETS = [
    *PROSE[60_000:64_000].split(),
    " ", "  ", "\n", "\n\n\n", "\r\n", "\t", " " * 70, "\n" * 70, "a" * 90, "ab" * 45, "1234567" * 12, "<s>", "</s>",
    "日本語の文章です。", "Ünïcödé", "e\u0301\u0327" * 20, "ﷺﷺ", EMOJI, "…—–", "\u00a0\u3000", "can't we'll",
]  # fmt: skip
TEXTS: dict[str, str] = {
    "prose": PROSE[:40_000],
    "no spaces": "".join(LETTERS.choices("abcdefghijklmnopqrstuvwxyz", k=12_000)),
    "lines": PROSE[:9_000].replace(" ", "\n") + "\n" * 3_000 + PROSE[:3_000],
    "unicode": "".join(LETTERS.choices("日本語文字äöüßéñкириллицаעברית\u0301ﷺ½Ⅷﬁ \n", k=9_000)),
    "emoji": EMOJI * 600,
    "one letter": "b" + "a" * 12_000,
    "one letter inside": PROSE[:3_001] + "a" * 9_000 + PROSE[:3_000],
    "two letters": "ab" * 6_000,
    "digits": PROSE[:1_001] + "12345678901" * 900 + PROSE[:1_001],
    "digits of two kinds": "1" * 3_000 + "".join(LETTERS.choices("34", k=3_000)),
    "blanks": PROSE[:3_003] + " " * 6_000 + PROSE[:3_003] + "\t" * 2_001,
    "special tokens": "<s>x</s> y" * 1_500,
    "nothing but special tokens": "<s>" * 3_000 + PROSE[:2_000],
    **{f"anything {seed}": "".join(random.Random(seed).choices(SNIPPETS, k=1_500)) for seed in range(6)},
}


class Watched:
    """A tokenizer that keeps what it is given."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.given = inner, list[str]()

    def __call__(self, text: str, **options: Any) -> Any:
        self.given.append(text)
        return self.inner(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.fixture(scope="module", params=TOKENIZERS)
def made(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize(("piece", "overlap"), [(512, 256), (1_000, 100)])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_joined_to_the_ids_of_the_whole(
    text: str, piece: int, overlap: int, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise, "PIECE", piece)
    monkeypatch.setattr(tokenise, "OVERLAP", overlap)
    for special in (True, False):
        found = token_ids(made, TEXTS[text], "a text", special=special)
        assert found.dtype == torch.int32
        assert found.tolist() == encode(made, TEXTS[text], special)


def test_prose_is_never_given_as_a_whole(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "PIECE", 1_000)
    monkeypatch.setattr(tokenise, "OVERLAP", 256)
    watched = Watched(made)
    token_ids(watched, TEXTS["prose"], "a text")
    words = made.backend_tokenizer.pre_tokenizer
    if isinstance(words, pre_tokenizers.Metaspace) and not words.split:  # no part of its one word is sure
        assert TEXTS["prose"] in watched.given
    else:
        assert max(map(len, watched.given)) < 3_000


@pytest.mark.parametrize("name", ["GPT-2", "Llama 2"])
def test_as_much_as_is_enough(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "PIECE", 1_000)
    monkeypatch.setattr(tokenise, "OVERLAP", 256)
    watched = Watched(TOKENIZERS[name]())
    found = token_ids(watched, TEXTS["prose"], "a text", enough=1_000).tolist()
    assert len(found) >= 1_000
    assert sum(map(len, watched.given)) < 12_000
    assert found == encode(watched.inner, TEXTS["prose"])[: len(found)]


def test_a_short_text_is_given_as_it_is() -> None:
    watched = Watched(tokenizer())
    assert token_ids(watched, "a short text", "a text").tolist() == encode(watched.inner, "a short text")
    assert watched.given == ["a short text"]
    assert token_ids(watched, "", "a text").shape == (0,)


def slow(text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
    """A tokenizer that tells no places."""
    return {"input_ids": list(text.encode())}


def jumbled(text: str, **options: Any) -> Any:
    """A tokenizer that tells places in no order."""
    told = tokenizer()(text, **options)
    if "offset_mapping" in told:
        told["offset_mapping"] = told["offset_mapping"][::-1]
    return told


def test_without_places_the_whole_is_given() -> None:
    text = PROSE[:100_000]
    assert token_ids(slow, text, "a text").tolist() == list(text.encode())
    watched = Watched(jumbled)
    watched.is_fast, watched.backend_tokenizer = True, tokenizer().backend_tokenizer  # type: ignore[attr-defined]
    assert token_ids(watched, text, "a text").tolist() == encode(tokenizer(), text)


def test_what_has_to_be_given_at_once_and_breaks_the_cap_is_refused() -> None:
    text = "ä" * 200_000
    memory.give_back()  # what tests before this one have left
    before = memory.current()
    with pytest.raises(UserError, match=r"may have to be given my\.txt \(391KiB\) at once, which takes") as caught:
        token_ids(slow, text, "my.txt", cap=before + 10 * 2**20)
    named = re.search(r"the smallest that can hold is (\S+);", str(caught.value))
    assert named is not None
    assert parse_size(named[1]) > before + tokenise.AT_ONCE * 400_000
    assert token_ids(slow, text, "my.txt", cap=parse_size(named[1])).tolist() == list(text.encode())


def test_pieces_that_grow_beyond_the_cap_are_refused_before() -> None:
    run, watched = "b" + "a" * 300_000, Watched(by_twos())
    memory.give_back()
    with pytest.raises(UserError, match=r"may have to be given my\.txt \(293KiB\) at once") as caught:
        token_ids(watched, run, "my.txt", cap=memory.current() + 60 * 2**20)
    assert max(map(len, watched.given)) <= 4 * tokenise.PIECE
    named = re.search(r"the smallest that can hold is (\S+);", str(caught.value))
    assert named is not None
    assert token_ids(watched, run, "my.txt", cap=parse_size(named[1])).tolist() == encode(watched.inner, run)


RUN = """
import json, sys, llmprune
from llmprune import memory
from llmprune.evaluate.perplexity import read_text
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import resolve
from llmprune.recipe import Evaluation
what, model, text, out, cap = sys.argv[1:]
if what == "prune":
    report = llmprune.prune(model, out=out, calibration=text, samples=4, length=32, sparsity="2:4", max_memory=cap)
    print(json.dumps([report.predicted_memory, max(report.peak_memory, memory.peak())]))
else:
    checkpoint = Checkpoint(resolve(model), "cpu")
    checkpoint.tokenizer("warm", verbose=False)
    before = memory.current()
    memory.begin()
    found = read_text(checkpoint, Evaluation(text=text, length=32))
    print(json.dumps([found.windows.numel(), memory.peak() - before]))
"""


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and 3 MB of text."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "text.txt").write_text((PROSE * 8)[:3_000_000])
    return make("llama", folder / "model"), folder / "text.txt"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_long_text_stays_below_the_smallest_cap(long: tuple[Path, Path], tmp_path: Path) -> None:
    refused = run("prune", *long, tmp_path / "out", "1MB")
    named = re.search(r"UserError: --max-memory is .*/text\.txt as one text .* can hold is (\S+);", refused.stderr)
    assert named is not None, refused.stderr
    done = run("prune", *long, tmp_path / "out", named[1])
    assert done.returncode == 0, done.stderr
    predicted, measured = json.loads(done.stdout.splitlines()[-1])
    assert measured <= parse_size(named[1])
    assert predicted <= 1.25 * measured


def test_a_long_text_of_an_evaluation_takes_few_bytes_a_token(long: tuple[Path, Path]) -> None:
    done = run("read", *long, "-", "-")
    assert done.returncode == 0, done.stderr
    tokens, taken = json.loads(done.stdout.splitlines()[-1])
    assert tokens > 2_900_000
    assert taken < 12 * 3_000_000 + 60 * 2**20
