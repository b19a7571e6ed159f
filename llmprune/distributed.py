"""Ranks that work on one model together, through torch.distributed; a process by itself needs none of this.

`torchrun` or `accelerate launch` starts the ranks, and within `joined` they are many; anywhere else each process is
rank 0 of 1, and every function here does nothing.

A rank may solve for an hour while the others wait for its weights, so no time limit of a collective tells a slow rank
from a dead one. Each rank has a `_Watch` instead.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llmprune.errors import Failure, LLMPruneError, UserError

T = TypeVar("T")

PERIOD = 2.0
"""Seconds from one beat of a rank to the next."""

SILENCE = 40.0
"""Seconds without a beat after which a rank is taken for dead; no call may keep Python's lock for so long."""

START = 300.0
"""Seconds that the ranks have for finding each other, and then each for its first beat, which it gives at once."""

GRACE = 4.0
"""Seconds that a rank which ends gives the others to hear why."""

_FOREVER = timedelta(days=30)

_joins = itertools.count()


@dataclass(frozen=True)
class _World:
    rank: int
    size: int
    group: dist.ProcessGroup | None
    watch: _Watch


_world: _World | None = None


def rank() -> int:
    """The number of this rank, from 0."""
    return _world.rank if _world else 0


def size() -> int:
    """How many ranks work together."""
    return _world.size if _world else 1


def local_size() -> int:
    """How many of the ranks share this machine and its memory: all of them, where the launcher does not tell."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) if _world else 1


def is_first() -> bool:
    """Whether this rank is the one that talks to the user and writes what there is only one of."""
    return rank() == 0


def local_device(asked: str) -> str:
    """The device of this rank, where any GPU was asked for: each rank on a machine has one of its own.

    Raises:
        UserError: there are fewer GPUs than ranks on this machine.
    """
    if _world is None or asked not in ("auto", "cuda") or not torch.cuda.is_available():
        return asked
    there = torch.cuda.device_count()
    if local_size() > there:
        raise UserError(
            f"{local_size()} ranks on a machine with {there} GPU{'s' if there > 1 else ''}: start {there} "
            f"(--nproc-per-node {there}), or give --device cpu; where each rank sees a GPU of its own, --device cuda:0"
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', rank())}"


@contextmanager
def joined() -> Iterator[None]:
    """Work together with the other ranks, where the launcher started any, or the caller has a process group already.

    All ranks leave together. When one fails, dies or freezes, all others end: those that wait in a collective cannot be
    woken up by an exception, so their processes do. Within another `joined` this does nothing.

    Raises:
        UserError: the environment does not tell where the other ranks are.
        Failure: the other ranks could not be found, or were lost.
    """
    global _world
    given = dist.is_available() and dist.is_initialized()
    count = dist.get_world_size() if given else int(os.environ.get("WORLD_SIZE", 1))
    if _world is not None or count == 1:
        yield
        return
    # There is no public way to the store of a group.
    store = dist.distributed_c10d._get_default_store() if given else _meet()
    number = dist.get_rank() if given else int(os.environ["RANK"])
    # The store may still hold what was said the last time, by these processes or by those that a launcher replaced.
    store = dist.PrefixStore(f"llmprune {os.environ.get('TORCHELASTIC_RESTART_COUNT')} {next(_joins)}", store)
    watch = _Watch(store, number, count)
    group: dist.ProcessGroup | None = None
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        with _reaching(watch):
            if given:  # a group beside the caller's, which may know no CPU and have a short time limit
                group = dist.new_group(backend=backend, timeout=_FOREVER)
            else:
                dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_FOREVER)
                group = dist.group.WORLD
        _world = _World(number, count, group, watch)
        yield
        total(torch.zeros(1))  # rank 0 may serve the store, so nobody leaves before all are through
    except BaseException as error:
        watch.fail(f"rank {number} of {count} failed: {_said(error)}")
        raise
    finally:
        watch.stop()
        _world = None
        if group is not None:
            # Where other ranks are gone, NCCL may wait for them for good.
            closing = threading.Thread(target=dist.destroy_process_group, args=(group,), daemon=True)
            closing.start()
            closing.join(GRACE)


def if_lost(onward: Callable[[], str]) -> None:
    """What to print when this process has to end because of another rank: what is finished, and how to go on.

    Args:
        onward: called in another thread, at any moment; it must not wait for anything.
    """
    if _world:
        _world.watch.onward = onward


def total(*tensors: Tensor) -> None:
    """Put into each tensor the sum of it over all ranks: the same bits on each of them."""
    if _world is None:
        return
    with _reaching(_world.watch):
        for tensor in tensors:
            with _plain(tensor) as plain:
                dist.all_reduce(plain, group=_world.group)


def broadcast(tensor: Tensor, owner: int) -> None:
    """Put into the tensor what it holds on the owner, whatever its dtype."""
    if _world is None:
        return
    with _reaching(_world.watch), _plain(tensor) as plain:
        dist.broadcast(plain.view(torch.uint8), owner, group=_world.group)


def share(value: T, owner: int = 0) -> T:
    """The owner's value, which can be anything that pickles, on every rank."""
    if _world is None:
        return value
    values = [value]
    with _reaching(_world.watch):
        dist.broadcast_object_list(values, owner, group=_world.group)
    return values[0]


def gather(value: T) -> list[T]:
    """The value of each rank, in their order, on every rank."""
    if _world is None:
        return [value]
    values = [value] * _world.size
    with _reaching(_world.watch):
        dist.all_gather_object(values, value, group=_world.group)
    return values


def smallest(value: int) -> int:
    """The smallest value of any rank."""
    return min(gather(value))


@contextmanager
def first() -> Iterator[None]:
    """Rank 0 goes first, and the others follow when it is through: for what it puts where the others find it.

    When it fails, its error is raised on all ranks.
    """
    if is_first():
        try:
            yield
        except Exception as error:
            share(error if isinstance(error, LLMPruneError) else Failure(f"rank 0 failed: {_said(error)}"))
            raise
        share(None)
    else:
        failed: LLMPruneError | None = share(None)
        if failed is not None:
            failed.told = True
            raise failed
        yield


def share_of(count: int) -> range:
    """Which of so many things this rank takes, when they are alike."""
    return range(rank(), count, size())


def mine(things: Sequence[T]) -> list[T]:
    """Those of some things, which are alike, that this rank takes."""
    return [things[number] for number in share_of(len(things))]


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """Which rank takes each item, so that all are through at about the same time.

    Each item, the costliest first, goes to the rank that has the least to do so far: the last rank takes at most 4/3 of
    the time that the best way to deal would take.
    """
    owners = [0] * len(costs)
    loads = [(0.0, rank) for rank in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        load, owner = loads[0]
        owners[item] = owner
        heapq.heapreplace(loads, (load + costs[item], owner))
    return owners


class _Watch:
    """Tells the other ranks that this one is alive, and ends this process when one of them fails, dies or freezes.

    Every rank counts up its beat in the store. A rank that ends before all are through posts the reason there; the
    first reason stands, and all wait until all have heard it, because one of them may serve the store.

    One thread talks to the store, and may get stuck with it; the other counts the time. It counts what it was awake
    for, so that nobody is taken for dead by a rank that itself was stopped for a while.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.onward: Callable[[], str] = str
        self._rank, self._size = rank, size
        self._store = store.clone()  # type: ignore[attr-defined]  # a connection for the thread alone
        self._beats = [0] * size
        self._silence = [0.0] * size
        self._reason = ""
        self._failing = False
        self._hurry, self._told, self._over = threading.Event(), threading.Event(), threading.Event()
        self._last = threading.Lock()
        for work in (self._talk, self._count):
            threading.Thread(target=work, daemon=True).start()

    def fail(self, reason: str) -> None:
        """Tell the others that this rank ends, and why; it goes on to end by itself."""
        self._failing = True
        self._post(reason)

    def stop(self) -> None:
        """Take no more notice of the others."""
        self._over.set()
        self._hurry.set()

    def _talk(self) -> None:
        try:
            while not self._over.is_set():
                self._store.add(f"beat {self._rank}", 1)
                for other in range(self._size):
                    beat = self._store.add(f"beat {other}", 0)
                    if beat != self._beats[other]:
                        self._beats[other], self._silence[other] = beat, 0.0
                if self._reason or self._store.check(["reason"]):
                    self._agree()
                    return
                self._hurry.wait(PERIOD)
        except RuntimeError:
            self._lose_store()

    def _agree(self) -> None:
        """Settle with the other ranks on the reason for which all end."""
        reason = self._store.compare_set("reason", "", self._reason).decode()
        heard, end = self._store.add("heard", 1), time.monotonic() + GRACE
        with contextlib.suppress(RuntimeError):  # the store went with the last that had to hear it
            while heard < sum(silence < SILENCE for silence in self._silence) and time.monotonic() < end:
                time.sleep(PERIOD / 20)
                heard = self._store.add("heard", 0)
            time.sleep(PERIOD / 10)  # the others look once more
        self._told.set()
        self._end(reason)

    def _count(self) -> None:
        while not self._over.wait(PERIOD):
            for other in range(self._size):
                self._silence[other] += PERIOD
            lost = [
                other
                for other, (beats, silence) in enumerate(zip(self._beats, self._silence, strict=True))
                if silence >= (SILENCE if beats else START)
            ]
            if self._rank in lost:  # not even this rank's own beats come back
                self._lose_store()
            elif lost:
                self._lose(f"rank {', '.join(map(str, lost))} of {self._size} no longer answers")

    def _lose(self, reason: str) -> None:
        if not self._over.wait(GRACE):  # else all are through, and some have left already
            self._post(reason)
            self._end(reason)

    def _lose_store(self) -> None:
        self._told.set()  # as far as it can be
        by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._lose(f"{'the launcher' if by_launcher else f'rank 0 of {self._size}'} no longer answers")

    def _post(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._hurry.set()
        self._told.wait(1.5 * GRACE)

    def _end(self, reason: str) -> None:
        if self._failing:
            return
        self._last.acquire()
        try:
            # Not through sys.stderr, which the main thread may hold.
            os.write(2, f"llmprune: {reason}\n".encode())
            os.write(2, f"{self.onward()}\n".lstrip().encode())
            # Some launchers end all ranks as soon as one is gone, and the one that failed has more to say.
            time.sleep(GRACE / 2)
        finally:
            os._exit(1)


@functools.cache
def _meet() -> dist.Store:
    """The store where the ranks find each other; it is kept, since rank 0 may serve it until the process ends."""
    where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    try:
        store: dist.Store = next(dist.rendezvous("env://", timeout=timedelta(seconds=START)))[0]
    except ValueError as error:
        raise UserError(
            f"{error}; WORLD_SIZE is {os.environ['WORLD_SIZE']}: start with torchrun or accelerate launch, or unset it"
        ) from None
    except dist.DistError as error:
        raise Failure(f"not all {os.environ['WORLD_SIZE']} ranks met at {where}: {_said(error)}") from None
    return store


@contextmanager
def _reaching(watch: _Watch) -> Iterator[None]:
    """Where a collective breaks because a rank is gone, the watch knows more about it; it ends this process."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise  # a mistake in the call
        time.sleep(SILENCE + 5 * GRACE)
        raise Failure(f"another rank has ended, its own message says why; here: {_said(error)}") from error


@contextmanager
def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in a row, on a device that the group can reach: itself, or a copy that is copied back.

    gloo takes a tensor with gaps, and gives nonsense.
    """
    tensor = tensor.detach()
    near = tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu()
    plain = near.contiguous().view(-1)
    yield plain
    if plain.data_ptr() != tensor.data_ptr():
        tensor.copy_(plain.view(tensor.shape))


def _said(error: BaseException) -> str:
    if isinstance(error, LLMPruneError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].removesuffix(": ")
