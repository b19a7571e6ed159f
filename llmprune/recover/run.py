"""`recover`: trains a sparse checkpoint within its masks, and writes it as one that `verify` passes."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmprune import data as texts
from llmprune import distributed, memory
from llmprune.errors import Failure, Interrupted, UserError
from llmprune.evaluate.divergence import other_tokens
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.linears import Linear, find_linears
from llmprune.model.quiet import quiet
from llmprune.model.skeleton import pick_device
from llmprune.model.source import Source, resolve
from llmprune.model.writer import LOCK, REPORT, check_room, claimed, clear, difference, fingerprint_files
from llmprune.progress import Progress, of_first
from llmprune.recover.adapters import merge
from llmprune.recover.keep import KeepZeros
from llmprune.recover.masks import Masks, check_whole, masks_of
from llmprune.recover.objective import Objective, divergence, next_token_loss
from llmprune.recover.options import Training
from llmprune.recover.trained import choose, parameters_of, round_to
from llmprune.recover.training import make_trainer
from llmprune.recover.write import check_writable, files_of, put, stored_dtypes, write
from llmprune.report.record import Perplexity, mask_sha256, versions
from llmprune.report.verify import compare, read_report

RECORD = "llmprune.recovery.json"
"""What tells of a recovery where the checkpoint has no llmprune.json."""

WORK = ".llmprune.recovery"
"""The folder, in RECOVERED, of what a run needs until it is through: its request, checkpoints, the result's drafts."""

REQUEST = "request.json"


@dataclass(frozen=True)
class Recovered:
    """A finished recovery.

    Attributes:
        out: the folder that was written.
        method: how it was trained.
        steps: of the optimiser.
        before, after: perplexity on the held-out text, of the weights as they are in the files.
        kl_before, kl_after: KL(dense ‖ model) on it, in nats a token; None where nothing was distilled.
        record: all that is known of it, as llmprune.json has it under `recovery`.
    """

    out: Path
    method: str
    steps: int
    before: Perplexity
    after: Perplexity
    kl_before: float | None
    kl_after: float | None
    record: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"out": str(self.out), **self.record}


@dataclass(frozen=True)
class _Plan:
    """What is known before any training.

    Attributes:
        report: the checkpoint's llmprune.json, None where it has none.
        linears: those that llmprune can prune.
        dense: the teacher.
        places: see `Objective`.
    """

    training: Training
    checkpoint: Checkpoint
    report: dict[str, Any] | None
    linears: list[Linear]
    dense: Checkpoint | None
    places: tuple[int, ...] | None

    @property
    def promised(self) -> dict[str, str]:
        """The hashes of the masks that the report promises, by linear."""
        linears = self.report["linears"] if self.report is not None else ()
        return {record["name"]: record["mask_sha256"] for record in linears if record.get("pattern")}

    def masks(self, model: nn.Module) -> Masks:
        """The masks to keep: of linears with promised zeros, and of others with a notable share of them."""
        parameters, promised = parameters_of(model), self.promised
        for linear in self.linears:
            weight = linear.view(parameters[linear.parameter].detach())
            if linear.name in promised and mask_sha256(weight) != promised[linear.name]:
                raise UserError(
                    f"{linear.name} of {self.checkpoint.source.name} has other zeros than its {REPORT} promises "
                    f"(`llmprune verify {self.checkpoint.source.name}` shows all): prune it anew"
                )
        return masks_of(parameters, self.linears, promised=promised)


def recover(
    pruned: str | Path,
    *,
    out: str | Path,
    data: str | Path,
    distill: str | Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Recovered:
    """Train a sparse checkpoint, so that its zeros stay zeros, and write it as another one like it.

    Zeros that are kept are those of the linears with a pattern in llmprune.json, and of each other linear that llmprune
    could prune and that is zero to a twentieth or more. A checkpoint without zeros is trained as it is.
    The result has the same files, keys and dtypes, and the same masks.

    Under `torchrun` each process trains on batches of its own. Stopped at any moment, the same call goes on from the
    last saved step.

    Args:
        pruned: a folder written by llmprune, any other checkpoint, or a Hub name.
        out: the folder to write. An unfinished recovery of the same request is gone on with; any other is refused.
        data: what is trained on: `c4`, `wikitext2`, `ptb`, `builtin`, a Hub data set `owner/name`, or a local file.
        distill: the dense model, whose answers are the aim.
        restart: do away with an earlier recovery in `out`.
        progress: where to show how far the work is; nowhere by default.
        **options: see `Training`.

    Raises:
        UserError: the request makes no sense for this checkpoint; nothing was written.
        Failure: training broke down, or the result does not hold what was promised.
    """
    training, source = Training.read(options), str(data)
    weights = training.weights(distill is not None)
    began = time.monotonic()
    memory.begin()
    with distributed.joined():
        shown = of_first(progress)
        with distributed.first(), shown.waiting("planning"):
            plan = _plan(pruned, distill, training)
            _check_out(Path(out), plan, restart)
        folder = Path(out).expanduser().absolute()
        with distributed.first():
            drawn: tuple[texts.Tokens, dict[str, Any]] | None = None
            if distributed.is_first():  # the others need no data
                with shown.waiting("reading the text"):
                    tokens = _draw(plan.checkpoint, plan.training, source)
                with shown.waiting("hashing the models' files"):
                    drawn = tokens, _fingerprint(plan, source, tokens)
        drawn = distributed.share(drawn)
        assert drawn is not None
        tokens, fingerprint = drawn
        with _begun(folder, fingerprint, restart) as work:
            return _run(plan, source, weights, tokens, work, folder, shown, began)


def _plan(pruned: str | Path, distill: str | Path | None, training: Training) -> _Plan:
    device = pick_device(training.device)
    if training.dtype == "float16" and device.type == "cpu":
        raise UserError("training in float16 takes a GPU: choose float32 or bfloat16 (--dtype)")
    trusted = training.trust_remote_code
    checkpoint = Checkpoint(resolve(pruned, trust_remote_code=trusted), "cpu")
    folder = checkpoint.source.folder
    report = read_report(folder) if (folder / REPORT).is_file() else None
    training = training.of_length(checkpoint.max_length)
    linears = [linear for name in checkpoint.blocks for linear in find_linears(checkpoint.block(name), name)]
    check_writable(checkpoint, set(checkpoint.model.state_dict()))
    if distill is None:
        return _Plan(training, checkpoint, report, linears, None, None)
    dense = Checkpoint(resolve(distill, trust_remote_code=trusted), "cpu")
    if differ := other_tokens(dense, checkpoint):
        raise UserError(f"{differ}: the dense model's answers cannot be the aim; give the one it was pruned from")
    places = None
    if training.hidden_weight:
        kept = _kept_of(dense, checkpoint, report)
        if kept is None or dense.hidden_size != checkpoint.hidden_size:
            raise UserError(
                f"the hidden states of {dense.source.name} ({len(dense.blocks)} blocks, {dense.hidden_size:,} wide) "
                f"cannot be compared with those of {checkpoint.source.name} ({len(checkpoint.blocks)} blocks, "
                f"{checkpoint.hidden_size:,} wide): leave hidden_weight out"
            )
        places = (*kept, len(dense.blocks))
    return _Plan(training, checkpoint, report, linears, dense, places)


def _kept_of(dense: Checkpoint, checkpoint: Checkpoint, report: dict[str, Any] | None) -> list[int] | None:
    """Which blocks of the dense model a checkpoint has, by its report and those of earlier runs; None: not known."""
    count, kept = len(checkpoint.blocks), list(range(len(checkpoint.blocks)))
    for run in [*(report or {}).get("earlier", ()), report or {}][::-1]:
        if count == len(dense.blocks):
            break
        if before := run.get("kept_blocks"):
            count, kept = run["dense_blocks"], [before[number] for number in kept]
    return kept if count == len(dense.blocks) else None


def check_request(dense: str | Path, data: str, distill: str | Path | None, training: Training) -> None:
    """See that a training makes sense, and that its text is there, before the model that is to be trained is.

    Args:
        dense: the model that this one is to be pruned from; it stands for it.
        data, distill: as for `recover`.

    Raises:
        UserError: it does not, or there is too little text.
    """
    plan = _plan(dense, distill, training)
    _draw(plan.checkpoint, plan.training, data)


def _draw(checkpoint: Checkpoint, training: Training, source: str) -> texts.Tokens:
    """The sequences that are held out, and behind them those that are trained on: (held_out + samples, length)."""
    assert training.length is not None
    taken = training.steps * training.batch * training.accumulate * distributed.size()
    samples = training.samples or taken
    count = training.held_out + samples
    try:
        drawn = texts.draw(texts.documents(source), checkpoint.tokenizer, count, training.length, training.seed, source)
    except UserError as error:
        if "samples of" not in str(error):
            raise
        raise UserError(
            f"{str(error).partition(': ask for')[0]} ({training.held_out} held out, {samples:,} trained on): give more "
            "text, fewer --steps, or fewer --samples, which are then seen several times"
        ) from None
    checkpoint.check_tokens(drawn.ids)
    return drawn


def _fingerprint(plan: _Plan, source: str, tokens: texts.Tokens) -> dict[str, Any]:
    """All that the result depends on."""
    keep = ("save_every", "held_out")  # neither changes what is trained, but for the tokens, which are there
    told = {key: value for key, value in asdict(plan.training).items() if key not in keep}
    found = versions()
    return {
        "training": told,
        "data": source,
        "tokens": tokens.sha256,
        "held_out": plan.training.held_out,
        "files": fingerprint_files(plan.checkpoint),
        "dense": None if plan.dense is None else fingerprint_files(plan.dense),
        "ranks": distributed.size(),
        "versions": {name: found[name] for name in ("llmprune", "torch", "transformers")},
    }


def _check_out(out: Path, plan: _Plan, restart: bool) -> None:
    folder = out.expanduser().absolute()
    if folder.resolve() in {found.source.folder for found in (plan.checkpoint, plan.dense) if found is not None}:
        raise UserError(f"{out} is the model itself; write the result to another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{out} is a file; -o takes a folder")
    check_room(folder, out, plan.checkpoint)
    if not folder.is_dir() or (folder / WORK / REQUEST).is_file():
        return
    if _record_of(folder) is not None:
        if not restart:
            raise UserError(f"{out} holds a finished recovery: choose another folder, or begin anew with --restart")
    elif any(path.name not in (LOCK, WORK) for path in folder.iterdir()):
        raise UserError(f"{out} is not empty, and what it holds is no recovery of llmprune: choose another folder")


def _record_of(folder: Path) -> dict[str, Any] | None:
    """The record of a finished recovery in a folder."""
    try:
        if (folder / RECORD).is_file():
            told = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        elif (folder / REPORT).is_file():
            told = json.loads((folder / REPORT).read_text(encoding="utf-8")).get("recovery")
        else:
            return None
    except (OSError, ValueError, AttributeError):
        return None
    return told if isinstance(told, dict) else None


def clear_recovery(folder: Path) -> None:
    """Do away with an earlier recovery in a folder, and with nothing else; what marks it as ours goes last."""
    told = _record_of(folder)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    if told is None:
        return
    for name in map(str, told.get("files", ())):
        path = folder / name
        if path.resolve().is_relative_to(folder.resolve()) and path.is_file():
            path.unlink()
    clear(folder)
    (folder / RECORD).unlink(missing_ok=True)


@contextmanager
def _begun(folder: Path, fingerprint: Mapping[str, Any], restart: bool) -> Iterator[Path]:
    """The folder to work in, to the exclusion of other processes.

    Raises:
        UserError: another process writes there, or it holds an unfinished recovery of another request.
    """
    work = folder / WORK
    if not distributed.is_first():
        distributed.share(None)
        yield work
        return
    with claimed(folder, folder):
        if restart:
            clear_recovery(folder)
        request = work / REQUEST
        told = json.loads(json.dumps(fingerprint))
        if request.is_file():
            if other := difference(json.loads(request.read_text())["fingerprint"], told):
                raise UserError(
                    f"{folder} holds an unfinished recovery with {other}: give the same to go on with it, choose "
                    "another folder, or begin anew with --restart"
                )
        else:
            work.mkdir(exist_ok=True)
            _note(work, {"fingerprint": told})
        distributed.share(None)  # the others may look
        yield work


def _note(work: Path, told: Mapping[str, Any]) -> None:
    draft = work / f"{REQUEST}.draft"
    draft.write_text(json.dumps(told), encoding="utf-8")
    draft.rename(work / REQUEST)


def _run(
    plan: _Plan,
    source: str,
    weights: Mapping[str, float],
    tokens: texts.Tokens,
    work: Path,
    out: Path,
    shown: Progress,
    began: float,
) -> Recovered:
    training, checkpoint = plan.training, plan.checkpoint
    held, train = tokens.ids[: training.held_out], tokens.ids[training.held_out :]
    transformers.set_seed(training.seed)
    with shown.waiting("loading the model"), quiet():
        model = _load(checkpoint.source, torch.float32)
        masks = plan.masks(model)
        names = choose(model, plan.linears, masks, training)
        trained = sum(
            value.numel() - (int((~masks[name]).sum()) if name in masks else 0)
            for name, value in model.named_parameters()
            if value.requires_grad
        )
        objective = Objective(None, training.temperature, **weights, places=plan.places)
        # In the method `norms` no weight with a mask is trained, and adapters have theirs inside.
        callbacks = [KeepZeros(masks)] if masks and training.method == "full" else []
        trainer = make_trainer(model, objective, train, training, work, callbacks, shown)
        check_whole(model)
        if plan.dense is not None:
            on_gpu = trainer.args.device.type != "cpu"
            objective.teacher = _load(plan.dense.source, "auto" if on_gpu else torch.float32)
            objective.teacher.eval().requires_grad_(False).to(trainer.args.device)
    hashes = {
        linear.name: mask_sha256(linear.view(masks[linear.parameter]))
        for linear in plan.linears
        if linear.parameter in masks and not bool(linear.view(masks[linear.parameter]).all())
    }
    request, resumed = distributed.share(_found(work) if distributed.is_first() else ({}, None))
    if resumed is not None and not all(distributed.gather(resumed.is_dir())):
        raise UserError(f"{resumed} is not seen by all processes: put it where they are, or begin anew with --restart")
    before = request.get("before")
    if before is None:
        before = _measure(trainer, held, source, "measuring before", shown)
        if distributed.is_first():
            _note(work, {**request, "before": before})
    try:
        with quiet():
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except KeyboardInterrupt:
        found = latest(work)
        onward = f"goes on after step {found.name.partition('-')[2]}" if found else "begins anew"
        raise Interrupted(f"interrupted; the same command {onward}") from None
    merge(model)
    raised = round_to(model, names, stored_dtypes(checkpoint), masks)
    after = _measure(trainer, held, source, "measuring after", shown)
    record = {
        "of": checkpoint.source.name,
        **asdict(training),
        "rate": training.peak,
        "loss_weights": dict(weights),
        "ranks": distributed.size(),
        "distilled_from": None if plan.dense is None else plan.dense.source.name,
        "data": {
            "source": source,
            "length": train.shape[1],
            "samples": len(train),
            "held_out": len(held),
            "tokens_sha256": tokens.sha256,
        },
        "masked_linears": len(hashes),
        "trained": trained,
        "raised": raised,
        "losses": [
            {"step": entry["step"], "loss": round(entry["loss"], 6)}
            for entry in trainer.state.log_history
            if math.isfinite(entry.get("loss", math.nan))
        ],
        "before": before,
        "after": after,
        "resumed_at": None if resumed is None else int(resumed.name.partition("-")[2]),
        "peak_memory": memory.peak(),
        "versions": versions(),
    }
    if (earlier := (plan.report or {}).get("recovery") or _record_of(checkpoint.source.folder)) is not None:
        record["earlier"] = earlier
    with distributed.first():
        if distributed.is_first():
            _finish(plan, model, names, hashes, record, work, out, shown, began)
    record = distributed.share(record)
    shown_before, shown_after = (Perplexity(**found["perplexity"]) for found in (before, after))
    return Recovered(out, training.method, training.steps, shown_before, shown_after, before["kl"], after["kl"], record)


def _finish(
    plan: _Plan,
    model: nn.Module,
    names: set[str],
    hashes: Mapping[str, str],
    record: dict[str, Any],
    work: Path,
    out: Path,
    shown: Progress,
    began: float,
) -> None:
    """Write, read again, and put the result to its place only when it is as promised."""
    draft = work / "draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        with shown.waiting("writing"):
            shards = write(plan.checkpoint, model, names, draft)
        trusted = plan.training.trust_remote_code
        if plan.report is not None:
            compare(draft, plan.report["linears"], shards, shown, trusted).raise_for_problems()
        promised = plan.promised
        if others := {name: sha256 for name, sha256 in hashes.items() if name not in promised}:
            _check_masks(draft, others, trusted)
        record["files"] = files_of(draft)
        record["seconds"] = round(time.monotonic() - began, 3)
        told: dict[str, Any] = record
        if plan.report is not None:
            told = {**plan.report, "out": str(out), "shards": shards, "recovery": record}
            # What was measured of the weights that came in is no longer true of those that went out.
            record["pruned"] = plan.report.get("sparse")
            told["sparse"] = None
        put(draft, out, RECORD if plan.report is None else REPORT, told)
    except OSError as error:
        raise Failure(f"writing to {out} failed: {error}; the same command goes on from there") from None
    shutil.rmtree(work, ignore_errors=True)


def _check_masks(folder: Path, hashes: Mapping[str, str], trusted: bool) -> None:
    written = Checkpoint(Source(str(folder), folder.resolve(), trusted=trusted), "cpu")
    for number, name in enumerate(written.blocks):
        block = written.load_block(number)
        for linear in find_linears(block.module, name):
            if linear.name in hashes and mask_sha256(linear.view(block.state[linear.parameter])) != hashes[linear.name]:
                raise Failure(f"{linear.name} was written with another mask than it had: please report this")
        written.unload_block(number)


def _load(source: Source, dtype: Any) -> Any:
    """A whole model, by plain transformers."""
    return AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, trust_remote_code=source.trusted)


def _found(work: Path) -> tuple[dict[str, Any], Path | None]:
    """What an earlier process noted, and the checkpoint to go on from."""
    return json.loads((work / REQUEST).read_text(encoding="utf-8")), latest(work)


def latest(work: Path) -> Path | None:
    """The last checkpoint of the Trainer in a folder that is whole: its state is what is written last."""
    found = []
    for path in work.glob("checkpoint-*"):
        try:
            found.append((int(json.loads((path / "trainer_state.json").read_text())["global_step"]), path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return max(found)[1] if found else None


@torch.no_grad()
def _measure(trainer: Any, held: Tensor, source: str, title: str, shown: Progress) -> dict[str, Any]:
    """Perplexity on held-out sequences, and with a teacher the divergence from it: plain data."""
    began = time.monotonic()
    model, teacher = trainer.model.eval(), trainer.objective.teacher
    lost = apart = 0.0
    batches = torch.split(held, trainer.args.per_device_train_batch_size)
    for batch in shown.over(batches, title):
        ids = batch.to(trainer.args.device)
        logits = model(input_ids=ids, use_cache=False).logits
        lost += float(next_token_loss(logits, ids)) * len(ids)
        if teacher is not None:
            apart += float(divergence(logits, teacher(input_ids=ids, use_cache=False).logits)) * len(ids)
    loss, (count, length) = lost / len(held), held.shape
    if not math.isfinite(loss):
        raise Failure(f"{title}: the loss on {source} is not finite; take a lower --rate, or --dtype float32")
    found = Perplexity(
        math.exp(min(loss, 700.0)),
        f"{source}, held out",
        length,
        count,
        count * (length - 1),
        round(time.monotonic() - began, 3),
    )
    return {"loss": loss, "perplexity": vars(found), "kl": None if teacher is None else apart / len(held)}
