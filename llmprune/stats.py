"""What calibration learns about the inputs of a linear: one `LinearStats` for all linears that read the same tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from llmprune import distributed, memory
from llmprune.errors import SingularGram
from llmprune.matrix import HALVES, inverse, inverse_factor, is_definite, product, reverse
from llmprune.parts import by_rows, not_finite

Needs = Literal["nothing", "norms", "gram"]
LEVELS: tuple[Needs, ...] = ("nothing", "norms", "gram")

Factor = TypeVar("Factor")

SAMPLE_TOKENS = 256
"""Input rows kept for estimating a linear's relative error where no Gram is collected."""

PANEL = 256
"""Rows of a Gram that are multiplied at a time."""

_CACHED = 2**18
"""Inputs that a CPU turns into float32 at a time, few enough to stay in its caches until they are summed up."""

_TARGET_DAMPING = 0.01


class LinearStats:
    """Sums over the calibration inputs X (tokens, in) of one linear, or of several that share their input.

    Everything is multiplied in float32 on the device of the inputs. The products of batches are summed up in float64
    where the device has it, which rounds far below the last bit of what comes of it: that is the same in any order, on
    however many ranks.

    Attributes:
        features: in_features.
        needs: the most that any solver of these linears asks for.
        tokens: number of input rows seen.
        squares: (in,) sum over tokens of x².
        sums: (in,) sum over tokens of x.
        damping: the relative damping that the last factorisation really took, None before the first.
    """

    def __init__(
        self,
        features: int,
        needs: Needs,
        device: torch.device | str = "cpu",
        beside: int = 0,
    ) -> None:
        """Nothing is seen yet.

        Args:
            beside: features of what is taken in of the dense model beside the inputs, see `target`; 0 for nothing. A
                Gram is needed then.
        """
        self.features = features
        self.needs = needs
        self.tokens = 0
        self.squares = torch.zeros(features, device=device, dtype=sums_dtype(device))
        self.sums = torch.zeros(features, device=device, dtype=sums_dtype(device))
        self.damping: float | None = None
        self._lower = _Panels(features, device) if needs == "gram" else None
        self._gram: Tensor | None = None
        self._cross = torch.zeros(beside, features, device=device, dtype=sums_dtype(device)) if beside else None
        self._rows: list[Tensor] = []
        self._factor: tuple[object, Any] | None = None

    def add(self, inputs: Tensor, lacking: Tensor | None = None) -> None:
        """Take in a batch.

        Args:
            inputs: (..., in), of any float dtype.
            lacking: (..., beside) for the same tokens, what the dense model has more; see `target`.
        """
        x = inputs.reshape(-1, self.features)
        if len(x) == 0:
            return
        self.tokens += len(x)
        if self._cross is not None:
            if lacking is None:
                raise RuntimeError("nothing of the dense model was given")
            more, columns = lacking.reshape(len(x), -1).float().T.contiguous(), x.float().T.contiguous()
            for rows, sums in zip(torch.split(more, PANEL), torch.split(self._cross, PANEL), strict=True):
                sums += product(rows, columns)
            del more, columns
        if self._lower is not None:
            self.sums += x.sum(0, dtype=torch.float32)
            self._lower.add(x)
            return
        for rows in torch.split(x, max(1, _CACHED // self.features)) if x.device.type == "cpu" else (x,):
            values = rows.to(torch.float32, copy=True)
            self.sums += values.sum(0)
            self.squares += values.square_().sum(0)
        room = SAMPLE_TOKENS - sum(map(len, self._rows))
        if room > 0:
            step = max(1, len(x) // min(room, 32))
            self._rows.append(x[::step][:room].to(torch.float32, copy=True))

    def finish(self) -> None:
        """Sum up over the ranks, and make the sums ready for solving; no `add` may follow."""
        count = torch.tensor([self.tokens], device=self.squares.device)
        further = () if self._cross is None else (self._cross,)
        distributed.total(count, self.sums, self.squares if self._lower is None else self._lower.packed, *further)
        self.tokens, self.sums, self.squares = int(count), self.sums.float(), self.squares.float()
        if self._cross is not None:
            self._cross = self._cross.float()
        if self._lower is None:
            self._rows = [_of_all_ranks(self._rows, self.features, self.squares.device)] if self.tokens else []
            return
        self._gram, self._lower = self._lower.whole(), None
        self.squares = self._gram.diagonal().clone()

    @property
    def norms(self) -> Tensor:
        """(in,) ‖X_j‖₂, the norm of each input over all tokens."""
        return self.squares.sqrt()

    @property
    def means(self) -> Tensor:
        """(in,) the mean of each input over all tokens."""
        return self.sums / max(self.tokens, 1)

    @property
    def variances(self) -> Tensor:
        """(in,) the variance of each input over all tokens."""
        return (self.squares / max(self.tokens, 1) - self.means.square()).clamp_(min=0)

    @property
    def scale(self) -> float:
        """The mean of ‖X_j‖² over live inputs, which a relative damping is of; 1 where there are none."""
        live = ~self.dead
        return float(self.squares[live].mean()) if bool(live.any()) else 1.0

    @property
    def gram(self) -> Tensor:
        """(in, in) XᵀX. Only there when `needs` is "gram", after `finish`."""
        if self._gram is None:
            raise RuntimeError("no Gram was collected: the solver's `needs` must be 'gram'")
        return self._gram

    @property
    def dead(self) -> Tensor:
        """(in,) bool: inputs that were zero on every token."""
        return self.squares == 0

    @property
    def inverse_norms(self) -> Tensor:
        """(in,) 1/‖X_j‖₂, and 0 for dead inputs."""
        norms = self.norms
        return torch.where(norms > 0, 1 / norms, 0.0)

    def ranked(self, saliency: Tensor, weight: Tensor) -> Tensor:
        """A (rows, in) saliency, changed in place: weights of dead inputs are below all others, the smallest lowest."""
        dead = self.dead
        if bool(dead.any()):
            saliency[:, dead] = -1 / weight[:, dead].abs()
        return saliency

    def with_unseen(self, found: Tensor, dense: Tensor, keep: Tensor) -> Tensor:
        """(rows, in) weights that were found, with the dense ones of dead inputs where these are kept."""
        dead = self.dead
        if bool(dead.any()):  # nothing is known of what they do elsewhere
            found[:, dead] = torch.where(keep[:, dead], dense[:, dead], 0.0)
        return found

    def inverse_factor(self, damping: float) -> Tensor:
        """(in, in) the upper triangular U with (XᵀX + λI)⁻¹ = UᵀU and λ = damping · mean diagonal over live inputs.

        Dead inputs stand apart: of their rows and columns only the diagonal is not zero. A matrix that is not positive
        definite is damped ten times more, up to 1, first in float32 and then in float64; `damping` tells what was
        taken. Linears that share these statistics share what was made of the Gram last, by this or by the two below.

        Raises:
            SingularGram: no step succeeded; the message gives the tokens and the dampings tried.
        """
        return self._factorised(_inverse_upper, damping)

    def scaled_gram(self, damping: float) -> Tensor:
        """(in, in) S + damping · I, positive definite; S is the Gram of inputs that are scaled to a norm of one.

        A weight times the norm of its input is as large as its saliency for Wanda. The rows of dead inputs in S are
        zero. Damped further, shared and refused as `inverse_factor` is.
        """
        return self._factorised(_definite, damping)

    def scaled_inverse(self, damping: float, shift: float) -> Tensor:
        """(in, in) (S + (damping + shift) · I)⁻¹ with S as above. Damped further, shared and refused likewise."""
        return self._factorised(_scaled_inverse, damping, shift)

    def _factorised(self, factorise: Callable[..., Factor | None], damping: float, *further: float) -> Factor:
        """What `factorise(stats, damping, dtype, *further)` makes of the Gram, at the first step that succeeds."""
        asked = (factorise, damping, *further)
        if self._factor is not None and self._factor[0] == asked:
            known: Factor = self._factor[1]
            return known
        self._factor = None  # two at once take too much memory
        tried = [damping]
        while tried[-1] < 1:
            tried.append(min(1.0, 10 * tried[-1]))
        for dtype in (torch.float32, torch.float64):
            for relative in tried:
                found = factorise(self, relative, dtype, *further)
                if found is not None:
                    if 4 * self.features**2 >= memory.MUCH:
                        memory.give_back()  # what was held besides while it was factorised
                    self.damping = relative
                    self._factor = (asked, found)
                    return found
        raise SingularGram(
            f"the Gram of {self.tokens:,} tokens x {self.features:,} inputs is not positive definite with damping "
            f"{', '.join(f'{value:g}' for value in tried)} in float32 and float64; give it more calibration samples"
        )

    def target(self, weight: Tensor, share: float, rows: slice | None = None) -> Tensor:
        """T = W + share · E (XᵀX + λI)⁻¹, whose outputs on X are the nearest to those that would be right.

        Where X₀ − X was taken in, with X₀ what the dense model gives the linear, E = W (X₀−X)ᵀX, and T X is the best
        guess at W X₀ that a linear can make from X (asymmetric calibration, as of arXiv:2504.02692). Where the linear's
        output is added to hidden states H, those of the dense model are H₀, and H₀ + X₀Wᵀ − H − XWᵀ was taken in, E is
        its product with X: then H + T X is what comes nearest to the dense model's. λ is a hundredth of the mean
        diagonal.

        Args:
            weight: (rows, in) float32 dense weights W; not changed.
            share: of the way, from 0 to 1.
            rows: where outputs were taken in, which of them these are; None where inputs were.

        Raises:
            SingularGram: see `inverse_factor`.
        """
        if self._cross is None:
            raise RuntimeError("nothing of the dense model was taken in")
        upper = self.inverse_factor(_TARGET_DAMPING)
        lower = upper.T.contiguous()

        def moved(part: Tensor, lacking: Tensor) -> Tensor:
            return part + share * product(product(lacking, upper), lower)

        if rows is not None:
            return by_rows(moved, weight, self._cross[rows])
        cross = self._cross.T.contiguous()
        return by_rows(lambda part: moved(part, product(part, cross)), weight)

    def losses(self, dense: Tensor, pruned: Tensor) -> tuple[float, float] | None:
        """‖(Ŵ−W)X‖² and ‖WX‖² of (out, in) weights, exact from the Gram, else on the kept input rows.

        Their ratio is the relative error; that of more rows is the ratio of the sums. None when no inputs were seen.
        """
        if self.tokens == 0:
            return None
        change = pruned - dense
        if self._gram is not None:
            lost, total = (product(w, self._gram).mul_(w).sum() for w in (change, dense))
        else:
            x = torch.cat(self._rows)
            lost, total = (product(x, w).square_().sum() for w in (change, dense))
        return float(lost), float(total)

    def row_losses(self, dense: Tensor, pruned: Tensor) -> Tensor:
        """(out,) ‖(ŵ−w)X‖² of each row of (out, in) weights; there must be a Gram."""

        def lost(before: Tensor, after: Tensor) -> Tensor:
            change = after - before
            return product(change, self.gram).mul_(change).sum(1)

        return by_rows(lost, dense, pruned)

    def relative_error(self, dense: Tensor, pruned: Tensor) -> float | None:
        """‖(Ŵ−W)X‖² / ‖WX‖² of (out, in) weights; None when no inputs were seen."""
        losses = self.losses(dense, pruned)
        return None if losses is None else ratio(*losses)


def ratio(lost: float, total: float) -> float:
    """The relative error, by what is lost and what there was; rounding may leave a little less than nothing."""
    return max(lost / total, 0.0) if total > 0 else 0.0


def _of_all_ranks(rows: list[Tensor], features: int, device: torch.device) -> Tensor:
    """As many of each rank's rows (rows, in); where one has fewer there are zeros, which lose nothing."""
    if distributed.size() == 1:
        return torch.cat(rows)
    share = max(1, SAMPLE_TOKENS // distributed.size())
    mine = torch.cat([torch.empty(0, features, device=device), *rows])
    mine = mine[:: max(1, len(mine) // share)][:share]
    everything = torch.zeros(share * distributed.size(), features, device=device)
    everything[distributed.rank() * share :][: len(mine)] = mine
    distributed.total(everything)
    return everything


def sums_dtype(device: torch.device | str) -> torch.dtype:
    """What products of batches are summed up in."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


class _Panels:
    """A sum of XᵀX, of which only the panels on and below the diagonal are kept, because it is symmetric.

    They lie one after the other in memory that the whole matrix in float32 takes in the end: nothing moves elsewhere,
    and no pieces are left behind.

    Attributes:
        packed: all of them, in a row.
        panels: (rows, in) each, from the top.
    """

    def __init__(self, features: int, device: torch.device | str) -> None:
        """Nothing is added up yet."""
        ends = [*range(PANEL, features, PANEL), features]
        shapes = [(end - start, end) for start, end in zip([0, *ends], ends, strict=False)]
        sizes = [rows * width for rows, width in shapes]
        dtype, self._features = sums_dtype(device), features
        room = max(sum(sizes), -(-4 * features**2 // dtype.itemsize))
        self._memory = torch.zeros(room, device=device, dtype=dtype)
        self.packed = self._memory[: sum(sizes)]
        self.panels = [part.view(shape) for part, shape in zip(torch.split(self.packed, sizes), shapes, strict=True)]

    def add(self, x: Tensor) -> None:
        """Add XᵀX of (tokens, in) inputs.

        It is multiplied in float32; on a GPU, inputs in half precision are multiplied as they are, which is exact.
        """
        direct = x.device.type == "cuda" and x.dtype in HALVES and torch.version.hip is None
        columns = x.T if direct else x.float().T.contiguous()
        for panel in self.panels:
            end = panel.shape[1]
            rows = columns[end - len(panel) : end]
            if direct:
                panel += torch.mm(rows, columns[:end].T, out_dtype=torch.float32)
            else:
                panel += product(rows, columns[:end])

    def whole(self) -> Tensor:
        """(in, in) float32 the matrix, in the same memory; this is the end of the sum."""
        count = self._features
        found = self._memory.view(torch.float32)[-count * count :].view(count, count)
        for panel in reversed(self.panels):  # at the end of the memory, so that no row falls onto one still to be moved
            end = panel.shape[1]
            found[end - len(panel) : end, :end] = panel.clone()
        for panel in self.panels:
            end = panel.shape[1]
            start = end - len(panel)
            corner = found[start:end, start:end].tril()
            found[start:end, start:end] = corner + corner.tril(-1).T
            found[:start, start:end] = found[start:end, :start].T
        return found


def damped_inverse(gram: Tensor, damping: float) -> Tensor:
    """(G + damping · I)⁻¹ of a positive definite (in, in) Gram; two more matrices of its size are held at a time.

    Raises:
        SingularGram: G is not positive definite.
    """
    found = _inverse(gram.clone(), damping)
    if found is None:
        raise SingularGram(f"a Gram of {len(gram):,} inputs is not positive definite with damping {damping:g}")
    return found


def _inverse_upper(stats: LinearStats, damping: float, dtype: torch.dtype) -> Tensor | None:
    """See `LinearStats.inverse_factor`; None when the damped Gram is not positive definite.

    With J the reversal of order, JAJ = LLᵀ gives A = RRᵀ for the upper triangular R = JLJ, hence A⁻¹ = R⁻ᵀR⁻¹ and
    U = R⁻¹ = JL⁻¹J: one factorisation and one triangular inverse. Besides the Gram, one matrix of its size is held on a
    CPU, and two at a time elsewhere.

    Args:
        dtype: what is computed in; the result is float32.
    """
    scale = stats.scale
    gram = stats.gram.flip(0, 1).to(dtype).div_(scale)
    gram.diagonal().add_(damping).masked_fill_(stats.dead.flip(0), 1.0)
    found = inverse_factor(gram)
    del gram
    if found is None:
        return None
    upper = reverse(found)
    return None if not_finite(upper) else upper.div_(scale**0.5).float()


def _definite(stats: LinearStats, damping: float, dtype: torch.dtype) -> Tensor | None:
    """See `LinearStats.scaled_gram`; None when it is not positive definite."""
    gram = _scaled(stats, dtype)
    gram.diagonal().add_(damping)
    return gram.float() if is_definite(gram.clone()) else None


def _scaled_inverse(stats: LinearStats, damping: float, dtype: torch.dtype, shift: float) -> Tensor | None:
    """See `LinearStats.scaled_inverse`; None when what is inverted is not positive definite."""
    found = _inverse(_scaled(stats, dtype), damping + shift)
    return None if found is None else found.float()


def _scaled(stats: LinearStats, dtype: torch.dtype) -> Tensor:
    """(in, in) the Gram of inputs that are scaled to a norm of one, in memory of its own."""
    norms = stats.inverse_norms.to(dtype)
    return stats.gram.to(dtype, copy=True).mul_(norms).mul_(norms[:, None])


def _inverse(gram: Tensor, damping: float) -> Tensor | None:
    """(G + damping · I)⁻¹, or None when that is not positive definite.

    Args:
        gram: (in, in) contiguous; it is overwritten.
    """
    gram.diagonal().add_(damping)
    found = inverse(gram)
    return None if found is None or not_finite(found) else found
