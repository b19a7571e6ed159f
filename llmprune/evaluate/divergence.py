"""How far a model is from its dense original on a text: divergence and agreement, token by token.

Both models go through the text side by side, one block of each in memory at a time. Small damage shows here long before
the perplexity moves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llmprune import distributed, memory
from llmprune.errors import UserError
from llmprune.evaluate.perplexity import Text, batched, read_text
from llmprune.evaluate.stream import final_states, scores
from llmprune.model import blocks
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import resolve
from llmprune.planning import sequence_length
from llmprune.progress import Progress, Silent, of_first
from llmprune.recipe import Evaluation
from llmprune.report.record import Divergence


def divergence(
    model: str | Path,
    dense: str | Path,
    text: str | Evaluation,
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
        text: as for `perplexity`; without a stride.
        length: context length in tokens; by default 2048, or what both models can take.
        device, dtype, trust_remote_code: as in a recipe.
        progress: where to show how far the work is.

    Raises:
        UserError: the two have other tokens, or cannot be evaluated.
    """
    began = time.monotonic()
    chosen = Evaluation.of(text, length)
    if chosen.stride is not None:
        raise UserError("models are compared on windows that do not overlap: leave the stride out")
    with torch.no_grad(), distributed.joined():
        with distributed.first():
            where = distributed.local_device(device)
            trusted = trust_remote_code
            found = [resolve(name, dtype, trust_remote_code=trusted, progress=progress) for name in (dense, model)]
            pair = [Checkpoint(source, where, dtype) for source in found]
            if difference := other_tokens(*pair):
                raise UserError(f"{difference}: what they say of the next one cannot be compared")
            shortest = min(sequence_length(checkpoint, chosen.length) for checkpoint in pair)
            read = read_text(pair[0], replace(chosen, length=shortest))
        shown = of_first(progress)
        for checkpoint in pair:
            checkpoint.check_tokens(read.windows)
        groups = batched(pair[0], read)
        batches = [read.windows[group] for group in groups]
        room = memory.available() // 8
        first, second = (blocks.probe(checkpoint) for checkpoint in pair)
        said = final_states(pair[0], first, batches, Silent(), "", room)
        told = final_states(pair[1], second, batches, shown, "evaluating both models", room)  # at one pace with `said`
        sums = apart((pair[0], first, said), (pair[1], second, told), read, groups)
    return figure(sums, read, time.monotonic() - began)


Run = tuple[Checkpoint, blocks.Chain, Iterator[tuple[int, Tensor]]]
"""A checkpoint, and what leaves its last block, batch by batch."""


def apart(dense: Run, model: Run, text: Text, groups: Sequence[Sequence[int]]) -> Tensor:
    """How far a model is from the dense one on each window of a text, where no windows overlap.

    Args:
        dense, model: their states come in the same batches; the model's are asked for first.
        groups: the windows of each batch of this rank.

    Returns:
        (windows, 3) float64, sums over the predicted tokens of each window: the divergence, how often both say the same
        token, and the negative log likelihood by the model, which is that of `perplexity.losses`.
    """
    sums = torch.zeros(len(text.windows), 3, dtype=torch.float64)
    for (number, second), (_, first) in zip(model[2], dense[2], strict=True):
        for window, state, other in zip(groups[number], first, second, strict=True):
            ahead = scores(*dense[:2], state[:-1]), scores(*model[:2], other[:-1])
            done, likely = 1, []
            for ours, theirs in zip(*ahead, strict=True):
                logs, others = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
                sums[window, 0] += float((logs.exp() * (logs - others)).sum(dtype=torch.float64))
                sums[window, 1] += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
                wanted = text.windows[window, done : done + len(theirs), None].to(others.device)
                likely.append(others.gather(1, wanted).double())
                done += len(theirs)
            sums[window, 2] = -float(torch.cat(likely).sum())
    distributed.total(sums)
    return sums


def figure(sums: Tensor, text: Text, seconds: float) -> Divergence:
    """The divergence that follows from the sums over each window that `apart` gives."""
    count, context = text.windows.shape
    per_window = sums[:, 0] / (context - 1)
    error = float(per_window.std() / count**0.5) if count > 1 else None
    kl, agreeing = (float(sums[:, column].sum()) / text.predicted for column in (0, 1))
    return Divergence(kl, error, agreeing, text.name, context, count, text.predicted, round(seconds, 3))


def other_tokens(dense: Checkpoint, model: Checkpoint) -> str:
    """How the tokens of two models differ, in words; empty where they are the same."""
    sizes = [int(checkpoint.config.get_text_config().vocab_size) for checkpoint in (dense, model)]
    words = [checkpoint.tokenizer.get_vocab() for checkpoint in (dense, model)]
    if sizes[0] == sizes[1] and words[0] == words[1]:
        return ""
    return f"{model.source.name} and {dense.source.name} have other tokens ({sizes[1]:,} and {sizes[0]:,})"


def read_alike(dense: Checkpoint, model: Checkpoint) -> bool:
    """Whether two models are known to make the same tokens of any text, by how their tokenizers are made."""
    first, second = (getattr(checkpoint.tokenizer, "backend_tokenizer", None) for checkpoint in (dense, model))
    return first is not None and second is not None and bool(first.to_str() == second.to_str())
