"""A model in a process of its own, so that its peak of memory is its own; plain transformers generates in it.

The one that measures tells the process what to do through a pipe and waits for the answer: only one works at a time.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

import llmprune
from llmprune import memory
from llmprune.errors import Failure, LLMPruneError, UserError, first_line
from llmprune.model.quiet import quiet
from llmprune.model.skeleton import pick_device

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What `torchrun` sets, and transformers would read; a process of ours is nobody's rank."""

PATIENCE = 10.0
"""Seconds that a process which has let go of its pipe is given to end."""


@dataclass(frozen=True)
class Load:
    """The model to load.

    Attributes:
        folder: holds config.json and safetensors.
        device, dtype: as in a recipe.
        threads: that torch computes with on the CPU, None for its own choice.
        trusted: run code that comes with the model.
    """

    folder: Path
    device: str
    dtype: str
    threads: int | None
    trusted: bool


@dataclass(frozen=True)
class Loaded:
    """A model that is loaded; bytes.

    Attributes:
        parameters, weight_bytes, dtype: see `Timed`.
        device, device_name, threads: what it runs on.
        base_memory: resident before it was loaded.
    """

    parameters: int
    weight_bytes: int
    dtype: str
    device: str
    device_name: str
    threads: int
    base_memory: int


@dataclass(frozen=True)
class Turn:
    """The prompts to go on from.

    Attributes:
        prompts: (batch, tokens) ids.
        new_tokens: to generate for each.
        look: measure the cache as well.
    """

    prompts: list[list[int]]
    new_tokens: int
    look: bool = False


@dataclass(frozen=True)
class Took:
    """What a turn took.

    Attributes:
        first: seconds from the call to the first new token of all sequences.
        rest: seconds for the others.
        prompt_tokens: of each sequence.
        made: (batch, new tokens) ids.
        cache, cache_bytes: class and bytes of the cache, where they were asked for.
        peak_memory, peak_device_memory: see `Timed`; so far.
    """

    first: float
    rest: float
    prompt_tokens: int
    made: list[list[int]]
    cache: str
    cache_bytes: int
    peak_memory: int
    peak_device_memory: int | None


# -- on this side ----------------------------------------------------------------------------------------------------


class Worker:
    """A process with a model; `close` ends it, also in the middle of its work.

    Attributes:
        name: the model's.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as the process
        self._link, theirs = Pipe()
        places = [str(Path(llmprune.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        kept = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[theirs.fileno()],
            # The folder that somebody stands in holds no modules of ours.
            env={**kept, "PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1"},
        )
        theirs.close()  # so that the pipe breaks when the process ends

    def load(self, asked: Load) -> Loaded:
        """Load the model.

        Raises:
            UserError: it cannot be loaded.
            Failure: the process has died, or it has no room.
        """
        found = self._ask(asked)
        assert isinstance(found, Loaded)
        return found

    def turn(self, asked: Turn) -> Took:
        """Generate.

        Raises:
            Failure: the process has died, or the model cannot.
        """
        found = self._ask(asked)
        assert isinstance(found, Took)
        return found

    def close(self) -> None:
        """End the process at once; what it holds is given back when this returns."""
        self._process.kill()
        self._process.wait()
        self._link.close()
        self._log.close()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def _ask(self, asked: Load | Turn) -> Any:
        try:
            self._link.send(asked)
            answer = self._link.recv()
        except (EOFError, OSError):
            raise Failure(f"the process of {self.name} has died: {self._reason()}") from None
        if isinstance(answer, LLMPruneError):
            raise type(answer)(f"{self.name}: {answer}")
        return answer

    def _reason(self) -> str:
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return "it does not answer any more"
        if code == -signal.SIGKILL:
            return (
                "it was killed, as the system does where memory runs out (fewer models or a shorter prompt take less)"
            )
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{how}{f': {said[-1]}' if said else ''}"


@contextlib.contextmanager
def working(names: Sequence[str]) -> Iterator[list[Worker]]:
    """A process for each model; all are gone afterwards, whatever has happened."""
    workers: list[Worker] = []
    try:
        for name in names:
            workers.append(Worker(name))
        yield workers
    finally:
        for worker in workers:
            worker.close()


# -- in the process --------------------------------------------------------------------------------------------------


def main(link: Connection) -> None:
    """Do what comes through the pipe until it is closed."""
    model: Any = None
    base = memory.current()
    while True:
        try:
            asked = link.recv()
        except (EOFError, ConnectionError):
            return
        try:
            if isinstance(asked, Load):
                model = load(asked)
                answer: Any = _loaded(model, base)
            else:
                answer = generate(model, asked)
        except LLMPruneError as error:
            answer = error
        except (torch.OutOfMemoryError, MemoryError):
            answer = Failure("no memory is left: fewer models at once, a shorter prompt or a smaller batch take less")
        except Exception as error:
            answer = Failure(f"cannot generate: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        try:
            link.send(answer)
        except ConnectionError:  # nobody waits for it any more
            return


def load(asked: Load) -> Any:
    """The model on the device, by plain transformers, set to generate greedily and to stop at no token.

    Raises:
        UserError: it cannot be loaded.
    """
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    device = pick_device(asked.device)
    dtype = asked.dtype if asked.dtype == "auto" else getattr(torch, asked.dtype)
    onto = {} if device.type == "cpu" else {"device_map": {"": device}}  # the host need not hold the weights first
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                asked.folder, dtype=dtype, trust_remote_code=asked.trusted, **onto
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"cannot be loaded: {first_line(error)}") from None
    # What comes with the model may ask for an end at some token, for beams or for draws.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.eval()


def generate(model: Any, asked: Turn) -> Took:
    """Let the model go on from the prompts: greedily, for exactly as many tokens as asked, with its default cache.

    Raises:
        Failure: it stops earlier.
    """
    device = next(model.parameters()).device
    prompts = torch.tensor(asked.prompts, device=device)
    watch = _First(device)
    options = GenerationConfig(do_sample=False, max_new_tokens=asked.new_tokens, return_dict_in_generate=asked.look)
    inputs = {"attention_mask": torch.ones_like(prompts), "stopping_criteria": StoppingCriteriaList([watch])}
    gc.collect()
    with quiet():
        _wait_for(device)
        began = time.perf_counter()
        made = model.generate(prompts, generation_config=options, **inputs)
        _wait_for(device)
        ended = time.perf_counter()
    cache = None
    if asked.look:
        # transformers 5.0 calls it past_key_values, or cache_params in models without attention
        names = ("cache", "past_key_values", "cache_params")
        cache = next((found for name in names if (found := getattr(made, name, None)) is not None), None)
        made = made.sequences
    new = made[:, prompts.shape[1] :]
    if new.shape[1] != asked.new_tokens or watch.seen is None:
        raise Failure(f"makes {new.shape[1]:,} tokens instead of {asked.new_tokens:,}: its generation stops by itself")
    on_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    times = watch.seen - began, ended - watch.seen
    named = "none" if cache is None else type(cache).__name__
    return Took(*times, prompts.shape[1], new.tolist(), named, held(cache), memory.peak(), on_gpu)


def held(cache: Any) -> int:
    """The bytes of all tensors that hang on a cache, of whatever kind it is; what they share counts once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [cache]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, nn.Module):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            waiting.extend(thing.values())
        elif isinstance(thing, list | tuple):
            waiting.extend(thing)
        elif type(thing).__module__.startswith(("transformers", "transformers_modules")):
            waiting.extend(vars(thing).values() if hasattr(thing, "__dict__") else ())
    return sum(storages.values())


class _First(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing, and notes when the first new token is there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seen: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.seen is None:
            _wait_for(self.device)
            self.seen = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _loaded(model: Any, base: int) -> Loaded:
    parameters = list(model.parameters())  # those that are tied come once
    device = parameters[0].device
    counts: Counter[torch.dtype] = Counter()
    for parameter in parameters:
        counts[parameter.dtype] += parameter.numel()
    return Loaded(
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.nbytes for parameter in parameters),
        str(counts.most_common(1)[0][0]).removeprefix("torch."),
        device.type,
        _device_name(device),
        torch.get_num_threads(),
        base,
    )


def _device_name(device: torch.device) -> str:
    """The name of a GPU as its driver tells it, or of the CPU as the system does."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    told = Path("/proc/cpuinfo")
    if told.is_file():
        lines = told.read_text(encoding="utf-8", errors="replace").splitlines()
        named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        if named:
            return named
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that measures is interrupted too, and ends this process
    # Objects that come through the pipe are of the module by its own name, not of `__main__`.
    from llmprune.evaluate import worker

    worker.main(Connection(int(sys.argv[1])))
