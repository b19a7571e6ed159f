"""Pruning in the course of training, as a callback for any Trainer."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from llmprune.errors import Failure, UserError, unknown
from llmprune.model.linears import Linear
from llmprune.patterns import NM, Pattern, Scope, keep_more, parse
from llmprune.recover.masks import (
    Keeper,
    Masks,
    check_training,
    read_beside,
    resumed_from,
    trained_linears,
    write_beside,
)

Saliency = Literal["magnitude", "wanda", "movement"]

FILE = "llmprune_gradual.safetensors"
"""Holds, in each of the Trainer's checkpoints, what pruning goes on from."""


def cubic(step: int, begin: int, end: int, initial: float, final: float) -> float:
    """The sparsity after a step: s_f + (s_i − s_f)(1 − (t − t₀)/(t₁ − t₀))³ (Zhu & Gupta, arXiv:1710.01878).

    Args:
        step: t, steps of the optimiser that are done.
        begin, end: t₀ and t₁ = t₀ + nΔt; before and after the sparsity stands still.
        initial, final: s_i and s_f.
    """
    if step >= end:
        return final
    left = 1 - max(0, step - begin) / (end - begin)
    return final + (initial - final) * left**3


class GradualPruning(TrainerCallback):  # type: ignore[misc]
    """Prunes a model while it is trained: more and more weights go, and then the masks are frozen.

    Every `every` steps each linear's mask is computed anew at the sparsity of the cubic schedule (arXiv:1710.01878).
    What is pruned stays pruned. N:M patterns are approached by pruning first the lowest of what they prune in the end.
    `Trainer(..., callbacks=[GradualPruning("2:4", saliency="movement")])`

    With `straight_through`, for N:M, the pattern holds from the first step instead, and masks are free until `end`
    (SR-STE, arXiv:2102.04010): the model computes with the pruned weights, the gradient passes straight through to
    dense ones that are kept beside them, and those that are pruned decay: W ← W − rate · (g + λ (1 − mask) ∘ W). The
    model itself holds the pruned weights at any time between two steps, so that what is evaluated or saved is what it
    will be. The decay is added after the Trainer has clipped the gradient.

    Between two checkpoints of the Trainer nothing is lost: masks, saliencies and dense weights are saved with each.

    Args:
        sparsity: what holds in the end: `2:4`, any N:M, `50%`, 0.5.
        scope: what an unstructured sparsity is counted over, `row` or `matrix`.
        saliency: `magnitude`, |W|; `wanda`, |W|·‖X‖₂ with the norms of a linear's inputs since the last update
            (arXiv:2306.11695); or `movement`, the sum of −W·∂L/∂W since training began (arXiv:2005.07683), of gradients
            as the optimiser gets them.
        begin, end: optimiser steps between which the sparsity grows; `end` is by default two thirds of all.
        every: steps from one update of the masks to the next; by default 10.
        initial: the sparsity at `begin`, in [0, 1).
        straight_through: SR-STE instead of the schedule.
        decay: its λ.
        ignore: globs of linears, by name, that are left dense.

    Raises:
        UserError: here or when training begins: a pattern that does not fit a linear, steps that don't fit the
            training, nothing to prune, `wanda` on fused experts, adapters of peft, a checkpoint that was saved with
            other options, a Trainer that takes back the weights of an earlier step in the end
            (`load_best_model_at_end`), or parameters that are dealt to processes (FSDP, DeepSpeed).
    """

    def __init__(
        self,
        sparsity: str | float | Pattern = "50%",
        *,
        scope: Scope = "row",
        saliency: Saliency = "magnitude",
        begin: int = 0,
        end: int | None = None,
        every: int | None = None,
        initial: float = 0.0,
        straight_through: bool = False,
        decay: float = 2e-4,
        ignore: Sequence[str] = (),
    ) -> None:
        self.pattern = parse(sparsity, scope)
        if saliency not in get_args(Saliency):
            raise unknown("saliency", saliency, get_args(Saliency))
        if straight_through and every is not None:
            raise UserError("straight_through chooses its masks anew at every step: leave every out")
        every = 10 if every is None else every
        if every < 1 or begin < 0 or (end is not None and end <= begin):
            raise UserError(f"0 ≤ begin < end and every ≥ 1 must hold: begin {begin}, end {end}, every {every}")
        if not 0 <= initial < self.pattern.sparsity:
            raise UserError(f"initial must lie in [0, {self.pattern.sparsity:g}), not {initial:g}")
        if initial and begin == 0:
            raise UserError("an initial sparsity is reached at begin, which must be at least 1: there is none before")
        if straight_through and not isinstance(self.pattern, NM):
            raise UserError(f"straight_through is for N:M patterns, not for {self.pattern}")
        if straight_through and (saliency != "magnitude" or initial or begin):
            raise UserError("straight_through goes by magnitude from the first step on: leave saliency, initial, begin")
        if decay < 0:
            raise UserError(f"decay must be at least 0, not {decay:g}")
        self.saliency, self.begin, self.end, self.every, self.initial = saliency, begin, end, every, initial
        self.straight_through, self.decay, self.ignore = straight_through, decay, tuple(ignore)
        self.masks: Masks = {}
        self._linears: list[Linear] = []
        self._parameters: dict[str, nn.Parameter] = {}
        self._keeper: Keeper | None = None
        self._scores: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        self._dense: dict[str, Tensor] = {}
        self._watching: list[Any] = []

    # -- the Trainer's events ----------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check all, and begin, or go on where the checkpoint was."""
        model = kwargs["model"]
        check_training(model, args, state)
        if args.load_best_model_at_end:
            raise UserError(
                "load_best_model_at_end takes back weights of a step with other masks: leave it out, and take "
                "one of the checkpoints after the last update of the masks"
            )
        if args.fp16 and not args.max_grad_norm and (self.straight_through or self.saliency == "movement"):
            raise UserError("in float16 gradients are seen as they are only where they are clipped: set max_grad_norm")
        if getattr(model, "peft_config", None):
            raise UserError("GradualPruning prunes weights that are trained, but of this model adapters are (peft)")
        self._find(model, state.max_steps)
        found = resumed_from(args, state)
        if found is None:
            self.masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in self._parameters.items()}
            if self.saliency == "movement":
                self._scores = {
                    name: torch.zeros_like(value, dtype=torch.float32) for name, value in self._parameters.items()
                }
            if self.straight_through:
                self._dense = {name: value.detach().clone() for name, value in self._parameters.items()}
        else:
            self._resume(found)
        if self.saliency == "wanda" and state.global_step < self._last:
            self._watch(model)
        if self.straight_through:
            self._prune_through()
        self._hold(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the gradients that the optimiser gets."""
        self._check_started()
        for name, score in self._scores.items():
            value = self._parameters[name]
            if value.grad is not None:
                # In float16 a step is skipped where a gradient is infinite.
                score.sub_(value.detach().float() * value.grad.float().nan_to_num(0, 0, 0))
        for name, dense in self._dense.items():
            value = self._parameters[name]
            with torch.no_grad():
                value.copy_(dense)
            if value.grad is not None:
                value.grad.add_(dense.masked_fill(self.masks[name], 0), alpha=self.decay)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the zeros; or prune what the step made of the dense weights."""
        if self._dense:
            for name, dense in self._dense.items():
                dense.copy_(self._parameters[name].detach())
            self._prune_through()
        elif self._keeper is not None:
            self._keeper.apply()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compute the masks anew where it is time for that."""
        step = int(state.global_step)
        if self.straight_through:
            if step == self._last:  # from now on the zeros are kept, and the dense weights are of no more use
                self._dense = {}
                self._hold(kwargs["model"])
            return
        if self.begin <= step <= self._last and ((step - self.begin) % self.every == 0 or step == self._last):
            self._update(cubic(step, self.begin, self._last, self.initial, self.pattern.sparsity))
            self._hold(kwargs["model"])
        if step == self._last:
            self._stop_watching()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save what goes on, beside the Trainer's checkpoint."""
        parts = {"mask": self.masks, "score": self._scores, "dense": self._dense, "norm": self._sums()}
        tensors = {f"{kind} {name}": value for kind, part in parts.items() for name, value in part.items()}
        write_beside(args, state, FILE, self._parameters, tensors, self._options())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model; its zeros are where they were promised.

        Raises:
            Failure: training ended before the masks were complete.
        """
        self._stop_watching()
        if self._keeper is not None:
            self._keeper.apply()
            self._keeper.release()
            self._keeper = None
        if state.global_step < self._last:
            raise Failure(
                f"training ended after {state.global_step} of the {self._last} steps in which {self.pattern} is reached"
            )
        for linear in self._linears:
            if not self.pattern.holds(linear.view(self._parameters[linear.parameter].detach())):
                raise Failure(f"{linear.name} does not hold {self.pattern} after training: please report this")

    # -- beginning ---------------------------------------------------------------------------------------------------

    def _find(self, model: nn.Module, steps: int) -> None:
        self._last = max(self.begin + 1, 2 * steps // 3) if self.end is None else self.end
        if self._last > steps:
            raise UserError(f"pruning ends after step {self._last}, but training has {steps}: lower begin or end")
        self._parameters = dict(model.named_parameters())
        self._linears = [
            linear
            for linear in trained_linears(model)
            if not any(fnmatch.fnmatchcase(linear.name, glob) for glob in self.ignore)
            and linear.parameter in self._parameters
            and self._parameters[linear.parameter].requires_grad
        ]
        if not self._linears:
            raise UserError("there is no linear that is trained and not ignored: nothing to prune")
        for linear in self._linears:
            if linear.shape[1] % self.pattern.group:
                raise UserError(
                    f"{self.pattern} needs in_features divisible by {self.pattern.group}; {linear.name} has "
                    f"{linear.shape[1]} (ignore)"
                )
            if self.saliency == "wanda" and linear.expert is not None:
                raise UserError(
                    f"wanda sees no inputs of single experts in training, such as {linear.name}: take magnitude or "
                    "movement, or ignore them"
                )
        self._parameters = {linear.parameter: self._parameters[linear.parameter] for linear in self._linears}

    def _resume(self, checkpoint: Path) -> None:
        if not (checkpoint / FILE).is_file():
            raise UserError(f"{checkpoint} was not saved by a training with GradualPruning: there is no {FILE} in it")
        parts: dict[str, dict[str, Tensor]] = {"mask": {}, "score": {}, "dense": {}, "norm": {}}
        for key, value in read_beside(checkpoint / FILE, self._parameters, self._options()).items():
            kind, _, name = key.partition(" ")
            parts[kind][name] = value
        here = {name: value.device for name, value in self._parameters.items()}
        self.masks = {name: value.to(here[name]) for name, value in parts["mask"].items()}
        self._scores = {name: value.to(here[name]) for name, value in parts["score"].items()}
        self._dense = {name: value.to(here[name]) for name, value in parts["dense"].items()}
        # The sum over all ranks was saved; it is summed again later, so that one of them has it.
        first = not dist.is_initialized() or dist.get_rank() == 0
        self._norms = {name: value if first else torch.zeros_like(value) for name, value in parts["norm"].items()}

    def _options(self) -> dict[str, Any]:
        """What has to be the same where training goes on, as JSON has it."""
        return {
            "sparsity": str(self.pattern),
            "scope": self.pattern.scope,
            "saliency": self.saliency,
            "begin": self.begin,
            "end": self._last,
            "every": self.every,
            "initial": self.initial,
            "straight_through": self.straight_through,
            "decay": self.decay,
            "ignore": list(self.ignore),
        }

    def _check_started(self) -> None:
        if not self._parameters:
            raise Failure("GradualPruning saw no beginning of the training: give it to the Trainer as a callback")

    # -- masks -------------------------------------------------------------------------------------------------------

    def _hold(self, model: nn.Module) -> None:
        """Keep the zeros of the masks; while they are free, only between two steps."""
        if self._keeper is not None:
            self._keeper.release()
            self._keeper = None
        if not self._dense:
            self._keeper = Keeper(model, {name: mask for name, mask in self.masks.items() if not bool(mask.all())})
            self._keeper.apply()

    @torch.no_grad()
    def _update(self, sparsity: float) -> None:
        part = sparsity / self.pattern.sparsity
        norms = {name: value.sqrt() for name, value in self._sums().items()}
        for linear in self._linears:
            mask = linear.view(self.masks[linear.parameter])
            weight = linear.view(self._parameters[linear.parameter]).float()
            if self.saliency == "movement":
                saliency = linear.view(self._scores[linear.parameter]).float()
            elif self.saliency == "wanda":
                if not bool(norms[linear.module].any()):
                    raise Failure(
                        f"{linear.name} saw no inputs other than 0 since the last update: take another saliency"
                    )
                saliency = weight.abs() * norms[linear.module].to(weight.device)
            else:
                saliency = weight.abs()
            # What is pruned goes first, so that a mask holds all that were before it.
            saliency = saliency.masked_fill(~mask, -torch.inf)
            mask.copy_(mask & keep_more(self.pattern, saliency, part))
        self._norms = {}

    @torch.no_grad()
    def _prune_through(self) -> None:
        """The model gets the pruned weights, by masks that are chosen anew of the dense ones."""
        for linear in self._linears:
            if linear.parameter in self._dense:
                dense = linear.view(self._dense[linear.parameter])
                linear.view(self.masks[linear.parameter]).copy_(self.pattern.keep(dense.float().abs()))
        for name, dense in self._dense.items():
            self._parameters[name].copy_(dense.masked_fill(~self.masks[name], 0))

    # -- the norms of inputs -----------------------------------------------------------------------------------------

    def _watch(self, model: nn.Module) -> None:
        for path in dict.fromkeys(linear.module for linear in self._linears):
            module = model.get_submodule(path)
            assert isinstance(module, nn.Linear | Conv1D)
            self._watching.append(module.register_forward_pre_hook(functools.partial(self._see, path)))

    @torch.no_grad()
    def _see(self, path: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Add up squares; a block that is computed once more on the way back counts twice, all of its inputs alike."""
        if module.training:
            squares = given[0].detach().float().square().flatten(0, -2).sum(0)
            self._norms[path] = squares + self._norms[path].to(squares.device) if path in self._norms else squares

    def _stop_watching(self) -> None:
        for hook in self._watching:
            hook.remove()
        self._watching, self._norms = [], {}

    def _sums(self) -> dict[str, Tensor]:
        """The squares of the inputs of all linears that are watched, summed over all processes; some may see none."""
        sums = {}
        for linear in self._linears if self._watching else ():
            device = self._parameters[linear.parameter].device
            own = self._norms.get(linear.module)
            sums[linear.module] = torch.zeros(linear.shape[1], device=device) if own is None else own.to(device).clone()
            if dist.is_initialized():
                dist.all_reduce(sums[linear.module])
        return sums
