"""The loop over blocks: read this first.

`prune` makes a plan, draws the calibration tokens, and then, block by block, loads, captures, solves, propagates and
writes. At any time one block (while it is fitted, the next one too), its statistics and the activations between two
blocks are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune import allocation, data, dense, distributed, memory
from llmprune.allocate import PLAN_FILES
from llmprune.budget import GROWTH, PRUNE, SAMPLE, batch_size, windows_at_once
from llmprune.errors import Interrupted, UserError
from llmprune.evaluate import perplexity
from llmprune.follow import DenseWay, drift
from llmprune.model import blocks
from llmprune.model.activations import Activations
from llmprune.model.capture import Capture
from llmprune.model.checkpoint import Checkpoint, LoadedBlock
from llmprune.model.cpu import products, quick
from llmprune.model.linears import Linear, find_linears
from llmprune.model.source import Source
from llmprune.model.watch import Watch
from llmprune.model.writer import ALLOCATION, INDEX, Writer, batches_before, check_out, fingerprint_files, writing
from llmprune.permute import rearrange
from llmprune.plan import Choice, Plan, allocated
from llmprune.prepare import Found, find, first_plan, settle
from llmprune.progress import Clock, Progress, of_first
from llmprune.recipe import Recipe, assemble, check_said
from llmprune.reconstruct.block import Next
from llmprune.reconstruct.block import Reconstructor as BlockReconstructor
from llmprune.report.earlier import base_of, earlier_runs
from llmprune.report.record import (
    BlockRecord,
    ExpertsRecord,
    LinearRecord,
    Perplexity,
    Report,
    allocation_named,
    versions,
)
from llmprune.report.results import read_beginning
from llmprune.report.verify import compare
from llmprune.solve import as_narrower, narrower, renewed, solve_stage
from llmprune.structured.send import choose_experts
from llmprune.terminated import telling


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
    chosen = assemble(recipe, options).settled()
    check_said(chosen, options)
    memory.frugal()
    with torch.no_grad(), distributed.joined():
        shown = of_first(progress)
        try:
            return _prune(model, out, chosen, restart, shown)
        finally:
            memory.ease_above(None)


def _prune(model: str | Path, out: str | Path, recipe: Recipe, restart: bool, shown: Progress) -> Report:
    clock = Clock()
    with clock("plan"):
        source = find(model, recipe, shown)
        begun = read_beginning(source)
    memory.give_back()  # of a model that was made plain
    memory.begin()
    with clock("plan"), shown.waiting("planning"):
        whole, checkpoint, plan = first_plan(source, recipe, {} if restart else _batches_before(out))
    tokens, text, fingerprint = _read_texts(whole, checkpoint, plan, recipe, out, restart, clock, shown)
    with _begun(out, checkpoint, recipe, restart, fingerprint) as (writer, resumed):
        found = Found(writer, fingerprint, clock, resumed)
        if not resumed and text is not None:
            with clock("evaluate"):
                writer.found["dense"] = vars(perplexity.dense(whole, text, recipe.evaluate, shown, plan.spare))
        checkpoint, plan = settle(whole, checkpoint, plan, recipe, tokens, found, shown)
        memory.ease_above(plan.schedule.peak.host - GROWTH // 4)  # before it is as much as was said
        weights = plan.written(checkpoint).weights
        report = Report(writer.out, checkpoint.source.name, checkpoint.source.revision, recipe.to_dict(), weights)
        report.earlier, report.base = earlier_runs(begun, fingerprint["files"]), base_of(source, begun)
        report.origin = checkpoint.source.origin
        report.resumed = len(writer.records) if resumed else None
        report.batch = (found.get("batches") or {}).get(PRUNE) if plan.calibrates else None
        report.kept_blocks, report.hidden_channels = found.get("kept"), found.get("hidden")
        report.widths = {name: list(width) for name, width in plan.widths.items()} or None
        if report.kept_blocks or report.widths:
            report.dense_blocks, report.dense_weights = len(whole.blocks), whole.weights
        with quick(checkpoint.device, checkpoint.dtype):
            way = DenseWay(whole, report.kept_blocks, report.hidden_channels)
            prune_blocks(checkpoint, plan, tokens if plan.calibrates else None, writer, clock, shown, way)
        with distributed.first():  # ranks are told of a failure, and wait for files that they go on to read
            if distributed.is_first():
                _finish(writer, report, _plan_file(plan, checkpoint.source), str(checkpoint.device), clock, shown)
        if text is not None:
            with clock("evaluate"):
                report.dense = Perplexity(**had) if (had := found.get("dense")) else None
                report.sparse = _evaluate(writer.out, recipe, text, plan, shown)
        if tokens is not None:
            drawn = {"length": plan.schedule.length, "tokens_sha256": tokens.sha256, "asymmetric": plan.aims}
            report.calibration = {**report.recipe["calibration"], **drawn}
        report.ranks, report.seconds = distributed.size(), clock.result()
        report.peak_memory = max(distributed.gather(memory.peak()))
        report.predicted_memory = _predicted(checkpoint, plan, text)
        report.peak_device_memory = max(distributed.gather(_peak_device_memory(checkpoint.device) or 0)) or None
        writer.close(report.to_dict())
        if distributed.is_first():
            with shown.waiting("drawing the report"):
                draw_page(report, checkpoint.source)
    return distributed.share(report)


def _read_texts(
    whole: Checkpoint,
    checkpoint: Checkpoint,
    plan: Plan,
    recipe: Recipe,
    out: str | Path,
    restart: bool,
    clock: Clock,
    shown: Progress,
) -> tuple[data.Tokens | None, perplexity.Text | None, dict[str, Any]]:
    """The calibration tokens, the text of an evaluation, and all that the result depends on.

    The first rank finds them for all, so that only it needs the data.
    """
    tokens = text = None
    fingerprint: dict[str, Any] = {}
    with distributed.first():
        if distributed.is_first():
            with clock("plan"), shown.waiting("reading the text"):
                check_out(out, checkpoint, restart)
                _check_plan_file(recipe, out, restart)
                length, cap = plan.schedule.length, plan.room.cap
                tokens = draw(whole, recipe, length, cap) if plan.needs_data else None
                text = perplexity.read_text(whole, recipe.evaluate, cap) if recipe.evaluate.text else None
            with clock("hash"), shown.waiting("hashing the model's files"):
                fingerprint = _fingerprint(whole, plan, recipe, tokens, text)
            whole.forget_tokenizer()
    if checkpoint.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(checkpoint.device)
    return distributed.share((tokens, text, fingerprint))


def _check_plan_file(recipe: Recipe, out: str | Path, restart: bool) -> None:
    """See that a run that begins anew does not take away the plan file that it is asked for.

    Raises:
        UserError: it lies where an earlier run has put it.
    """
    name = allocation_named(recipe.to_dict())
    own = Path(out).expanduser() / ALLOCATION
    if restart and name.endswith(PLAN_FILES) and Path(name).expanduser().resolve() == own.resolve():
        raise UserError(
            f"--restart would take away {own}, the plan file that is asked for: copy it to another place, and name the "
            "copy (--allocation)"
        )


def _batches_before(out: str | Path) -> dict[str, int]:
    """As the first rank finds them, who may be the only one to see OUT."""
    with distributed.first():
        found = batches_before(out) if distributed.is_first() else {}
    return distributed.share(found)


def _targets(plan: Plan) -> dict[str, str] | None:
    """The targets of the plan's allocation as far as they are known."""
    return None if plan.budget is None or plan.budget.targets is None else dict(plan.budget.targets)


def _plan_file(plan: Plan, source: Source) -> str | None:
    """The text of the plan file that tells the allocation and can be used again; None where nothing was allocated."""
    if plan.budget is None or plan.budget.targets is None:
        return None
    known, targets, asked = plan.known, plan.budget.targets, plan.budget.sparsity
    weights = sum(linear.numel for linear in known)
    reached = f"{allocation.reached(known, targets):.4%} of {weights:,} weights"
    told = [
        f"How sparse each linear of {source.name} is, by the allocation {plan.budget.name}: {reached}"
        + (f", {asked:.4%} asked." if asked is not None else "."),
        "It can be edited, and used again with --allocation and this file.",
    ]
    return allocation.write({linear.name: targets[linear.name] for linear in known}, told)


def _finish(writer: Writer, report: Report, plan_file: str | None, device: str, clock: Clock, shown: Progress) -> None:
    """Write all but the report, and read everything again to see that it is as promised."""
    with clock("write"), shown.waiting("writing what surrounds the blocks"):
        writer.finish(plan_file)
    for record in writer.records:
        report.add_block(record)
    with clock("verify"):
        linears = [vars(record) for record in report.linears]
        trusted = report.recipe["trust_remote_code"]
        verdict = compare(writer.out, linears, writer.hashes, shown, trusted, device)
        verdict.problems += [f"{name} no longer holds what was written" for name in verdict.changed]
        verdict.raise_for_problems()
    report.shards, report.side_files, report.versions = writer.hashes, writer.side_files, versions()


def _evaluate(out: Path, recipe: Recipe, text: perplexity.Text, plan: Plan, shown: Progress) -> Perplexity | None:
    """The perplexity of what was written; the first rank measures alone where the others don't see it."""
    together = all(distributed.gather((out / INDEX).is_file()))
    if not together and not distributed.is_first():
        return None
    source = Source(str(out), out, trusted=recipe.trust_remote_code)
    written = Checkpoint(source, distributed.local_device(recipe.device), recipe.dtype)
    title = "evaluating the sparse model"
    return perplexity.measure(written, text, shown, title, plan.spare, alone=not together)


def prune_blocks(
    checkpoint: Checkpoint,
    plan: Plan,
    tokens: data.Tokens | None,
    writer: Writer,
    clock: Clock,
    progress: Progress,
    way: DenseWay,
) -> None:
    """Prune and write all blocks in order; the inputs of each come from the pruned blocks before it.

    In a block, the linears of one stage after the other are solved, on inputs that have passed those before them. Each
    rank calibrates its share of the batches. Blocks that the writer has already are only run, as OUT holds them.

    Args:
        way: how the dense model's states go beside, all of them or a sample.
    """
    finished = distributed.share(len(writer.records))
    if finished == len(plan.blocks):
        return
    schedule, narrow, result = plan.schedule, plan.narrow, plan.written(checkpoint)
    activations = wanted = None
    lost = way.lost(-1)  # whether there is anything yet that a fit could make up for
    if tokens is not None:
        with clock("embed"), progress.waiting("embedding the calibration text"):
            batches = distributed.mine(tokens.batches(schedule.batch))
            activations = blocks.start(checkpoint, plan.chain, batches, schedule.place, writer.out)
            wanted = way.start(plan, activations, batches if plan.follows_dense else batches[:SAMPLE], writer.out)
    for number, choices in progress.over(list(enumerate(plan.blocks)), "pruning blocks"):
        if number < finished and activations is None:
            continue
        clock.lap()
        with clock("read"):
            block = checkpoint.load_block(number, dense=wanted is not None)
            checkpoint.prefetch(number + 1)
        calls = activations.calls[number] if activations is not None else []
        stages = schedule.stages[number] if number >= finished else ()
        pruned = [choice.linear for choice in choices if choice.kept is None]
        fitted = [choice.linear for choice in choices if choice.fitted]
        lost = lost or bool(pruned) or way.lost(number) or (narrow is not None and bool(narrow.of(number)))
        fit = plan.fit if fitted and lost else None
        linears = {choice.linear.name: choice.linear for choice in choices}
        permuted = plan.permuted(number)
        changed = {linear.parameter for linear in (*pruned, *fitted)}
        changed = changed.union(*(channels.parameters(linears, block.state) for channels, _ in permuted))
        if permuted and (number >= finished or plan.follows_dense):
            with clock("permute"):  # finished blocks too: what the dense model makes of them stays the same to the bit
                rearrange(block, linears, permuted, calls, activations, checkpoint.device)
        runs = Capture(pruned, stages, schedule.held, plan.writers[number])
        if wanted is not None and not runs.goes_beside:
            # A finished block gives what it gave when it was solved and watched, to the bit: experts run one by one.
            beside = any(stage.beside for stage in schedule.stages[number])
            same = Watch(pruned).watching(block.module, block.name) if beside else nullcontext()
            with clock("dense"), same:
                way.follow(checkpoint, number, calls, wanted)
        if narrow is not None:
            changed |= narrow.changed(number)
        if number < finished:
            with clock("read"):
                if narrow is not None and not distributed.is_first():  # which may not see OUT
                    block = narrow.blank(number, block)
                elif narrow is not None or wanted is not None:
                    block = result.load_block(number)
                _as_written(block, changed)
        staying: dict[str, Tensor] = {}
        sent: list[ExpertsRecord] | None = None
        routed = narrow.experts[number] if narrow is not None and number >= finished else {}
        if routed and plan.sender is not None and activations is not None:
            with clock("choose"):
                staying, sent = choose_experts(block, routed, plan.sender, calls, activations, checkpoint.device)
        done: dict[str, LinearRecord] = {}
        away: tuple[float, float] | tuple[None, None] = (None, None)
        with runs.running(block.module, block.name, calls, activations, wanted if plan.follows_dense else None):
            for stage in stages:
                with clock("capture"):
                    stats = runs.collect(stage, checkpoint.device)
                    memory.give_back()
                if checkpoint.device.type == "cpu":  # else solving takes other memory, and other cores
                    with clock("write"):
                        writer.settle()
                with clock("solve"):
                    done.update(solve_stage(checkpoint, block, stage.inputs, choices, stats))
            if runs.goes_beside and wanted is not None:
                with clock("dense"):
                    way.follow(checkpoint, number, calls, wanted, runs.finish_dense)
            if fit is None and narrow is None:
                _propagate(checkpoint, number, activations, runs, clock)
        if narrow is not None:
            if number >= finished:
                with clock("solve"):
                    block = narrower(narrow, number, block, choices, staying)
            checkpoint.unload_block(number)
            pruned, fitted = _same(block, pruned), _same(block, fitted)
        if fit is not None or narrow is not None:
            if fit is not None and number >= finished and activations is not None and wanted is not None:
                with clock("fit"):
                    away = _fit(fit, checkpoint, number, block, fitted, activations, wanted)
                    done = renewed(block, choices, done) if narrow is None else done
                    memory.give_back()
            runs = Capture(pruned, (), schedule.held)  # what went through the block before is of weights that were
            with runs.running(block.module, block.name, calls, activations):
                _propagate(result, number, activations, runs, clock)
        if number >= finished:
            drifted = drift(activations, wanted) if activations is not None and wanted is not None else None
            held = memory.peak(), _peak_device_memory(checkpoint.device)
            batch = schedule.batch if tokens is not None else None
            spent = BlockRecord(block.name, clock.lap(), *held, away[0], away[1], drifted, sent, batch)
            moved = {channels.linear for channels, _ in permuted}
            found = [done.get(choice.linear.name) or _left_dense(choice) for choice in choices]
            if narrow is not None:
                found = as_narrower(block, found, staying)
            records = [vars(replace(record, permuted=record.name in moved)) for record in found]
            with clock("write"):
                writer.commit_block(number, block, changed, {**asdict(spent), "linears": records}, progress.block)
                if not schedule.overlap:
                    writer.settle()
        del block
        result.unload_block(number)


def _same(block: LoadedBlock, linears: list[Linear]) -> list[Linear]:
    """The linears of a block that have these names."""
    names = {linear.name for linear in linears}
    return [linear for linear in find_linears(block.module, block.name) if linear.name in names]


def _propagate(
    checkpoint: Checkpoint, number: int, activations: Activations | None, runs: Capture, clock: Clock
) -> None:
    """Take all batches, where there are any, out of a block whose linears are solved."""
    if activations is not None:
        with clock("propagate"):
            blocks.advance(checkpoint, number, activations, runs.finish)
            memory.give_back()


def _fit(
    fit: BlockReconstructor,
    checkpoint: Checkpoint,
    number: int,
    block: LoadedBlock,
    pruned: list[Linear],
    activations: Activations,
    wanted: Activations,
) -> tuple[float, float]:
    """Fit a block; the one after it is loaded meanwhile, dense, where it is looked ahead to."""
    following = None
    if fit.ahead and number + 1 < len(checkpoint.blocks):
        following = Next(checkpoint.load_block(number + 1, dense=True), activations.calls[number + 1])
    away = fit.fit(number, block, pruned, activations.calls[number], activations, wanted, following)
    if following is not None:
        del following  # its tensors, before memory is given back
        checkpoint.unload_block(number + 1)
    return away


def draw_page(report: Report, source: Source) -> None:
    """Draw report.html beside a finished checkpoint; what goes wrong is told in the report, and loses no run."""
    try:
        from llmprune.report.page import draw  # plotly takes memory that the blocks may need

        draw(report.out, source=source, shards=report.shards, trust_remote_code=source.trusted)
        report.page_problem = None
    except (Exception, KeyboardInterrupt) as error:
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        report.page_problem = f"{type(error).__name__}: {reason}"


def _predicted(checkpoint: Checkpoint, plan: Plan, text: perplexity.Text | None) -> int:
    """The planned peak on the host, with the windows of an evaluation, whose number the plan does not know."""
    peak = plan.schedule.peak.host
    if text is None:
        return peak
    count, length = text.windows.shape
    windows = min(-(-count // distributed.size()), windows_at_once(checkpoint, length, plan.spare))
    more = max(0, windows - batch_size(checkpoint, length)) * length
    return max(peak, plan.schedule.memory["evaluate"].host + more * checkpoint.hidden_size * checkpoint.dtype.itemsize)


def _as_written(block: LoadedBlock, changed: set[str]) -> None:
    """Take over a finished block from the first rank, which reads it from OUT; others may not see that folder.

    Args:
        changed: names of the parameters that are not the source's.
    """
    for name in sorted(changed):
        distributed.broadcast(block.state[name], 0)
    block.refresh(changed)


def plan(
    model: str | Path,
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    progress: Progress | None = None,
    look: bool = True,
    **options: Any,
) -> tuple[Checkpoint, Plan]:
    """What `prune` would do with these arguments, before any work; see `prune`.

    Args:
        look: find out an allocation that needs the weights and no data, for which all of them are read.
    """
    chosen = assemble(recipe, options).settled()
    check_said(chosen, options)
    memory.frugal()
    shown = of_first(progress)
    source = find(model, chosen, shown)
    read_beginning(source)
    with shown.waiting("planning"):
        _, checkpoint, made = first_plan(source, chosen)
    for text in (chosen.calibration.source if made.needs_data else None, chosen.evaluate.text):
        if text is not None:
            data.check(text)
    if look and made.budget is not None and made.budget.targets is None and made.budget.allocator.needs == "weights":
        with torch.no_grad():
            made = allocated(made, dense.look(checkpoint, made, None, shown))
    return checkpoint, made


@contextmanager
def _begun(
    out: str | Path, checkpoint: Checkpoint, recipe: Recipe, restart: bool, fingerprint: Mapping[str, Any]
) -> Iterator[tuple[Writer, bool]]:
    """The writer, and whether it goes on with an earlier run; where OUT cannot be had, every rank is told."""
    with ExitStack() as held:
        with distributed.first():
            writer = held.enter_context(writing(out, checkpoint, recipe.shard_size, restart))
            held.enter_context(_interruptible(writer))
            resumed = not restart and writer.find(fingerprint)
        yield writer, distributed.share(resumed)


@contextmanager
def _interruptible(writer: Writer) -> Iterator[None]:
    """Every moment is a safe one to stop at; tell what there is by then.

    An allocation, or a choice of blocks or of units of all of them, is there when it is whole.
    """

    def onward() -> str:
        blocks = {shard.block for shard in writer.shards} - {None}
        done = f"{len(writer.records)} of {len(blocks)} blocks are finished in {writer.out}: "
        return f"{done if writer.records else ''}{writer.onward}"

    def stopped() -> str:
        return f"stopped{'; ' if writer.records else ': '}{onward()}"

    if distributed.is_first():
        distributed.if_lost(lambda: f"{onward()}, also with another number of ranks")
    try:
        with telling(stopped) if distributed.is_first() else nullcontext():
            yield
    except KeyboardInterrupt:
        writer.stop()
        if not distributed.is_first():
            raise
        raise Interrupted(stopped()) from None
    finally:
        distributed.if_lost(str)  # what comes after is another thing


def _fingerprint(
    checkpoint: Checkpoint, plan: Plan, recipe: Recipe, tokens: data.Tokens | None, text: perplexity.Text | None
) -> dict[str, Any]:
    """All that the result depends on, but for the last bits of sums: memory and ranks may be others later."""
    made_by, chosen = versions(), replace(recipe, max_memory=None).to_dict()
    if recipe.depth.drop is None:
        del chosen["depth"]  # it says nothing, and runs that are older than it go on
    for part in () if recipe.narrows else ("width", "experts"):
        del chosen[part]
    return {
        "recipe": chosen,
        "revision": checkpoint.source.revision,
        "files": fingerprint_files(checkpoint),
        "device": checkpoint.device.type,
        "tokens": tokens.sha256 if tokens else None,
        "evaluation text": text.sha256 if text else None,
        "versions": {name: made_by[name] for name in ("llmprune", "torch", "transformers")},
        "allocation": _targets(plan),  # of a plan file, which may have been edited
        "products": products(checkpoint.device, checkpoint.dtype),
    }


def _peak_device_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def draw(checkpoint: Checkpoint, recipe: Recipe, length: int, cap: int | None = None) -> data.Tokens:
    """The calibration tokens of a recipe.

    Args:
        length: of a sequence.
        cap: see `token_ids`.
    """
    chosen = recipe.calibration
    texts = data.documents(chosen.source, config=chosen.config, split=chosen.split, column=chosen.column)
    tokens = data.draw(texts, checkpoint.tokenizer, chosen.samples, length, chosen.seed, chosen.source, cap)
    checkpoint.check_tokens(tokens.ids)
    return tokens


def _left_dense(choice: Choice) -> LinearRecord:
    return LinearRecord(choice.linear.name, choice.linear.shape, kept=choice.kept)
