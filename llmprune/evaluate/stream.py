"""Takes batches of tokens through a whole model, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmprune.budget import LOSS_TOKENS
from llmprune.model import blocks
from llmprune.model.activations import Activations
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.cpu import quick
from llmprune.progress import Progress


def final_states(
    checkpoint: Checkpoint, chain: blocks.Chain, batches: Sequence[Tensor], progress: Progress, title: str, room: int
) -> Iterator[tuple[int, Tensor]]:
    """What leaves the last block, batch by batch; the outer weights with the head are loaded whenever one is given.

    All batches go through a block before the next is read, as far as the room holds them.

    Args:
        batches: token ids (sequences, length) each.
        room: bytes that hidden states may take; one batch is always taken.

    Yields:
        The number of a batch, and its hidden states (sequences, length, hidden).
    """
    passes = _passes(checkpoint, batches, room)
    steps = [(group, block) for group in passes for block in range(len(checkpoint.blocks))]
    activations: Activations | None = None
    for group, block in progress.over(steps, title):
        if block == 0:
            activations = blocks.start(checkpoint, chain, [batches[number] for number in group])
        assert activations is not None
        checkpoint.load_block(block)
        with quick(checkpoint.device, checkpoint.dtype, exact=True):
            blocks.advance(checkpoint, block, activations)
        checkpoint.unload_block(block)
        if block == len(checkpoint.blocks) - 1:
            checkpoint.load_outer(head=True)
            for place, number in enumerate(group):
                yield number, activations.read(place)
            checkpoint.unload()


def scores(checkpoint: Checkpoint, chain: blocks.Chain, states: Tensor) -> Iterator[Tensor]:
    """The model's scores for some tokens, `LOSS_TOKENS` of them at a time.

    Args:
        states: (tokens, hidden) that have left the last block, of any sequences; what follows looks at each by itself.

    Yields:
        (rows, vocabulary), in the dtype of the model.
    """
    step = min(LOSS_TOKENS, checkpoint.max_length or LOSS_TOKENS)
    for part in torch.split(states, step):
        stand_in = torch.zeros(1, len(part), dtype=torch.long)
        with quick(checkpoint.device, checkpoint.dtype, exact=True):
            said = blocks.logits(checkpoint, chain, stand_in, part[None])[0]
        yield said


def answered(checkpoint: Checkpoint, chain: blocks.Chain, states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """How likely the model holds some next tokens, and which it holds the most likely.

    Args:
        states: (tokens, hidden) that have left the last block.
        wanted: (tokens, answers) ids.

    Returns:
        (tokens, answers) natural logarithms of their probabilities, float64; (tokens,) the ids of the most likely.
    """
    logs, best = [], []
    done = 0
    for part in scores(checkpoint, chain, states):
        ids = wanted[done : done + len(part)].to(part.device)
        logs.append(part.float().log_softmax(-1).gather(1, ids).double())
        best.append(part.argmax(-1))
        done += len(part)
    return torch.cat(logs), torch.cat(best)


def in_batches(numbers: Sequence[int], batch: int) -> list[list[int]]:
    """Things that are alike, so many at a time."""
    return [list(numbers[start : start + batch]) for start in range(0, len(numbers), batch)]


def _passes(checkpoint: Checkpoint, batches: Sequence[Tensor], room: int) -> list[range]:
    """Which batches go through a block together."""
    each = checkpoint.hidden_size * checkpoint.dtype.itemsize
    ends, taken = [0], 0
    for number, batch in enumerate(batches):
        size = batch.numel() * each
        if taken and taken + size > room:
            ends.append(number)
            taken = 0
        taken += size
    return [range(first, last) for first, last in zip(ends, [*ends[1:], len(batches)], strict=True) if first < last]
