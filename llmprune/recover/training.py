"""transformers' Trainer, set up for a recovery."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from llmprune import distributed
from llmprune.errors import UserError
from llmprune.progress import Progress
from llmprune.recover.objective import Objective
from llmprune.recover.options import Training

MARKS = 100
"""The most marks of progress that are shown."""


class SparseTrainer(Trainer):  # type: ignore[misc]
    """A Trainer with a loss of ours, whose checkpoints hold what is trained and nothing else."""

    objective: Objective

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The mean over the batch; all sequences are equally long, so that the mean over batches is the whole mean."""
        return self.objective(model, inputs["input_ids"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the parameters that are trained, under the names they have while they are: what else there is, is in the
        checkpoint that training began with."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {
            name: value.detach().cpu().contiguous()
            for name, value in self.model.named_parameters()
            if value.requires_grad
        }
        save_file(trained, folder / "model.safetensors", metadata={"format": "pt"})


class Shown(TrainerCallback):  # type: ignore[misc]
    """Shows how far training is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._marks: Iterator[int] | None = None
        self._done = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to show it."""
        left = state.max_steps - state.global_step
        self._every = max(1, math.ceil(left / MARKS))
        self._first, self._done = state.global_step, 0
        many = "" if self._every == 1 else f", in marks of {self._every} steps"
        marks = range(max(1, math.ceil(left / self._every)))
        self._marks = iter(self._progress.over(marks, f"training{many}"))
        next(self._marks)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show it."""
        done = state.global_step - self._first
        if self._marks is not None and (done % self._every == 0 or state.global_step == state.max_steps):
            next(self._marks, None)


class _Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[number]}


def _stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack([row["input_ids"] for row in rows])}


def make_trainer(
    model: Any,
    objective: Objective,
    ids: Tensor,
    training: Training,
    folder: Path,
    callbacks: Sequence[TrainerCallback],
    progress: Progress,
) -> SparseTrainer:
    """A Trainer that is ready to train.

    Args:
        model: float32; what is trained of it requires gradients.
        ids: (sequences, length) int64.
        folder: for its checkpoints.
        callbacks: besides that which shows the progress.
    """
    on_cpu = training.device == "cpu" or not torch.cuda.is_available()
    bfloat = training.dtype == "bfloat16"
    if training.dtype == "auto":
        bfloat = not on_cpu and torch.cuda.is_bf16_supported(including_emulation=False)
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=on_cpu,
        ddp_backend=("gloo" if on_cpu else "nccl") if distributed.size() > 1 else None,
        bf16=bfloat,
        fp16=training.dtype == "float16",
        max_steps=training.steps,
        per_device_train_batch_size=training.batch,
        gradient_accumulation_steps=training.accumulate,
        learning_rate=training.peak,
        lr_scheduler_type="cosine",
        warmup_steps=min(training.steps - 1, math.ceil(training.steps / 20)),
        weight_decay=training.weight_decay,
        optim="adamw_torch",
        seed=training.seed,
        data_seed=training.seed,
        save_strategy="steps" if training.save_every else "no",
        save_steps=training.save_every or 1,
        save_total_limit=1,
        logging_steps=max(1, training.steps // 20),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=not on_cpu,
    )
    if training.checkpointing:
        if not model.supports_gradient_checkpointing:
            kind = type(model).__name__
            raise UserError(f"transformers cannot compute the blocks of a {kind} once more: leave checkpointing out")
        # The newer name of the same; transformers 5.0 has only the older.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if arguments.n_gpu > 1:  # torch's DataParallel copies the model for each batch, hooks and all; torchrun is the way
        arguments._n_gpu = 1
    trainer = SparseTrainer(
        model=model,
        args=arguments,
        train_dataset=_Sequences(ids),
        data_collator=_stack,
        callbacks=[*callbacks, Shown(progress)],
    )
    trainer.objective = objective
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean of each batch
    trainer.remove_callback(PrinterCallback)
    return trainer
