"""A model with fewer blocks: the same files, read under other names, and a config that says so.

Nothing is copied: the shorter model is a checkpoint of its own, whose blocks are some of the whole model's, and it can
be pruned, measured and written as any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import Failure, UserError
from llmprune.model import blocks
from llmprune.model.activations import Call
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.config import altered
from llmprune.model.index import TensorInfo

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")

_NUMBERS = ("mlp_only_layers", "moe_layers")
"""What configs call lists of the numbers of blocks that are another kind."""

_OTHERS = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id")
"""Lists that are not about blocks, however long they happen to be."""

_LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""What configs call the number of blocks of another kind that come first."""


def shortened(whole: Checkpoint, kept: Sequence[int]) -> Checkpoint:
    """The model without some of its blocks.

    Args:
        whole: the model; nothing of it is loaded before or after.
        kept: the numbers of the blocks that stay, in order.

    Raises:
        UserError: its config cannot say that, because what a block is hangs on its place.
    """
    places = {number: place for place, number in enumerate(kept)}
    config, text = _config(whole, kept)
    gone = [whole.footprint(keys) for number, keys in enumerate(whole.block_keys) if number not in places]
    before = tuple(whole.blocks[number] for number in kept)
    try:
        made = whole.reshaped(config, text, index=_index(whole, places), before=before, gone=tuple(gone))
    except Failure as error:  # a block that is of another kind by its place asks for other tensors
        told = str(error).partition(";")[0]  # what follows blames the files, which were whole before
        raise UserError(f"{_kind(whole)} cannot do without these blocks: {told}") from None
    if len(made.blocks) != len(kept):
        raise UserError(f"{_kind(whole)} has {len(made.blocks)} blocks where its config says {len(kept)}")
    _check_same(whole, made, kept)
    return made


def _kind(checkpoint: Checkpoint) -> str:
    return type(checkpoint.model).__name__


def _config(whole: Checkpoint, kept: Sequence[int]) -> tuple[Any, str]:
    """The config of the shorter model, and its text."""
    count = len(whole.blocks)
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in vars(whole.config.get_text_config()).items():  # what it says of each block
        if name in _NUMBERS and isinstance(value, list):
            changes[name] = [place for place, number in enumerate(kept) if number in value]
        elif name in _LEADING and isinstance(value, int):
            changes[name] = sum(number < value for number in kept)
        elif not name.startswith("_") and isinstance(value, list) and len(value) == count and name not in _OTHERS:
            changes[name] = [value[number] for number in kept]
    return altered(whole, changes, f"{len(kept)} blocks of {count}")


def _index(whole: Checkpoint, places: Mapping[int, int]) -> dict[str, TensorInfo]:
    """The tensors of the shorter model by their keys in it."""
    known = {key: number for number, keys in enumerate(whole.block_keys) for key in keys}
    before = {key[: found.start()] for key, number in known.items() if (found := _numbered(key, number))}
    made = {}
    for key, info in whole.index.items():
        found = _NUMBER.search(key)
        if key in known and not _numbered(key, known[key]):
            raise UserError(f"{key} does not tell the number of its block, so that no block can be left out")
        if found is None or key[: found.start()] not in before:
            made[key] = info
            continue
        number = int(found[0])
        # What follows the last block under a number of its own (to predict more than one token) goes on following it.
        place = places.get(number) if number < len(whole.blocks) else number - len(whole.blocks) + len(places)
        if place is not None:
            made[f"{key[: found.start()]}{place}{key[found.end() :]}"] = info
    return made


def _numbered(key: str, number: int) -> re.Match[str] | None:
    """The first number in a key, if it is that one."""
    found = _NUMBER.search(key)
    return found if found is not None and int(found[0]) == number else None


# -- is each block what it was? -------------------------------------------------------------------------------------


def _check_same(whole: Checkpoint, made: Checkpoint, kept: Sequence[int]) -> None:
    """See that each block of the shorter model is what the block it comes from is, and is called as that is.

    Of those that are alike, and have moved as far, the last one is tried with its weights.
    """
    tokens = torch.zeros(1, blocks.probe_length(whole), dtype=torch.long)
    before, after = (blocks.start(one, blocks.probe(one), [tokens]).calls for one in (whole, made))
    moved = zip(blocks.kinds(made), (number - place for place, number in enumerate(kept)), strict=True)
    tried = {key: place for place, key in enumerate(moved)}.values()
    for place, number in enumerate(kept):
        old, new = whole.block(whole.blocks[number]), made.block(made.blocks[place])
        why = _other(old, new, number, place) or _called_otherwise(before[number][0], after[place][0])
        if not why and place in tried:
            why = _answers_otherwise(whole, made, number, place, before[number][0])
        if why:
            raise UserError(
                f"{_kind(whole)} cannot do without these blocks: block {number} would be block {place}, and that is "
                f"another there ({why})"
            )


def _other(old: nn.Module, new: nn.Module, number: int, place: int) -> str:
    """In what a block differs from another, but for its number and its weights."""
    one, other = dict(old.named_modules()), dict(new.named_modules())
    shapes = [{name: value.shape for name, value in block.state_dict().items()} for block in (old, new)]
    if one.keys() != other.keys() or shapes[0] != shapes[1]:
        return "it has other weights"
    for name, module in one.items():
        twin = other[name]
        if type(module) is not type(twin):
            return f"{name} is a {type(twin).__name__}"
        mine, its = dict(_plain(module)), dict(_plain(twin))
        for key in mine.keys() | its.keys():
            values = mine.get(key), its.get(key)
            numbers = values == (number, place) and not isinstance(values[0], bool)
            if values[0] != values[1] and not numbers:
                return f"{f'{name}.' if name else ''}{key} is {values[1]!r} and not {values[0]!r}"
    return ""


def _plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if not name.startswith("_") and isinstance(value, bool | int | float | str | tuple | type(None)):
            yield name, value


def _called_otherwise(old: Call, new: Call) -> str:
    """In what a block is called with something else."""
    one, other = ({**dict(enumerate(call.args)), **call.kwargs} for call in (old, new))
    differing = [name for name in one.keys() | other.keys() if not _alike(one.get(name), other.get(name))]
    return f"it is called with another {differing[0]}" if differing else ""


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, bool | int | float | str | type(None)):
        return bool(one == other)
    return type(one) is type(other)


def _answers_otherwise(whole: Checkpoint, made: Checkpoint, number: int, place: int, call: Call) -> str:
    """Whether a block gives something else than the one that it comes from."""
    shape = (1, blocks.probe_length(whole), whole.hidden_size)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(whole.device, whole.dtype)
    found = []
    for checkpoint, block in ((whole, number), (made, place)):
        module = checkpoint.load_block(block).module
        found.append(blocks.run(module, call, given).nan_to_num())  # equal where both are no numbers
        checkpoint.unload_block(block)
    return "" if torch.equal(*found) else "with the same weights it returns something else"
