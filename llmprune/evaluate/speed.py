"""How fast checkpoints generate, and what memory that takes: measured on the device at hand, side by side, with noise.

Each model is loaded by plain transformers in a process of its own, and stays there; only one works at a time. In every
round each of them generates once from the same prompts, greedily and for the same number of tokens; every other round
goes through them in the opposite order, so that a machine that gets slower or faster meanwhile favours none. A round
before, in which everything is warmed up, is thrown away.

What the machine does besides makes single times worth little, but both models of a round are hit alike: a model is
compared with the dense one by the ratio of their speeds within each round. The interval of the ratio is that of
Student's t over the logarithms, and holds together with those of all other ratios of the result (Bonferroni). A model
is called faster or slower only where it leaves 1. Rounds are taken for independent.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from llmprune import data, memory
from llmprune.errors import UserError
from llmprune.evaluate.compare import short_names
from llmprune.evaluate.pieces import holding, write_json
from llmprune.evaluate.worker import Load, Loaded, Took, Turn, working
from llmprune.model.index import TensorInfo, hash_files, read_index
from llmprune.model.skeleton import load_config, load_tokenizer, longest, pick_device
from llmprune.model.source import Source, resolve
from llmprune.progress import Progress, Silent
from llmprune.report.record import versions
from llmprune.report.speed import PHASES, Phase, Ratio, Speed, Spread, Timed, Verdict
from llmprune.tokenise import token_ids

RESULT = "speed.json"

LEVEL = 0.95
"""All intervals of a result hold together at this level."""

READ = 40
"""Characters of the text that are read for each token that is needed, at least."""


@dataclass(frozen=True)
class Candidate:
    """A model that can be measured.

    Attributes:
        name: a short one.
        source: where it is.
        config: its own.
        index: the tensors in its files.
    """

    name: str
    source: Source
    config: Any
    index: dict[str, TensorInfo]

    @property
    def files(self) -> set[Path]:
        """Those that hold its weights."""
        return {info.file for info in self.index.values()}

    @property
    def file_bytes(self) -> int:
        """Of these files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return int(self.config.get_text_config().vocab_size)


def speed(
    dense: str | Path,
    models: Sequence[str | Path] = (),
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch: int = 1,
    rounds: int = 5,
    text: str = "builtin",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Speed:
    """Measure how fast models generate with plain transformers, and what memory they take.

    All of them are in memory at the same time. What is timed is `model.generate`, greedily, with the cache that
    transformers takes by itself (a dynamic one) and without a compiler: first the prefill, up to the first new token,
    then the others. They never stop at a token that means the end.

    Args:
        dense: what the others are compared with: a Hub name, a folder, or a `.gguf` file (which is dequantised).
        models: the others; without any there are figures of the one model, and no ratios.
        prompt_tokens, new_tokens: of each sequence.
        batch: sequences at once.
        rounds: how often each model is timed; for one round there is no interval.
        text: what prompts are cut from, by the dense model's tokenizer: as for `perplexity`.
        seed: draws where they begin.
        device: `auto` takes a GPU where there is one.
        dtype: `auto` is what the config of each model says.
        threads: that torch computes with on the CPU; None leaves it to torch.
        trust_remote_code: run code that comes with a model.
        out: the folder for speed.json.
        progress: where to show how far the work is.

    Raises:
        UserError: a number makes no sense, a model or the text cannot be had, a prompt is longer than a model takes,
            or the models don't fit into the memory; nothing was measured.
        Failure: a model's process died or cannot generate; nothing was written.
    """
    began, shown = time.monotonic(), progress or Silent()
    _check(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, rounds=rounds, threads=threads)
    kind = pick_device(device).type
    candidates = _find([dense, *models], dtype, trust_remote_code, shown)
    for candidate in candidates:
        _check_length(candidate, prompt_tokens, new_tokens)
    with shown.waiting("reading the text"):
        prompts = draw_prompts(candidates[0], text, prompt_tokens, batch, seed)
        notes = _check_tokens(candidates, prompts)
    if kind == "cpu":
        _check_memory(candidates, dtype)
    notes += _busy()
    folder = None if out is None else Path(out).expanduser().absolute()
    with contextlib.nullcontext() if folder is None else holding(folder):
        asked = [Load(one.source.folder, device, dtype, threads, trust_remote_code) for one in candidates]
        loaded, took = _run([one.name for one in candidates], asked, prompts, new_tokens, rounds, shown)
        with shown.waiting("hashing the files of the models"):
            timed = [_timed(*each) for each in zip(candidates, loaded, took, strict=True)]
        timed[0].dense = bool(models)
        notes += [f"{one.name}: {one.source.origin}" for one in candidates if one.source.origin]
        machine = loaded[0]
        found = Speed(
            how=f"generate of plain transformers, greedy, with its {' or '.join(sorted({one.cache for one in timed}))}",
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            rounds=rounds,
            order="the models take turns in every round, backwards in every other; a first round is thrown away",
            text=text,
            seed=seed,
            tokens_sha256=data.hash_tokens(prompts),
            device=machine.device,
            device_name=machine.device_name,
            threads=machine.threads,
            models=timed,
            ratios=ratios(timed),
            level=LEVEL,
            versions=versions(),
            notes=notes,
            seconds=round(time.monotonic() - began, 3),
        )
        if folder is not None:
            write_json(folder / RESULT, found.to_dict(), "")
    return found


def turns(count: int, number: int) -> list[int]:
    """Who is when in a round: every other one goes backwards."""
    return list(range(count))[:: -1 if number % 2 else 1]


def ratios(models: Sequence[Timed]) -> list[Ratio]:
    """How the others compare with the first model, in each phase that was measured.

    The intervals hold together: each is at 1 − (1 − level) / their number.
    """
    dense, *others = models
    pairs: list[tuple[str, Phase, Spread, Spread]] = []
    for model in others:
        for phase in PHASES:
            before, after = dense.rate(phase), model.rate(phase)
            if before is not None and after is not None:
                pairs.append((model.name, phase, before, after))
    count = len(pairs)
    return [Ratio(name, phase, *compared(before.values, after.values, count)) for name, phase, before, after in pairs]


def compared(
    dense: Sequence[float], model: Sequence[float], together: int = 1
) -> tuple[float, float | None, float | None, Verdict]:
    """How many times as fast a model is, from speeds that belong together round by round.

    Args:
        dense, model: tokens per second of each round, in one order.
        together: how many intervals are to hold at once.

    Returns:
        The geometric mean of the ratios, its interval (None for one round), and what that says.
    """
    logs = [math.log(after / before) for before, after in zip(dense, model, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), None, None, "not known"
    quantile = float(stats.t.ppf(1 - (1 - LEVEL) / together / 2, len(logs) - 1))
    reach = quantile * statistics.stdev(logs) / math.sqrt(len(logs))
    verdict: Verdict = "no difference beyond noise"
    if abs(mean) > reach:
        verdict = "faster" if mean > 0 else "slower"
    return math.exp(mean), math.exp(mean - reach), math.exp(mean + reach), verdict


def draw_prompts(candidate: Candidate, text: str, length: int, count: int, seed: int) -> Tensor:
    """Prompts that are cut out of a text at places drawn by the seed.

    Returns:
        (count, length) token ids of the model's tokenizer.

    Raises:
        UserError: no such text, no tokenizer, or too little text.
    """
    tokenizer = load_tokenizer(candidate.source)
    pile, characters = [], 0
    for document in data.documents(text, "evaluation"):
        pile.append(document)
        characters += len(document)
        if characters >= READ * length * count:
            break
    ids = token_ids(tokenizer, data.JOINT.join(pile), text).to(torch.int64)
    if len(ids) < length:
        raise UserError(
            f"{text} has {len(ids):,} tokens, too few for a prompt of {length:,}: ask for a shorter one "
            "(--prompt-tokens), or name a longer text"
        )
    starts = torch.randint(len(ids) - length + 1, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def _check(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} takes a number of at least 1, not {value}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("speed is measured by one process: run it without torchrun")


def _find(models: Sequence[str | Path], dtype: str, trusted: bool, shown: Progress) -> list[Candidate]:
    found = []
    for name, model in zip(short_names([*map(str, models)]), models, strict=True):
        source = resolve(model, dtype, trust_remote_code=trusted, as_is=True, progress=shown)
        config = load_config(source)
        if config.is_encoder_decoder:
            raise UserError(f"{name} is an encoder-decoder; only decoders are measured")
        found.append(Candidate(name, source, config, read_index(source.folder)))
    return found


def _check_length(candidate: Candidate, prompt: int, new: int) -> None:
    most = longest(candidate.config)
    if most is not None and prompt + new > most:
        raise UserError(
            f"a prompt of {prompt:,} tokens and {new:,} new ones are more than {candidate.name} can take "
            f"({most:,}): ask for fewer (--prompt-tokens, --new-tokens)"
        )


def _check_tokens(candidates: Sequence[Candidate], prompts: Tensor) -> list[str]:
    """See that all models know the tokens of the prompts; what to note about their tokenizers."""
    dense, *others = candidates
    words = load_tokenizer(dense.source).get_vocab()
    notes = []
    for candidate in candidates:
        if int(prompts.max()) >= candidate.vocabulary:
            raise UserError(
                f"the prompts have the token {int(prompts.max()):,}, and {candidate.name} knows "
                f"{candidate.vocabulary:,}: its vocabulary is not that of {dense.name}'s tokenizer"
            )
    for candidate in others:
        try:
            own = load_tokenizer(candidate.source).get_vocab()
        except UserError:
            notes.append(f"{candidate.name} has no tokenizer: its tokens are taken for those of {dense.name}")
            continue
        if own != words or candidate.vocabulary != dense.vocabulary:
            notes.append(
                f"{candidate.name} and {dense.name} have other tokens ({candidate.vocabulary:,} and "
                f"{dense.vocabulary:,}): as many tokens are not as much text"
            )
    return notes


def _check_memory(candidates: Sequence[Candidate], dtype: str) -> None:
    """See that all models fit into the memory at the same time."""
    size = None if dtype == "auto" else getattr(torch, dtype).itemsize
    needed = sum(
        info.nbytes if size is None else info.numel * size for one in candidates for info in one.index.values()
    )
    free = memory.available()
    if needed > free:
        raise UserError(
            f"the weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: the models take "
            "turns and stay in memory; measure fewer at once"
        )


def _busy() -> list[str]:
    """What to note where the machine had other work."""
    load, cores = (
        os.getloadavg()[0],
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )
    if load < 0.5:
        return []
    return [f"other programs were at work when it began (load {load:.1f}, {cores} cores): noise is less without them"]


def _run(
    names: Sequence[str], asked: Sequence[Load], prompts: Tensor, new_tokens: int, rounds: int, shown: Progress
) -> tuple[list[Loaded], list[list[Took]]]:
    """Load models into processes of their own, and let them take turns; what each turn took, the warm-up first."""
    took: list[list[Took]] = [[] for _ in names]
    with working(names) as workers:
        loaded = []
        for worker, load in zip(workers, asked, strict=True):
            with shown.waiting(f"loading {worker.name}"):
                loaded.append(worker.load(load))
        listed = prompts.tolist()
        for number in shown.over(range(rounds + 1), "rounds"):
            for place in turns(len(workers), number):
                took[place].append(workers[place].turn(Turn(listed, new_tokens, look=number == 0)))
    return loaded, took


def _timed(candidate: Candidate, loaded: Loaded, took: Sequence[Took]) -> Timed:
    """The figures of a model from its turns, of which the first warmed it up and had its cache looked at."""
    warm, *counted = took
    batch, new = len(warm.made), len(warm.made[0])
    held = warm.prompt_tokens + new - 1  # the last token is never read
    return Timed(
        name=candidate.name,
        path=candidate.source.name,
        shards=hash_files(candidate.source.folder, candidate.files),
        dense=False,
        parameters=loaded.parameters,
        file_bytes=candidate.file_bytes,
        weight_bytes=loaded.weight_bytes,
        dtype=loaded.dtype,
        cache=warm.cache,
        cache_bytes=warm.cache_bytes,
        cache_bytes_per_token=warm.cache_bytes / (batch * held),
        base_memory=loaded.base_memory,
        peak_memory=counted[-1].peak_memory,
        peak_device_memory=counted[-1].peak_device_memory,
        first_token=Spread.of([turn.first for turn in counted]),
        prefill=Spread.of([batch * warm.prompt_tokens / turn.first for turn in counted]),
        decode=Spread.of([batch * (new - 1) / turn.rest for turn in counted]) if new > 1 else None,
    )
