"""TRL's trainers are built on transformers' Trainer: the callbacks do in them what they do there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llmprune.recover import GradualPruning, KeepZeros
from tests.test_gradual import matrices
from tests.test_recover import sparse

ARGUMENTS: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "bf16": False,
    "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_length": 32,
}  # fmt: skip
VERSES = [f"{number} bottles of beer on the wall" for number in range(16)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return sparse("llama", tmp_path_factory.mktemp("llama"))


def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def tuned(folder: Path, out: Path, callback: Any) -> dict[str, torch.Tensor]:
    model, tokenizer = loaded(folder)
    SFTTrainer(
        model=model, args=SFTConfig(output_dir=str(out), **ARGUMENTS), processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": VERSES}), callbacks=[callback],
    ).train()  # fmt: skip
    return matrices(model)


def test_zeros_stay_zeros_in_supervised_tuning(pair: tuple[Path, Path], tmp_path: Path) -> None:
    before, after = matrices(loaded(pair[1])[0]), tuned(pair[1], tmp_path, KeepZeros())
    for name, weight in before.items():
        assert torch.equal(after[name] != 0, weight != 0), name
        assert not torch.equal(after[name], weight)


@pytest.mark.parametrize("options", [{"saliency": "movement"}, {"straight_through": True}], ids=str)
def test_pruning_in_the_course_of_supervised_tuning(
    options: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    for name, weight in tuned(pair[0], tmp_path, GradualPruning("2:4", **options)).items():
        assert bool((weight.unflatten(1, (-1, 4)) == 0).sum(-1).eq(2).all()), name


def test_zeros_stay_zeros_in_preference_tuning(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, tokenizer = loaded(pair[1])
    before = matrices(model)
    told = [{"prompt": verse[:9], "chosen": verse[9:], "rejected": verse[12:]} for verse in VERSES]
    DPOTrainer(
        model=model, ref_model=loaded(pair[0])[0], args=DPOConfig(output_dir=str(tmp_path), **ARGUMENTS),
        processing_class=tokenizer, train_dataset=Dataset.from_list(told), callbacks=[KeepZeros()],
    ).train()  # fmt: skip
    for name, weight in matrices(model).items():
        assert torch.equal(weight != 0, before[name] != 0), name
        assert not torch.equal(weight, before[name])
