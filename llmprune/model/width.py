"""A model with narrower blocks: fewer channels, heads or experts in each, and a config that says so.

A linear whose inputs become fewer reads what others make, and which rows of these belong to which of its inputs is
tried: a narrower block must return what the block as it was returns when that linear does not look at the inputs that
went, or when no token is sent to the experts that did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.errors import Failure, LLMPruneError, UserError
from llmprune.model import blocks
from llmprune.model.activations import Call
from llmprune.model.checkpoint import Checkpoint, LoadedBlock
from llmprune.model.config import altered
from llmprune.model.cuts import Cuts, expert_cuts, ways_to_cut
from llmprune.model.linears import find_linears
from llmprune.model.widths import Changed, Number, Target, numbers_of


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
    found = _sought(whole, {"channels": channels, "heads": heads, "experts": experts})
    made = _made(whole, [number for number, _ in found])
    routed: list[dict[str, Cuts]] = [{} for _ in whole.blocks]
    for number, changed in (entry for entry in found if entry[0].what == "experts"):
        for place, here in enumerate(changed):
            routed[place].update(expert_cuts(whole, place, number, here))
    widths = {name: width for number, _ in found for name, width in number.widths.items()}
    trial, why = _Trial(whole), ""
    for cuts in ways_to_cut(whole, [entry for entry in found if entry[0].what != "experts"]):
        narrow = Narrow(made, cuts, tuple(routed), widths)
        if not (why := trial.otherwise(narrow)):
            return narrow
    raise UserError(f"{kind} cannot be made narrower without changing what is left: {why}")


def untried(whole: Checkpoint, **targets: Target) -> Checkpoint:
    """The narrower model without any weights, of which nobody has seen whether it does what the whole one does.

    Args:
        **targets: as for `narrowed`.
    """
    return _made(whole, [number for number, _ in _sought(whole, targets)])


def _sought(whole: Checkpoint, targets: Mapping[str, Target | None]) -> list[tuple[Number, list[Changed]]]:
    """The numbers of the config that become smaller, and what each governs, per block."""
    found: list[tuple[Number, list[Changed]]] = []
    for what, target in targets.items():
        if target is not None:
            known = list(numbers_of(whole, what, target))
            if not known:
                why = ", apart from the size of each" if what == "heads" else ""
                raise UserError(
                    f"{type(whole.model).__name__} cannot have fewer {what}: no number in its config says how many "
                    f"there are{why}"
                )
            found += known
    return found


def _made(whole: Checkpoint, found: Sequence[Number]) -> Checkpoint:
    """The model of which these numbers are smaller; its blocks are in no file."""
    changes = {key: value for number in found for key, value in number.changes.items()}
    config, text = altered(whole, changes, ", ".join(number.words for number in found))
    try:
        return whole.reshaped(config, text, narrower=True)
    except Failure as error:
        kind = type(whole.model).__name__
        raise UserError(f"{kind} cannot be made narrower: {str(error).partition(';')[0]}") from None


# -- is what is left what it was? -------------------------------------------------------------------------------------

_NEVER = 1e4
"""How far the scores of an expert that went are below all others."""

_APART = 8
"""How many times the rounding of the dtype a token may be apart, as a fraction of what a block adds to it."""

_ENOUGH = 0.75
"""The part of the tokens that must come out right where there are experts: two that score alike change by rounding."""


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
        ties = any(linear.expert is not None for linear in linears.values())
        return float(near.float().mean()) >= (_ENOUGH if ties else 1)


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
