"""What can be chosen of a recovery."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llmprune.errors import UserError, unknown
from llmprune.recipe import DTYPES, build

LENGTH = 512
"""Tokens of a sequence, where the model can take that."""

METHODS = ("full", "lora", "norms")

RATES = {"full": 2e-4, "lora": 1e-3, "norms": 1e-3}
"""The peak learning rate of each method, where none is given."""


@dataclass(frozen=True)
class Training:
    """How a sparse model is trained.

    Attributes:
        method: `full` trains the kept weights of all linears and everything else but the embeddings and the output
            layer; `lora` adapters of the linears that stay inside the masks, norms and biases; `norms` norms and biases
            alone (the last two as PERP, arXiv:2312.15230).
        embeddings: `full` trains the embeddings and the output layer as well.
        steps: steps of the optimiser, AdamW.
        rate: its learning rate at the peak; by default that of `RATES`. It grows over the first twentieth of the steps,
            and falls as a cosine.
        weight_decay: of AdamW.
        batch: sequences at once on each GPU (or CPU process).
        accumulate: batches whose gradients make a step.
        length: tokens of a sequence; by default 512, or what the model can take.
        samples: sequences of the text that are trained on; by default as many as the steps take, so that each is seen
            once.
        held_out: sequences that are not trained on, to measure on before and after.
        seed: draws the text, its order, and the adapters.
        rank, alpha: of the adapters; what they add counts alpha / rank. By default alpha is twice the rank.
        lm_weight: what the language model's loss counts; by default 1, and with a dense teacher 0.
        kl_weight: what KL(dense ‖ model) counts, with a dense teacher.
        temperature: of that divergence.
        hidden_weight: what the distance of hidden states from the teacher's counts.
        dtype: what is computed in; weights and gradients stay float32. `auto` is bfloat16 on a GPU that has it, and
            float32 elsewhere.
        device: `auto`, `cpu` or `cuda`.
        checkpointing: compute each block once more on the way back instead of holding what is inside of it.
        save_every: steps between the points from which a run that was stopped goes on; 0 for none.
        trust_remote_code: run code that comes with the models.
    """

    method: str = "full"
    embeddings: bool = False
    steps: int = 500
    rate: float | None = None
    weight_decay: float = 0.0
    batch: int = 4
    accumulate: int = 1
    length: int | None = None
    samples: int | None = None
    held_out: int = 16
    seed: int = 0
    rank: int = 16
    alpha: float | None = None
    lm_weight: float | None = None
    kl_weight: float = 1.0
    temperature: float = 1.0
    hidden_weight: float = 0.0
    dtype: str = "auto"
    device: str = "auto"
    checkpointing: bool = False
    save_every: int = 200
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        for name in ("steps", "batch", "accumulate", "samples", "held_out", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if self.length is not None and self.length < 2:
            raise UserError(f"length must be at least 2, not {self.length}: a sequence of one token predicts nothing")
        if self.save_every < 0:
            raise UserError(f"save_every must be at least 0, not {self.save_every}")
        for name in ("rate", "temperature", "alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} must be greater than 0, not {value:g}")
        for name in ("lm_weight", "kl_weight", "hidden_weight", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UserError(f"{name} must be at least 0, not {value:g}")
        if self.embeddings and self.method != "full":
            raise UserError(f"embeddings are trained by the method full, not by {self.method}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(
                f"device {self.device!r} is not one of auto, cpu, cuda: which GPUs are seen is said by "
                "CUDA_VISIBLE_DEVICES"
            )

    @classmethod
    def read(cls, options: dict[str, Any]) -> Training:
        """From options by name; those that are None are left at their defaults.

        Raises:
            UserError: an unknown option, or a value that makes no sense.
        """
        return build(cls, {name: value for name, value in options.items() if value is not None}, "recover")

    def of_length(self, longest: int | None) -> Training:
        """The same with a length, for a model that takes so many tokens at the most, as far as that is known.

        Raises:
            UserError: the length is more than that.
        """
        if self.length is None:
            return replace(self, length=min(LENGTH, longest or LENGTH))
        if longest is not None and self.length > longest:
            raise UserError(f"length {self.length:,} is more than the {longest:,} tokens that the model takes")
        return self

    @property
    def peak(self) -> float:
        """The learning rate at the peak."""
        return RATES[self.method] if self.rate is None else self.rate

    @property
    def scale(self) -> float:
        """What adapters count."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def weights(self, distils: bool) -> dict[str, float]:
        """What each part of the loss counts: `lm`, `kl`, `hidden`.

        Raises:
            UserError: nothing is left to be minimised, or a part needs a teacher that is not there.
        """
        if not distils:
            if self.hidden_weight:
                raise UserError("hidden_weight is about a dense teacher, which is not given (distill)")
            if self.lm_weight == 0:
                raise UserError("without a dense teacher (distill) there is nothing but lm_weight, which is 0")
            return {"lm": 1.0 if self.lm_weight is None else self.lm_weight, "kl": 0.0, "hidden": 0.0}
        lm = 0.0 if self.lm_weight is None else self.lm_weight
        if not (lm or self.kl_weight or self.hidden_weight):
            raise UserError("lm_weight, kl_weight and hidden_weight are all 0: nothing is left to be minimised")
        return {"lm": lm, "kl": self.kl_weight, "hidden": self.hidden_weight}
