"""The loop over blocks: read this first.

`prune` makes a plan, draws the calibration tokens, and then, block by block, loads, captures, solves, propagates and
writes. At any time one block, its statistics and the activations between two blocks are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune import data, memory, solvers
from llmprune.errors import Failure, Interrupted, SingularGram
from llmprune.evaluate import perplexity
from llmprune.model import blocks
from llmprune.model.activations import Activations
from llmprune.model.attention import quick_attention
from llmprune.model.checkpoint import Checkpoint, LoadedBlock
from llmprune.model.linears import Capture, Input
from llmprune.model.source import Source, resolve
from llmprune.model.writer import Writer, check_out, fingerprint_files, writing
from llmprune.patterns import some_rows, zeros
from llmprune.plan import Choice, Plan, make_plan
from llmprune.progress import Clock, Progress, Silent
from llmprune.recipe import Recipe, assemble
from llmprune.report.record import BlockRecord, LinearRecord, Perplexity, Report, mask_sha256, versions
from llmprune.report.verify import compare
from llmprune.solvers import Solver
from llmprune.stats import LinearStats

FEW_TOKENS = 64
"""A linear that fewer calibration tokens reached is noted; where a Gram is needed, one with fewer than its inputs."""


def prune(
    model: str | Path,
    *,
    out: str | Path,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Prune a model and write the result as a plain Hugging Face checkpoint.

    Args:
        model: a Hub name (`owner/name`, `owner/name@revision`), a folder, or a `.gguf` file.
        out: the folder to write. An unfinished run of the same request is gone on with; any other is refused.
        recipe: a `Recipe`, plain data, or a YAML file.
        restart: do away with an earlier run in `out`.
        progress: where to show how far the work is; nowhere by default.
        **options: recipe keys by name, on top of the recipe: `sparsity="2:4"`, `method="wanda"`,
            `calibration={"source": "builtin", "samples": 32}`, ...; and, for short, `calibration="builtin"`,
            `samples`, `length`, `seed`, `evaluate="wikitext2"`.

    Returns:
        What was done, and how well it went; the same as `llmprune.json` in `out`.

    Raises:
        UserError: the request makes no sense for this model; nothing was written.
        Failure: the work could not be finished.
    """
    chosen = assemble(recipe, options)
    shown = progress or Silent()
    clock = Clock()
    memory.frugal()
    with torch.no_grad():
        with clock("plan"), shown.waiting("planning"):
            checkpoint = Checkpoint(resolve(model, chosen.dtype), chosen.device, chosen.dtype)
            plan = make_plan(checkpoint, chosen)
            check_out(out, checkpoint, restart)
            tokens = _draw(checkpoint, chosen, plan.schedule.length) if plan.needs_data else None
            if checkpoint.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(checkpoint.device)
            text = perplexity.read_text(checkpoint, chosen.evaluate) if chosen.evaluate.text else None
        with clock("hash"), shown.waiting("hashing the model's files"):
            fingerprint = _fingerprint(checkpoint, chosen, tokens, text)
        with writing(out, checkpoint, chosen.shard_size, restart) as writer, _interruptible(writer, plan):
            resumed = not restart and writer.recover(fingerprint, shown)
            if not resumed:
                with clock("evaluate"):
                    before = perplexity.dense(checkpoint, text, chosen.evaluate, shown, plan.spare) if text else None
                writer.begin(fingerprint, vars(before) if before else None)
            report = Report(
                writer.out, checkpoint.source.name, checkpoint.source.revision, chosen.to_dict(), plan.weights
            )
            report.resumed = len(writer.records) if resumed else None
            with quick_attention(checkpoint.device, checkpoint.dtype):
                prune_blocks(checkpoint, plan, tokens, writer, clock, shown)
            with clock("write"), shown.waiting("writing what surrounds the blocks"):
                writer.finish()
            for record in writer.records:
                report.add_block(record)
            with clock("verify"):
                linears = [vars(record) for record in report.linears]
                verdict = compare(writer.out, linears, writer.hashes, shown)
                verdict.problems += [f"{name} no longer holds what was written" for name in verdict.changed]
                verdict.raise_for_problems()
            if text is not None:
                report.dense = Perplexity(**writer.dense) if writer.dense else None
                with clock("evaluate"):
                    written = Checkpoint(Source(str(out), writer.out), chosen.device, chosen.dtype)
                    report.sparse = perplexity.measure(written, text, shown, "evaluating the sparse model", plan.spare)
            if tokens is not None:
                drawn = {"length": plan.schedule.length, "tokens_sha256": tokens.sha256}
                report.calibration = {**report.recipe["calibration"], **drawn}
            report.shards, report.side_files, report.versions = writer.hashes, writer.side_files, versions()
            report.seconds, report.peak_memory = clock.result(), memory.peak()
            report.predicted_memory = plan.schedule.peak.host
            report.peak_device_memory = _peak_device_memory(checkpoint.device)
            writer.close(report.to_dict())
    return report


def prune_blocks(
    checkpoint: Checkpoint, plan: Plan, tokens: data.Tokens | None, writer: Writer, clock: Clock, progress: Progress
) -> None:
    """Prune and write all blocks in order; the inputs of each come from the pruned blocks before it.

    Blocks that the writer has already are only run, as OUT holds them.
    """
    finished = len(writer.records)
    if finished == len(plan.blocks):
        return
    schedule = plan.schedule
    activations = None
    if tokens is not None:
        with clock("embed"), progress.waiting("embedding the calibration text"):
            batches = tokens.batches(schedule.batch)
            activations = blocks.start(checkpoint, plan.chain, batches, schedule.place, writer.out)
    for number, choices in progress.over(list(enumerate(plan.blocks)), "pruning blocks"):
        if number < finished and activations is None:
            continue
        clock.lap()
        with clock("read"):
            block = checkpoint.load_block(number)
            checkpoint.prefetch(number + 1)
        done: dict[str, LinearRecord] = {}
        for inputs in schedule.passes[number] if number >= finished else ():
            with clock("capture"):
                stats = capture(checkpoint, block, inputs, choices, number, activations)
                memory.give_back()
            with clock("write"):
                writer.settle()
            with clock("solve"):
                done.update(prune_block(checkpoint, block, inputs, choices, stats))
        if activations is not None:
            with clock("propagate"):
                blocks.advance(checkpoint, number, activations)
                memory.give_back()
        if number >= finished:
            spent = BlockRecord(block.name, clock.lap(), memory.peak(), _peak_device_memory(checkpoint.device))
            changed = {choice.linear.parameter for choice in choices if choice.kept is None}
            records = [vars(done.get(choice.linear.name) or _left_dense(choice)) for choice in choices]
            with clock("write"):
                writer.commit_block(number, block, changed, {**vars(spent), "linears": records}, progress.block)
                if not schedule.overlap:
                    writer.settle()
        del block
        checkpoint.unload_block(number)


def capture(
    checkpoint: Checkpoint,
    block: LoadedBlock,
    inputs: tuple[Input, ...],
    choices: tuple[Choice, ...],
    number: int,
    activations: Activations | None,
) -> dict[str, LinearStats]:
    """Run all batches through the block as it is, and collect statistics of some of the inputs of its linears."""
    collected = Capture(inputs, [choice.linear for choice in choices], checkpoint.device)
    if activations is not None:
        with collected.watching(block.module, block.name):
            for batch, call in enumerate(activations.calls[number]):
                blocks.run(block.module, call, activations.read(batch))
                collected.next_batch()
    collected.finish()
    return collected.stats


def prune_block(
    checkpoint: Checkpoint,
    block: LoadedBlock,
    inputs: tuple[Input, ...],
    choices: tuple[Choice, ...],
    stats: dict[str, LinearStats],
) -> dict[str, LinearRecord]:
    """Solve the linears that are given these inputs, and put the pruned weights into the block.

    Args:
        stats: by the names of the linears; those of an input are let go as soon as its linears are solved.

    Returns:
        What became of each linear.
    """
    done: dict[str, LinearRecord] = {}
    for entry in inputs:
        shared = stats[entry.linears[0]]
        for name in entry.linears:
            del stats[name]
        for stack in _stacks([choice for choice in choices if choice.linear.name in entry.linears]):
            done.update(_prune_stack(checkpoint, block, stack, shared))
            memory.give_back()
        del shared
    block.refresh()
    return done


def _prune_stack(
    checkpoint: Checkpoint, block: LoadedBlock, stack: list[Choice], stats: LinearStats
) -> dict[str, LinearRecord]:
    """Solve linears that share their input, their method and their pattern as one matrix."""
    first = stack[0]
    views = [choice.linear.view(block.state[choice.linear.parameter]) for choice in stack]
    together = torch.cat(views) if len(views) > 1 else views[0]
    plain = torch.contiguous_format
    dense = together.to(checkpoint.device, torch.float32, copy=True, memory_format=plain)
    del together
    name = ", ".join(choice.linear.name for choice in stack)
    solver, note = usable(first.solver, stats, name)
    try:
        pruned = solver.solve(dense, stats, first.pattern)
    except SingularGram as error:
        raise Failure(f"{name}: {error}") from None
    note = note or _damped(solver, stats)
    sizes = [choice.linear.shape[0] for choice in stack]
    done = {}
    for choice, view, before, after in zip(
        stack, views, torch.split(dense, sizes), torch.split(pruned, sizes), strict=True
    ):
        view.copy_(after).add_(0.0)  # no zero is written as -0
        check(view, choice)
        done[choice.linear.name] = _record(choice, view, before, after, stats, note)
    return done


def usable(solver: Solver, stats: LinearStats, name: str) -> tuple[Solver, str | None]:
    """The solver for a linear with these statistics, and a note where that is out of the ordinary.

    A linear that no token reached (an expert that was never chosen) is pruned by magnitude.

    Raises:
        Failure: the statistics are not finite.
    """
    if not bool(torch.isfinite(stats.squares).all()):
        raise Failure(f"the calibration inputs of {name} hold NaN or infinite values; try --dtype float32")
    if solver.needs == "nothing":
        return solver, None
    if stats.tokens == 0:
        return solvers.load("magnitude"), "no calibration token reached it: pruned by magnitude"
    few = stats.features if solver.needs == "gram" else FEW_TOKENS
    return solver, f"only {stats.tokens:,} calibration tokens reached it" if stats.tokens < few else None


def check(weight: Tensor, choice: Choice) -> None:
    """See that a pruned weight, as it will be written, is finite and has its zeros.

    Raises:
        Failure: it is not, or has not.
    """
    name = choice.linear.name
    if not all(bool(torch.isfinite(rows).all()) for rows in some_rows(weight)):
        raise Failure(f"pruning {name} gave NaN or infinite weights; try a larger damping (--set method.damping=0.1)")
    if not choice.pattern.holds(weight):
        raise Failure(f"pruning {name} did not reach {choice.pattern}; this is a mistake in {choice.method}, report it")


def _damped(solver: Solver, stats: LinearStats) -> str | None:
    asked = getattr(solver, "damping", None)
    if asked is None or stats.damping is None or stats.damping == asked:
        return None
    return f"damped by {stats.damping:g} instead of {asked:g}: its Gram could not be factorised otherwise"


def plan(
    model: str | Path, *, recipe: Recipe | Mapping[str, Any] | str | Path | None = None, **options: Any
) -> tuple[Checkpoint, Plan]:
    """What `prune` would do with these arguments, before any work; see `prune`."""
    chosen = assemble(recipe, options)
    memory.frugal()
    checkpoint = Checkpoint(resolve(model, chosen.dtype), chosen.device, chosen.dtype)
    made = make_plan(checkpoint, chosen)
    for text in (chosen.calibration.source if made.needs_data else None, chosen.evaluate.text):
        if text is not None:
            data.check(text)
    return checkpoint, made


@contextmanager
def _interruptible(writer: Writer, plan: Plan) -> Iterator[None]:
    """Every moment is a safe one to stop at; tell what there is by then."""
    try:
        yield
    except KeyboardInterrupt:
        writer.stop()
        done = f"; {len(writer.records)} of {len(plan.blocks)} blocks are finished in {writer.out}"
        raise Interrupted(f"stopped{done if writer.records else ''}: {writer.onward}") from None


def _fingerprint(
    checkpoint: Checkpoint, recipe: Recipe, tokens: data.Tokens | None, text: perplexity.Text | None
) -> dict[str, Any]:
    """All that the result depends on."""
    made_by = versions()
    return {
        "recipe": recipe.to_dict(),
        "revision": checkpoint.source.revision,
        "files": fingerprint_files(checkpoint),
        "device": checkpoint.device.type,
        "tokens": tokens.sha256 if tokens else None,
        "evaluation text": text.sha256 if text else None,
        "versions": {name: made_by[name] for name in ("llmprune", "torch", "transformers")},
    }


def _peak_device_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _draw(checkpoint: Checkpoint, recipe: Recipe, length: int) -> data.Tokens:
    chosen = recipe.calibration
    texts = data.documents(chosen.source, config=chosen.config, split=chosen.split, column=chosen.column)
    tokens = data.draw(texts, checkpoint.tokenizer, chosen.samples, length, chosen.seed, chosen.source)
    checkpoint.check_tokens(tokens.ids)
    return tokens


def _stacks(choices: list[Choice]) -> list[list[Choice]]:
    """Of linears that share an input, those with one method and pattern, where rows don't depend on each other."""
    stacks: dict[Any, list[Choice]] = {}
    for choice in choices:
        key = (choice.solver, choice.pattern) if choice.pattern.row_independent else choice.linear.name
        stacks.setdefault(key, []).append(choice)
    return list(stacks.values())


def _left_dense(choice: Choice) -> LinearRecord:
    return LinearRecord(choice.linear.name, choice.linear.shape, kept=choice.kept)


def _record(
    choice: Choice, written: Tensor, before: Tensor, after: Tensor, stats: LinearStats, note: str | None
) -> LinearRecord:
    error = stats.relative_error(before, after)
    if error is not None and not math.isfinite(error):
        error, note = None, "its relative error is too large for float32"
    return LinearRecord(
        name=choice.linear.name,
        shape=choice.linear.shape,
        method=choice.method,
        pattern=str(choice.pattern),
        scope=choice.pattern.scope,
        sparsity=zeros(written) / written.numel(),
        relative_error=error,
        error_from=None if error is None else "gram" if stats.needs == "gram" else "sample",
        tokens=stats.tokens,
        damping=stats.damping,
        note=note,
        mask_sha256=mask_sha256(written),
    )
