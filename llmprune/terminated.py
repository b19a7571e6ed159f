"""SIGTERM, by which launchers, schedulers and containers end a process: it says how to go on before it ends.

Python's own handlers wait for the main thread, which may be in a collective with ranks that are gone, or in a long
product. The byte that Python writes for a signal as it comes is read by a thread instead.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 128 + signal.SIGTERM

_ENOUGH = 0
"""The number of no signal."""


@contextmanager
def telling(onward: Callable[[], str]) -> Iterator[None]:
    """Inside, SIGTERM ends the process at once, with a word before.

    Where somebody else looks after signals, or the thread is not the main one, nothing changes.

    Args:
        onward: the word; called in another thread, at any moment, and must not wait for anything.
    """
    if _looked_after():
        yield
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # without a handler of Python's no byte is written for it
    listener = threading.Thread(target=_listen, args=(heard, onward), daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.write(told, bytes([_ENOUGH]))
        listener.join()  # no thread is to be left that Python would end in the middle of something as it ends itself
        os.close(told)


def _looked_after() -> bool:
    """Whether signals are not ours to handle."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return True
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    return before != -1


def _listen(heard: int, onward: Callable[[], str]) -> None:
    """Wait for SIGTERM, or for a word that it is enough."""
    numbers = b""
    while _ENOUGH not in numbers:
        numbers = os.read(heard, 64)
        if signal.SIGTERM in numbers:
            try:
                os.write(2, f"llmprune: {onward()}\n".encode())  # not through sys.stderr, which another may hold
            finally:
                os._exit(EXIT_CODE)
    os.close(heard)
