"""A model with fewer hidden channels: the same files, of whose tensors a part is read, and a config that says so.

A channel goes from the embeddings, from what every block adds to the hidden states, and from all that reads them. What
is left is what the whole model would be if these channels were always zero. Norms divide by a mean over all channels,
zeros included; over those that are left it is larger by their share, which the norms' weights and the config's epsilon
make up for. Where that is not all, as for norms that subtract a mean, a trial shows it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import LLMPruneError, UserError, first_line
from llmprune.model import blocks
from llmprune.model.checkpoint import Checkpoint, LoadedBlock
from llmprune.model.config import altered
from llmprune.model.index import Part, TensorInfo
from llmprune.model.linears import find_linears

_EPSILON = re.compile(r"(^|_)eps(ilon)?$")
"""What configs call the number that norms add to the mean of the squares."""

_WORDS = 64
"""Rows of the embeddings that a trial looks at."""

_APART = 1e-3
"""How far a token may be apart, as a fraction of what it should be; a trial runs in float32.

Norms inside of blocks may have their epsilon from the same number of the config.
"""

_ENOUGH = 0.75
"""The part of the tokens that must come out right where there are experts: two may be alike but for rounding."""


def slimmer(whole: Checkpoint, kept: Sequence[int], way: int) -> Checkpoint:
    """The model without some of its hidden channels.

    Args:
        whole: the model; nothing of it is loaded before or after.
        kept: the numbers of the channels that stay, in order.
        way: how norms use the width; see `way_to_slim`.

    Raises:
        UserError: its config cannot say that.
    """
    form, index = next(itertools.islice(_ways(whole, torch.tensor(kept)), way, None))
    return _made(whole, form, index)


def way_to_slim(whole: Checkpoint, kept: Sequence[int]) -> int:
    """The number of the way in which a model uses its width, by a trial on the host, in float32 and with few words.

    Args:
        kept: channels that stay; as many others may stay in the same way.

    Raises:
        UserError: its config cannot say that, or what is left would be another model than without what went.
    """
    places = torch.tensor(kept)
    small, trial, why = _with_few_words(whole), None, ""
    for number, (form, index) in enumerate(_ways(small, places)):
        trial = trial or _Trial(small, form, places)
        if not (found := trial.otherwise(_made(small, form, _unrounded(index)))):
            return number
        why = why or found
    raise UserError(f"{_cannot(whole, _channels(whole, len(kept)))}: what is left would not be what it was ({why})")


def _cannot(whole: Checkpoint, what: str) -> str:
    return f"{type(whole.model).__name__} cannot have {what}"


def _channels(whole: Checkpoint, count: int) -> str:
    return f"{count:,} of {whole.hidden_size:,} hidden channels"


def _unrounded(index: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same tensors, of which those that are scaled are not rounded to the dtype that they will be stored in."""
    return {
        key: replace(info, part=replace(info.part, dtype=torch.float32))
        if info.part is not None and (info.part.factor, info.part.shift) != (1.0, 0.0)
        else info
        for key, info in index.items()
    }


def _made(whole: Checkpoint, form: Checkpoint, index: Mapping[str, TensorInfo]) -> Checkpoint:
    """The slimmer model; the dense model's states go beside through all blocks of the whole one."""
    assert form.shape is not None
    gone = (*map(whole.footprint, whole.block_keys), *(() if whole.shape is None else whole.shape.gone))
    said = form.shape.config, form.shape.config_json
    return whole.reshaped(*said, index=index, gone=gone, wide=whole.hidden_size)


def _with_few_words(whole: Checkpoint) -> Checkpoint:
    """The model in float32 on the host, with the first rows of its embeddings alone."""
    words = min(_WORDS, whole.model.get_input_embeddings().weight.shape[0])
    form, index = _form(whole, {"vocab_size": words, "pad_token_id": None}, f"{words} words"), dict(whole.index)
    for key, info in whole.index.items():
        shape = form.index[key].shape if key in form.index else info.shape
        if dims := _smaller_dims(info, shape):
            index[key] = replace(info, shape=shape, part=_part(info, {dim: torch.arange(shape[dim]) for dim in dims}))
    assert form.shape is not None
    return whole.reshaped(form.shape.config, form.shape.config_json, "cpu", "float32", index=index)


def _smaller_dims(info: TensorInfo, shape: tuple[int, ...]) -> list[int]:
    return [dim for dim, size in enumerate(shape) if size != info.shape[dim]]


def _ways(whole: Checkpoint, kept: Tensor) -> Iterator[tuple[Checkpoint, dict[str, TensorInfo]]]:
    """The slimmer model without any weights, and its tensors, in each of the ways in which it may use the width."""
    for change in _changes(whole, len(kept)):
        form = _form(whole, change, _channels(whole, len(kept)))
        for index in _indices(whole, _shapes(whole, form), kept):
            yield form, index


def _changes(whole: Checkpoint, count: int) -> Iterator[dict[str, Any]]:
    """What the config has to say otherwise; the epsilon too, unless norms inside of blocks want it as it was."""
    text = whole.config.get_text_config()
    changes: dict[str, Any] = {"hidden_size": count}
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and not isinstance(getattr(type(text), "head_dim", None), property):
        changes["head_dim"] = getattr(text, "head_dim", None) or whole.hidden_size // heads
    known = {name: value for name, value in vars(text).items() if _EPSILON.search(name) and isinstance(value, float)}
    yield {**changes, **{name: value * whole.hidden_size / count for name, value in known.items()}}
    if known:
        yield changes


def _form(whole: Checkpoint, changes: Mapping[str, Any], what: str) -> Checkpoint:
    """A model of other widths without any weights.

    Args:
        what: what it has, for a message.
    """
    config, text = altered(whole, changes, what)
    try:
        return whole.reshaped(config, text, "cpu", narrower=True)
    except Exception as error:  # the skeleton of a family may fail in any way
        raise UserError(f"{_cannot(whole, what)}: {first_line(error).partition(';')[0]}") from None


def _shapes(whole: Checkpoint, form: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shapes of the slimmer model's tensors by their keys, where they are other than they were.

    Raises:
        UserError: there are others, or something else would change.
    """
    width, cannot = whole.hidden_size, _cannot(whole, _channels(whole, form.hidden_size))
    if other := whole.index.keys() ^ form.index.keys():
        raise UserError(f"{cannot}: {min(other)} would not be there in one of the two models")
    for key in whole.unclaimed_keys:
        if width in whole.index[key].shape:
            raise UserError(f"{cannot}: no module asks for {key}, and nobody knows whether it has hidden channels")
    found = {}
    for key, info in whole.index.items():
        shape = form.index[key].shape
        if shape == info.shape:
            continue
        pairs = list(zip(info.shape, shape, strict=True)) if len(shape) == len(info.shape) else []
        if not pairs or any(pair not in {(width, form.hidden_size), pair[:1] * 2} for pair in pairs):
            raise UserError(f"{cannot}: {key} would change from {info.shape} to {shape}")
        found[key] = shape
    return found


def _indices(whole: Checkpoint, shapes: dict[str, tuple[int, ...]], kept: Tensor) -> Iterator[dict[str, TensorInfo]]:
    """The slimmer model's tensors, in each of the ways in which norms and embeddings may use the width.

    Norms multiply by their weights, by one more than these, or divide by no mean; the embeddings may be multiplied by
    the root of the width, and where the output layer shares them, the norm in front of that makes up for it.
    """
    root = (whole.hidden_size / len(kept)) ** 0.5
    embedded = whole.model.get_input_embeddings()
    tied = bool(whole.tied)
    outer = set(whole.outer_keys)
    for factor, shift, large in ((root, 0.0, 1.0), (root, root - 1, 1.0), (root, root - 1, root), (1.0, 0.0, 1.0)):
        index = dict(whole.index)
        for key, shape in shapes.items():
            info, name = whole.index[key], whole.targets(key)[0]
            scale = 1.0, 0.0
            if whole.model.get_submodule(name.rpartition(".")[0]) is embedded:
                scale = large, 0.0
            elif _of_norm(whole, key) and not (tied and large > 1 and key in outer):
                scale = factor, shift
            index[key] = replace(
                info, shape=shape, part=_part(info, dict.fromkeys(_smaller_dims(info, shape), kept), *scale)
            )
        yield index


def _part(info: TensorInfo, places: dict[int, Tensor], factor: float = 1.0, shift: float = 0.0) -> Part:
    """What is left of a tensor, of which a part may be all there is."""
    if info.part is None:
        return Part(info.shape, places, factor, shift)
    assert not info.part.places.keys() & places.keys()
    return replace(info.part, places={**info.part.places, **places}, factor=factor, shift=shift)


def _of_norm(whole: Checkpoint, key: str) -> bool:
    """Whether a key of the files is the weight of something that has no matrix, and so is taken for a norm."""
    name = whole.targets(key)[0]
    parent, _, leaf = name.rpartition(".")
    held = whole.model.get_submodule(parent).named_parameters(recurse=False)
    return leaf != "bias" and len(whole.index[key].shape) == 1 and all(value.dim() == 1 for _, value in held)


class _Trial:
    """Compares slimmer models with the whole one: embeddings, the first block of each kind, and the output layer."""

    def __init__(self, whole: Checkpoint, form: Checkpoint, kept: Tensor) -> None:
        """Run the whole model's parts on hidden states whose other channels are zero, and stay zero.

        Args:
            form: the slimmer model, whose weights are not looked at.
        """
        self._form = form
        self._routed = any(
            linear.expert is not None for name in whole.blocks for linear in find_linears(whole.block(name), name)
        )
        self._kept, self._chain = kept, blocks.probe(whole)
        self._tokens = (
            torch.arange(blocks.probe_length(whole))[None] % whole.model.get_input_embeddings().weight.shape[0]
        )
        chance = torch.Generator().manual_seed(0)
        given = torch.randn((*self._tokens.shape, len(kept)), generator=chance) + 0.5  # norms may subtract a mean
        self._given = given.to(whole.device, whole.dtype)
        wide = given.new_zeros((*self._tokens.shape, whole.hidden_size)).index_copy_(-1, kept, given)
        self._wide = wide.to(whole.device, whole.dtype)
        self._kinds = sorted(set(blocks.kinds(whole)))
        self._wanted = self._parts(whole, self._wide)

    def otherwise(self, made: Checkpoint) -> str:
        """In what a slimmer model is another than the whole one without what went; empty where it is the same."""
        try:
            found = self._parts(made, self._given)
        except LLMPruneError:
            raise
        except Exception as error:
            return f"a trial failed with {type(error).__name__}: {error}"
        for name, wanted in self._wanted.items():
            told = found[name]
            wide = wanted.index_select(-1, self._kept) if told.shape != wanted.shape else wanted
            near = (told - wide).norm(dim=-1) <= _APART * wide.norm(dim=-1)
            if float(near.float().mean()) < (_ENOUGH if self._routed and name.startswith("what") else 1):
                return f"{name} other than before"
        return ""

    def _parts(self, checkpoint: Checkpoint, given: Tensor) -> dict[str, Tensor]:
        """What the parts of a model make of hidden states and its embeddings: float32 on the host, by what they do."""
        try:
            activations = blocks.start(checkpoint, self._chain, [self._tokens])
            own = activations.read(0)
            found = {"the embeddings are": own}
            if given is self._wide:
                own = torch.zeros_like(own).index_copy_(-1, places := self._kept.to(own.device), own[..., places])
            for number in self._kinds:
                block = checkpoint.load_block(number)
                if given is self._wide:
                    self._without(block)
                for states, of in ((given, "numbers"), (own, "embeddings")):
                    made = blocks.run(block.module, activations.calls[number][0], states)
                    found[f"what {checkpoint.blocks[number]} makes of {of} is"] = made - states
                checkpoint.unload_block(number)
            checkpoint.load_outer(head=True)
            found["the output layer's scores are"] = blocks.logits(checkpoint, self._chain, self._tokens, given)
            return {name: value.float().cpu() for name, value in found.items()}
        finally:
            checkpoint.unload()

    def _without(self, block: LoadedBlock) -> None:
        """Let a loaded block of the whole model add nothing to the channels that went."""
        gone = torch.ones(self._wide.shape[-1], dtype=torch.bool)
        gone[self._kept] = False
        places = gone.nonzero()[:, 0]
        for name, value in self._form.block(block.name).state_dict(prefix=f"{block.name}.").items():
            for dim, size in enumerate(value.shape):
                if size != block.state[name].shape[dim]:
                    block.state[name].index_fill_(dim, places, 0)
        block.refresh(block.state)
