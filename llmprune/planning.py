"""Makes the plan from a recipe and a checkpoint: decided and checked before any work. User errors end here."""

from __future__ import annotations

import fnmatch
import functools
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from llmprune import allocate, data, distributed, named, solvers
from llmprune.after import read_after
from llmprune.allocate import Improver
from llmprune.allocation import target
from llmprune.budget import CHOOSE, PRUNE, Needs, Room, Schedule, Work, abreast, batch_size
from llmprune.errors import UserError, unknown
from llmprune.model.blocks import Chain, hidden_of, kinds, probe, probe_length
from llmprune.model.channels import Channels, find_channels
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.linears import find_linears
from llmprune.model.skeleton import decoder_prefix
from llmprune.model.survey import Survey
from llmprune.model.watch import Input
from llmprune.model.width import Narrow
from llmprune.patterns import NM, Unstructured, parse
from llmprune.plan import NOT_ASKED, UNSEEN, Budget, Choice, Plan, known_of, settled
from llmprune.recipe import AIM, DEFAULT_SPARSITY, Recipe
from llmprune.solvers import Solver
from llmprune.stats import LEVELS
from llmprune.structured import counts, experts, width
from llmprune.structured.depth import Shortening

DEFAULT_LENGTH = 2048

UNSEEN_EXPERTS = "experts that transformers does not let run one by one: NOT pruned"


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    had: Room,
    shortening: Shortening | None = None,
    narrow: Narrow | None = None,
    passes: bool = False,
) -> Plan:
    """Decide for every linear, check shapes, try the first block of each kind on a few tokens, and fit it into memory.

    Args:
        had: the memory that it is to fit into.
        shortening: the blocks that will be taken out of it before.
        narrow: what becomes of it where its blocks are to be narrower.
        passes: whether the calibration text goes through the dense model before.

    Raises:
        UserError: a pattern that does not divide, a rule that matches nothing, a model that cannot be walked, ...
    """
    if recipe.narrows:
        _check_narrowed(recipe)
    budget = _budget(recipe)
    by_file = budget is not None and budget.allocator.needs == "nothing"  # which may ask for anything
    unasked = recipe.sparsity is None and not by_file
    if unasked and narrow is None and all(rule.sparsity is None for rule in recipe.rules):
        _check_unasked(recipe)
    default = _resolve(recipe, None, budget)
    rules = [_resolve(recipe, number, budget) for number in range(len(recipe.rules))]
    chooser = width.load(recipe.width.by)
    methods = {name: solver for name, solver, _ in (default, *rules)}
    after = read_after(recipe, {named.name_of(recipe.width.by): chooser} if narrow is not None else methods)
    permutes = bool(recipe.permute) and (by_file or any(isinstance(entry[2], NM) for entry in (default, *rules)))
    chain, surveys, movable = _try(checkpoint, permutes)
    asked = recipe.calibration.asymmetric
    by_default = asked is None and narrow is None and checkpoint.shape is None
    blocks: list[tuple[Choice, ...]] = []
    writers: list[tuple[str, ...]] = []
    channels: list[tuple[Channels, ...]] = []
    for number, kind in enumerate(kinds(checkpoint)):
        survey, like = surveys[kind], checkpoint.blocks[kind]
        called = {name.removeprefix(like) for moment in survey.moments for group in moment for name in group}
        checkpoint.check_revertible(number)
        name = checkpoint.blocks[number]
        writers.append(tuple(name + known.removeprefix(like) for known in survey.writers))
        channels.append(tuple(one.renamed(like, name) for one in movable.get(kind, ())))
        choices = []
        for linear in find_linears(checkpoint.block(name), name):
            said = checkpoint.name_before(number, linear.name)
            rule = next((place for place, entry in enumerate(recipe.rules) if matches(entry.match, said)), None)
            method, solver, pattern = default if rule is None else rules[rule]
            kept = None
            if any(matches(pattern_, said) for pattern_ in recipe.ignore):
                kept = "ignored"
            elif rule is not None and recipe.rules[rule].skip:
                kept = f"skipped by rule {rule + 1}"
            own = rule is not None and recipe.rules[rule].sparsity is not None
            if kept is None and unasked and not own:
                kept = NOT_ASKED
            place = None if rule is None else rule + 1
            choice = Choice(linear, method, solver, pattern, after, kept, place, budget is not None and not own)
            if narrow is not None and (cuts := narrow.cuts[number].get(linear.name)) is not None:
                choice = Choice(linear, named.name_of(recipe.width.by), chooser, cuts.pattern, after)
            if kept is None and choice.needs != "nothing" and linear.name.removeprefix(name) not in called:
                choice = replace(choice, kept=UNSEEN)
                if narrow is not None and linear.name in narrow.cuts[number]:
                    raise UserError(f"{linear.name} cannot be made narrower by {choice.method}: {choice.kept}")
            aims = choice.fits and linear.expert is None and (not writers[number] or linear.name in writers[number])
            share = (AIM if by_default and after.reconstructors else asked or 0.0) if aims else 0.0
            choices.append(replace(choice, allocated=choice.allocated and choice.kept is None, asymmetric=share))
        blocks.append(tuple(choices))
    if checkpoint.shape is None:  # else it was done for the model as it was, and what went may have been meant
        _check_names(checkpoint, recipe, blocks)
    if budget is not None:
        if not any(choice.allocated for block in blocks for choice in block):
            raise UserError(f"allocation {budget.name} has nothing to allocate: each linear is left out, or has a rule")
        if budget.allocator.needs == "nothing":
            budget = replace(budget, targets=budget.allocator.allocate(known_of(blocks), budget.sparsity or 0.0))
            blocks = settled(blocks, budget)
    _check_shapes(budget, blocks)
    works = []
    lacking: dict[Unstructured, float] = {}
    for number, kind in enumerate(kinds(checkpoint)):
        survey, like, name = surveys[kind], checkpoint.blocks[kind], checkpoint.blocks[number]
        moments = [
            [[name + known.removeprefix(like) for known in group] for group in moment] for moment in survey.moments
        ]
        dense = survey.again or not recipe.calibration.true_sequential
        blocks[number] = _rounded(blocks[number], [group for moment in moments for group in moment], lacking)
        seen = _moments(blocks[number], moments, writers[number])
        works.append(_work(number, blocks[number], seen, survey, dense))
    if not unasked and not any(choice.kept is None for block in blocks for choice in block):
        raise UserError("nothing is left to prune: every linear is ignored, skipped or cannot be pruned")
    if asked and not any(choice.asymmetric and choice.kept is None for block in blocks for choice in block):
        raise UserError(
            "calibration.asymmetric changes what kept weights are fitted to, and nothing fits them here (experts are "
            "never fitted that way): take a method such as sparsegpt or alps, or add --reconstruct cg"
        )
    schedule, together = _schedule(checkpoint, recipe, blocks, works, budget, permutes, had, shortening, narrow, passes)
    others = _others(checkpoint, blocks)
    parts = tuple(blocks), chain, checkpoint.weights, others, schedule, had, budget, tuple(writers), tuple(channels)
    made = Plan(
        *parts, shortening, None, together, narrow, experts.load(recipe.experts.by), counts.ranking_of(recipe.width)
    )
    _check_permuted(made, recipe)
    return made


def _check_narrowed(recipe: Recipe) -> None:
    """See that nothing is asked for besides narrower blocks that would prune linears in another way.

    Raises:
        UserError: something is.
    """
    given = {
        "sparsity": recipe.sparsity,
        "rules": recipe.rules,
        "ignore": recipe.ignore,
        "scope": recipe.scope,
        "allocation": recipe.allocation != "uniform",
        "permute": recipe.permute is True,
        "refine": recipe.refine,
    }
    if recipe.width.hidden is not None and recipe.calibration.asymmetric:
        raise UserError(
            "calibration.asymmetric does not go together with width.hidden: the dense model has other hidden states. "
            "Leave it out (a --quality asks for it too), or take --reconstruct block, which fits blocks to these"
        )
    if found := [name for name, value in given.items() if value]:
        what = "experts" if not recipe.width.asks and recipe.width.hidden is None else "width"
        raise UserError(
            f"{found[0]} does not go together with {what}: all blocks get the same widths, and no linear is pruned in "
            "another way meanwhile. Leave it out, and prune the narrower model afterwards, which is one like any other"
        )


def _check_unasked(recipe: Recipe) -> None:
    """See that nothing is asked for that only comes with pruned linears, where none are.

    Raises:
        UserError: something is.
    """
    given = {
        "permute": recipe.permute,
        "refine": recipe.refine,
        "reconstruct": [name for name in map(named.name_of, recipe.reconstruct) if name != "block"],
        "calibration.asymmetric": recipe.calibration.asymmetric,
    }
    if found := [name for name, value in given.items() if value]:
        raise UserError(
            f"{found[0]} follows the pruning of linears, and no sparsity is asked for: say one (--sparsity 2:4), or "
            "leave it out (a --quality asks for it too)"
        )


def _try(checkpoint: Checkpoint, permutes: bool) -> tuple[Chain, dict[int, Survey], dict[int, list[Channels]]]:
    """Run the first block of each kind on a few tokens.

    Returns:
        How hidden states pass between blocks; by the numbers of those blocks how they run; and likewise, where channels
        are to change places, which of them may.
    """
    surveys: dict[int, Survey] = {}
    movable: dict[int, list[Channels]] = {}

    def study(number: int, run: Callable[[], Any]) -> Any:
        name = checkpoint.blocks[number]
        block = checkpoint.block(name)
        linears = find_linears(block, name)
        surveys[number] = Survey(linears, probe_length(checkpoint))
        if permutes:
            try:
                movable[number] = find_channels(block, name, linears, lambda: hidden_of(run()))
            except Exception as error:
                raise UserError(
                    f"permute: a trial of {name} to see which channels may change places failed with "
                    f"{type(error).__name__}: {error}; leave it out (--set permute=false)"
                ) from error
        with surveys[number].watching(block, name):
            return run()

    return probe(checkpoint, study), surveys, movable


def _schedule(
    checkpoint: Checkpoint,
    recipe: Recipe,
    blocks: Sequence[tuple[Choice, ...]],
    works: Sequence[Work],
    budget: Budget | None,
    permutes: bool,
    had: Room,
    shortening: Shortening | None,
    narrow: Narrow | None,
    passes: bool,
) -> tuple[Schedule, int]:
    """The work laid out so that it fits into memory, and how many shorter models may be measured together."""
    length = sequence_length(checkpoint, recipe.calibration.length)
    look = budget.allocator.needs if budget is not None else "nothing"
    pruned = [choice for block in blocks for choice in block if choice.kept is None]
    fits = [choice.after.block for block in blocks for choice in block if choice.fitted]
    fitted = max((fit.runs for fit in fits if fit is not None), default=0)
    calibrates = look == "norms" or fitted > 0 or any(choice.needs != "nothing" for choice in pruned)
    calibrates = calibrates or (narrow is not None and narrow.routed)
    text = None if recipe.evaluate.text is None else sequence_length(checkpoint, recipe.evaluate.length)
    samples = -(-recipe.calibration.samples // distributed.size())
    together = (0, 0)
    if budget is not None and isinstance(budget.allocator, Improver):
        sequences = data.sequences(budget.allocator.tokens, recipe.calibration.samples, length)
        mine = -(-sequences // distributed.size())
        together = mine, budget.allocator.together(mine, sequences)
    looked_at, drawn = 0, recipe.calibration.samples
    if shortening is not None and shortening.given is None:
        looked_at = -(-data.sequences(shortening.chooser.tokens, drawn, length) // distributed.size())
    source, evaluated = recipe.calibration.source, recipe.evaluate.text or ""
    needs = Needs(
        checkpoint,
        works,
        samples if calibrates or passes else 0,
        length,
        text,
        fitted=fitted,
        look=look,
        together=together,
        permuted=permutes,
        shortened=(looked_at, drawn),
        base=had.base,
        narrowed=narrow is not None,
        foresees=any(isinstance(choice.solver, width.Foreseeing) for choice in pruned),
        passes=passes,
        drawn=(source, data.size_of(source) if calibrates or passes or looked_at else 0),
        evaluated=(evaluated, data.size_of(evaluated, joined=True) if evaluated else 0),
    )
    before = had.batches.get(CHOOSE if shortening is not None or passes else PRUNE)
    before = None if before is None else min(samples, before)
    made = needs.schedule(min(samples, batch_size(checkpoint, length, fitted > 0)), had, before)
    return abreast(checkpoint, made, looked_at, had) if looked_at else (made, 1)


def _check_permuted(plan: Plan, recipe: Recipe) -> None:
    """See that a permutation that was asked for finds something to permute."""
    if recipe.permute is not True or any(map(plan.permuted, range(len(plan.blocks)))):
        return
    groups = any(isinstance(choice.pattern, NM) for choice in plan.pruned)
    why = (
        "no channels of this model's pruned linears can change places without changing what its blocks return"
        if groups
        else "only N:M patterns such as 2:4 have groups that it could make better, and no linear gets one"
    )
    raise UserError(f"permute has nothing to do: {why}; leave it out")


def _budget(recipe: Recipe) -> Budget | None:
    """How the recipe's sparsity is to be divided; None where it is not."""
    allocator, spec = allocate.load(recipe.allocation), recipe.allocation
    name = named.name_of(spec)
    if name == "uniform":
        return None
    if allocator.needs == "nothing":
        return Budget(str(getattr(allocator, "path", name)), allocator, None)
    patterns = tuple(
        pattern for text in getattr(allocator, "patterns", ()) if isinstance(pattern := target(text, "row"), NM)
    )
    if recipe.sparsity is None:
        raise UserError(
            f"allocation {name} divides a sparsity, and none is asked for: say one (--sparsity), or leave it out"
        )
    asked = parse(recipe.sparsity)
    if isinstance(asked, NM):
        raise UserError(
            f"allocation {name} divides a sparsity such as 40%, not {asked}: to choose which linears get {asked}, ask "
            f"for the sparsity of all together, and add --set 'allocation.patterns=[{asked}, dense]'"
        )
    return Budget(name, allocator, asked.sparsity, patterns)


def sequence_length(checkpoint: Checkpoint, asked: int | None) -> int:
    """The asked length, checked against what the model can take; by default 2048 or as much as it takes.

    Raises:
        UserError: the model takes less.
    """
    longest = checkpoint.max_length
    if asked is None:
        return min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    if longest is not None and asked > longest:
        raise UserError(
            f"sequences of {asked:,} tokens are longer than {checkpoint.source.name} can take ({longest:,}): "
            f"ask for at most that (--length {longest})"
        )
    return asked


def matches(pattern: str, name: str) -> bool:
    """Whether a glob, or `re:` and a regular expression, matches a whole name."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise UserError(f"{pattern!r} is not a valid regular expression: {error}") from None
    return fnmatch.fnmatchcase(name, pattern)


def _resolve(recipe: Recipe, number: int | None, budget: Budget | None) -> tuple[str, Solver, Unstructured | NM]:
    rule = recipe.rules[number] if number is not None else None
    where = "" if number is None else f"rule {number + 1}: "
    try:
        method = rule.method if rule is not None and rule.method is not None else recipe.method
        solver = solvers.load(method)
        scope = (rule.scope if rule is not None else None) or recipe.scope or solver.scope
        sparsity = rule.sparsity if rule is not None and rule.sparsity is not None else recipe.sparsity
        pattern = parse(sparsity if sparsity is not None else DEFAULT_SPARSITY, scope)  # type: ignore[arg-type]
        if budget is not None and (rule is None or rule.sparsity is None):
            if budget.patterns:
                pattern = budget.patterns[0]
            elif isinstance(pattern, NM):  # a plan file goes before it, and may ask for anything
                pattern = Unstructured(pattern.sparsity, scope)  # type: ignore[arg-type]
        return named.name_of(method), solver, pattern
    except UserError as error:
        raise UserError(f"{where}{error}") from None


def _check_names(checkpoint: Checkpoint, recipe: Recipe, blocks: list[tuple[Choice, ...]]) -> None:
    linears = [choice.linear.name for block in blocks for choice in block]
    modules = [name for name, _ in checkpoint.model.named_modules()]
    patterns = [("ignore", pattern) for pattern in recipe.ignore]
    patterns += [(f"rule {number}", rule.match) for number, rule in enumerate(recipe.rules, 1)]
    for where, pattern in patterns:
        # Outer modules (lm_head) may be named too; they are left alone anyway.
        known = linears if where != "ignore" else linears + modules
        if not any(matches(pattern, name) for name in known):
            raise unknown(f"name in {where}, it matches no linear:", pattern, {_tail(name) for name in linears})


def _tail(name: str) -> str:
    return f"*.{name.rsplit('.', 1)[-1]}"


def _check_shapes(budget: Budget | None, blocks: list[tuple[Choice, ...]]) -> None:
    for choice in (choice for block in blocks for choice in block if choice.kept is None):
        may = budget.patterns if choice.allocated and budget is not None and budget.patterns else (choice.pattern,)
        for pattern in may:
            group, features = pattern.group, choice.linear.shape[1]
            if features % group:
                by = f" (rule {choice.rule})" if choice.rule else ""
                raise UserError(
                    f"{pattern} needs in_features divisible by {group}; "
                    f"{choice.linear.name} has {features}{by}: "
                    f"leave it out with --ignore '{_tail(choice.linear.name)}', or choose another pattern"
                )


def _others(checkpoint: Checkpoint, blocks: list[tuple[Choice, ...]]) -> dict[str, int]:
    """Weights that no linear covers, told apart by where they are."""
    held = {choice.linear.parameter for block in blocks for choice in block}
    found: dict[str, int] = {}

    def add(kind: str, key: str) -> None:
        found[kind] = found.get(kind, 0) + checkpoint.index[key].numel

    for key in checkpoint.outer_keys:
        parameter = checkpoint.targets(key)[0]
        decoder = decoder_prefix(checkpoint.model)
        inside = parameter.startswith(decoder) or parameter.count(".") == 1
        part = parameter.removeprefix(decoder) if inside else ".".join(parameter.split(".")[:2])
        add(f"outside the blocks: {part}", key)
    for keys in checkpoint.block_keys:
        for key in keys:
            if not held.intersection(checkpoint.targets(key)):
                matrix = len(checkpoint.index[key].shape) > 1 and "expert" in key
                add(UNSEEN_EXPERTS if matrix else "in the blocks, but no linear: norms, biases, routers, ...", key)
    for key in checkpoint.unclaimed_keys:
        add("claimed by no module: copied as it is", key)
    return found


def _rounded(
    choices: Sequence[Choice], shared: Sequence[Sequence[str]], lacking: dict[Unstructured, float]
) -> tuple[Choice, ...]:
    """Round up in some linears what a row loses, so that as many zeros come about as are asked for over all of them.

    Args:
        shared: names of linears that share an input; they are rounded alike, so that they can be solved together.
        lacking: by sparsities as they are asked for, the zeros that the linears before these have too few.
    """
    place = {name: number for number, group in enumerate(shared) for name in group}
    alike: dict[tuple[Unstructured, int | str], list[int]] = {}
    for at, choice in enumerate(choices):
        pattern = choice.pattern
        if choice.kept is None and not choice.allocated and isinstance(pattern, Unstructured):
            alike.setdefault((pattern, place.get(choice.linear.name, choice.linear.name)), []).append(at)
    made = list(choices)
    for (pattern, _), group in alike.items():
        up, shapes = replace(pattern, up=True), [made[at].linear.shape for at in group]
        fewer, more = (sum(map(rule.count, shapes)) for rule in (pattern, up))
        short = lacking.get(pattern, 0.0) + pattern.sparsity * sum(rows * width for rows, width in shapes) - fewer
        goes = more > fewer and 2 * short >= more - fewer and all(up.count((1, width)) < width for _, width in shapes)
        lacking[pattern] = short - (more - fewer if goes else 0)
        for at in group if goes else ():
            made[at] = replace(made[at], pattern=up)
    return tuple(made)


def _moments(
    choices: Sequence[Choice], moments: Sequence[Sequence[Sequence[str]]], writers: Sequence[str]
) -> tuple[tuple[Input, ...], ...]:
    """What the linears that are pruned are given, by moments, in the order in which it comes about.

    Args:
        moments: names of linears in that order, those that share an input together. Linears that are in none of them,
            because their weight is read without calling them, come first: what they do may come before anything else.
    """
    pruned = {choice.linear.name: choice for choice in choices if choice.kept is None}
    known = {name for moment in moments for group in moment for name in group}
    found = []
    for moment in [[[name] for name in pruned if name not in known], *moments]:
        inputs = []
        for group in moment:
            if names := tuple(name for name in group if name in pruned):
                needs = max((pruned[name].needs for name in names), key=LEVELS.index)
                first = pruned[names[0]].linear
                stream, aims = first.name in writers, any(pruned[name].asymmetric for name in names)
                beside = first.shape[0 if stream else 1] if aims else 0
                inputs.append(Input(names, first.shape[1], needs, beside, stream))
        if inputs:
            found.append(tuple(inputs))
    return tuple(found)


def _work(
    number: int, choices: Sequence[Choice], moments: tuple[tuple[Input, ...], ...], survey: Survey, dense: bool
) -> Work:
    if dense and moments:
        moments = (tuple(entry for moment in moments for entry in moment),)
    chosen = {choice.linear.name: choice for choice in choices}
    rows, buffers = {}, {}
    for entry in (entry for moment in moments for entry in moment):
        counts = [chosen[name].linear.shape[0] for name in entry.linears]
        independent = all(chosen[name].row_independent for name in entry.linears)
        rows[entry] = sum(counts) if independent else max(counts)
        buffers[entry] = functools.reduce(operator.or_, (chosen[name].solver.buffers for name in entry.linears))
    widest = max((max(choice.linear.shape) for choice in choices), default=0)
    largest = max((choice.linear.numel for choice in choices), default=0)
    experts = (choice.linear for choice in choices if choice.linear.expert is not None)
    inside = max((part.shape[1] for part in experts if part.name.endswith(".down_proj")), default=0)
    after = max((choice.after.room for choice in choices), default=0)
    return Work(number, moments, rows, buffers, dense, survey.again, survey.held, widest, largest, inside, after)
