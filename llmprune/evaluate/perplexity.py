"""Perplexity under the protocol of the pruning papers, block by block, so that whatever can be pruned can be evaluated.

The text is tokenised as a whole and cut into windows of the context length without overlap; a shorter rest is left out.
Each window predicts all its tokens but the first; the perplexity is exp of the mean over all predicted tokens. With a
stride the windows overlap, and each but the first predicts its last tokens alone, with more before them.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmprune import data, distributed, memory
from llmprune.budget import batch_size, windows_at_once
from llmprune.errors import Failure, UserError
from llmprune.evaluate.stream import answered, final_states, in_batches
from llmprune.model import blocks
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import resolve
from llmprune.planning import sequence_length
from llmprune.progress import Progress, of_first
from llmprune.recipe import Evaluation
from llmprune.report.record import Perplexity
from llmprune.tokenise import token_ids

Keep = Callable[[Iterator[tuple[int, Tensor]]], Iterator[tuple[int, Tensor]]]


@dataclass(frozen=True)
class Text:
    """A tokenised text.

    Attributes:
        name: what was asked for.
        windows: (windows, length) token ids.
        stride: tokens from one window to the next, None where they don't overlap.
    """

    name: str
    windows: Tensor
    stride: int | None = None

    def first(self, window: int) -> int:
        """The first token of a window that is predicted from those before it, and counts."""
        return 1 if self.stride is None or window == 0 else self.windows.shape[1] - self.stride

    @property
    def predicted(self) -> int:
        """How many tokens count."""
        return sum(self.windows.shape[1] - self.first(window) for window in range(len(self.windows)))

    @property
    def sha256(self) -> str:
        """The hash of the tokens and of how they are cut: the same tokens in other windows tell something else."""
        cut = f"{data.hash_tokens(self.windows)} {tuple(self.windows.shape)} {self.stride}"
        return hashlib.sha256(cut.encode()).hexdigest()


def perplexity(
    model: str | Path,
    text: str | Evaluation,
    *,
    length: int | None = None,
    stride: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Perplexity:
    """The perplexity of a model on a text.

    Args:
        model: a Hub name, a folder, or a `.gguf` file.
        text: `wikitext2`, `c4`, `ptb`, `builtin` (their evaluation part), a Hub data set, or a local file; or an
            `Evaluation`, which also says which part and column of it, its length and stride.
        length: context length in tokens; by default 2048, or what the model can take.
        stride: see `Evaluation`.
        device, dtype, trust_remote_code: as in a recipe.
        progress: where to show how far the work is.
    """
    with torch.no_grad(), distributed.joined():
        with distributed.first():
            source = resolve(model, dtype, trust_remote_code=trust_remote_code, progress=progress)
            checkpoint = Checkpoint(source, distributed.local_device(device), dtype)
            windows = read_text(checkpoint, Evaluation.of(text, length, stride))
        shown = of_first(progress)
        return measure(checkpoint, windows, shown)


def read_text(checkpoint: Checkpoint, chosen: Evaluation, cap: int | None = None) -> Text:
    """Read, tokenise and cut the text of an evaluation.

    Args:
        cap: see `token_ids`.

    Raises:
        UserError: no such text, it is shorter than one window, or so long that the cap would not hold.
    """
    if chosen.text is None:
        raise UserError("no text to evaluate on")
    length = sequence_length(checkpoint, chosen.length)
    texts = data.documents(chosen.text, "evaluation", config=chosen.config, split=chosen.split, column=chosen.column)
    ids = token_ids(checkpoint.tokenizer, data.JOINT.join(texts), chosen.text, cap=cap).to(torch.int64)
    count = len(ids) // length
    if length < 2:
        raise UserError("a window of one token predicts nothing: the length must be at least 2")
    if chosen.stride is not None and chosen.stride >= length:
        raise UserError(f"a stride of {chosen.stride:,} leaves tokens out: it must be less than the length, {length:,}")
    if count == 0:
        raise UserError(
            f"{chosen.text} has {len(ids):,} tokens, too few for a window of {length:,}: ask for a shorter one"
        )
    return Text(chosen.text, ids.unfold(0, length, chosen.stride or length), chosen.stride)


def dense(
    checkpoint: Checkpoint, text: Text, chosen: Evaluation, progress: Progress, spare: int | None = None
) -> Perplexity:
    """Measure the model before it is pruned; see `measure`.

    Raises:
        UserError: it is broken: worse than the stated bound.
    """
    found = measure(checkpoint, text, progress, "evaluating the dense model", spare)
    check(found, checkpoint.source.name, chosen)
    return found


def check(found: Perplexity, model: str, chosen: Evaluation) -> None:
    """See that a model is worth being pruned.

    Raises:
        UserError: it is broken: worse than the stated bound.
    """
    if chosen.max_perplexity is not None and not found.value <= chosen.max_perplexity:
        raise UserError(
            f"{model} is broken before it is pruned: perplexity {found}, and the bound is "
            f"{chosen.max_perplexity:g}; check the checkpoint, or go on with --set evaluate.max_perplexity=null"
        )


def measure(
    checkpoint: Checkpoint,
    text: Text,
    progress: Progress,
    title: str = "evaluating",
    spare: int | None = None,
    alone: bool = False,
) -> Perplexity:
    """The perplexity of an open checkpoint; see `losses`."""
    began = time.monotonic()
    found = losses(checkpoint, text, progress, title, spare, alone)
    return figure(found, text, checkpoint.source.name, time.monotonic() - began)


def losses(
    checkpoint: Checkpoint,
    text: Text,
    progress: Progress,
    title: str = "evaluating",
    spare: int | None = None,
    alone: bool = False,
    keep: Keep | None = None,
) -> Tensor:
    """How badly a model predicts each window of a text, with one block in memory at a time.

    All windows go through a block before the next is read, as far as a quarter of the free memory holds them. Each rank
    takes its share of them.

    Args:
        spare: bytes that windows may take beyond the first batch of them.
        alone: only this rank measures, and takes them all.
        keep: is given the states that leave the last block, batch by batch as `batched` makes them, to hand them on.

    Returns:
        (windows,) float64, the negative log likelihoods of the tokens that count, summed over each window.
    """
    checkpoint.check_tokens(text.windows)
    chain = blocks.probe(checkpoint)
    count, length = text.windows.shape
    groups = batched(checkpoint, text, alone)
    batches = [text.windows[group] for group in groups]
    at_once = windows_at_once(checkpoint, length, memory.available() if spare is None else spare)
    room = at_once * length * checkpoint.hidden_size * checkpoint.dtype.itemsize
    stream = final_states(checkpoint, chain, batches, progress, title, room)
    found = torch.zeros(count, dtype=torch.float64)
    for number, states in stream if keep is None else keep(stream):
        for window, state in zip(groups[number], states, strict=True):
            first = text.first(window)
            logs, _ = answered(checkpoint, chain, state[first - 1 : -1], text.windows[window, first:, None])
            found[window] = -float(logs.sum())
    if not alone:
        distributed.total(found)
    return found


def batched(checkpoint: Checkpoint, text: Text, alone: bool = False) -> list[list[int]]:
    """The windows that this rank takes, those together that run at once."""
    count, length = text.windows.shape
    return in_batches(range(count) if alone else distributed.share_of(count), batch_size(checkpoint, length))


def figure(losses: Tensor, text: Text, model: str, seconds: float) -> Perplexity:
    """The perplexity that follows from what was lost on each window.

    Raises:
        Failure: it is not finite.
    """
    count, length = text.windows.shape
    mean = float(losses.sum()) / text.predicted
    if not math.isfinite(mean):
        raise Failure(f"the perplexity of {model} on {text.name} is not finite; try --dtype float32")
    value = math.exp(min(mean, 700.0))
    return Perplexity(value, text.name, length, count, text.predicted, round(seconds, 3), text.stride)
