"""Ranks find each other, say the same things, and all end when one of them does."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llmprune import distributed
from llmprune.errors import Failure, UserError

QUICK = {"PERIOD": 0.1, "SILENCE": 1.5, "GRACE": 0.8}
"""The limits of the watch in tests where some rank does not answer."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int16, torch.bool)
DTYPES += (torch.complex64, torch.float8_e4m3fn)


class Ranks:
    """Processes that were started as ranks, without a launcher: rank 0 serves the store."""

    def __init__(self, folder: Path, size: int, work: Callable[..., None], *args: Any, **limits: float) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.test_distributed"])
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.errors = [folder / f"errors{rank}" for rank in range(size)]
        self.processes = [
            context.Process(target=start, args=(rank, size, port, self.errors[rank], limits, work, *args))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, rank: int) -> tuple[int | None, str]:
        """The exit code of a rank, and what it wrote to standard error."""
        self.processes[rank].join(30)
        return self.processes[rank].exitcode, self.errors[rank].read_text()

    def all_well(self) -> None:
        for rank in range(len(self.processes)):
            code, errors = self.wait(rank)
            assert code == 0, errors


def start(
    rank: int, size: int, port: int, errors: Path, limits: dict[str, float], work: Callable[..., None], *args: Any
) -> None:
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    for name, value in limits.items():
        setattr(distributed, name, value)
    work(*args)


def tensors(rank: int, dtype: torch.dtype) -> list[Tensor]:
    """Some of every shape; small whole numbers, so that every sum is exact."""
    draw = torch.Generator().manual_seed(rank)
    whole = torch.randint(0, 9, (5, 6, 7), generator=draw).to(dtype)
    return [whole, whole.clone()[1:4, ::2, 3:], whole[0].clone().T, whole[0, 0, 0].clone(), whole[:0]]


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool((a.float() == b.float()).all())


def say_the_same() -> None:
    with distributed.joined():
        me, size = distributed.rank(), distributed.size()
        assert (me, size) == (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        assert distributed.is_first() == (me == 0)
        assert distributed.local_size() == size
        assert sorted(itertools.chain(*distributed.gather(distributed.share_of(11)))) == list(range(11))
        assert distributed.gather({"rank": me}) == [{"rank": rank} for rank in range(size)]
        assert distributed.share({"rank": me}) == {"rank": 0}
        assert distributed.share(me, size - 1) == size - 1
        assert distributed.smallest((me + 1) % size) == 0
        for dtype in DTYPES:
            for number, tensor in enumerate(tensors(me, dtype)):
                distributed.broadcast(tensor, 1)
                assert equal(tensor, tensors(1, dtype)[number]), dtype
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64):
            summed = tensors(me, dtype)
            distributed.total(*summed)
            for number, tensor in enumerate(summed):
                restated = torch.stack([tensors(rank, dtype)[number] for rank in range(size)]).sum(0)
                assert equal(tensor, restated.to(dtype)), dtype
        uneven = torch.randn(1000, generator=torch.Generator().manual_seed(me))
        distributed.total(uneven)
        assert len(set(distributed.gather(uneven.numpy().tobytes()))) == 1
        parameter = torch.nn.Parameter(torch.full((3, 3), float(me)))
        distributed.broadcast(parameter, 1)
        assert parameter.requires_grad
        assert bool((parameter == 1).all())
        with pytest.raises(RuntimeError, match="scalar type"):
            distributed.total(torch.ones(3, dtype=torch.int16))
        with distributed.joined():
            assert distributed.size() == size
        assert distributed.size() == size
    assert distributed.size() == 1
    assert not dist.is_initialized()


def say_it_twice() -> None:
    """The second time, all that was said the first time is still in the store."""
    say_the_same()
    if os.environ["RANK"] == "0":
        time.sleep(0.3)
    say_the_same()


@pytest.mark.parametrize("size", [2, 4])
def test_collectives(tmp_path: Path, size: int) -> None:
    with Ranks(tmp_path, size, say_it_twice) as ranks:
        ranks.all_well()


def go_first(path: Path) -> None:
    with distributed.joined():
        with distributed.first():
            if distributed.is_first():
                time.sleep(0.3)
                path.write_text("there")
            assert path.read_text() == "there"
        for error, seen, text in (
            (UserError("no such model"), UserError, "^no such model$"),
            (OSError("disk full"), OSError if distributed.is_first() else Failure, "disk full"),
        ):
            with pytest.raises(seen, match=text), distributed.first():
                raise error
        assert distributed.smallest(3) == 3


def test_the_first_goes_first(tmp_path: Path) -> None:
    with Ranks(tmp_path, 3, go_first, tmp_path / "file") as ranks:
        ranks.all_well()


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)


def keep_waiting(path: Path, victim: int, how: str) -> None:
    """All wait for one rank, which never comes."""
    with distributed.joined():
        distributed.if_lost(lambda: "3 blocks are finished")
        distributed.gather(0)
        if distributed.rank() != victim:
            distributed.broadcast(torch.ones(3), victim)
        elif how == "raises":
            raise UserError("no such model")
        path.touch()
        time.sleep(60)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", ["raises", "is killed", "freezes"])
def test_all_end_with_one(tmp_path: Path, how: str, victim: int) -> None:
    with Ranks(tmp_path, 3, keep_waiting, tmp_path / "there", victim, how, **QUICK) as ranks:
        if how != "raises":
            wait_for(tmp_path / "there")
            pid = ranks.processes[victim].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL if how == "is killed" else signal.SIGSTOP)
        what = "failed: no such model" if how == "raises" else "no longer answers"
        for rank in {0, 1, 2} - {victim}:
            code, errors = ranks.wait(rank)
            assert code == 1
            assert errors.endswith(f"llmprune: rank {victim} of 3 {what}\n3 blocks are finished\n")
        if how == "raises":
            code, errors = ranks.wait(victim)
            assert code == 1
            assert "UserError: no such model" in errors


def test_all_end_within_a_minute() -> None:
    """From the last beat of a rank that dies to the end of the others, with all that is waited for in between."""
    period, silence, grace = distributed.PERIOD, distributed.SILENCE, distributed.GRACE
    noticed = period + silence + period  # it is looked at, and counted, once in a period
    told = grace + 1.5 * grace + grace / 2
    assert noticed + told < 60
    assert noticed + told <= silence + 5 * grace  # after which a broken collective is told of without the watch
    assert distributed.START <= 300


def be_slow(path: Path) -> None:
    """The others wait for rank 0, in a collective and at the end."""
    with distributed.joined():
        for _ in range(2):
            distributed.gather(0)
            path.touch()
            if distributed.is_first():
                time.sleep(1.4 * distributed.SILENCE)


def test_slow_or_stopped_is_not_dead(tmp_path: Path) -> None:
    """All are stopped for a while, as by Ctrl-Z, and then rank 0 takes its time."""
    with Ranks(tmp_path, 2, be_slow, tmp_path / "there", **{**QUICK, "GRACE": 0.2}) as ranks:
        wait_for(tmp_path / "there")
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in ranks.processes:
                assert process.pid is not None
                os.kill(process.pid, number)
            time.sleep(1.4 * QUICK["SILENCE"])
        ranks.all_well()


def bring_a_group(port_file: Path) -> None:
    """What a script does that works with torch.distributed already; here not by the environment."""
    rank, size = int(os.environ.pop("RANK")), int(os.environ.pop("WORLD_SIZE"))
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=size)
    for _ in range(2):
        with distributed.joined():
            assert (distributed.rank(), distributed.size()) == (rank, size)
            assert distributed.gather(rank) == list(range(size))
        values = torch.tensor(rank)
        dist.all_reduce(values)
        assert int(values) == sum(range(size))
    dist.destroy_process_group()


def test_the_group_of_the_caller_stays(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, bring_a_group, tmp_path / "store") as ranks:
        ranks.all_well()


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)


def test_torchrun() -> None:
    done = torchrun("-m", "tests.test_distributed")
    assert done.returncode == 0, done.stderr


def test_torchrun_starts_again_when_one_fails() -> None:
    done = torchrun("--max-restarts", "1", "-m", "tests.test_distributed", "fail")
    assert done.stderr.count("UserError: no such model") == 1
    assert done.stderr.count("llmprune: rank 1 of 2 failed: no such model\n3 blocks are finished\n") == 1
    assert done.returncode == 0, done.stderr


def test_one_process_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with distributed.joined(), distributed.first():
        assert not dist.is_initialized()
        assert (distributed.rank(), distributed.size(), distributed.local_size()) == (0, 1, 1)
        assert distributed.is_first()
        assert distributed.local_device("auto") == "auto"
        tensor = torch.arange(4.0)[::2]
        distributed.total(tensor)
        distributed.broadcast(tensor, 0)
        assert tensor.tolist() == [0, 2]
        assert distributed.share("a") == "a"
        assert distributed.gather("a") == ["a"]
        assert distributed.smallest(3) == 3
        assert distributed.share_of(3) == range(3)
        distributed.if_lost(str)


def test_half_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"MASTER_ADDR expected.* torchrun"), distributed.joined():
        pass


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    world: Any = distributed._World(3, 4, None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(distributed, "_world", world)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.local_device("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [distributed.local_device(asked) for asked in ("auto", "cuda")] == ["cuda:1", "cuda:1"]
    assert [distributed.local_device(asked) for asked in ("cpu", "cuda:0")] == ["cpu", "cuda:0"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"2 ranks on a machine with 1 GPU: start 1 .*--device cpu"):
        distributed.local_device("auto")


@pytest.mark.parametrize("seed", range(30))
def test_deal(seed: int) -> None:
    draw = random.Random(seed)
    ranks = draw.randint(1, 4)
    costs = [draw.choice([0, 1, 2, 3, 7.5, 20]) for _ in range(draw.randint(0, 7))]

    def longest(owners: tuple[int, ...] | list[int]) -> float:
        loads = [0.0] * ranks
        for owner, cost in zip(owners, costs, strict=True):
            loads[owner] += cost
        return max(loads)

    owners = distributed.deal(costs, ranks)
    assert len(owners) == len(costs)
    assert owners == distributed.deal(costs, ranks)
    best = min(longest(every) for every in itertools.product(range(ranks), repeat=len(costs)))
    assert longest(owners) <= 4 / 3 * best


def test_deal_alike() -> None:
    assert distributed.deal([1] * 6, 3) == [0, 1, 2, 0, 1, 2]
    assert distributed.deal([], 2) == []


if __name__ == "__main__":
    if sys.argv[1:] == ["fail"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        try:
            with distributed.joined():
                distributed.if_lost(lambda: "3 blocks are finished")
                if distributed.rank() == 1:
                    raise UserError("no such model")
                distributed.gather(0)
        finally:
            time.sleep(0.5)  # the launcher must not end this rank before it has shown its traceback
    else:
        say_it_twice()
