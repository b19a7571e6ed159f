"""What training minimises: the language model's own loss, and how far the answers are from a dense teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmprune.errors import UserError


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """The mean negative log likelihood of each token but the first.

    Args:
        logits: (batch, length, vocabulary).
        ids: (batch, length) int64.

    Returns:
        () float32, nats a token.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def divergence(logits: Tensor, dense: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(dense ‖ model) of what both say of the next token, times T² (arXiv:1503.02531).

    Args:
        logits, dense: (batch, length, vocabulary); places count alike, the last of a sequence too.
        temperature: both logits are divided by it.

    Returns:
        () float32, nats a token.
    """
    logs = (logits.float() / temperature).log_softmax(-1).flatten(0, 1)
    others = (dense.float() / temperature).log_softmax(-1).flatten(0, 1)
    return F.kl_div(logs, others, reduction="batchmean", log_target=True) * temperature**2


def states_apart(states: Sequence[Tensor], dense: Sequence[Tensor]) -> Tensor:
    """How far hidden states are from the dense model's, each pair by its own size (SquareHead, arXiv:2310.06927).

    Args:
        states, dense: as many of each, (batch, length, width).

    Returns:
        () float32, the mean over the pairs of ‖s − d‖² / ‖d‖².
    """
    parts = [
        (mine.float() - theirs.float()).square().sum() / theirs.float().square().sum().clamp_min(1e-12)
        for mine, theirs in zip(states, dense, strict=True)
    ]
    return torch.stack(parts).mean()


@dataclass
class Objective:
    """The loss of a batch: `lm` × next token + `kl` × divergence + `hidden` × states apart.

    Attributes:
        teacher: the dense model; None where nothing is distilled.
        temperature, lm, kl, hidden: as above.
        places: which of the teacher's hidden states goes with each of the model's: those in front of its blocks, and
            the last; None where all go with all. A model that lacks blocks has fewer.
    """

    teacher: Any = None
    temperature: float = 1.0
    lm: float = 1.0
    kl: float = 0.0
    hidden: float = 0.0
    places: tuple[int, ...] | None = None

    def __call__(self, model: nn.Module, ids: Tensor) -> Tensor:
        """The loss on (batch, length) token ids: () float32."""
        told = model(input_ids=ids, use_cache=False, output_hidden_states=self.hidden > 0)
        loss = (
            self.lm * next_token_loss(told.logits, ids) if self.lm else told.logits.new_zeros((), dtype=torch.float32)
        )
        if self.teacher is None:
            return loss
        with torch.no_grad():
            said = self.teacher(input_ids=ids, use_cache=False, output_hidden_states=self.hidden > 0)
        if self.kl:
            loss = loss + self.kl * divergence(told.logits, said.logits, self.temperature)
        if self.hidden:
            dense = said.hidden_states
            if self.places is not None:
                dense = [dense[place] for place in self.places]
            if len(dense) != len(told.hidden_states):
                raise UserError(
                    f"the models return {len(told.hidden_states)} and {len(dense)} hidden states, which cannot be "
                    "compared: leave hidden_weight out"
                )
            loss = loss + self.hidden * states_apart(told.hidden_states[1:], dense[1:])
        return loss
