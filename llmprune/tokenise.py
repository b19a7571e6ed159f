"""Token ids of a text of any length, in little memory.

A tokenizer takes hundreds of bytes for each token that it finds, until it has the last. A long text is given to it in
pieces that overlap, and these are joined where the ids are sure to be those of the text as a whole: in the middle half
of an overlap both pieces must have found the same tokens at the same characters. What tokenizers make of a word, as
their pre-tokenizer cuts them, does not depend on other words, so that from the beginning of a word which both have on,
the later piece goes on as the whole would. Where a word is so long that none begins there, BPE goes on like that from
any token: it merges nothing across a cut between two tokens in a long text that it does not merge in a short one which
has the same two. Pieces that do not agree are made longer, at the worst as long as the text.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llmprune import memory
from llmprune.errors import UserError
from llmprune.recipe import format_size

PIECE = 2**15
"""Characters of a piece."""

OVERLAP = 2**11
"""Characters that a piece shares with the one before it."""

AT_ONCE = 512
"""Bytes that a tokenizer takes for each byte of UTF-8 that it is given at once, with places. Measured."""

_SLACK = 2**24
"""What a cap that is named to be the smallest is more than that."""


def encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Token ids of a text of any length, without the warning that it is longer than the model's context."""
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def token_ids(
    tokenizer: Any, text: str, name: str, *, special: bool = True, enough: int | None = None, cap: int | None = None
) -> Tensor:
    """The same as `encode` gives, in a few bytes a token.

    Args:
        name: what the text is called.
        special: whether the tokenizer adds what it puts around a text.
        enough: how many of the first tokens are enough; there may be more.
        cap: bytes of resident memory that this process may have; None where it is not told.

    Returns:
        (tokens,) int32.

    Raises:
        UserError: the tokenizer has to be given so much at once that the cap would not hold.
    """
    found = _Pieces(tokenizer, text, name, cap).join(special, enough) if len(text) > 2 * PIECE else None
    if found is None:
        _check_room(text, len(text), name, cap)
        found = array("i", encode(tokenizer, text, special))
    return torch.frombuffer(found, dtype=torch.int32) if found else torch.empty(0, dtype=torch.int32)


def _check_room(text: str, characters: int, name: str, cap: int | None) -> None:
    """See that some characters of a text can be given to a tokenizer at once; the whole may have to follow."""
    if cap is None or characters <= 2 * PIECE:
        return
    memory.give_back()  # what smaller pieces took
    parts = (text[start : start + PIECE] for start in range(0, len(text), PIECE))
    size, held = sum(len(part.encode(errors="replace")) for part in parts), memory.current()
    if held + AT_ONCE * size * characters // len(text) > cap:
        raise UserError(
            f"--max-memory is {format_size(cap)}, but this model's tokenizer may have to be given {name} "
            f"({format_size(size)}) at once, which takes more: the smallest that can hold is "
            f"{format_size(held + AT_ONCE * size + _SLACK)}; or give a shorter text"
        )


@dataclass(frozen=True)
class _Piece:
    """Some characters of a text, tokenised.

    Attributes:
        first, last: text[first:last].
        ids: of its tokens.
        starts, ends: which characters of the text each is of.
        begins: whether each begins a word.
    """

    first: int
    last: int
    ids: array[int]
    starts: array[int]
    ends: array[int]
    begins: bytes

    def same(self, mine: slice, other: _Piece, theirs: slice) -> bool:
        """Whether some tokens are those of another piece."""
        return (
            self.ids[mine] == other.ids[theirs]
            and self.starts[mine] == other.starts[theirs]
            and self.ends[mine] == other.ends[theirs]
            and self.begins[mine] == other.begins[theirs]
        )


class _Pieces:
    """A text that is tokenised in pieces."""

    def __init__(self, tokenizer: Any, text: str, name: str, cap: int | None) -> None:
        self._tokenizer, self._text, self._name, self._cap = tokenizer, text, name, cap
        fast = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        model = getattr(fast, "model", None)
        self._known = model is not None and not getattr(model, "dropout", None)
        self._merges = type(model).__name__ == "BPE"

    def join(self, special: bool, enough: int | None) -> array[int] | None:
        """The ids of the whole; None where they cannot be found in pieces."""
        around = self._around(special) if self._known else None
        if around is None:
            return None
        held, found = self._piece(0, PIECE), array("i", around[0])
        done = sure = 0  # of the tokens of `held`: how many are found, and how many another piece has as well
        while held.last < len(self._text):
            if enough is not None and len(found) >= enough:
                return found
            following = self._piece(held.last - OVERLAP, held.last - OVERLAP + PIECE)
            joint = self._joint(held, following)
            if joint is not None:
                found.extend(held.ids[done : joint[0]])
                held, (_, done, sure) = following, joint
                continue
            longer = self._piece(held.first, 2 * held.last - held.first)
            if not longer.same(slice(sure), held, slice(sure)):
                return None
            held = longer
        found.extend(held.ids[done:])
        found.extend(around[1])
        return found

    def _around(self, special: bool) -> tuple[list[int], list[int]] | None:
        """What the tokenizer puts before a text and behind it; None where that is not all it does."""
        if not special:
            return [], []
        text = self._text[:PIECE]
        told = self._tokenizer(text, add_special_tokens=True, return_special_tokens_mask=True, verbose=False)
        ids, mask = told["input_ids"], told["special_tokens_mask"]
        first = mask.index(0) if 0 in mask else len(mask)
        last = len(mask) - (mask[::-1].index(0) if 0 in mask else 0)
        return (ids[:first], ids[last:]) if ids[first:last] == encode(self._tokenizer, text, special=False) else None

    def _piece(self, first: int, last: int) -> _Piece:
        last = min(last, len(self._text))
        _check_room(self._text, last - first, self._name, self._cap)
        text = self._text[first:last]
        told = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, words, spans = array("i", told["input_ids"]), told.word_ids(0), told["offset_mapping"]
        starts, ends = (array("q", (first + span[side] for span in spans)) for side in (0, 1))
        begins = bytes([1, *(one != other for one, other in pairwise(words))]) if words else b""
        return _Piece(first, last, ids, starts, ends, begins)

    def _joint(self, held: _Piece, following: _Piece) -> tuple[int, int, int] | None:
        """Where two pieces are joined; None where they do not agree.

        Returns:
            The first token of the one that is left to the other; of the other the same token, and how many tokens of it
            are behind those in which both agree.
        """
        places = held.last - 3 * OVERLAP // 4, held.last - OVERLAP // 4
        mine, theirs = ([bisect_left(piece.starts, place) for place in places] for piece in (held, following))
        if not held.same(slice(*mine), following, slice(*theirs)):
            return None
        begun = following.begins.find(1, theirs[0] + 1, theirs[1])
        if begun < 0 and self._merges and theirs[1] - theirs[0] > 1:
            begun = (theirs[0] + theirs[1]) // 2
        return None if begun < 0 else (mine[0] + begun - theirs[0], begun, theirs[1])
