"""Chooses the hidden channels that a model does without, by what they carry of the dense model's hidden states."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmprune import data, distributed, memory
from llmprune.model import blocks
from llmprune.model.activations import Activations
from llmprune.model.checkpoint import Checkpoint
from llmprune.plan import Plan
from llmprune.progress import Progress


def choose_hidden(
    checkpoint: Checkpoint, plan: Plan, tokens: data.Tokens, progress: Progress, folder: Path
) -> tuple[int, ...]:
    """The numbers of the hidden channels that stay, in order, the same on every rank.

    Those stay whose share of their tokens' energy is the largest: x_j² / ‖x‖², summed over all tokens in front of all
    blocks and behind the last. Norms make all tokens as large as each other for whatever reads them.

    Args:
        checkpoint: the dense model.
        plan: how many stay, and how that is laid out.
        folder: where activations may be kept.
    """
    asked = plan.slimming
    assert asked is not None
    batches = distributed.mine(tokens.batches(asked.batch))
    with progress.waiting("embedding the calibration text"):
        activations = blocks.start(checkpoint, plan.chain, batches, asked.place, folder)
    sums = _energies(activations, checkpoint.hidden_size)
    for number in progress.over(range(len(checkpoint.blocks)), "looking at the hidden channels"):
        checkpoint.load_block(number)
        checkpoint.prefetch(number + 1)
        blocks.advance(checkpoint, number, activations)
        sums += _energies(activations, checkpoint.hidden_size)
        checkpoint.unload_block(number)
        memory.give_back()
    distributed.total(sums)
    return distributed.share(tuple(sorted(sums.topk(asked.kept).indices.tolist())))


def _energies(activations: Activations, width: int) -> Tensor:
    """(width,) float64 on the host: each channel's share of its tokens' energy, summed over all tokens."""
    sums = torch.zeros(width, dtype=torch.float64)
    for batch in range(len(activations)):
        squares = activations.read(batch).float().square().flatten(0, -2)
        total = squares.sum(-1, keepdim=True)
        sums += squares.div_(total.masked_fill_(total == 0, torch.inf)).sum(0).cpu().double()
    return sums
