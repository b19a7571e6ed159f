"""The plan: every linear with its method and pattern, worked out and checked before any work. User errors end here."""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmprune import solvers
from llmprune.errors import UserError, unknown
from llmprune.model.blocks import Chain, kinds, probe
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.linears import Capture, Linear, find_linears
from llmprune.model.skeleton import decoder_prefix
from llmprune.patterns import NM, Unstructured, parse
from llmprune.recipe import Recipe
from llmprune.solvers import Solver

RUNTIME_BYTES = 450 * 2**20
"""What Python, torch and transformers take by themselves, measured on Linux with the CPU build of torch 2.13."""

DEFAULT_LENGTH = 2048

UNSEEN_EXPERTS = "experts that transformers does not let run one by one: NOT pruned"

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens that run through a block at once on a kind of device; whole sequences, at least one."""


@dataclass(frozen=True)
class Choice:
    """What is to happen to one linear.

    Attributes:
        linear: the linear.
        method: the method's name.
        solver: the method with its options.
        pattern: where zeros will stand.
        kept: why it is left dense instead; None when it is pruned.
        rule: the number of the rule that decided, from 1; None for the recipe's own choice.
    """

    linear: Linear
    method: str
    solver: Solver
    pattern: Unstructured | NM
    kept: str | None = None
    rule: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        blocks: per block, its linears with what happens to them.
        chain: how hidden states pass between blocks.
        weights: all weights of the checkpoint.
        others: weights that are in no linear: their kind to their number.
        batch: sequences per forward.
        length: tokens per calibration sequence.
        memory: estimated peak per phase, in bytes.
    """

    blocks: tuple[tuple[Choice, ...], ...]
    chain: Chain
    weights: int
    others: dict[str, int]
    batch: int
    length: int
    memory: dict[str, int]

    @property
    def choices(self) -> list[Choice]:
        """All linears in order."""
        return [choice for block in self.blocks for choice in block]

    @property
    def pruned(self) -> list[Choice]:
        """The linears that will be pruned."""
        return [choice for choice in self.choices if choice.kept is None]

    @property
    def covered(self) -> float:
        """The fraction of the checkpoint's weights that lie in pruned linears."""
        return sum(choice.linear.numel for choice in self.pruned) / max(self.weights, 1)

    @property
    def needs_data(self) -> bool:
        """Whether any method asks for calibration."""
        return any(choice.solver.needs != "nothing" for choice in self.pruned)

    @property
    def peak_memory(self) -> int:
        """The estimated peak in bytes."""
        return max(self.memory.values())

    @property
    def uncovered(self) -> dict[str, float]:
        """What is left dense, as fractions of all weights: reason or kind of weight to share."""
        left: dict[str, float] = {}
        for choice in self.choices:
            if choice.kept is not None:
                left[choice.kept] = left.get(choice.kept, 0) + choice.linear.numel / self.weights
        for kind, count in self.others.items():
            left[kind] = count / self.weights
        return dict(sorted(left.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "weights": self.weights,
            "covered": self.covered,
            "uncovered": self.uncovered,
            "memory": self.memory,
            "peak_memory": self.peak_memory,
            "batch": self.batch,
            "length": self.length,
            "linears": [
                {
                    "name": choice.linear.name,
                    "shape": list(choice.linear.shape),
                    "method": choice.method if choice.kept is None else None,
                    "pattern": str(choice.pattern) if choice.kept is None else None,
                    "kept": choice.kept,
                    "rule": choice.rule,
                }
                for choice in self.choices
            ],
        }


def make_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Decide for every linear, check shapes, and try the first block of each kind on a few tokens.

    Raises:
        UserError: a pattern that does not divide, a rule that matches nothing, a model that cannot be walked, ...
    """
    default = _resolve(recipe, None)
    rules = [_resolve(recipe, number) for number in range(len(recipe.rules))]
    called: dict[int, set[str]] = {}

    @contextlib.contextmanager
    def watch(number: int) -> Iterator[None]:
        name = checkpoint.blocks[number]
        linears = find_linears(checkpoint.block(name), name)
        capture = Capture(linears, {linear.name: "nothing" for linear in linears}, checkpoint.device)
        with capture.watching(checkpoint.block(name), name):
            yield
        modules = {linear.module for linear in linears if linear.name in capture.stats}
        called[number] = {module.removeprefix(name) for module in modules}

    chain = probe(checkpoint, watch)
    blocks = []
    for number, kind in enumerate(kinds(checkpoint)):
        checkpoint.check_revertible(number)
        name = checkpoint.blocks[number]
        choices = []
        for linear in find_linears(checkpoint.block(name), name):
            rule = next((place for place, entry in enumerate(recipe.rules) if matches(entry.match, linear.name)), None)
            method, solver, pattern = default if rule is None else rules[rule]
            kept = None
            if any(matches(pattern_, linear.name) for pattern_ in recipe.ignore):
                kept = "ignored"
            elif rule is not None and recipe.rules[rule].skip:
                kept = f"skipped by rule {rule + 1}"
            elif solver.needs != "nothing" and linear.module.removeprefix(name) not in called[kind]:
                kept = "its inputs cannot be seen: its weight is read without calling it"
            choices.append(Choice(linear, method, solver, pattern, kept, None if rule is None else rule + 1))
        blocks.append(tuple(choices))
    _check_names(checkpoint, recipe, blocks)
    _check_shapes(recipe, blocks)
    if not any(choice.kept is None for block in blocks for choice in block):
        raise UserError("nothing is left to prune: every linear is ignored, skipped or cannot be pruned")

    length = sequence_length(checkpoint, recipe.calibration.length)
    batch = min(recipe.calibration.samples, batch_size(checkpoint, length))
    weights = sum(info.numel for info in checkpoint.index.values())
    memory = _estimate(checkpoint, recipe, blocks, batch, length)
    return Plan(tuple(blocks), chain, weights, _others(checkpoint, blocks), batch, length, memory)


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


def batch_size(checkpoint: Checkpoint, length: int) -> int:
    """How many sequences of a length run through a block at once."""
    return max(1, BATCH_TOKENS.get(checkpoint.device.type, BATCH_TOKENS["cpu"]) // length)


def matches(pattern: str, name: str) -> bool:
    """Whether a glob, or `re:` and a regular expression, matches a whole name."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise UserError(f"{pattern!r} is not a valid regular expression: {error}") from None
    return fnmatch.fnmatchcase(name, pattern)


def _resolve(recipe: Recipe, number: int | None) -> tuple[str, Solver, Unstructured | NM]:
    rule = recipe.rules[number] if number is not None else None
    where = "" if number is None else f"rule {number + 1}: "
    try:
        method = rule.method if rule is not None and rule.method is not None else recipe.method
        solver = solvers.load(method)
        scope = (rule.scope if rule is not None else None) or recipe.scope or solver.scope
        sparsity = rule.sparsity if rule is not None and rule.sparsity is not None else recipe.sparsity
        return method if isinstance(method, str) else method["name"], solver, parse(sparsity, scope)  # type: ignore[arg-type]
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


def _check_shapes(recipe: Recipe, blocks: list[tuple[Choice, ...]]) -> None:
    for block in blocks:
        for choice in block:
            group, features = choice.pattern.group, choice.linear.shape[1]
            if choice.kept is None and features % group:
                by = f" (rule {choice.rule})" if choice.rule else ""
                raise UserError(
                    f"{choice.pattern} needs in_features divisible by {group}; "
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


def _estimate(
    checkpoint: Checkpoint, recipe: Recipe, blocks: list[tuple[Choice, ...]], batch: int, length: int
) -> dict[str, int]:
    """Peak bytes of each phase, from shapes alone; host and device together."""
    run = checkpoint.dtype.itemsize
    tokens = batch * length
    hidden = checkpoint.hidden_size
    data = any(choice.kept is None and choice.solver.needs != "nothing" for block in blocks for choice in block)
    flowing = recipe.calibration.samples * length * hidden * run if data else 0
    embed = sum(checkpoint.index[key].nbytes for key in checkpoint.outer_keys)
    outer = max((checkpoint.index[key].nbytes for key in checkpoint.outer_keys), default=0)
    largest = max(sum(checkpoint.index[key].nbytes for key in keys) for keys in checkpoint.block_keys)
    peak_capture = peak_solve = 0
    for number, block in enumerate(blocks):
        stored = sum(checkpoint.index[key].nbytes for key in checkpoint.block_keys[number])
        elements = sum(checkpoint.index[key].numel for key in checkpoint.block_keys[number])
        copied = checkpoint.device.type != "cpu" or any(
            checkpoint.index[key].dtype != checkpoint.dtype for key in checkpoint.block_keys[number]
        )
        loaded = stored + (elements * run if copied else 0)
        inputs: dict[str, tuple[int, bool]] = {}
        for choice in block:
            name = choice.linear.name
            # Linears of one parent and one width mostly share their input (q/k/v, gate/up).
            parent = name.rsplit(".", 1)[0]
            gram = choice.kept is None and choice.solver.needs == "gram"
            key = f"{parent}:{choice.linear.shape[1]}"
            inputs[key] = (choice.linear.shape[1], gram or inputs.get(key, (0, False))[1])
        grams = sum(width * width * 4 for width, gram in inputs.values() if gram)
        widest = max((choice.linear.shape for choice in block), key=lambda shape: shape[1], default=(0, 0))
        flow = tokens * run * (6 * hidden + 2 * sum({choice.linear.shape[0] for choice in block}))
        upcast = tokens * widest[1] * 4
        # The block before may still be on its way to the disk.
        peak_capture = max(peak_capture, stored + loaded + grams + (flow + upcast if data else 0))
        work = sum({4 * choice.linear.numel for choice in block if choice.kept is None} or {0})
        factor = 4 * widest[1] ** 2 * 4 if grams else 0
        peak_solve = max(peak_solve, loaded + grams + factor + 3 * work, 2 * stored)
    base = RUNTIME_BYTES + flowing
    return {
        "embed": base + (embed + tokens * hidden * run * 4 if data else 0),
        "capture": base + peak_capture,
        "solve": base + peak_solve,
        "copy": RUNTIME_BYTES + 2 * max(largest, outer),
    }
