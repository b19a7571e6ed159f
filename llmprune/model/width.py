"""A model with narrower blocks: fewer channels, heads or experts in each, and a config that says so.

No architecture is known by name. What a number of the config governs is found by making the skeleton with a smaller
one: the tensors whose shapes change are what has to be cut. A linear whose inputs become fewer reads what the others
make, and which rows of these belong to which of its inputs is tried: a narrower block must return what the block as it
was returns when that linear does not look at the inputs that went, or when no token is sent to the experts that did.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import Failure, LLMPruneError, UserError
from llmprune.model import blocks
from llmprune.model.activations import Call
from llmprune.model.checkpoint import Checkpoint, LoadedBlock, Shape
from llmprune.model.config import altered
from llmprune.model.linears import Linear, find_linears
from llmprune.model.quiet import quiet
from llmprune.model.skeleton import make_skeleton
from llmprune.patterns import Columns

_ROW = 16
"""Bytes of which the rows of an expert's weights are a multiple, for kernels that run all experts at once."""

_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "top_k_experts")
"""What configs call the number of experts that a token is sent to."""

_EXPERTS = re.compile(r"^(?!.*(shared|per_tok)).*(^|_)experts$")
"""What configs call the number of experts that a router chooses among."""

_WIDTHS = re.compile(r"(^|_)(intermediate|ffn|inner|n_inner)(_|$)")
"""What configs call the number of channels of an MLP; which of them is one is tried."""


@dataclass(frozen=True)
class Cut:
    """What of a parameter goes with the units of a linear's inputs.

    Attributes:
        parameter: its full name.
        expert: its place in a fused parameter.
        dim: of the parameter; never the first one of an expert's part.
        places: (units, each) along that dimension.
    """

    parameter: str
    expert: int | None
    dim: int
    places: Tensor = field(repr=False)


@dataclass(frozen=True)
class Cuts:
    """What goes with the inputs of a linear, unit by unit; its own columns are part of it. Or with experts.

    Attributes:
        name: of the linear, or of the module that holds the experts.
        pattern: how many units stay.
        cuts: of parameters.
        groups: as many units stay in each of so many parts; routers that choose a group first need that.
    """

    name: str
    pattern: Columns
    cuts: tuple[Cut, ...]
    groups: int = 1

    def staying(self, scores: Tensor) -> Tensor:
        """(units,) bool, the units that stay by (units,) scores."""
        count = self.pattern.units // self.groups
        part = Columns(self.pattern.kept // self.groups, count)
        return torch.cat([part.of_scores(each) for each in scores.view(self.groups, count)])


@dataclass(frozen=True)
class Narrow:
    """The narrower model beside the one that it comes from.

    Attributes:
        checkpoint: the narrower model; its blocks are in no file until they are written.
        cuts: per block, by the names of the linears whose inputs go.
        experts: per block, by the names of the modules that hold them, what goes with experts.
        widths: by the config's name for it, the number that is less: what it was, and what it is.
    """

    checkpoint: Checkpoint
    cuts: tuple[Mapping[str, Cuts], ...]
    experts: tuple[Mapping[str, Cuts], ...]
    widths: Mapping[str, tuple[int, int]]

    @property
    def routed(self) -> bool:
        """Whether any experts go."""
        return any(map(len, self.experts))

    def of(self, number: int) -> dict[str, Cuts]:
        """All cuts of a block by their names."""
        return {**self.cuts[number], **self.experts[number]}

    def changed(self, number: int) -> set[str]:
        """The names of a block's parameters that are smaller than they were."""
        return {cut.parameter for cuts in self.of(number).values() for cut in cuts.cuts}

    def blank(self, number: int, block: LoadedBlock) -> LoadedBlock:
        """A block of the narrower model in which nothing is known yet of what becomes smaller.

        Args:
            block: the block as it was, loaded.
        """
        name = self.checkpoint.blocks[number]
        shapes = {key: value.shape for key, value in self.checkpoint.block(name).state_dict(prefix=f"{name}.").items()}
        state = {
            key: value if value.shape == shapes[key] else value.new_zeros(shapes[key])
            for key, value in block.state.items()
        }
        return self.checkpoint.place_block(number, state)

    def take(self, number: int, block: LoadedBlock, staying: Mapping[str, Tensor]) -> LoadedBlock:
        """A block of the narrower model with what stays of the weights.

        Args:
            block: the block as it was, loaded.
            staying: by the names of the cuts, (units,) bool.
        """
        state = dict(block.state)
        chosen: dict[tuple[str, int], dict[int | None, Tensor]] = {}
        for name, cuts in self.of(number).items():  # the experts themselves last, when all of them are smaller
            for cut in cuts.cuts:
                keep = chosen.setdefault((cut.parameter, cut.dim), {})
                size = state[cut.parameter].shape[cut.dim]
                stays = keep.setdefault(cut.expert, torch.ones(size, dtype=torch.bool))
                stays[cut.places[~staying[name]].flatten()] = False
        for (parameter, dim), keep in chosen.items():
            state[parameter] = _selected(state[parameter], dim, keep)
        return self.checkpoint.place_block(number, state)


def _selected(tensor: Tensor, dim: int, keep: Mapping[int | None, Tensor]) -> Tensor:
    """What stays of a tensor along a dimension, or of each expert's part of it."""
    if None in keep:
        return tensor.index_select(dim, keep[None].nonzero()[:, 0])
    shape = list(tensor.shape)
    shape[dim] = int(keep[0].sum())
    found = tensor.new_empty(shape)
    for expert, part in enumerate(found):
        part.copy_(tensor[expert].index_select(dim - 1, keep[expert].nonzero()[:, 0]))
    return found


def width_step(whole: Checkpoint) -> int:
    """What widths should be a multiple of, at the least, so that any kernel takes them."""
    return max(1, _ROW // whole.dtype.itemsize)


Target = Callable[[int], int]
"""How many of so many stay."""


def narrowed(
    whole: Checkpoint, channels: Target | None = None, heads: Target | None = None, experts: Target | None = None
) -> Narrow:
    """The model with fewer channels, heads or experts.

    Args:
        whole: nothing of it is loaded before or after.
        channels: how many of an MLP's channels stay; None for all.
        heads: how many of the heads that have keys and values of their own; their queries go with them.
        experts: how many of those that a router chooses among.

    Raises:
        UserError: it has none that can go, or its config cannot say so.
    """
    kind = type(whole.model).__name__
    sought = [*(_channels(whole, channels) if channels else ()), *(_heads(whole, heads) if heads else ())]
    sought += _experts(whole, experts) if experts else ()
    found: list[tuple[_Number, list[_Changed]]] = []
    for number in sought:
        changed = _governed(whole, number)
        if any(changed):
            if number.problem is not None:
                raise number.problem
            found.append((number, changed))
    for what, asked in (("channels", channels), ("heads", heads), ("experts", experts)):
        if asked is not None and not any(number.what == what for number, _ in found):
            why = "no number in its config says how many there are"
            if what == "heads":
                why += ", apart from the size of each"
            raise UserError(f"{kind} cannot have fewer {what}: {why}")
    changes = {key: value for number, _ in found for key, value in number.changes.items()}
    config, text = altered(whole, changes, ", ".join(number.words for number, _ in found))
    told = whole.shape.before if whole.shape is not None else tuple(whole.blocks)
    gone = whole.shape.gone if whole.shape is not None else ()
    shape = Shape(config, text, whole.index, told, gone, narrower=True)
    try:
        made = Checkpoint(whole.source, str(whole.device), str(whole.dtype).removeprefix("torch."), shape)
    except Failure as error:
        raise UserError(f"{kind} cannot be made narrower: {str(error).partition(';')[0]}") from None
    widths = {name: width for number, _ in found for name, width in number.widths.items()}
    routed: list[dict[str, Cuts]] = [{} for _ in whole.blocks]
    inner = [entry for entry in found if entry[0].what != "experts"]
    for number, changed in (entry for entry in found if entry[0].what == "experts"):
        for place, here in enumerate(changed):
            routed[place].update(_expert_cuts(whole, place, number, here))
    options = []
    for number, changed in inner:
        ways = [
            [_cuts(whole, place, number, here, layout) for place, here in enumerate(changed)] for layout in _LAYOUTS
        ]
        options.append(ways if _differ(*ways) else ways[:1])
    trial = _Trial(whole)
    for chosen in itertools.product(*options):
        cuts = tuple({key: one for way in chosen for key, one in way[place].items()} for place in range(len(routed)))
        narrow = Narrow(made, cuts, tuple(routed), widths)
        if not (why := trial.otherwise(narrow)):
            return narrow
    raise UserError(f"{kind} cannot be made narrower without changing what is left: {why}")


@dataclass(frozen=True)
class Unit:
    """What each unit less of a number of the config saves, over all blocks.

    Attributes:
        count: how many units there are.
        weights: that go with one.
        products: of a token with weights that go with one; of experts those that a token is sent to count.
    """

    count: int
    weights: float
    products: float


def channel_units(whole: Checkpoint) -> list[Unit]:
    """The widths of a model's MLPs, and what a channel of each is worth."""
    return _units(whole, _channels(whole, lambda count: count // 2))


def head_units(whole: Checkpoint) -> list[Unit]:
    """The heads that have keys and values of their own, and what each is worth; none where none can go."""
    return _units(whole, _heads(whole, lambda count: max(1, count // 2)))


def products(whole: Checkpoint) -> float:
    """Products of a token with the weights of a model, in its linears and the output layer."""
    head = whole.model.get_output_embeddings()
    last = 0.0 if head is None else float(head.weight.numel())
    return last + sum(_used(whole, shape, shape.numel()) for _, shape in _matrices(whole))


def _matrices(whole: Checkpoint) -> Iterator[tuple[str, torch.Size]]:
    for name in whole.blocks:
        held = {linear.parameter for linear in find_linears(whole.block(name), name)}
        state = whole.block(name).state_dict(prefix=f"{name}.")
        yield from ((parameter, state[parameter].shape) for parameter in sorted(held))


def _used(whole: Checkpoint, shape: torch.Size, numel: float) -> float:
    """The part of weights in a matrix, or in one of each expert, that a token is multiplied with."""
    if len(shape) < 3:
        return numel
    return numel * min(1.0, experts_per_token(whole.config.get_text_config()) / shape[0])


def _units(whole: Checkpoint, numbers: Iterable[_Number]) -> list[Unit]:
    matrices = dict(_matrices(whole))
    found = []
    for number in numbers:
        weights = used = 0.0
        for changed in _governed(whole, number):
            for name, (old, new) in changed.items():
                saved = math.prod(old) - math.prod(new)
                weights += saved
                used += _used(whole, matrices[name], saved) if name in matrices else 0
        gone = number.count - number.kept
        if weights and gone:
            found.append(Unit(number.count, weights / gone, used / gone))
    return found


@dataclass(frozen=True)
class _Number:
    """A number of the config, and what it is to be.

    Attributes:
        what: channels, heads or experts.
        count: how many units there are; `kept` how many stay.
        changes: of the config.
        sections: in how many parts a linear may hold what it makes of all units, by sizes relative to each other.
        widths: the numbers before and after.
        groups: see `Cuts`.
        problem: what is wrong with the number that is asked for, should it turn out to govern anything.
        unsure: the config does not say the number, which is a guess.
    """

    what: str
    count: int
    kept: int
    changes: Mapping[str, int]
    sections: tuple[int, ...]
    widths: Mapping[str, tuple[int, int]]
    groups: int = 1
    problem: UserError | None = None
    unsure: bool = False

    @property
    def words(self) -> str:
        return f"{self.kept} of {self.count} {self.what}"


def _channels(whole: Checkpoint, target: Target) -> Iterator[_Number]:
    text = whole.config.get_text_config()
    for name, value in sorted(vars(text).items()):
        if not _WIDTHS.search(name) or isinstance(value, bool) or not isinstance(value, int | None):
            continue
        if value is not None and value < 2:  # none of that kind
            continue
        count = 4 * whole.hidden_size if value is None else value  # what families mean that say nothing
        kept, problem = _target(target, count)
        widths = {name: (count, kept)}
        yield _Number("channels", count, kept, {name: kept}, (1, 1), widths, problem=problem, unsure=value is None)


def _heads(whole: Checkpoint, target: Target) -> Iterator[_Number]:
    text = whole.config.get_text_config()
    queries, grouped = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if not isinstance(queries, int) or not isinstance(grouped, int | None):  # not the same in every block
        return
    count = grouped or queries
    if count < 2 or queries % count:
        return
    each, (kept, problem) = queries // count, _target(target, count)
    size = getattr(text, "head_dim", None) or whole.hidden_size // queries
    changes = {"num_attention_heads": kept * each, "head_dim": size}
    widths = {"num_attention_heads": (queries, kept * each)}
    if grouped:
        changes["num_key_value_heads"] = kept
        widths["num_key_value_heads"] = (count, kept)
    yield _Number("heads", count, kept, changes, (each, 1, 1), widths, problem=problem)


def _target(target: Target, count: int) -> tuple[int, UserError | None]:
    """How many of so many stay; half of them where what is asked for makes no sense, and what is wrong with it."""
    try:
        return target(count), None
    except UserError as error:
        return count // 2, error


def _experts(whole: Checkpoint, target: Target) -> Iterator[_Number]:
    text = whole.config.get_text_config()
    at_once, groups = experts_per_token(text), int(getattr(text, "n_group", None) or 1)
    for name, count in sorted(vars(text).items()):
        if not _EXPERTS.search(name) or isinstance(count, bool) or not isinstance(count, int) or count < 2:
            continue
        kept, problem = _target(target, count)
        if problem is None and kept < at_once:
            problem = UserError(
                f"each token is sent to {at_once} experts, so that at least as many must stay, not {kept}"
            )
        if problem is None and kept % groups:
            problem = UserError(
                f"the router chooses among {groups} groups of experts, of which as many must go of each: {kept} that "
                f"stay do not divide by {groups}"
            )
        yield _Number("experts", count, kept, {name: kept}, (1,), {name: (count, kept)}, groups, problem)


def experts_per_token(config: Any) -> int:
    """How many experts a token is sent to, by the config of a decoder; 1 where it does not say."""
    return next((count for name in _CHOSEN if isinstance(count := getattr(config, name, None), int)), 1)


# -- what changes, and where ------------------------------------------------------------------------------------------


_Changed = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""The parameters of a block that become smaller: their shapes before and after."""


def _governed(whole: Checkpoint, number: _Number) -> list[_Changed]:
    """Per block, what a number of the config changes; nothing where it is a guess, and something else would."""
    try:
        config, _ = altered(whole, number.changes, number.words)
        return _changed(whole, config, number)
    except UserError:
        if number.unsure:
            return []
        if number.problem is not None:
            raise number.problem from None
        raise


def _changed(whole: Checkpoint, config: Any, number: _Number) -> list[_Changed]:
    """Per block, what a number of the config changes."""
    kind = type(whole.model).__name__
    try:
        with quiet():
            model = make_skeleton(config, whole.dtype, whole.source.trusted)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{kind} cannot have {number.words}: {reason}") from None
    before, after = whole.model.state_dict(), model.state_dict()
    if before.keys() != after.keys():
        raise UserError(f"{kind} cannot have {number.words}: it would have other weights")
    found: list[_Changed] = [{} for _ in whole.blocks]
    places = {f"{name}.": number for number, name in enumerate(whole.blocks)}
    stored = {name for keys in whole.block_keys for key in keys for name in whole.targets(key)}
    for name, old in before.items():
        shapes = tuple(old.shape), tuple(after[name].shape)
        if shapes[0] == shapes[1]:
            continue
        place = next((place for prefix, place in places.items() if name.startswith(prefix)), None)
        if place is None or name not in stored or len(shapes[0]) != len(shapes[1]):
            raise UserError(f"{kind} cannot have {number.words}: {name} would change with it")
        found[place][name] = shapes
    return found


_Layout = Callable[[int, int, tuple[int, ...]], Tensor]
"""The places (units, each) of all units, of which there are so many, along a dimension of some size.

A linear that makes several things side by side may hold them in sections; their sizes are relative to each other.
"""


@functools.lru_cache(4096)  # one for all experts
def _side_by_side(size: int, count: int, sections: tuple[int, ...] = ()) -> Tensor:
    """Each unit's lie together."""
    return torch.arange(size).view(count, -1)


@functools.lru_cache(4096)
def _in_sections(size: int, count: int, sections: tuple[int, ...]) -> Tensor:
    """One part of all units comes after the other: gate and up; queries, keys and values."""
    total = sum(sections)
    if len(sections) < 2 or size // count % total:
        return _side_by_side(size, count)
    parts, start = [], 0
    for share in sections:
        length = size * share // total
        parts.append(torch.arange(start, start + length).view(count, -1))
        start += length
    return torch.cat(parts, 1)


_LAYOUTS: tuple[_Layout, ...] = (_side_by_side, _in_sections)


def _differ(one: Sequence[Mapping[str, Cuts]], other: Sequence[Mapping[str, Cuts]]) -> bool:
    """Whether two ways to cut blocks are not the same."""

    def places(way: Sequence[Mapping[str, Cuts]]) -> list[int]:
        return [id(cut.places) for block in way for cuts in block.values() for cut in cuts.cuts]

    return places(one) != places(other)


def _cuts(whole: Checkpoint, place: int, number: _Number, changed: _Changed, layout: _Layout) -> dict[str, Cuts]:
    """What has to be cut of a block for one number of the config.

    Raises:
        UserError: what changes are not the inputs of linears and what makes them.
    """
    name = whole.blocks[place]
    linears = find_linears(whole.block(name), name)
    readers: dict[str, tuple[Linear, list[Cut]]] = {}
    makers: list[tuple[str, int | None, int, int]] = []
    for parameter, (old, new) in changed.items():
        held = [linear for linear in linears if linear.parameter == parameter]
        bias = [linear for linear in linears if linear.expert is not None and linear.bias_parameter == parameter]
        experts = sorted({linear.expert for linear in held or bias}, key=lambda expert: expert or 0) or [None]
        lead = int(experts[0] is not None)
        for dim in (dim for dim in range(len(old)) if old[dim] != new[dim]):
            _check_share(whole, parameter, old[dim], new[dim], number)
            if dim < lead:
                raise UserError(_no_cut(whole, parameter, number))
            inside = dim - lead
            inputs = bool(held) and inside == (0 if held[0].transposed else 1)
            for expert in experts:
                if not inputs:
                    makers.append((parameter, expert, dim, old[dim]))
                    continue
                mine = [linear for linear in held if linear.expert == expert]
                if len(mine) != 1:
                    raise UserError(_no_cut(whole, parameter, number))
                if expert is not None and new[dim] * whole.dtype.itemsize % _ROW:
                    raise UserError(
                        f"{number.words}: kernels for experts take widths that are a multiple of "
                        f"{_ROW // whole.dtype.itemsize}, and {new[dim]:,} is none"
                    )
                readers[mine[0].name] = mine[0], [Cut(parameter, expert, dim, _side_by_side(old[dim], number.count))]
    for parameter, expert, dim, size in makers:
        near = [key for key, (linear, _) in readers.items() if linear.expert == expert]
        if not near:
            raise UserError(_no_cut(whole, parameter, number))
        shared = {key: _shared(key, parameter) for key in near}
        best = [key for key in near if shared[key] == max(shared.values())]
        if len(best) != 1:
            raise UserError(_no_cut(whole, parameter, number))
        # What makes no more than one thing of each input has no sections.
        way = layout if size > readers[best[0]][0].shape[1] else _side_by_side
        readers[best[0]][1].append(Cut(parameter, expert, dim, way(size, number.count, number.sections)))
    if alone := next((key for key, (_, cuts) in readers.items() if len(cuts) < 2), None):
        raise UserError(_no_cut(whole, alone, number))
    pattern = Columns(number.kept, number.count, number.what)
    return {key: Cuts(key, pattern, tuple(cuts)) for key, (_, cuts) in readers.items()}


def _expert_cuts(whole: Checkpoint, place: int, number: _Number, changed: _Changed) -> dict[str, Cuts]:
    """What goes of a block with experts.

    Raises:
        UserError: what changes are not the experts and their router.
    """
    name = whole.blocks[place]
    held = {linear.module for linear in find_linears(whole.block(name), name) if linear.expert is not None}
    if not changed:
        return {}
    if len(held) != 1:
        raise UserError(_no_cut(whole, next(iter(changed)), number))
    found = []
    for parameter, (old, new) in changed.items():
        dims = [dim for dim in range(len(old)) if old[dim] != new[dim]]
        if len(dims) != 1 or old[dims[0]] != number.count:
            raise UserError(_no_cut(whole, parameter, number))
        found.append(Cut(parameter, None, dims[0], _side_by_side(number.count, number.count)))
    module = held.pop()
    return {module: Cuts(module, Columns(number.kept, number.count, "experts"), tuple(found), number.groups)}


def _shared(one: str, other: str) -> int:
    """How many modules two names have in common, from the outermost on."""
    pairs = enumerate(zip(one.split("."), other.split("."), strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(one.count("."), other.count(".")))


def _check_share(whole: Checkpoint, parameter: str, old: int, new: int, number: _Number) -> None:
    """See that a dimension holds the units, and loses as many as are asked."""
    if old % number.count or new != old // number.count * number.kept:
        raise UserError(_no_cut(whole, parameter, number))


def _no_cut(whole: Checkpoint, parameter: str, number: _Number) -> str:
    return (
        f"{type(whole.model).__name__} cannot have {number.words}: {parameter} changes with their number in a way that "
        "is not known"
    )


# -- is what is left what it was? -------------------------------------------------------------------------------------

_NEVER = 1e4
"""How far the scores of an expert that went are below all others."""

_APART = 8
"""How many times the rounding of the dtype a token may be apart, as a fraction of what a block adds to it."""

_ENOUGH = 0.75
"""The part of the tokens that must come out right: where two experts score alike, rounding sends a token elsewhere."""


class _Trial:
    """Runs narrower blocks, and blocks as they were that don't look at what went; the first of each kind."""

    def __init__(self, whole: Checkpoint) -> None:
        """Prepare what blocks are called with."""
        tokens = torch.zeros(1, blocks.probe_length(whole), dtype=torch.long)
        self._whole, self._calls = whole, blocks.start(whole, blocks.probe(whole), [tokens]).calls
        chance = torch.Generator().manual_seed(0)
        self._given = torch.randn((*tokens.shape, whole.hidden_size), generator=chance).to(whole.device, whole.dtype)

    def otherwise(self, narrow: Narrow) -> str:
        """In what a narrower block differs from one that does not look at what went; empty where none does."""
        try:
            for number in sorted(set(blocks.kinds(self._whole))):
                if narrow.of(number) and not self._same(narrow, number):
                    return f"{self._whole.blocks[number]} returns something else"
            return ""
        except LLMPruneError:
            raise
        except Exception as error:
            return f"a trial failed with {type(error).__name__}: {error}"
        finally:
            self._whole.unload()
            narrow.checkpoint.unload()

    def _same(self, narrow: Narrow, number: int) -> bool:
        call, given, chance = self._calls[number][0], self._given, torch.Generator().manual_seed(number)
        block = self._whole.load_block(number)
        linears = {linear.name: linear for linear in find_linears(block.module, block.name)}
        staying = {}
        for name, cuts in narrow.cuts[number].items():
            staying[name] = cuts.pattern.of_scores(torch.rand(cuts.pattern.units, generator=chance))
            weight = linears[name].view(block.state[linears[name].parameter])
            weight[:, cuts.pattern.inputs(weight.shape[1])[~staying[name]].flatten()] = 0
        block.refresh({linears[name].parameter for name in staying})
        for name, cuts in narrow.experts[number].items():
            staying[name] = cuts.staying(torch.rand(cuts.pattern.units, generator=chance))
            _send_nothing(block, cuts, ~staying[name], call, given)
        wanted = blocks.run(block.module, call, given).float()
        made = narrow.take(number, block, staying)
        found = blocks.run(made.module, call, given).float()
        self._whole.unload_block(number)
        narrow.checkpoint.unload_block(number)
        apart, size = (found - wanted).norm(dim=-1), (wanted - given.float()).norm(dim=-1)
        near = apart <= max(_APART * torch.finfo(self._whole.dtype).eps, 1e-4) * size
        return float(near.float().mean()) >= _ENOUGH


def _send_nothing(block: LoadedBlock, cuts: Cuts, gone: Tensor, call: Call, given: Tensor) -> None:
    """Change the router's rows for some experts of a loaded block so that it sends no token of a trial to them."""
    running = block.module.state_dict(prefix=f"{block.name}.", keep_vars=True)
    for cut in cuts.cuts:
        if cut.parameter.startswith(f"{cuts.name}."):
            continue
        rows = running[cut.parameter].data.movedim(cut.dim, 0)
        if rows.numel() == len(rows):  # what is added to the scores
            rows[gone] = -_NEVER
            continue
        seen: list[Tensor] = []
        router = block.module.get_submodule(cut.parameter.rpartition(".")[0].removeprefix(block.name).removeprefix("."))
        hook = router.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        try:
            blocks.run(block.module, call, given)
        finally:
            hook.remove()
        tokens = seen[0].flatten(0, -2).float()
        row = torch.linalg.lstsq(tokens, tokens.new_full((len(tokens), 1), -_NEVER)).solution[:, 0]
        rows[gone] = row.to(rows.dtype)
