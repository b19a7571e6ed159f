"""What a pruned model has to keep of the dense one's quality: `ppl+5%`, `kl<=0.05`, `agreement>=90%`, or a task.

How much of what a promise allows is spent is told on one scale for all of them: nothing by a model that is as good as
the dense one, 1 by one that just keeps the promise. On that scale several promises can be kept at once, and the place
where one stops to hold can be guessed from two points.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmprune.errors import UserError
from llmprune.report.comparison import Compared, Difference
from llmprune.report.record import Score

FORMS = (
    "ppl+5% (at most 5 % above the dense model's), ppl<=20, kl<=0.05 (nats a token), agreement>=90%, a task as in "
    "arc_easy-1se (no lower than the dense model's by more than one standard error), or arc_easy-0.02"
)

MANY = 1e6
"""What is spent by a model of which nothing can be told, or by one that loses where nothing is allowed."""

_NUMBER = r"\d+\.?\d*|\.\d+"
_RISE = re.compile(rf"(?:ppl|perplexity)\+({_NUMBER})%")
_BOUND = re.compile(rf"(ppl|perplexity|kl|agreement)(<=|>=)({_NUMBER})(%?)")
_TASK = re.compile(rf"([\w./-]+?)(?::([\w./-]+?))?(?:-({_NUMBER})se|-(\d*\.\d+))?")
_OWN = ("ppl", "perplexity", "kl", "agreement", "size")


@dataclass(frozen=True)
class Verdict:
    """Whether a model keeps a promise.

    Attributes:
        promise: as it was written.
        figure: what it is about: `perplexity`, `kl`, `agreement`, or a task and its metric.
        value: the model's; None where it has none that is finite.
        dense: the dense model's.
        bound: the worst value that keeps the promise.
        spent: how much of what the promise allows: 0 for a model as good as the dense one, 1 at the bound, below 0 for
            a better one.
    """

    promise: str
    figure: str
    value: float | None
    dense: float
    bound: float
    spent: float

    @property
    def holds(self) -> bool:
        """Whether it is kept."""
        return self.spent <= 1

    def __str__(self) -> str:
        form = ".2%" if self.figure == "agreement" else ".4g"
        side = "most" if self.bound > self.dense else "least"
        value = "not finite" if self.value is None else format(self.value, form)
        dense = "" if self.figure in ("kl", "agreement") else f", dense {self.dense:{form}}"
        return f"{self.figure} {value}, at {side} {self.bound:{form}}{dense}"


@dataclass(frozen=True)
class Promise:
    """What is promised of one figure.

    Attributes:
        written: as the user wrote it, without blanks.
        figure: `perplexity`, `kl`, `agreement`, or `task`.
        amount: what is allowed, in the unit.
        unit: `rise` (a fraction of the dense figure above it), `bound` (the figure itself), `drop` (below the dense
            figure; above it where lower is better), or `stderr` (the same, in standard errors of the paired
            difference).
        task, metric: of `task`; without a metric `acc` where the task has it, else its first.
    """

    written: str
    figure: Literal["perplexity", "kl", "agreement", "task"]
    amount: float
    unit: Literal["rise", "bound", "drop", "stderr"]
    task: str = ""
    metric: str | None = None

    @classmethod
    def read(cls, text: str) -> Promise:
        """Read a promise as a user writes it: see `FORMS`; a task alone is one within one standard error.

        Raises:
            UserError: it is none, or its number makes no sense.
        """
        written = "".join(str(text).split())
        if found := _RISE.fullmatch(written):
            return cls(written, "perplexity", _above_zero(written, float(found[1])) / 100, "rise")
        if found := _BOUND.fullmatch(written):
            return cls._bound(written, found[1], found[2], float(found[3]), bool(found[4]))
        if re.match(r"size\b", written):
            raise UserError(
                f"target {written}: zeros do not make the files smaller, a pruned checkpoint has as many bytes as the "
                "dense one: prune to a sparsity (`llmprune prune --sparsity 40%`), make a smaller model (`llmprune "
                "prune --params 60%`), or promise something about quality"
            )
        found = _TASK.fullmatch(written)
        if found is None or re.match(rf"(?:{'|'.join(_OWN)})(?![\w.])", written):
            raise UserError(f"target {text!r} is not understood: write {FORMS}")
        task, metric, errors, drop = found.groups()
        if drop is not None:
            return cls(written, "task", _above_zero(written, float(drop)), "drop", task, metric)
        amount = _above_zero(written, float(errors)) if errors is not None else 1.0
        return cls(written, "task", amount, "stderr", task, metric)

    @classmethod
    def _bound(cls, written: str, name: str, side: str, amount: float, percent: bool) -> Promise:
        if side != (">=" if name == "agreement" else "<="):
            better = "higher" if name == "agreement" else "lower"
            raise UserError(f"target {written}: {better} is better, so turn the sign around; write {FORMS}")
        if percent and name != "agreement":
            raise UserError(f"target {written}: {name} is bounded by a number and not by a share; write {FORMS}")
        if name == "agreement":
            amount = amount / 100 if percent else amount
            if not 0 < amount < 1:
                raise UserError(f"target {written}: the agreement must lie between 0% and 100%")
            return cls(written, "agreement", amount, "bound")
        return cls(written, "kl" if name == "kl" else "perplexity", _above_zero(written, amount), "bound")

    def judge(self, dense: Compared, model: Compared, differences: Sequence[Difference]) -> Verdict:
        """Whether a model keeps the promise.

        Args:
            dense, model: their figures; where these are the same, it is seen whether the promise can be kept at all.
            differences: between the two, see `side_by_side`.

        Raises:
            UserError: it cannot be told, or not even the dense model keeps it.
        """
        if self.figure == "task":
            return self._judge_task(dense, model, differences)
        if self.figure == "perplexity":
            assert dense.perplexity is not None
            first = dense.perplexity.value
            bound = first * (1 + self.amount) if self.unit == "rise" else self.amount
            if bound <= first:
                raise UserError(f"target {self.written}: the dense model itself has perplexity {dense.perplexity}")
            if model.perplexity is None:  # what it says is not finite
                return self._verdict("perplexity", None, first, bound, MANY)
            value = model.perplexity.value
            return self._verdict("perplexity", value, first, bound, math.log(value / first) / math.log(bound / first))
        apart = model.divergence  # the dense model has none from itself
        if apart is None and not model.dense:
            return self._verdict(self.figure, None, 0.0 if self.figure == "kl" else 1.0, self.amount, MANY)
        if self.figure == "kl":
            value = apart.kl if apart is not None else 0.0
            return self._verdict("kl", value, 0.0, self.amount, value / self.amount)
        value = apart.agreement if apart is not None else 1.0
        return self._verdict("agreement", value, 1.0, self.amount, (1 - value) / (1 - self.amount))

    def _judge_task(self, dense: Compared, model: Compared, differences: Sequence[Difference]) -> Verdict:
        first = self._score(dense.scores)
        place = first.task, first.metric, first.filter
        if first.higher_is_better is None:
            raise UserError(f"target {self.written}: lm-eval does not say whether {first.metric} is better when higher")
        name, sign = f"{first.task} {first.metric}", 1.0 if first.higher_is_better else -1.0
        found = [entry for entry in differences if (entry.task, entry.metric, entry.filter) == place]
        if not found:  # the model's figure is not finite
            return self._verdict(name, None, first.value, first.value, MANY)
        allowed = self.amount
        if self.unit == "stderr":
            if found[0].stderr is None:
                raise UserError(
                    f"target {self.written}: the noise of {name} is not known, as it is no mean over more than one "
                    f"document of its own: promise a drop, such as {self.task}-0.02"
                )
            allowed *= found[0].stderr
        lost = -sign * found[0].difference
        value = first.value + found[0].difference
        spent = lost / max(allowed, 1e-9) if lost > 0 or allowed > 0 else 0.0
        return self._verdict(name, value, first.value, first.value - sign * allowed, spent)

    def _score(self, scores: Sequence[Score]) -> Score:
        """The score that it is about."""
        own = [score for score in scores if score.task == self.task]
        if not own:
            raise UserError(f"target {self.written}: {self.task} has no figure of its own; name a single task")
        names = list(dict.fromkeys(score.metric for score in own))
        metric = self.metric if self.metric is not None else "acc" if "acc" in names else names[0]
        if metric not in names:
            raise UserError(f"target {self.written}: {self.task} has no figure {metric}; it has {', '.join(names)}")
        return next(score for score in own if score.metric == metric)

    def _verdict(self, figure: str, value: float | None, dense: float, bound: float, spent: float) -> Verdict:
        # What is at the bound keeps it, whatever the last bits of the division.
        at_bound = math.isclose(spent, 1, rel_tol=1e-9)
        return Verdict(self.written, figure, value, dense, bound, 1.0 if at_bound else min(spent, MANY))


def _above_zero(written: str, amount: float) -> float:
    if not amount > 0:
        raise UserError(f"target {written}: nothing is allowed, which no pruning keeps: give a number above 0")
    return amount
