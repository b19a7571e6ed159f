"""One look at the dense model, before it is pruned: what an allocation wants to know of each linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune import data, distributed, memory
from llmprune.allocate import Improver
from llmprune.allocation import Seen
from llmprune.answers import Allocated, Answers
from llmprune.model import blocks
from llmprune.model.checkpoint import Checkpoint
from llmprune.norms import Norms
from llmprune.plan import Plan
from llmprune.progress import Progress


def look(
    checkpoint: Checkpoint, plan: Plan, tokens: data.Tokens | None, progress: Progress, folder: Path | None = None
) -> dict[str, str]:
    """The targets of the linears that share the plan's budget, the same on every rank.

    Every block is in memory once, alone. Where inputs are asked for, each rank runs its share of the batches through
    all of them; else the blocks are dealt to the ranks.

    Args:
        tokens: the calibration tokens, where the allocation needs any.
        folder: where activations may be kept.

    Raises:
        UserError: the budget cannot be met.
    """
    budget, schedule = plan.budget, plan.schedule
    assert budget is not None
    activations = None
    if budget.allocator.needs == "norms":
        assert tokens is not None
        with progress.waiting("embedding the calibration text"):
            batches = distributed.mine(tokens.batches(schedule.batch))
            activations = blocks.start(checkpoint, plan.chain, batches, schedule.place, folder)
    mine = range(len(plan.blocks)) if activations is not None else distributed.share_of(len(plan.blocks))
    evidence: dict[str, Any] = {}
    norms: dict[str, Tensor] = {}
    for number in progress.over(mine, "looking at the dense blocks"):
        shared = [choice for choice in plan.blocks[number] if choice.allocated]
        block = checkpoint.load_block(number)
        if activations is not None:
            checkpoint.prefetch(number + 1)
            inputs = [entry for stage in schedule.stages[number] for entry in stage.inputs]
            pruned = [choice.linear for choice in plan.blocks[number] if choice.kept is None]
            sums = Norms(pruned, [entry.linears for entry in inputs], checkpoint.device)
            with sums.watching(block.module, block.name):
                blocks.advance(checkpoint, number, activations)
            norms.update(sums.finish())
            memory.give_back()
        if shared and (activations is None or distributed.is_first()):
            weights = [choice.linear.view(block.state[choice.linear.parameter]) for choice in shared]
            names = [choice.linear.name for choice in shared]
            seen = [
                Seen(weight, norms.get(name), checkpoint.device) for name, weight in zip(names, weights, strict=True)
            ]
            evidence.update(zip(names, budget.allocator.look(seen), strict=True))
            del weights, seen
        del block
        checkpoint.unload_block(number)
    if activations is None:
        evidence = {name: told for part in distributed.gather(evidence) for name, told in part.items()}
    targets: dict[str, str] = {}
    with distributed.first():
        if distributed.is_first():
            known = [replace(linear, evidence=evidence[linear.name]) for linear in plan.known]
            targets = dict(budget.allocator.allocate(known, budget.sparsity or 0.0))
    targets = distributed.share(targets)
    if isinstance(budget.allocator, Improver) and tokens is not None:
        del activations
        answers = Answers(checkpoint, plan.chain, tokens, budget.allocator.tokens)

        def measure(candidates: Sequence[Mapping[str, str]], part: Sequence[int]) -> list[float]:
            return answers.measure(Allocated(plan, norms, checkpoint.device, candidates), part)

        share, sequences = budget.sparsity or 0.0, answers.sequences
        better = budget.allocator.improve(plan.known, share, targets, measure, sequences, progress)
        targets = distributed.share(dict(better))
    return targets
