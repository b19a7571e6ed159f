"""Channel permutation: lets the inputs of linears change places so that N:M groups lose less, folded into the weights.

Which may change places is found by `model/channels.py`. It is done to a block before anything else is: its weights are
put in another order, and it returns what it did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llmprune import distributed
from llmprune.errors import Failure
from llmprune.model import blocks
from llmprune.model.activations import Activations, Call
from llmprune.model.channels import Channels
from llmprune.model.checkpoint import LoadedBlock
from llmprune.model.linears import Linear
from llmprune.norms import Norms
from llmprune.patterns import NM

_ROWS = 1024
"""Rows of a weight that are looked at."""

_GROUPS = 512
"""Groups among which channels are dealt out at once."""

_ROUNDS, _FEW = 3, 64
"""About how often each place of the groups is dealt out; more often where there are few groups to exchange with."""


def rearrange(
    block: LoadedBlock,
    linears: Mapping[str, Linear],
    chosen: Sequence[tuple[Channels, NM]],
    calls: Sequence[Call],
    activations: Activations | None,
    device: torch.device,
) -> None:
    """Put the channels of a dense block in an order in which its N:M groups lose little.

    Args:
        linears: those of the block by name.
        chosen: what may change places, and the pattern that its linear will get.
        calls, activations: what this rank's batches of the calibration are; without them weights alone decide.
    """
    norms = _look(block, [linears[channels.linear] for channels, _ in chosen], calls, activations, device)
    changed: set[str] = set()
    for channels, pattern in chosen:
        order = None
        if distributed.is_first():
            linear = linears[channels.linear]
            weight = linear.view(block.state[linear.parameter])
            order = best_order(weight, norms.get(channels.linear), channels, pattern, device)
        order = distributed.share(order)
        assert order is not None
        channels.rearrange(order, linears, block.state)
        changed |= channels.parameters(linears, block.state)
    block.refresh(changed)


def _look(
    block: LoadedBlock,
    linears: Sequence[Linear],
    calls: Sequence[Call],
    activations: Activations | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """Norms of what the linears are given, over all batches of all ranks; none without activations."""
    if activations is None:
        return {}
    norms = Norms(linears, [[linear.name] for linear in linears], device)
    with norms.watching(block.module, block.name):
        for batch, call in enumerate(calls):
            blocks.run(block.module, call, activations.read(batch))
    found = norms.finish()
    for name, norm in found.items():
        if not bool(torch.isfinite(norm).all()):
            raise Failure(f"the calibration inputs of {name} hold NaN or infinite values; try --dtype float32")
    return found


def best_order(
    weight: Tensor, norms: Tensor | None, channels: Channels, pattern: NM, device: torch.device | str = "cpu"
) -> Tensor:
    """The order of units in which the groups of a pattern keep the most.

    What is kept is W_ij² ‖X_j‖², summed over the N largest of each group; a part of the rows stands for all. Norms are
    rounded to bfloat16, so that their last bits, which other ranks or batches change, lead to no other order.

    Args:
        weight: (out, in).
        norms: (in,) of the inputs; None for weights alone.
        device: where it is worked out.

    Returns:
        (units,) which unit comes to the place of each; only those of one orbit change places.
    """
    step = -(-len(weight) // _ROWS)
    scores = weight[::step].to(device, torch.float32).square()
    if norms is not None:
        scores = scores * norms.to(device, torch.bfloat16).float().square()
    order = torch.arange(len(channels.units))
    for units in _orbits(channels, pattern.m):
        stacked = torch.cat([scores[:, lane] for lane in channels.units[units].T])
        order[units] = units[deal(stacked, pattern.n, pattern.m)]
    return order


def moves(channels: Channels, pattern: NM) -> bool:
    """Whether any of the channels can come into other groups of a pattern."""
    return any(len(units) > pattern.m for units in _orbits(channels, pattern.m))


def _orbits(channels: Channels, m: int) -> Iterator[Tensor]:
    """The units of each orbit whose channels fill whole groups, in the order of their channels."""
    return (units for units in channels.in_orbits() if _whole(channels.units[units], m))


def _whole(places: Tensor, m: int) -> bool:
    """Whether the channels (units, each), unit by unit, fill whole groups, the same units in each."""
    if len(places) % m:
        return False
    groups = places.view(-1, m, places.shape[1])
    firsts = groups[:, :1]
    return bool((firsts % m == 0).all()) and torch.equal(groups, firsts + torch.arange(m)[None, :, None])


def deal(scores: Tensor, n: int, m: int) -> Tensor:
    """An order of channels in which groups of m keep much in their n largest scores, summed over rows.

    Channels are first dealt out by their sums, back and forth. Then, again and again, one of each group is taken out
    by chance, and these are dealt out anew in the best way there is (a linear sum assignment, as for RIA, ICLR 2024):
    a group keeps the n − 1 largest of its others, and the larger of their n-th and the new one.

    Args:
        scores: (rows, channels), not negative; the channels divide by m.

    Returns:
        (channels,) which channel comes to each place; never one that keeps less than the order as it is.
    """
    width = scores.shape[1]
    groups = width // m
    plain = torch.arange(width)
    if groups < 2 or n >= m:
        return plain
    ranked = scores.sum(0).argsort(descending=True, stable=True).cpu().view(m, groups)
    ranked[1::2] = ranked[1::2].flip(1)

    def value(order: Tensor) -> float:
        return kept(scores, order, n, m)

    found = max(plain, ranked.T.flatten(), key=value).view(groups, m)
    chance = torch.Generator().manual_seed(0)
    for _ in range(m * max(_ROUNDS, _FEW // groups)):
        found = found.gather(1, torch.rand(groups, m, generator=chance).argsort(1))  # another one of each stands first
        for some in torch.split(torch.randperm(groups, generator=chance), _GROUPS):
            _deal_again(scores, found, some, n)
    return max(plain, found.flatten(), key=value)


def _deal_again(scores: Tensor, found: Tensor, some: Tensor, n: int) -> None:
    """Deal out the first ones of some groups anew; `found` (groups, m) is changed in place."""
    from scipy.optimize import linear_sum_assignment  # tens of MB, for this alone

    firsts = found[some, 0]
    edge = scores[:, found[some, 1:]].topk(n, dim=-1).values[..., -1]
    candidates = scores[:, firsts]
    # Σ max(a, b) = (Σ a + Σ b + Σ |a − b|) / 2, where the sums of a and of b alone change nothing.
    gain = torch.cdist(candidates.T.contiguous(), edge.T.contiguous(), p=1)
    rows, columns = linear_sum_assignment(gain.double().cpu().numpy(), maximize=True)
    found[some[torch.from_numpy(columns)], 0] = firsts[torch.from_numpy(rows)]


def kept(scores: Tensor, order: Tensor, n: int, m: int) -> float:
    """What groups of m keep in their n largest scores, of channels in this order."""
    return float(scores[:, order].view(len(scores), -1, m).topk(n, dim=-1).values.sum(dtype=torch.float64))
