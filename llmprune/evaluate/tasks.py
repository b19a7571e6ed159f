"""Task benchmarks by EleutherAI's lm-eval: its tasks, prompts and metrics, on a model that runs block by block."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmprune import distributed, memory
from llmprune.budget import batch_tokens
from llmprune.errors import Failure, LLMPruneError, NotFinite, UserError, unknown
from llmprune.evaluate.stream import answered, final_states
from llmprune.model import blocks
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.quiet import quiet
from llmprune.model.skeleton import make_skeleton
from llmprune.model.source import resolve
from llmprune.progress import Progress, of_first
from llmprune.report.record import Score

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(f"tasks need lm-eval, which is not installed ({error}): pip install 'llmprune[eval]'") from None

SETS: dict[str, tuple[str, ...]] = {
    "pruning": ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
}
"""Names for several tasks; `pruning` are the seven of the papers on pruning, whose mean accuracy (acc) they give."""


WINDOWS = 2**40
"""Parts of long texts that lm-eval hands over at once: all."""

GENERATED = 8
"""Texts that are generated at once, where there is room."""

T = TypeVar("T")


@dataclass
class Tasks:
    """What the tasks told.

    Attributes:
        model: what was asked for.
        scores: every figure that is finite.
        means: the mean accuracy of each named set, of which every task has one.
        seconds: how long it took.
        broken: figures that are not finite, in words.
        raw: lm-eval's own results, whole; with the single documents where they were asked for.
    """

    model: str
    scores: list[Score]
    means: dict[str, float] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0
    raw: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON, without what is raw."""
        shown = {"scores": [vars(score) for score in self.scores], "means": self.means}
        return {"model": self.model, **shown, "broken": self.broken, "seconds": self.seconds}


def evaluate(
    model: str | Path,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: float | None = None,
    include_path: Sequence[str | Path] = (),
    batch: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    unsafe_code: bool = False,
    samples: bool = False,
    manager: Any = None,
    progress: Progress | None = None,
) -> Tasks:
    """Run tasks of lm-eval on a model.

    Args:
        model: a Hub name, a folder, or a `.gguf` file.
        tasks: names that lm-eval knows (tasks, groups, tags, globs), or of `SETS`.
        shots: solved examples before each question; by default what the task says.
        limit: only so many documents of each task, or below 1 that part of them.
        include_path: folders with tasks of the user's own.
        batch: tokens that run at once, padding included; by default what suits the device, and less where its memory
            does not hold that.
        device, dtype, trust_remote_code: as in a recipe.
        unsafe_code: let tasks run the code that the model writes, on this machine (`humaneval`, `mbpp`).
        samples: keep what was said of each document in `raw`.
        manager: what `find` gave for these tasks, where they were looked for already.
        progress: where to show how far the work is.

    Raises:
        UserError: an unknown task (the answer names the nearest), one whose documents cannot be had, or a model that
            cannot be evaluated.
        NotFinite: what the model says is not finite.
    """
    began = time.monotonic()
    with torch.no_grad(), distributed.joined(), calm():
        manager, wanted = find(tasks, [str(path) for path in include_path], manager)
        with distributed.first():
            source = resolve(model, dtype, trust_remote_code=trust_remote_code, progress=progress)
            checkpoint = Checkpoint(source, distributed.local_device(device), dtype)
        runner = Streamed(checkpoint, batch, of_first(progress))
        try:
            found = lm_eval.simple_evaluate(
                runner,
                tasks=wanted,
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                log_samples=samples,
                confirm_run_unsafe_code=unsafe_code,
            )
        except OverflowError as error:  # lm-eval's perplexity of what is all but impossible
            raise NotFinite(f"a figure of {model} on {', '.join(wanted)} is too large for a number: {error}") from error
        except Exception as error:
            if runner.asked or isinstance(error, LLMPruneError):  # the tasks themselves were sound
                raise
            raise _unusable(wanted, error) from error
        finally:
            checkpoint.unload()
        # lm-eval gives its results to one process alone.
        made, raw = distributed.share((_scores(found), plain(found)) if found is not None else ([], {}))
    sound = [score for score in made if math.isfinite(score.value)]
    broken = [f"{score.task} {score.metric}" for score in made if not math.isfinite(score.value)]
    return Tasks(str(model), sound, means(tasks, sound), broken, round(time.monotonic() - began, 3), raw)


def documents(found: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What was measured of each single document, of the results that `samples` keep in `Tasks.raw`.

    Returns:
        For each task: `id` and `filter`, `hash` of all that was asked, and `values`, metric to value. The value is a
        number, for some metrics of a whole text a list of a log likelihood and a length, or whatever else lm-eval has.
    """
    return {
        task: [
            {
                "id": sample["doc_id"],
                "filter": sample["filter"],
                "hash": "-".join(sample[f"{part}_hash"][:16] for part in ("doc", "prompt", "target")),
                "values": {metric: sample[metric] for metric in sample["metrics"]},
            }
            for sample in samples
        ]
        for task, samples in found.get("samples", {}).items()
    }


class Streamed(HFLM):  # type: ignore[misc]
    """A model of lm-eval's that reads one block at a time; how text becomes tokens and requests is lm-eval's own.

    All requests of a task go through a block before the next block is read. What generates text loads the whole model.
    Each rank takes its share of the requests.

    Attributes:
        asked: whether lm-eval has had anything to ask yet.
    """

    def __init__(self, checkpoint: Checkpoint, batch: int | None, progress: Progress) -> None:
        with quiet():
            # lm-eval reads the config of this one; it has no weights.
            self._stand_in = make_skeleton(checkpoint.config, checkpoint.dtype, checkpoint.source.trusted)
            tokenizer = checkpoint.tokenizer
            super().__init__(self._stand_in, tokenizer=tokenizer, backend="causal", batch_size=WINDOWS)
        self._device = checkpoint.device
        self._checkpoint, self._progress, self._fixed = checkpoint, progress, batch is not None
        self._tokens, self._texts = batch or batch_tokens(checkpoint), GENERATED
        self._chain = blocks.probe(checkpoint)
        self._whole: Any = None
        self._sound: Tensor | None = None
        self.asked = False

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes about the model."""
        return {
            "model_num_parameters": self._checkpoint.weights,
            "model_dtype": str(self._checkpoint.dtype),
            "model_revision": self._checkpoint.source.revision,
            "model_sha": self._checkpoint.source.revision or "",
        }

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """For each request the log probability of its continuation, and whether it is what greedy decoding gives."""
        self.asked = True
        sequences: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise UserError(f"a continuation of {len(continuation):,} tokens cannot be scored by this model")
            told = tuple((context + continuation)[-(self.max_length + 1) : -1])
            sequences.setdefault(told, []).append(number)

        def scored(tokens: int) -> dict[int, tuple[float, bool]]:
            self._tokens = tokens
            return self._scored(requests, sequences)

        found = self._fitting(self._tokens, scored, self._fixed)
        everything: dict[int, tuple[float, bool]] = {}
        for part in distributed.gather(found):
            everything.update(part)
        if not all(math.isfinite(value) for value, _ in everything.values()):
            raise self._broken()
        for number, (text, _, _) in enumerate(requests):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, everything[number])
        return [everything[number] for number in range(len(requests))]

    def _scored(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], sequences: Mapping[tuple[int, ...], list[int]]
    ) -> dict[int, tuple[float, bool]]:
        """What this rank finds for its share of the sequences, by the numbers of the requests that end them."""
        found: dict[int, tuple[float, bool]] = {}
        ordered = _by_length(sequences)  # shared out before they are put together: ranks may hold more or less at once
        batches = list(_batches(distributed.mine(ordered), self._tokens))
        padded = [_padded(batch) for batch in batches]
        room = memory.available() // 4
        states = final_states(self._checkpoint, self._chain, padded, self._progress, "scoring", room)
        for number, hidden in states:
            for told, row in zip(batches[number], hidden, strict=True):
                answers = [requests[place][2] for place in sequences[told]]
                kept = row[len(told) - max(map(len, answers)) : len(told)]
                found.update(zip(sequences[told], self._score(kept, answers), strict=True))
        return found

    def _fitting(self, most: int, run: Callable[[int], T], fixed: bool = False) -> T:
        """Run so much at once; half of it whenever memory is short, unless the user said how much it has to be.

        Raises:
            Failure: not even one fits.
        """
        while most:
            try:
                return run(most)
            except RuntimeError as error:
                if fixed or not should_reduce_batch_size(error):
                    raise
            self._checkpoint.unload()
            clear_device_cache(garbage_collection=True)
            most //= 2
        raise Failure(f"the memory of {self._device} does not hold one sequence of {self._checkpoint.source.name}")

    def _score(self, states: Tensor, answers: list[list[int]]) -> Iterator[tuple[float, bool]]:
        """Each answer's log probability; the states (tokens, hidden) are those before the tokens of the longest."""
        longest = len(states)
        wanted = torch.tensor([[0] * (longest - len(answer)) + answer for answer in answers]).T  # (tokens, answers)
        logs, best = answered(self._checkpoint, self._chain, states, wanted)
        right = best[:, None].cpu() == wanted
        for place, answer in enumerate(answers):
            start = longest - len(answer)
            yield float(logs[start:, place].sum()), bool(right[start:, place].all())

    def _broken(self) -> NotFinite:
        return NotFinite(f"what {self._checkpoint.source.name} says is not finite; try --dtype float32")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model goes on to say; for this it is loaded as a whole."""
        self.asked = True
        if self._whole is None:
            self._checkpoint.unload()
            source = self._checkpoint.source
            whole = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=self._checkpoint.dtype, trust_remote_code=source.trusted
            )
            self._whole = whole.to(self._device)
            self._whole.register_forward_hook(self._look)
        mine = distributed.mine(requests)
        say = super().generate_until

        def generated(texts: int) -> list[str]:
            self._model, self._texts, self.batch_size_per_gpu = self._whole, texts, texts
            made: list[str] = say(mine, disable_tqdm)
            return made

        try:
            said = self._fitting(self._texts, generated) if mine else []
        finally:
            self._model, self.batch_size_per_gpu = self._stand_in, WINDOWS
        if not all(distributed.gather(self._sound is None or bool(self._sound))):
            raise self._broken()
        parts = distributed.gather(said)
        return [parts[number % len(parts)][number // len(parts)] for number in range(len(requests))]

    def _look(self, _: Any, __: Any, told: Any) -> None:
        """See that what a token is chosen by is finite; nothing waits for the answer before the end."""
        sound = told.logits[:, -1].amax(-1).isfinite().all()  # some models rule tokens out by -inf
        self._sound = sound if self._sound is None else self._sound & sound


def _by_length(sequences: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The longest first."""
    return sorted(sequences, key=lambda sequence: (-len(sequence), sequence))


def _batches(sequences: Sequence[tuple[int, ...]], most: int) -> Iterator[list[tuple[int, ...]]]:
    """Sequences, the longest first, put together in their order: at most so many tokens with padding."""
    batch: list[tuple[int, ...]] = []
    for sequence in sequences:
        if batch and (len(batch) + 1) * len(batch[0]) > most:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def _padded(batch: list[tuple[int, ...]]) -> Tensor:
    """(sequences, length), filled up on the right, where nothing before looks."""
    length = len(batch[0])
    return torch.tensor([[*sequence, *[0] * (length - len(sequence))] for sequence in batch])


def _unusable(names: Sequence[str], error: Exception) -> UserError:
    """What went wrong before the model was asked anything."""
    if "confirm_run_unsafe_code" in str(error):
        return UserError(
            f"{', '.join(names)} runs code that the model writes, on this machine: look at what that can do here, and "
            "allow it with --run-unsafe-code"
        )
    if isinstance(error, FileNotFoundError | ConnectionError):
        return UserError(
            f"the documents of {', '.join(names)} cannot be had: {error}. A file that a task of your own names is "
            "looked for from the folder in which llmprune runs; what is on the Hub needs the network once"
        )
    said = f"{type(error).__name__}: {error}"
    return UserError(f"the questions of {', '.join(names)} cannot be made by lm-eval: {said}")


def find(tasks: Sequence[str], folders: list[str], manager: Any = None) -> tuple[Any, list[str]]:
    """A manager that knows the tasks, and their names in it.

    Args:
        manager: one that was found earlier.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"no folder with tasks at {folder} (--include-path)")
    asked = [name for task in tasks for name in SETS.get(task, (task,))]
    if manager is None and folders:
        # Groups and patterns there may mean tasks of lm-eval's own as well.
        own = TaskManager(include_path=folders, include_defaults=False)
        manager = own if set(asked) <= set(own.all_subtasks) else None
    if manager is None:
        manager = TaskManager(include_path=folders or None)  # it takes seconds to read the thousands that lm-eval has
    names: list[str] = []
    for name in asked:
        found = manager.match_tasks([name])
        if not found:
            _check_files(folders)
            raise unknown("task", name, [*SETS, *manager.all_tasks])
        names += found
    return manager, list(dict.fromkeys(names))


def _check_files(folders: Sequence[str]) -> None:
    """See that the files of the user's own tasks are YAML: lm-eval passes over those that are not."""
    for path in sorted(path for folder in folders for path in Path(folder).rglob("*.yaml")):
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path} is not the YAML of a task: {error}") from None


def _scores(found: dict[str, Any]) -> list[Score]:
    made = []
    for task, figures in found["results"].items():
        counted = found.get("n-samples", {}).get(task, {}).get("effective")
        documents = counted if counted is not None else int(figures.get("sample_len", 0))
        for key, value in figures.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{kind}")
            better = found.get("higher_is_better", {}).get(task, {}).get(metric)
            error = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
            shots = int(found.get("n-shot", {}).get(task) or 0)
            made.append(Score(task, metric, kind, float(value), error, documents, shots, better))
    return made


def plain(value: Any) -> Any:
    """The same as plain data; what is not finite is None, and what JSON does not know is its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def means(tasks: Sequence[str], made: list[Score]) -> dict[str, float]:
    """The mean accuracy of the sets that were asked for."""
    means = {}
    for name in tasks:
        if name in SETS:
            values = {score.task: score.value for score in made if score.metric == "acc"}
            if all(task in values for task in SETS[name]):  # one of a user's own by that name may have none
                means[name] = sum(values[task] for task in SETS[name]) / len(SETS[name])
    return means


@contextlib.contextmanager
def calm() -> Iterator[None]:
    """Let lm-eval only speak of what goes wrong, and not on standard output, where results are."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        log.setLevel(before)
