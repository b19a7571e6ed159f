"""Looks at the experts of a block, and chooses those that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmprune import distributed
from llmprune.errors import Failure
from llmprune.model import blocks
from llmprune.model.activations import Activations, Call
from llmprune.model.checkpoint import LoadedBlock
from llmprune.model.cuts import Cuts
from llmprune.model.linears import find_linears
from llmprune.model.watch import Watch
from llmprune.report.record import ExpertsRecord
from llmprune.structured.experts import Chooser, Seen


def choose_experts(
    block: LoadedBlock,
    routed: Mapping[str, Cuts],
    chooser: Chooser,
    calls: Sequence[Call],
    activations: Activations,
    device: torch.device,
) -> tuple[dict[str, Tensor], list[ExpertsRecord]]:
    """The experts of a block that stay, by the names of the modules that hold them; the same on every rank.

    Args:
        block: as it was, loaded.
        routed: what goes with experts.
        calls, activations: what this rank's batches of the calibration are.

    Returns:
        (experts,) bool for each module, and what is told of it.
    """
    looks = _Looks(block, routed, device)
    with looks.watching(block.module, block.name):
        for batch, call in enumerate(calls):
            blocks.run(block.module, call, activations.read(batch))
    staying, told = {}, []
    for name, cuts in routed.items():
        seen = looks.seen(name)
        scores = chooser.scores(seen)
        if not bool(torch.isfinite(scores).all()):
            raise Failure(f"what {name} returns holds NaN or infinite values; try --dtype float32")
        staying[name] = distributed.share(cuts.staying(scores))
        tokens = [int(count) for count in seen.tokens]
        told.append(ExpertsRecord.of(name, staying[name].nonzero()[:, 0].tolist(), tokens))
    return staying, told


class _Looks(Watch):
    """Adds up what experts make of the tokens that are sent to them, over all batches of all ranks."""

    def __init__(self, block: LoadedBlock, routed: Mapping[str, Cuts], device: torch.device) -> None:
        """Nothing is seen yet."""
        super().__init__(linear for linear in find_linears(block.module, block.name) if linear.module in routed)
        self._sums = {name: torch.zeros(3, cuts.pattern.units, dtype=torch.float64) for name, cuts in routed.items()}
        self._device = device

    def waits(self, names: object) -> bool:
        """Nothing of the inputs is of interest."""
        return False

    def returned(self, module: str, expert: int, output: Tensor, weights: Tensor) -> None:
        """Take in what an expert returns."""
        norms = output.float().norm(dim=-1)
        sums = self._sums[module][:, expert]
        sums[0] += len(output)
        sums[1] += float(norms.sum(dtype=torch.float64))
        sums[2] += float((norms * weights).sum(dtype=torch.float64))

    def seen(self, module: str) -> Seen:
        """All of it, summed up."""
        sums = self._sums[module].to(self._device)
        distributed.total(sums)
        return Seen(*sums.cpu())
