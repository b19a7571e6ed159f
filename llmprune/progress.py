"""How far the work is, and how long its parts took."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from llmprune import distributed

T = TypeVar("T")


class Progress(Protocol):
    """Shows how far the work is."""

    def over(self, items: Sequence[T], title: str) -> Iterator[T]:
        """Go through the items, counting."""

    def waiting(self, title: str) -> contextlib.AbstractContextManager[None]:
        """Show that something goes on whose length is not known."""

    def block(self, record: Mapping[str, Any]) -> None:
        """Show how long the parts of a block took: a `BlockRecord` as plain data."""


class Silent:
    """Shows nothing."""

    def over(self, items: Sequence[T], title: str) -> Iterator[T]:
        """Go through the items."""
        yield from items

    def waiting(self, title: str) -> contextlib.AbstractContextManager[None]:
        """Do nothing."""
        return contextlib.nullcontext()

    def block(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""


def of_first(progress: Progress | None) -> Progress:
    """What this rank shows: nothing but on the first one, and where nothing is asked for."""
    return progress if progress is not None and distributed.is_first() else Silent()


class JsonLines(Silent):
    """One JSON object a line, on standard error, for other programs to read while the work goes on.

    `{"event": "progress", "title": ..., "done": 3, "of": 30}`, `{"event": "block", "name": ..., "seconds": {...}, ...}`
    and `{"event": "waiting", "title": ...}`; each has `time`, in seconds since 1970.
    """

    def over(self, items: Sequence[T], title: str) -> Iterator[T]:
        """Go through the items, telling each."""
        for number, item in enumerate(items, 1):
            yield item
            self._tell("progress", {"title": title, "done": number, "of": len(items)})

    def waiting(self, title: str) -> contextlib.AbstractContextManager[None]:
        """Tell it once."""
        self._tell("waiting", {"title": title})
        return contextlib.nullcontext()

    def block(self, record: Mapping[str, Any]) -> None:
        """Tell it."""
        self._tell("block", {key: value for key, value in record.items() if key != "linears"})

    def _tell(self, event: str, data: Mapping[str, Any]) -> None:
        line = json.dumps({"event": event, "time": round(time.time(), 3), **data})
        print(line, file=sys.stderr, flush=True)


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

    def block(self, record: Mapping[str, Any]) -> None:
        """Print it as a line."""
        seconds = " ".join(f"{phase} {value:.2f}" for phase, value in record["seconds"].items())
        peaks = f"peak {record['peak_memory'] / 2**30:.2f} GiB"
        if record.get("peak_device_memory"):
            peaks += f", device {record['peak_device_memory'] / 2**30:.2f} GiB"
        self.console.print(f"{record['name']}: {seconds} s, {peaks}", highlight=False)


class Clock:
    """Adds up the seconds spent in named phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()
        self._lap: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside towards a phase."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began

    def lap(self) -> dict[str, float]:
        """Seconds per phase since the last lap; phases without any are left out."""
        before, self._lap = self._lap, dict(self.seconds)
        spent = {phase: value - before.get(phase, 0.0) for phase, value in self.seconds.items()}
        return {phase: round(value, 3) for phase, value in spent.items() if value > 0}

    def result(self) -> dict[str, float]:
        """Seconds per phase, and the `total` since the clock was made."""
        return {
            phase: round(value, 3) for phase, value in {**self.seconds, "total": time.monotonic() - self._began}.items()
        }
