"""Chooses the hidden channels that a model does without, by what they carry of the dense model's hidden states."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from llmprune import data, distributed, memory
from llmprune.errors import UserError
from llmprune.model import blocks
from llmprune.model.activations import Activations
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.cuts import width_step
from llmprune.plan import Plan
from llmprune.progress import Progress
from llmprune.recipe import share_of


def channels_left(checkpoint: Checkpoint, asked: str | int | float) -> int:
    """How many hidden channels stay.

    A share comes to what both kernels and the number of heads go into, where the dense width is such a number too.

    Raises:
        UserError: what is asked for makes no sense.
    """
    width = checkpoint.hidden_size
    if isinstance(asked, int) and not isinstance(asked, bool):
        left = width - asked
    else:
        share = share_of(asked)
        if share is None:
            raise UserError(f"width.hidden must be how many go (64), or a share of them (12.5%), not {asked!r}")
        heads = getattr(checkpoint.config.get_text_config(), "num_attention_heads", None)
        step = math.gcd(width, math.lcm(heads if isinstance(heads, int) else 1, width_step(checkpoint)))
        left = min(max(step, round(width * (1 - share) / step) * step), width - step)
    if not 0 < left < width:
        raise UserError(f"width.hidden: of {width:,} at least one must go, and at least one must stay; {asked} go")
    return left


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
