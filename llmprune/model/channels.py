"""Finds input channels of linears that may change places, with the rows of other linears that make them.

What an MLP's last linear is given, channel by channel, comes from the same row of the linears before it; what an
attention's output is given comes from a row of its values. Where such rows and channels change places together, the
block returns what it did, and N:M groups come out of other channels.

No architecture is known by name: every linear's output is replaced by numbers of ours while the block runs, and the
inputs of the others tell what became of them.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.model.blocks import PROBE_TOKENS, replaced
from llmprune.model.linears import Linear, first_projection, is_fused

_PARTS = (1, 2, 3)
"""A linear may stand for so many side by side: gate and up; queries, keys and values."""

_MOST_ORBITS = 1024

_NONE, _MIXED = -1, -2


@dataclass(frozen=True)
class Channels:
    """Input channels of a linear that may change places.

    Attributes:
        linear: its name.
        units: (units, each) channels; those of one unit are made by one row of each maker, and go together.
        orbits: (units,) numbers; units of the same number may change places.
        makers: names of linears, and the row (units,) of each that makes a unit.
    """

    linear: str
    units: Tensor = field(repr=False)
    orbits: Tensor = field(repr=False)
    makers: tuple[tuple[str, Tensor], ...]

    def in_orbits(self) -> Iterator[Tensor]:
        """The units of each orbit, in the order of their channels."""
        for orbit in torch.unique(self.orbits):
            units = (self.orbits == orbit).nonzero()[:, 0]
            yield units[self.units[units, 0].argsort()]

    def renamed(self, old: str, new: str) -> Channels:
        """The same of another block."""
        makers = tuple((new + name.removeprefix(old), rows) for name, rows in self.makers)
        return replace(self, linear=new + self.linear.removeprefix(old), makers=makers)

    def parameters(self, linears: Mapping[str, Linear], state: Mapping[str, Tensor]) -> set[str]:
        """The names of the parameters that `rearrange` changes."""
        makers = [linears[name] for name, _ in self.makers]
        biases = {linear.bias_parameter for linear in makers if linear.bias(state) is not None}
        return {linears[self.linear].parameter, *(linear.parameter for linear in makers), *biases}

    def rearrange(self, order: Tensor, linears: Mapping[str, Linear], state: Mapping[str, Tensor]) -> None:
        """Let units change places in a block's weights and biases.

        Args:
            order: (units,) which unit comes to the place of each.
            linears: those of the block by name.
            state: its parameters by their full names; changed in place.
        """
        weight = linears[self.linear].view(state[linears[self.linear].parameter])
        weight[:, self.units.flatten()] = weight[:, self.units[order].flatten()]
        for name, rows in self.makers:
            linear = linears[name]
            weight = linear.view(state[linear.parameter])
            weight[rows] = weight[rows[order]]
            if (bias := linear.bias(state)) is not None:
                bias[rows] = bias[rows[order]]


def find_channels(block: nn.Module, name: str, linears: Sequence[Linear], run: Callable[[], Tensor]) -> list[Channels]:
    """The input channels of a block's linears that may change places.

    Args:
        block, name: the block, which is loaded, and its full name.
        linears: those of the block.
        run: runs the block on some tokens, and returns the hidden states.
    """
    modules = dict(block.named_modules(prefix=name))
    plain = {
        linear.name: (linear, modules[linear.module])
        for linear in linears
        if linear.expert is None and _is_plain(modules[linear.module])
    }
    fused = [module for module in modules.values() if is_fused(module)]
    found = list(_of_experts(modules, linears))
    with _disturbed(block, [*(module for _, module in plain.values()), *fused]), contextlib.suppress(_RunAgainError):
        bench = _Bench(plain, fused, run)
        found += [one for reader in plain if (one := _of(bench, reader)) is not None]
    return found


class _RunAgainError(Exception):
    """A linear is run more than once in a block, so that its inputs are no channels of one tensor."""


@contextlib.contextmanager
def _disturbed(block: nn.Module, known: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, all parameters but those of the known modules are others, each number by itself.

    What scales or shifts each channel by itself is seen then, also where a block happens to have the same for all.
    """
    own = {id(parameter) for module in known for parameter in module.parameters()}
    others = {key: value for key, value in block.named_parameters() if id(value) not in own}
    kept = {key: value.detach().clone() for key, value in others.items()}
    try:
        for key, value in others.items():
            noise = _values(key, 0, value.shape, torch.float32).to(value.device)
            value.data.copy_(value.float() + noise * (0.1 + 0.3 * value.float().abs()))
        yield
    finally:
        for key, value in others.items():
            value.data.copy_(kept[key])


def _is_plain(module: nn.Module) -> bool:
    """Whether a linear has nothing but a weight and a bias."""
    return {key for key, _ in module.named_parameters()} <= {"weight", "bias"} and not any(module.buffers())


def _of_experts(modules: Mapping[str, nn.Module], linears: Sequence[Linear]) -> Iterator[Channels]:
    """Those of fused experts: their layout is known, and what their gate does to its channels is tried."""
    parts: dict[str, dict[int, dict[str, Linear]]] = {}
    for linear in linears:
        if linear.expert is not None and is_fused(modules[linear.module]):
            experts = parts.setdefault(linear.module, {})
            experts.setdefault(linear.expert, {})[linear.name.rsplit(".", 1)[-1]] = linear
    for path, experts in parts.items():
        module: Any = modules[path]
        known = experts[min(experts)]
        width = known["down_proj"].shape[1]
        channels = torch.arange(width)
        if {"gate_proj", "up_proj"} <= known.keys():
            makers = [("gate_proj", channels), ("up_proj", channels)]
            columns = [channels, channels + width]
        elif "gate_up_proj" in known:
            makers = [("gate_up_proj", 2 * channels), ("gate_up_proj", 2 * channels + 1)]
            columns = [rows for _, rows in makers]
        else:
            makers, columns = [("up_proj", channels)], [channels]
        made = _values(path, 0, (PROBE_TOKENS, len(columns) * width), torch.float32)
        apply = module._apply_gate if first_projection(module) == "gate_up_proj" else module.act_fn
        order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
        moved = made.clone()
        for each in columns:
            moved[:, each] = made[:, each[order]]
        if bool(_near(apply(moved), apply(made)[:, order]).all()):
            for named in experts.values():
                whole = tuple((named[part].name, rows) for part, rows in makers)
                yield Channels(named["down_proj"].name, channels[:, None], torch.zeros(width, dtype=torch.long), whole)


@dataclass(frozen=True)
class _Part:
    """Some rows of a linear, and what they are made to return."""

    name: str
    start: int
    end: int


_RETURNED = ""
"""Stands for what the block returns where linears stand for what they are given."""

_Change = Callable[[Tensor, Tensor], Tensor]


class _Bench:
    """Runs a block of which the linears return what they are told to.

    Attributes:
        linears: those linears by name.
        base: what is seen when all return numbers by chance.
    """

    def __init__(
        self, linears: Mapping[str, tuple[Linear, nn.Module]], fused: Sequence[nn.Module], run: Callable[[], Tensor]
    ) -> None:
        self.linears = {name: linear for name, (linear, _) in linears.items()}
        self._modules = [*(module for _, module in linears.values()), *fused]
        self._run = run
        self._told: dict[_Part, dict[str, Tensor]] = {}
        self._values: dict[Any, Tensor] = {}
        self.base = self.see({})

    def see(self, changes: Mapping[str, _Change]) -> dict[str, Tensor]:
        """Run the block once.

        Args:
            changes: for some linears what to make of the numbers by chance (..., out), and of others like them.

        Returns:
            (tokens, in) what each linear that was run was given, by name, and (tokens, hidden) what the block returned.

        Raises:
            _RunAgainError: a linear is run more than once.
        """
        seen: dict[str, Tensor] = {}

        def stand_in(name: str) -> Callable[[Tensor], Tensor]:
            def forward(given: Tensor) -> Tensor:
                if name in seen:
                    raise _RunAgainError
                seen[name] = given.detach().flatten(0, -2).clone()
                shape = (*given.shape[:-1], self.linears[name].shape[0])
                made, others = (self._numbers(name, kind, shape, given) for kind in (0, 1))
                return changes[name](made, others) if name in changes else made.clone()  # a block may add to it

            return forward

        def experts(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden.sin()  # which shows what becomes of the hidden states, and takes no time

        stand_ins = [*map(stand_in, self.linears)]
        stand_ins += [experts] * (len(self._modules) - len(stand_ins))
        with torch.no_grad(), replaced(self._modules, stand_ins):
            seen[_RETURNED] = self._run().flatten(0, -2).clone()
        return seen

    def _numbers(self, name: str, kind: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        key = (name, kind, shape, like.dtype)
        if key not in self._values:
            self._values[key] = _values(name, kind, shape, like.dtype).to(like.device)
        return self._values[key]

    def sources(self, part: _Part) -> dict[str, Tensor]:
        """Which row of a part makes each channel of what is seen, by name.

        Returns:
            (channels,) rows, _NONE where no row has to do with the channel, or _MIXED where several have.
        """
        if part not in self._told:
            self._told[part] = self._trace(part)
        return self._told[part]

    def _trace(self, part: _Part) -> dict[str, Tensor]:
        count = part.end - part.start
        rows = torch.arange(count)
        found = {name: torch.zeros(value.shape[1], dtype=torch.long) for name, value in self.base.items()}
        clear = {name: torch.ones_like(value, dtype=torch.bool) for name, value in found.items()}
        touched = {name: torch.zeros_like(value) for name, value in clear.items()}
        for bit in range(max(1, (count - 1).bit_length())):
            ones = (rows >> bit) & 1 == 1
            changed = [self._changed(part, ones), self._changed(part, ~ones)]
            for name in found:
                one, other = (each[name] for each in changed)
                clear[name] &= one ^ other
                touched[name] |= one | other
                found[name] += one.long() << bit
            if not any(bool(each.any()) for each in clear.values()):
                break  # all rows have been tried, and none makes anything by itself
        return {
            name: torch.where(clear[name], value + part.start, torch.where(touched[name], _MIXED, _NONE))
            for name, value in found.items()
        }

    def _changed(self, part: _Part, chosen: Tensor) -> dict[str, Tensor]:
        """Which channels of what is seen change when the chosen rows of a part return something else, by name."""

        def change(made: Tensor, others: Tensor) -> Tensor:
            made = made.clone()
            made[..., part.start : part.end][..., chosen] = others[..., part.start : part.end][..., chosen]
            return made

        seen = self.see({part.name: change})
        changed = {}
        for name, before in self.base.items():
            after = seen.get(name)
            if after is None or after.shape != before.shape:  # other tokens: the way through the block is another
                changed[name] = torch.ones(before.shape[1], dtype=torch.bool)
            else:
                changed[name] = (after != before).any(0).cpu()
        return changed


def _of(bench: _Bench, name: str) -> Channels | None:
    """Those of one linear."""
    if name not in bench.base:
        return None  # an expert that no token was sent to
    makers: list[_Part] = []
    for other in [known for known in bench.base if known not in (name, _RETURNED)]:
        parts = _parts(bench, other, name)
        if parts is None:
            return None
        makers += parts
    if not makers:
        return None
    for part in makers:
        if any(bool((told != _NONE).any()) for reader, told in bench.sources(part).items() if reader != name):
            return None
    made = torch.stack([bench.sources(part)[name] for part in makers], 1)
    rows, unit = torch.unique(made, dim=0, return_inverse=True)
    for part, each in zip(makers, rows.T, strict=True):
        if len(rows) != part.end - part.start or len(torch.unique(each)) != len(rows):
            return None
    alike = _alike(bench, name, makers)
    if alike is None or bool((unit.bincount() != len(unit) // len(rows)).any()):
        return None
    order = (unit * _MOST_ORBITS + alike).argsort(stable=True)
    units = order.view(len(rows), -1)
    orbits = torch.unique(alike[units], dim=0, return_inverse=True)[1]
    found = Channels(name, units, orbits, tuple((part.name, each) for part, each in zip(makers, rows.T, strict=True)))
    return found if len(torch.unique(orbits)) < len(orbits) and _holds(bench, found) else None


def _parts(bench: _Bench, source: str, reader: str) -> list[_Part] | None:
    """The parts of a linear that make a reader's input channels one by one, in as few as can be; None: only some."""
    count, width = bench.linears[source].shape[0], bench.linears[reader].shape[1]
    for number in _PARTS:
        size = count // number
        if size * number != count or width % size:
            continue
        parts = [_Part(source, place * size, (place + 1) * size) for place in range(number)]
        told = [bench.sources(part)[reader] >= 0 for part in parts]
        if all(bool(each.all()) or not bool(each.any()) for each in told) and any(map(bool, map(torch.any, told))):
            return [part for part, each in zip(parts, told, strict=True) if bool(each.any())]
    return None if bool((bench.sources(_Part(source, 0, count))[reader] >= 0).any()) else []


def _alike(bench: _Bench, name: str, makers: Sequence[_Part]) -> Tensor | None:
    """(in,) numbers of the input channels, the same where what is made of the makers' rows is the same.

    All rows of a maker return the same numbers for it.
    """
    spans: dict[str, list[_Part]] = {}
    for part in makers:
        spans.setdefault(part.name, []).append(part)

    def even(parts: Sequence[_Part]) -> _Change:
        def change(made: Tensor, others: Tensor) -> Tensor:
            made = made.clone()
            for part in parts:
                made[..., part.start : part.end] = made[..., part.start : part.start + 1]
            return made

        return change

    given = bench.see({source: even(parts) for source, parts in spans.items()})[name].cpu()
    numbers = torch.full((given.shape[1],), -1)
    for number in range(_MOST_ORBITS):
        left = (numbers < 0).nonzero()
        if not len(left):
            return numbers
        same = _near(given, given[:, left[0]]).all(0)
        numbers[same & (numbers < 0)] = number
    return None


def _holds(bench: _Bench, channels: Channels) -> bool:
    """Whether channels come out as they should when rows change places by chance."""
    order = by_chance(channels)
    moves: dict[str, Tensor] = {}
    for maker, rows in channels.makers:
        places = moves.setdefault(maker, torch.arange(bench.linears[maker].shape[0]))
        places[rows] = rows[order]

    def move(places: Tensor) -> _Change:
        return lambda made, others: made[..., places]

    before = bench.base[channels.linear]
    after = bench.see({maker: move(places) for maker, places in moves.items()})[channels.linear]
    if before.shape != after.shape:
        return False
    wanted = before.clone()
    wanted[:, channels.units.flatten()] = before[:, channels.units[order].flatten()]
    return bool(_near(after, wanted).all())


def by_chance(channels: Channels, seed: int = 0) -> Tensor:
    """(units,) an order by chance in which only units that may do so change places."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(len(channels.orbits))
    for units in channels.in_orbits():
        order[units] = units[torch.randperm(len(units), generator=generator)]
    return order


def _near(one: Tensor, other: Tensor) -> Tensor:
    """Equal but for what the order of sums makes of it in their dtype."""
    apart = (one.float() - other.float()).abs()
    size = torch.maximum(one.float().abs(), other.float().abs())
    return apart <= 4 * torch.finfo(one.dtype).eps * size.clamp(min=float(size.mean()))


def _values(name: str, kind: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Numbers by chance, the same for the same name, kind and shape."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind} {name}".encode()))
    return torch.randn(tuple(shape), generator=generator).to(dtype)
