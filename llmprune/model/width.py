"""A model with narrower blocks: fewer channels, heads or experts in each, and a config that says so.

No architecture is known by name. What a number of the config governs is found by making the skeleton with a smaller
one: the tensors whose shapes change are what has to be cut. A linear whose inputs become fewer reads what the others
make, and which rows of these belong to which of its inputs is tried: a narrower block must return what the block as it
was returns when that linear does not look at the inputs that went, or when no token is sent to the experts that did.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    parts = [tensor[expert].index_select(dim - 1, keep[expert].nonzero()[:, 0]) for expert in range(len(tensor))]
    return torch.stack(parts)


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
        config, _ = altered(whole, number.changes, number.words)
        changed = _changed(whole, config, number)
        if any(changed):
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
    why = ""
    routed: list[dict[str, Cuts]] = [{} for _ in whole.blocks]
    inner = [entry for entry in found if entry[0].what != "experts"]
    for number, changed in (entry for entry in found if entry[0].what == "experts"):
        for place, here in enumerate(changed):
            routed[place].update(_expert_cuts(whole, place, number, here))
    for layouts in itertools.product((_side_by_side, _in_sections), repeat=len(inner)):
        cuts: list[dict[str, Cuts]] = [{} for _ in whole.blocks]
        for (number, changed), layout in zip(inner, layouts, strict=True):
            for place, here in enumerate(changed):
                cuts[place].update(_cuts(whole, place, number, here, layout))
        narrow = Narrow(made, tuple(cuts), tuple(routed), widths)
        if not (why := _otherwise(whole, narrow)):
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
        config, _ = altered(whole, number.changes, number.words)
        weights = used = 0.0
        for changed in _changed(whole, config, number):
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
    """

    what: str
    count: int
    kept: int
    changes: Mapping[str, int]
    sections: tuple[int, ...]
    widths: Mapping[str, tuple[int, int]]
    groups: int = 1

    @property
    def words(self) -> str:
        return f"{self.kept} of {self.count} {self.what}"


def _channels(whole: Checkpoint, target: Target) -> Iterator[_Number]:
    text = whole.config.get_text_config()
    for name, value in sorted(vars(text).items()):
        if not _WIDTHS.search(name) or isinstance(value, bool) or not isinstance(value, int | None):
            continue
        count = value or 4 * whole.hidden_size  # what families mean that say nothing
        kept = target(count)
        yield _Number("channels", count, kept, {name: kept}, (1, 1), {name: (count, kept)})


def _heads(whole: Checkpoint, target: Target) -> Iterator[_Number]:
    text = whole.config.get_text_config()
    queries = int(getattr(text, "num_attention_heads", None) or 0)
    if not queries:
        return
    grouped = getattr(text, "num_key_value_heads", None)
    count = int(grouped or queries)
    if queries % count:
        raise UserError(f"{type(whole.model).__name__} has {queries} heads for {count} of keys and values")
    each, kept = queries // count, target(count)
    size = getattr(text, "head_dim", None) or whole.hidden_size // queries
    changes = {"num_attention_heads": kept * each, "head_dim": size}
    widths = {"num_attention_heads": (queries, kept * each)}
    if grouped:
        changes["num_key_value_heads"] = kept
        widths["num_key_value_heads"] = (count, kept)
    yield _Number("heads", count, kept, changes, (each, 1, 1), widths)


def _experts(whole: Checkpoint, target: Target) -> Iterator[_Number]:
    text = whole.config.get_text_config()
    at_once, groups = experts_per_token(text), int(getattr(text, "n_group", None) or 1)
    for name, count in sorted(vars(text).items()):
        if not _EXPERTS.search(name) or isinstance(count, bool) or not isinstance(count, int) or count < 2:
            continue
        kept = target(count)
        if kept < at_once:
            raise UserError(f"each token is sent to {at_once} experts, so that at least as many must stay, not {kept}")
        if kept % groups:
            raise UserError(
                f"the router chooses among {groups} groups of experts, of which as many must go of each: {kept} that "
                f"stay do not divide by {groups}"
            )
        yield _Number("experts", count, kept, {name: kept}, (1,), {name: (count, kept)}, groups)


def experts_per_token(config: Any) -> int:
    """How many experts a token is sent to, by the config of a decoder; 1 where it does not say."""
    return next((count for name in _CHOSEN if isinstance(count := getattr(config, name, None), int)), 1)


# -- what changes, and where ------------------------------------------------------------------------------------------


_Changed = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""The parameters of a block that become smaller: their shapes before and after."""


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


_Layout = Callable[[int, _Number], Tensor]
"""The places (units, each) of all units along a dimension of some size, of what a linear makes."""


def _side_by_side(size: int, number: _Number) -> Tensor:
    """Each unit's lie together."""
    return torch.arange(size).view(number.count, -1)


def _in_sections(size: int, number: _Number) -> Tensor:
    """One part of all units comes after the other: gate and up; queries, keys and values."""
    total, one = sum(number.sections), size // number.count
    if len(number.sections) < 2 or one % total or one == 1:
        return _side_by_side(size, number)
    parts, start = [], 0
    for share in number.sections:
        length = size * share // total
        parts.append(torch.arange(start, start + length).view(number.count, -1))
        start += length
    return torch.cat(parts, 1)


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
                own = Cut(parameter, expert, dim, _side_by_side(old[dim], number))
                readers[mine[0].name] = mine[0], [own]
    for parameter, expert, dim, size in makers:
        near = [key for key, (linear, _) in readers.items() if linear.expert == expert]
        if not near:
            raise UserError(_no_cut(whole, parameter, number))
        shared = {key: _shared(key, parameter) for key in near}
        best = [key for key in near if shared[key] == max(shared.values())]
        if len(best) != 1:
            raise UserError(_no_cut(whole, parameter, number))
        readers[best[0]][1].append(Cut(parameter, expert, dim, layout(size, number)))
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
        if old[0] == new[0] or old[1:] != new[1:] or old[0] != number.count:
            raise UserError(_no_cut(whole, parameter, number))
        found.append(Cut(parameter, None, 0, _side_by_side(number.count, number)))
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
"""How many times the rounding of the dtype the answers of a block may be apart, as a fraction of them."""


def _otherwise(whole: Checkpoint, narrow: Narrow) -> str:
    """In what a narrower block differs from one that does not look at what went; the first of each kind is tried."""
    try:
        return _tried(whole, narrow)
    except LLMPruneError:
        raise
    except Exception as error:
        return f"a trial failed with {type(error).__name__}: {error}"
    finally:
        whole.unload()
        narrow.checkpoint.unload()


def _tried(whole: Checkpoint, narrow: Narrow) -> str:
    tokens = torch.zeros(1, blocks.probe_length(whole), dtype=torch.long)
    chain = blocks.probe(whole)
    calls = blocks.start(whole, chain, [tokens]).calls
    chance = torch.Generator().manual_seed(0)
    given = torch.randn((*tokens.shape, whole.hidden_size), generator=chance).to(whole.device, whole.dtype)
    for number in sorted(set(blocks.kinds(whole))):
        if not narrow.of(number):
            continue
        block = whole.load_block(number)
        linears = {linear.name: linear for linear in find_linears(block.module, block.name)}
        staying = {}
        for name, cuts in narrow.cuts[number].items():
            staying[name] = cuts.pattern.of_scores(torch.rand(cuts.pattern.units, generator=chance))
            weight = linears[name].view(block.state[linears[name].parameter])
            weight[:, cuts.pattern.inputs(weight.shape[1])[~staying[name]].flatten()] = 0
        block.refresh({linears[name].parameter for name in staying})
        for name, cuts in narrow.experts[number].items():
            staying[name] = cuts.staying(torch.rand(cuts.pattern.units, generator=chance))
            _send_nothing(block, cuts, ~staying[name], calls[number][0], given)
        wanted = blocks.run(block.module, calls[number][0], given).float()
        made = narrow.take(number, block, staying)
        found = blocks.run(made.module, calls[number][0], given).float()
        apart, size = (found - wanted).norm(), (wanted - given.float()).norm()
        if not bool(apart <= max(_APART * torch.finfo(whole.dtype).eps, 1e-4) * size):
            return f"{made.name} returns something else"
        whole.unload_block(number)
        narrow.checkpoint.unload_block(number)
    return ""


def _send_nothing(block: LoadedBlock, cuts: Cuts, gone: Tensor, call: Call, given: Tensor) -> None:
    """Change the router's rows for some experts of a loaded block so that it sends no token of a trial to them."""
    running = block.module.state_dict(prefix=f"{block.name}.", keep_vars=True)
    outside = [cut.parameter for cut in cuts.cuts if not cut.parameter.startswith(f"{cuts.name}.")]
    for parameter in outside:
        if running[parameter].ndim == 1:  # what is added to the scores
            running[parameter].data[gone] = -_NEVER
        else:
            owner = parameter.rpartition(".")[0].removeprefix(block.name).removeprefix(".")
            seen: list[Tensor] = []
            router = block.module.get_submodule(owner)
            hook = router.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
            try:
                blocks.run(block.module, call, given)
            finally:
                hook.remove()
            tokens = seen[0].flatten(0, -2).float()
            row = torch.linalg.lstsq(tokens, tokens.new_full((len(tokens), 1), -_NEVER)).solution[:, 0]
            running[parameter].data[gone] = row.to(running[parameter].dtype)
