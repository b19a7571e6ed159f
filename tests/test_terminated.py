"""On SIGTERM a process says how to go on, whatever it is at, and ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from llmprune import distributed
from llmprune.terminated import telling
from tests.test_distributed import Ranks, wait_for


def wait_for_another(path: Path) -> None:
    """Rank 0 waits for rank 1 in a collective, where no handler of Python's is called."""
    with distributed.joined():
        distributed.gather(0)
        if distributed.is_first():
            with telling(lambda: "3 blocks are finished"):
                path.touch()
                distributed.broadcast(torch.ones(3), 1)
        else:
            threading.Event().wait(60)


def test_in_a_collective(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, wait_for_another, tmp_path / "there") as ranks:
        wait_for(tmp_path / "there")
        time.sleep(0.5)
        ranks.processes[0].terminate()
        code, errors = ranks.wait(0)
        assert code == 143
        assert errors == "llmprune: 3 blocks are finished\n"


CASES = {
    "before and after": "with telling(word): pass\nend()",
    "a handler of the caller's": "signal.signal(SIGTERM, lambda *_: os._exit(7))\nwith telling(word): end()",
    "a loop of the caller's": "signal.set_wakeup_fd(socket.fileno())\nwith telling(word): end()",
    "a thread": "def work():\n with telling(word): end()\nthreading.Thread(target=work).start()",
    "an error": "try:\n with telling(word): 1 / 0\nexcept ZeroDivisionError: end()",
    "inside": "with telling(word): end()",
}
BEGIN = """
import os, signal, socket, threading, time
from signal import SIGTERM
from llmprune.terminated import telling
socket, other = socket.socketpair()
socket.setblocking(False)
def word(): return "to go on"
def end():
    os.kill(os.getpid(), SIGTERM)
    time.sleep(20)
"""


@pytest.mark.parametrize("case", CASES)
def test_what_else_there_is_stays_as_it_was(case: str) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN + CASES[case]], capture_output=True, text=True, check=False)
    expected = {"inside": (143, "llmprune: to go on\n"), "a handler of the caller's": (7, "")}
    assert (done.returncode, done.stderr) == expected.get(case, (-signal.SIGTERM, ""))
