"""The decoder blocks: find them, see that they form a plain chain, record what each is called with, run one.

A block is a black box here. While the model runs, each block's `forward` stands aside for a function that records its
arguments, so that the model itself makes the masks, rotary tables and whatever else its blocks want, and no
architecture has to be known by name.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmprune import memory
from llmprune.errors import Failure, LLMPruneError, UserError
from llmprune.model.activations import HIDDEN, Activations, Call, Place
from llmprune.model.checkpoint import Checkpoint
from llmprune.parts import not_finite

PROBE_TOKENS = 19
"""Tokens of a trial run; no width in a model is likely to be this number."""


@dataclass(frozen=True)
class Chain:
    """How hidden states pass from block to block in this model.

    Attributes:
        slot: the position or keyword under which a block is given the hidden states.
        length: 0 when a block returns the hidden states alone, else the length of the tuple that they come first in.
    """

    slot: int | str
    length: int

    def wrap(self, hidden: Tensor) -> Any:
        """Hidden states in the form in which a block returns them."""
        return hidden if self.length == 0 else (hidden, *[None] * (self.length - 1))

    def taken(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """The hidden states among a block's arguments."""
        value: Tensor = args[self.slot] if isinstance(self.slot, int) else kwargs[self.slot]
        return value


@contextlib.contextmanager
def replaced(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let other functions answer for the blocks' forwards for a while."""
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


Study = Callable[[int, Callable[[], Any]], Any]


def _unstudied(number: int, run: Callable[[], Any]) -> Any:
    return run()


def probe(checkpoint: Checkpoint, study: Study = _unstudied) -> Chain:
    """Run a few tokens through the first block of each kind, and see that the blocks form a plain chain.

    Args:
        checkpoint: nothing of it is loaded before or after.
        study: runs a block, given its number and what does so, and returns what that returns.

    Raises:
        UserError: the model cannot be walked block by block; the message says why.
    """
    kind = type(checkpoint.model).__name__
    try:
        return _probe(checkpoint, study)
    except LLMPruneError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{kind} cannot be walked block by block: a trial run failed with {reason}") from error
    finally:
        checkpoint.unload()


def probe_length(checkpoint: Checkpoint) -> int:
    """The tokens of a trial run."""
    return min(PROBE_TOKENS, checkpoint.max_length or PROBE_TOKENS)


def kinds(checkpoint: Checkpoint) -> list[int]:
    """For each block the number of the first block that has the same class and the same parameters."""
    first: dict[Any, int] = {}
    numbers = []
    for number, name in enumerate(checkpoint.blocks):
        block = checkpoint.block(name)
        shape = tuple((key, tuple(value.shape)) for key, value in block.state_dict().items())
        numbers.append(first.setdefault((type(block), shape), number))
    return numbers


def _probe(checkpoint: Checkpoint, study: Study) -> Chain:
    model, kind = checkpoint.model, type(checkpoint.model).__name__
    blocks = [checkpoint.block(name) for name in checkpoint.blocks]
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    returned: list[Tensor] = []
    lengths: list[int] = []

    def first(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        with torch.no_grad():
            output = study(0, lambda: type(blocks[0]).forward(blocks[0], *args, **kwargs))
        lengths.append(_form(output, kind))
        return passed(hidden_of(output))

    def later(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return passed(returned[-1])

    def passed(hidden: Tensor) -> Any:
        # A fresh leaf for each block: what depends on it afterwards can be told by its need of a gradient.
        returned.append(hidden.detach().clone().requires_grad_())
        return returned[-1] if lengths[0] == 0 else (returned[-1], *[None] * (lengths[0] - 1))

    checkpoint.load_outer()
    checkpoint.load_block(0)
    vocabulary = int(checkpoint.config.get_text_config().vocab_size)
    tokens = (torch.arange(probe_length(checkpoint), device=checkpoint.device) % vocabulary)[None]
    with torch.enable_grad(), replaced(blocks, [first, *[later] * (len(blocks) - 1)]):
        model.get_decoder()(input_ids=tokens, use_cache=False)
    if len(seen) != len(blocks):
        raise UserError(f"{kind} is not a plain chain of blocks: {len(blocks)} blocks were called {len(seen)} times")

    slots: set[int | str] = set()
    for number, (args, kwargs) in enumerate(seen):
        arguments = _arguments(args, kwargs)
        name = checkpoint.blocks[number]
        if number == 0:
            continue
        places = [place for place, value in arguments.items() if value is returned[number - 1]]
        if len(places) != 1:
            raise UserError(
                f"{kind} is not a plain chain of blocks: {name} is not given what "
                f"{checkpoint.blocks[number - 1]} returned"
            )
        slots.add(places[0])
        for place, value in arguments.items():
            if place != places[0] and any(tensor.requires_grad for tensor in _tensors(value, name, kind)):
                raise UserError(
                    f"{kind} is not a plain chain of blocks: {name} is also given {place!r}, "
                    "which depends on earlier blocks"
                )
    if len(blocks) == 1:
        args, kwargs = seen[0]
        slots = {next(place for place, value in _arguments(args, kwargs).items() if isinstance(value, Tensor))}
    if len(slots) != 1:
        raise UserError(f"{kind} is not a plain chain of blocks: hidden states come as {', '.join(map(str, slots))}")
    chain = Chain(slots.pop(), lengths[0])

    for number in sorted(set(kinds(checkpoint)) - {0}):
        checkpoint.load_block(number)
        args, kwargs = seen[number]
        with torch.no_grad():
            output = study(number, functools.partial(blocks[number], *args, **kwargs))
        if _form(output, kind) != chain.length or hidden_of(output).shape != returned[0].shape:
            raise UserError(f"{kind} is not a plain chain of blocks: {checkpoint.blocks[number]} returns another form")
        checkpoint.unload_block(number)
    return chain


def start(
    checkpoint: Checkpoint,
    chain: Chain,
    batches: Sequence[Tensor],
    place: Place = "host",
    folder: Path | None = None,
) -> Activations:
    """Embed all batches and record what each block is called with; the outer weights are loaded only meanwhile.

    Args:
        batches: token ids (sequences, length) each.
        place, folder: see `Activations`.
    """
    blocks = [checkpoint.block(name) for name in checkpoint.blocks]
    activations = Activations(len(blocks), checkpoint.device, place, folder)
    pool = _Pool()

    def recorder(number: int) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            hidden = chain.taken(args, kwargs)
            if number == 0:
                if not_finite(hidden):
                    raise Failure(f"the embeddings of {checkpoint.source.name} hold NaN or infinite values")
                activations.add(hidden)
            values = {
                place: HIDDEN if place == chain.slot else pool.keep(value)
                for place, value in _arguments(args, kwargs).items()
            }
            kept = Call(
                tuple(values[place] for place in range(len(args))),
                {place: value for place, value in values.items() if isinstance(place, str)},
            )
            activations.calls[number].append(kept)
            return chain.wrap(hidden)

        return record

    checkpoint.load_outer()
    with torch.no_grad(), replaced(blocks, [recorder(number) for number in range(len(blocks))]):
        for tokens in batches:
            checkpoint.model.get_decoder()(input_ids=tokens.to(checkpoint.device), use_cache=False)
    checkpoint.unload()
    return activations


def run(block: nn.Module, call: Call, hidden: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    """One block over one batch: hidden states in, hidden states out, on the device they are given on.

    Args:
        weights: taken instead of the block's own, by their names in it; then gradients are there where they are on.
    """
    args = tuple(hidden if value is HIDDEN else value for value in call.args)
    kwargs = {name: hidden if value is HIDDEN else value for name, value in call.kwargs.items()}
    if weights is not None:
        return hidden_of(torch.func.functional_call(block, weights, args, kwargs))
    with torch.no_grad():
        return hidden_of(block(*args, **kwargs))


def advance(
    checkpoint: Checkpoint, number: int, activations: Activations, through: Callable[[int], Tensor] | None = None
) -> None:
    """Take all batches through one loaded block, which is not called again.

    Args:
        through: what the block returns for a batch; by default it is run.

    Raises:
        Failure: the block returns NaN or infinite values.
    """
    pass_through(checkpoint, number, activations.calls[number], activations, through)
    activations.calls[number].clear()


def pass_through(
    checkpoint: Checkpoint,
    number: int,
    calls: Sequence[Call],
    activations: Activations,
    through: Callable[[int], Tensor] | None = None,
) -> None:
    """As `advance`, with calls that are given, and stay."""
    block = checkpoint.block(checkpoint.blocks[number])
    for batch, call in enumerate(calls):
        output = through(batch) if through is not None else run(block, call, activations.read(batch))
        check_output(checkpoint, number, batch, output)
        activations.write(batch, output)
        del output
        memory.ease()


def check_output(checkpoint: Checkpoint, number: int, batch: int, output: Tensor) -> None:
    """See that what a block returns for a batch is finite.

    Raises:
        Failure: it is not.
    """
    if not_finite(output):
        raise Failure(
            f"{checkpoint.blocks[number]} returns NaN or infinite activations (batch {batch}) in "
            f"{str(checkpoint.dtype).removeprefix('torch.')}; try --dtype float32, and check the checkpoint"
        )


def logits(checkpoint: Checkpoint, chain: Chain, tokens: Tensor, hidden: Tensor) -> Tensor:
    """The model's logits (sequences, length, vocabulary) for hidden states that have left the last block.

    The outer weights must be loaded with their head. The model itself runs, with blocks that pass everything on.
    Gradients go back to the hidden states where these want one.
    """
    blocks = [checkpoint.block(name) for name in checkpoint.blocks]
    final = hidden.to(checkpoint.device)

    def passing(*args: Any, **kwargs: Any) -> Any:
        return chain.wrap(chain.taken(args, kwargs))

    def last(*args: Any, **kwargs: Any) -> Any:
        return chain.wrap(final)

    with torch.set_grad_enabled(hidden.requires_grad), replaced(blocks, [*[passing] * (len(blocks) - 1), last]):
        output = checkpoint.model(input_ids=tokens.to(checkpoint.device), use_cache=False)
    value: Tensor = output.logits
    return value


class _Pool:
    """Keeps one copy of tensors that are equal, so that a mask shared by all batches is held once."""

    def __init__(self) -> None:
        self._known: dict[Any, list[Tensor]] = {}

    def keep(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = self._known.setdefault((value.shape, value.dtype, value.device), [])
            for other in known:
                if other is value or torch.equal(other, value):
                    return other
            known.append(value)
            return value
        if isinstance(value, list | tuple):
            return type(value)(self.keep(item) for item in value)
        if isinstance(value, dict):
            return {key: self.keep(item) for key, item in value.items()}
        return value


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def _tensors(value: Any, block: str, kind: str) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple) or (isinstance(value, dict) and value):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, block, kind)
    elif not isinstance(value, _PLAIN):
        raise UserError(
            f"{kind} is not a plain chain of blocks: {block} is given a {type(value).__name__}, through which blocks "
            "could share state"
        )


def _arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[int | str, Any]:
    """All arguments by position or keyword."""
    found: dict[int | str, Any] = dict(enumerate(args))
    found.update(kwargs)
    return found


def _form(output: Any, kind: str) -> int:
    if isinstance(output, Tensor):
        return 0
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return len(output)
    raise UserError(f"{kind} is not a plain chain of blocks: a block returns a {type(output).__name__}")


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns."""
    value: Tensor = output if isinstance(output, Tensor) else output[0]
    return value


def summary(checkpoint: Checkpoint) -> str:
    """The blocks in words: `30 x LlamaDecoderLayer`."""
    counted = Counter(type(checkpoint.block(name)).__name__ for name in checkpoint.blocks)
    return ", ".join(f"{count} x {name}" for name, count in counted.items())
