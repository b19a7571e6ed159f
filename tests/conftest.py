"""What several tests need. Each of several workers computes with its part of the cores, as do processes of its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.fixture
def no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no report.html, which is most of the time of a tiny one."""
    monkeypatch.setattr("llmprune.pipeline.draw_page", lambda *_: None)


def hears_interrupts() -> None:
    """In a process that is started: SIGINT ends it, also where the tests run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama; many files have a model of their own instead."""
    from tests.families import make  # torch is imported when the threads are known

    return make("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A local file of text; many files have one of their own instead."""
    path = tmp_path_factory.mktemp("text") / "verses.txt"
    path.write_text("Shall I compare thee to a summer's day? Thou art more lovely and more temperate. " * 40)
    return str(path)
