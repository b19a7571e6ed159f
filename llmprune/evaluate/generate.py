"""What a model and its dense original say after a prompt, side by side, in plain transformers."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from llmprune import memory
from llmprune.errors import Failure, UserError
from llmprune.model.quiet import quiet
from llmprune.model.skeleton import load_config, load_tokenizer, pick_device
from llmprune.model.source import Source
from llmprune.model.writer import EVALUATION
from llmprune.progress import Progress, Silent
from llmprune.report.results import Generation, read_generations

LEAST = 12
"""Tokens that are asked for at least: a model that was harmed may want to end at once, and a sentence is to be seen."""


def side_by_side(
    out: Path,
    dense: Source | None,
    prompts: Sequence[str],
    tokens: int = 48,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> list[Generation]:
    """Let a pruned checkpoint, and the dense model where it is at hand, answer; one of them is in memory at a time.

    Args:
        out: the pruned checkpoint.
        prompts: what they are asked.
        tokens: the most that an answer has.
        trust_remote_code: run code that comes with the pruned checkpoint; the dense model's as its source says.

    Raises:
        UserError: a model is larger than the free memory, or cannot be loaded.
    """
    shown = progress or Silent()
    with shown.waiting("the pruned model answers"):
        sparse = answers(Source(str(out), out, trusted=trust_remote_code), prompts, tokens)
    with shown.waiting("the dense model answers"):
        before = answers(dense, prompts, tokens) if dense is not None else [None] * len(prompts)
    told = zip(prompts, sparse, before, strict=True)
    return [Generation(prompt, after, was, tokens) for prompt, after, was in told]


def answers(source: Source, prompts: Sequence[str], tokens: int) -> list[str]:
    """What a model says, greedily: a chat model as the answer to a user, any other as the continuation of a text.

    Raises:
        UserError: it is larger than the free memory, or cannot be loaded.
    """
    folder, trusted = source.folder, source.trusted
    needed = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if needed > memory.available():
        raise UserError(
            f"{folder} has {needed / 1e9:.1f} GB of weights, and {memory.available() / 1e9:.1f} GB of memory are free: "
            "answers need the whole model at once (leave --prompt out)"
        )
    device = pick_device("auto")
    made: list[str] = []
    with quiet(), torch.no_grad():
        load_config(source)  # tells of code that is not trusted
        tokenizer = load_tokenizer(source)
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted).to(device)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"{folder} cannot be loaded to answer: {error}") from None
        for prompt in prompts:
            if tokenizer.chat_template:
                message = [{"role": "user", "content": prompt}]
                options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
                inputs = tokenizer.apply_chat_template(message, **options)
            else:
                inputs = tokenizer(prompt, return_tensors="pt")
            ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
            least = min(LEAST, tokens)
            said = model.generate(
                ids, attention_mask=mask, min_new_tokens=least, max_new_tokens=tokens, do_sample=False
            )
            made.append(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip())
    del model
    gc.collect()
    memory.give_back()
    return made


def keep(out: Path, made: Sequence[Generation]) -> Path:
    """Add answers to those that are kept beside a checkpoint; an older answer to the same prompt goes.

    Raises:
        Failure: they cannot be written.
    """
    new = {one.prompt for one in made}
    all_of_them = [*(one for one in read_generations(out) if one.prompt not in new), *made]
    path = out / EVALUATION / "generations.json"
    try:
        path.parent.mkdir(exist_ok=True)
        draft = path.with_name(f".{path.name}")
        draft.write_text(json.dumps([asdict(one) for one in all_of_them], indent=2) + "\n", encoding="utf-8")
        draft.rename(path)
    except OSError as error:
        raise Failure(f"answers cannot be written to {path.parent}: {error.strerror}") from None
    return path
