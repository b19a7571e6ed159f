"""How far a model is from its dense original on a text: divergence and agreement, token by token.

Both models go through the text side by side, one block of each in memory at a time. Small damage shows here long before
the perplexity moves.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from llmprune import distributed, memory
from llmprune.budget import batch_size
from llmprune.errors import UserError
from llmprune.evaluate.perplexity import read_text
from llmprune.evaluate.stream import final_states, in_batches, scores
from llmprune.model import blocks
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import resolve
from llmprune.progress import Progress, Silent, of_first
from llmprune.recipe import Evaluation
from llmprune.report.record import Divergence


def divergence(
    model: str | Path,
    dense: str | Path,
    text: str,
    *,
    length: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Divergence:
    """Compare what two models say of each next token of a text.

    Args:
        model: a Hub name, a folder, or a `.gguf` file.
        dense: what it is compared with, of the same vocabulary; the text is read with its tokenizer.
        text: `wikitext2`, `c4`, `builtin` (their evaluation part), a Hub data set, or a local file.
        length: context length in tokens; by default 2048, or what the models can take.
        device, dtype, trust_remote_code: as in a recipe.
        progress: where to show how far the work is.

    Raises:
        UserError: the two have other tokens, or cannot be evaluated.
    """
    began = time.monotonic()
    with torch.no_grad(), distributed.joined():
        with distributed.first():
            where = distributed.local_device(device)
            trusted = trust_remote_code
            found = [resolve(name, dtype, trust_remote_code=trusted, progress=progress) for name in (dense, model)]
            pair = [Checkpoint(source, where, dtype) for source in found]
            _check_alike(*pair)
            windows = read_text(pair[0], Evaluation(text, length)).windows
        shown = of_first(progress)
        for checkpoint in pair:
            checkpoint.check_tokens(windows)
        sums = _sums(pair, windows, shown)
    count, context = windows.shape
    tokens = count * (context - 1)
    per_window = sums[:, 0] / (context - 1)
    error = float(per_window.std() / count**0.5) if count > 1 else None
    kl, agreeing = float(sums[:, 0].sum()) / tokens, float(sums[:, 1].sum()) / tokens
    return Divergence(kl, error, agreeing, text, context, count, tokens, round(time.monotonic() - began, 3))


def _sums(pair: list[Checkpoint], windows: Tensor, progress: Progress) -> Tensor:
    """(windows, 2) for each window the sum of the divergences, and how often both say the same token."""
    groups = in_batches(distributed.share_of(len(windows)), batch_size(pair[0], windows.shape[1]))
    batches = [windows[group] for group in groups]
    room = memory.available() // 8
    chains = [blocks.probe(checkpoint) for checkpoint in pair]
    streams = [  # they go at one pace, so that one of them shows it for both
        final_states(checkpoint, chain, batches, shown, "evaluating both models", room)
        for checkpoint, chain, shown in zip(pair, chains, (progress, Silent()), strict=True)
    ]
    sums = torch.zeros(len(windows), 2, dtype=torch.float64)
    for (number, first), (_, second) in zip(*streams, strict=True):
        for window, *states in zip(groups[number], first, second, strict=True):
            said = [
                scores(checkpoint, chain, state[:-1])
                for checkpoint, chain, state in zip(pair, chains, states, strict=True)
            ]
            for ours, theirs in zip(*said, strict=True):
                logs, others = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
                sums[window, 0] += float((logs.exp() * (logs - others)).sum(dtype=torch.float64))
                sums[window, 1] += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    distributed.total(sums)
    return sums


def _check_alike(dense: Checkpoint, model: Checkpoint) -> None:
    """See that scores of the two are scores of the same tokens.

    Raises:
        UserError: they are not.
    """
    sizes = [int(checkpoint.config.get_text_config().vocab_size) for checkpoint in (dense, model)]
    words = [checkpoint.tokenizer.get_vocab() for checkpoint in (dense, model)]
    if sizes[0] != sizes[1] or words[0] != words[1]:
        raise UserError(
            f"{model.source.name} and {dense.source.name} have other tokens ({sizes[1]:,} and {sizes[0]:,}): what they "
            "say of the next one cannot be compared"
        )
