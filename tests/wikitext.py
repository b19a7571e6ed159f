"""The task `wikitext` of lm-eval, on a page that is given to it."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

TASK = """
include: {whole}
task: wikitext_page
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{test: {data}}}}}
training_split: null
validation_split: null
should_decontaminate: false
"""


def word_perplexity(model: Path, text: str, tokens: int, length: int, folder: Path) -> tuple[str, float, int, str]:
    """What lm-eval's own model finds, on the beginning of a text that is so many tokens long.

    Args:
        tokens: of the text as the task changes it; those that are shown at once are `length`.
        folder: where the task and its page are put.

    Returns:
        The text as the model is shown it, its perplexity by words, the number of words, and the token before it.
    """
    home = Path(lm_eval.__file__).parent / "tasks" / "wikitext"
    if not (home / "wikitext.yaml").is_file():
        pytest.skip("lm-eval has no task wikitext here")
    (folder / "wikitext_page.yaml").write_text(TASK.format(whole=home / "wikitext.yaml", data=folder / "page.json"))
    changed = runpy.run_path(str(home / "preprocess_wikitext.py"))["wikitext_detokenizer"]
    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(end: int) -> int:
        return len(tokenizer(changed({"page": text[:end]}), add_special_tokens=False)["input_ids"])

    page = next((text[:end] for end in range(tokens, len(text)) if count(end) == tokens), None)
    assert page is not None, f"the text cannot be cut to {tokens} tokens"
    (folder / "page.json").write_text(json.dumps({"page": page}))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    runner = HFLM(pretrained=str(model), tokenizer=tokenizer, max_length=length, batch_size=1, device="cpu")
    found = lm_eval.simple_evaluate(runner, tasks=["wikitext_page"], task_manager=manager)
    assert found is not None
    words = len(re.split(r"\s+", page))
    before = tokenizer.decode([runner.prefix_token_id])
    return changed({"page": page}), found["results"]["wikitext_page"]["word_perplexity,none"], words, before
