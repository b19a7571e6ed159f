"""The numbers of a config that say how wide blocks are, what each of them governs, and what a unit of it is worth.

No architecture is known by name: the skeleton is made with a smaller number, and the tensors whose shapes change are
what it governs.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmprune.errors import UserError, first_line
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.config import altered
from llmprune.model.linears import find_linears
from llmprune.model.quiet import quiet
from llmprune.model.skeleton import make_skeleton

_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "top_k_experts")
"""What configs call the number of experts that a token is sent to."""

_EXPERTS = re.compile(r"^(?!.*(shared|per_tok)).*(^|_)experts$")
"""What configs call the number of experts that a router chooses among."""

_WIDTHS = re.compile(r"(^|_)(intermediate|ffn|inner|n_inner)(_|$)")
"""What configs call the number of channels of an MLP; which of them is one is tried."""


Target = Callable[[int], int]
"""How many of so many stay."""


@dataclass(frozen=True)
class Number:
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
        """For messages."""
        return f"{self.kept} of {self.count} {self.what}"


def numbers_of(whole: Checkpoint, what: str, target: Target) -> Iterator[tuple[Number, list[Changed]]]:
    """The numbers of a config that say how many channels, heads or experts there are, and what each governs, per block.

    Raises:
        UserError: what is asked for makes no sense for one, or something else would change with it.
    """
    for number in _SOUGHT[what](whole, target):
        changed = _governed(whole, number)
        if any(changed):
            if number.problem is not None:
                raise number.problem
            yield number, changed


def _channels(whole: Checkpoint, target: Target) -> Iterator[Number]:
    text = whole.config.get_text_config()
    for name, value in sorted(vars(text).items()):
        if not _WIDTHS.search(name) or isinstance(value, bool) or not isinstance(value, int | None):
            continue
        if value is not None and value < 2:  # none of that kind
            continue
        count = 4 * whole.hidden_size if value is None else value  # what families mean that say nothing
        kept, problem = _target(target, count)
        widths = {name: (count, kept)}
        yield Number("channels", count, kept, {name: kept}, (1, 1), widths, problem=problem, unsure=value is None)


def _heads(whole: Checkpoint, target: Target) -> Iterator[Number]:
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
    yield Number("heads", count, kept, changes, (each, 1, 1), widths, problem=problem)


def _target(target: Target, count: int) -> tuple[int, UserError | None]:
    """How many of so many stay; half of them where what is asked for makes no sense, and what is wrong with it."""
    try:
        return target(count), None
    except UserError as error:
        return count // 2, error


def _experts(whole: Checkpoint, target: Target) -> Iterator[Number]:
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
        yield Number("experts", count, kept, {name: kept}, (1,), {name: (count, kept)}, groups, problem)


_SOUGHT: dict[str, Callable[[Checkpoint, Target], Iterator[Number]]] = {
    "channels": _channels,
    "heads": _heads,
    "experts": _experts,
}


def experts_per_token(config: Any) -> int:
    """How many experts a token is sent to, by the config of a decoder; 1 where it does not say."""
    return next((count for name in _CHOSEN if isinstance(count := getattr(config, name, None), int)), 1)


Changed = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""The parameters of a block that become smaller: their shapes before and after."""


def _governed(whole: Checkpoint, number: Number) -> list[Changed]:
    """Per block, what a number of the config changes; nothing where it is a guess, and something else would."""
    try:
        config, _ = altered(whole, number.changes, number.words)
        return _changed(whole, config, number)
    except UserError as error:
        if number.unsure:
            return []
        if number.problem is not None:
            raise number.problem from None
        if number.what == "heads" and (counts := heads_that_can_go(whole, made=True)):
            raise UserError(
                f"{error}; of its {number.count} heads with keys and values {_listed(counts)} can go"
            ) from None
        raise


def _listed(counts: Sequence[int]) -> str:
    *most, last = map(str, counts)
    return f"{', '.join(most)} or {last}" if most else last


def _changed(whole: Checkpoint, config: Any, number: Number) -> list[Changed]:
    """Per block, what a number of the config changes."""
    kind = type(whole.model).__name__
    try:
        with quiet():
            model = make_skeleton(config, whole.dtype, whole.source.trusted)
    except Exception as error:
        raise UserError(f"{kind} cannot have {number.words}: {first_line(error)}") from None
    before, after = whole.model.state_dict(), model.state_dict()
    if before.keys() != after.keys():
        raise UserError(f"{kind} cannot have {number.words}: it would have other weights")
    found: list[Changed] = [{} for _ in whole.blocks]
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


# -- what a unit is worth ---------------------------------------------------------------------------------------------


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
    return _units(whole, "channels", lambda count: count // 2)


def head_units(whole: Checkpoint) -> list[Unit]:
    """The heads that have keys and values of their own, and what each is worth; none where none can go."""
    fewest = next(iter(heads_that_can_go(whole)), None)
    return _units(whole, "heads", lambda count: max(1, count // 2) if fewest is None else count - fewest)


def heads_that_can_go(whole: Checkpoint, made: bool = False) -> list[int]:
    """How many heads may go, of those that have keys and values of their own, as far as the config can say it.

    Args:
        made: each is tried by a model without any weights as well, which takes a while.
    """
    found = []
    for gone in range(1, min((number.count for number in _heads(whole, lambda count: count - 1)), default=1)):
        with contextlib.suppress(UserError):
            for number in _heads(whole, lambda count, gone=gone: count - gone):  # type: ignore[misc]
                config, _ = altered(whole, number.changes, number.words)
                if not made or any(_changed(whole, config, number)):
                    found.append(gone)
    return found


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


def _units(whole: Checkpoint, what: str, target: Target) -> list[Unit]:
    matrices = dict(_matrices(whole))
    found = []
    for number, changed in numbers_of(whole, what, target):
        saved = {name: math.prod(old) - math.prod(new) for block in changed for name, (old, new) in block.items()}
        used = sum(_used(whole, matrices[name], numel) for name, numel in saved.items() if name in matrices)
        gone = number.count - number.kept
        found.append(Unit(number.count, sum(saved.values()) / gone, used / gone))
    return found
