"""OSSCAR: those units go whose loss the weights that stay can make up for best, and then they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.matrix import product
from llmprune.patterns import Columns, Pattern, Scope
from llmprune.solvers import Buffers
from llmprune.stats import LinearStats, Needs, damped_inverse

_WORTH = 1e-4
"""An exchange is worth it from this part of the output energy of an average input on."""

_CANDIDATES = 4
"""Units that went which are tried in an exchange: those that would bring the most if they came back."""


@dataclass(frozen=True)
class Solver:
    """Minimises ‖(Ŵ−W)X‖² over which columns of Ŵ are zero and over all others (as OSSCAR, arXiv:2403.12983).

    With H = (XᵀX + λI)⁻¹ of the inputs that stay and Ŵ the best weights for them, a unit U costs
    tr(Ŵ_U (H_UU)⁻¹ Ŵ_Uᵀ) when it goes and all others make up for it. The cheapest go, a few at a time, and Ŵ and H
    follow by low-rank updates. Then units that went come back for others, as long as the loss falls.

    Args:
        damping: λ as a fraction of each input's own ‖X_j‖².
        rounds: in about so many the units go.
        exchanges: the most that are made afterwards.
    """

    needs: ClassVar[Needs] = "gram"
    scope: ClassVar[Scope] = "matrix"
    updates: ClassVar[bool] = True
    row_independent: ClassVar[bool] = False
    products: ClassVar[float] = 12
    buffers: ClassVar[Buffers] = Buffers(factorising=3, factor=5, weights=4)

    damping: float = 0.01
    rounds: int = 128
    exchanges: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], not {self.damping}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, not {self.rounds}")
        if self.exchanges < 0:
            raise ValueError(f"exchanges must not be below 0, not {self.exchanges}")

    def solve(self, weight: Tensor, stats: LinearStats, pattern: Pattern) -> Tensor:
        assert isinstance(pattern, Columns)
        units = pattern.inputs(weight.shape[1]).to(weight.device)
        inverse = stats.scaled_inverse(self.damping, 0.0).clone()
        scaled = weight * stats.norms  # in a space in which all inputs have a norm of one, and dead ones none
        left = _Left(scaled, inverse, units)
        leaving = pattern.units - pattern.kept
        step = -(-leaving // self.rounds)
        for start in range(0, leaving, step):
            left.remove(left.costs().topk(min(step, leaving - start), largest=False).indices)
        gram = stats.scaled_gram(self.damping)
        for _ in range(self.exchanges):
            if not left.exchange(gram, scaled):
                break
        kept = units[left.stays].flatten()
        del left
        found = torch.zeros_like(weight)
        fitted = _fitted(gram, scaled, kept) * stats.inverse_norms[kept]
        found[:, kept] = torch.where(stats.dead[kept], weight[:, kept], fitted)  # of what never came nothing is known
        return found


class _Left:
    """What is left of a linear: the best weights (out, in) of the units that stay, and H of their inputs."""

    def __init__(self, weight: Tensor, inverse: Tensor, units: Tensor) -> None:
        self.weight, self.inverse, self.units = weight.clone(), inverse, units
        self.stays = torch.ones(len(units), dtype=torch.bool, device=weight.device)
        self._through: Tensor | None = None  # the Gram times H, once it is asked for

    def costs(self) -> Tensor:
        """(units,) what the loss grows by when a unit goes; infinite for those that are gone."""
        return _costs(self.weight, _blocks(self.inverse, self.units), self.units).masked_fill(~self.stays, torch.inf)

    def remove(self, gone: Tensor) -> None:
        """Let units go; all others make up for them."""
        inputs = self.units[gone].flatten()
        rows = self.inverse[inputs]  # (gone, in)
        share = torch.linalg.solve(rows[:, inputs], rows)
        for matrix in (self.weight, self._through):
            if matrix is not None:
                matrix.addmm_(matrix[:, inputs], share, alpha=-1)
                matrix[:, inputs] = 0
        self.inverse.addmm_(rows.T, share, alpha=-1)
        self.inverse[inputs] = 0
        self.inverse[:, inputs] = 0
        self.stays[gone] = False

    def exchange(self, gram: Tensor, dense: Tensor) -> bool:
        """Let one unit come back for another that goes, where the loss falls; whether it does."""
        gone = (~self.stays).nonzero()[:, 0]
        if not len(gone) or len(gone) == len(self.stays):
            return False
        if self._through is None:
            self._through = product(gram, self.inverse)
        back = self.units[gone]  # (gone, each)
        across = gram[back]  # (gone, each, in): what they have to do with all inputs
        through = self._through[back]  # likewise; zero where nothing stays
        lacking = product(dense - self.weight, across.flatten(0, 1)).T.reshape(*back.shape, -1)  # (gone, each, out)
        inside = torch.einsum("gai,gbi->gab", through, across)
        schur = gram[back[:, :, None], back[:, None, :]] - inside
        gains = (lacking * torch.linalg.solve(schur, lacking)).sum((1, 2))
        best: tuple[float, int, int] = (-_WORTH * float(dense.square().sum()) / dense.shape[1], -1, -1)
        for place in gains.topk(min(_CANDIDATES, len(gone))).indices.tolist():
            weight, inverse = self._with(lacking[place], through[place], schur[place])
            costs = _costs(weight, inverse, self.units).masked_fill(~self.stays, torch.inf)
            best = min(best, (float(costs.min() - gains[place]), place, int(costs.argmin())))
        _, place, other = best
        if place < 0:
            return False
        self._bring_back(gone[place], lacking[place], through[place], schur[place], gram)
        self.remove(torch.tensor([other], device=self.units.device))
        return True

    def _with(self, lacking: Tensor, through: Tensor, schur: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of those that stay, and the blocks of H, if a unit came back."""
        step = torch.linalg.solve(schur, lacking)  # (each, out): the weights that it would have
        ahead = through[:, self.units]  # (each, units, each')
        back = torch.linalg.solve(schur, ahead.flatten(1)).view_as(ahead)
        blocks = _blocks(self.inverse, self.units) + torch.einsum("aui,auj->uij", ahead, back)
        return self.weight - step.T @ through, blocks

    def _bring_back(self, unit: Tensor, lacking: Tensor, through: Tensor, schur: Tensor, gram: Tensor) -> None:
        inputs = self.units[unit]
        step = torch.linalg.solve(schur, lacking)
        change = through.clone()  # H grows by changeᵀ schur⁻¹ change
        change[:, inputs] = -torch.eye(len(inputs), device=through.device)
        back = torch.linalg.solve(schur, change)
        self.weight.addmm_(step.T, change, alpha=-1)
        if self._through is not None:
            self._through.addmm_(product(gram, change), back)
        self.inverse.addmm_(change.T, back)
        self.stays[unit] = True


def _blocks(inverse: Tensor, units: Tensor) -> Tensor:
    """(units, each, each) H_UU of every unit; the identity where a unit is gone."""
    found = inverse[units[:, :, None], units[:, None, :]]
    empty = found.diagonal(dim1=1, dim2=2).sum(1) == 0
    found[empty] = torch.eye(units.shape[1], device=found.device)
    return found


def _costs(weight: Tensor, blocks: Tensor, units: Tensor) -> Tensor:
    """(units,) tr(Ŵ_U (H_UU)⁻¹ Ŵ_Uᵀ)."""
    if units.shape[1] == 1:
        return weight[:, units[:, 0]].square().sum(0) / blocks[:, 0, 0]
    parts = weight.T[units]  # (units, each, out)
    found: Tensor = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
    return found


def _fitted(gram: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    """(out, kept) the best weights of the inputs that stay, by the Gram itself and not by updates."""
    rows = gram[kept]
    return product(product(target, rows), damped_inverse(rows[:, kept], 0.0))
