"""How far the work is, and how long its parts took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

T = TypeVar("T")


class Progress(Protocol):
    """Shows how far the work is."""

    def over(self, items: Sequence[T], title: str) -> Iterator[T]:
        """Go through the items, counting."""

    def waiting(self, title: str) -> contextlib.AbstractContextManager[None]:
        """Show that something goes on whose length is not known."""


class Silent:
    """Shows nothing."""

    def over(self, items: Sequence[T], title: str) -> Iterator[T]:
        """Go through the items."""
        yield from items

    def waiting(self, title: str) -> contextlib.AbstractContextManager[None]:
        """Do nothing."""
        return contextlib.nullcontext()


class Bars:
    """Progress bars with the time left, on standard error; plain lines where that is no terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)

    def over(self, items: Sequence[T], title: str) -> Iterator[T]:
        """Go through the items under a bar."""
        if not self.console.is_terminal:
            began = time.monotonic()
            for number, item in enumerate(items, 1):
                yield item
                each = (time.monotonic() - began) / number
                left = f"{each * (len(items) - number):.0f} s left"
                self.console.print(f"{title} {number}/{len(items)}, {each:.1f} s each, {left}", highlight=False)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with RichProgress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console) as bar:
            task = bar.add_task(title, total=len(items))
            for item in items:
                yield item
                bar.advance(task)

    @contextlib.contextmanager
    def waiting(self, title: str) -> Iterator[None]:
        """Show a title and a spinner."""
        if not self.console.is_terminal:
            self.console.print(title, highlight=False)
            yield
            return
        with self.console.status(title):
            yield


class Clock:
    """Adds up the seconds spent in named phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside towards a phase."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began

    def result(self) -> dict[str, float]:
        """Seconds per phase, and the `total` since the clock was made."""
        return {
            phase: round(value, 3) for phase, value in {**self.seconds, "total": time.monotonic() - self._began}.items()
        }
