"""Pages as a real browser shows them, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")

needed = pytest.mark.skipif(PROGRAM is None, reason="there is no chromium to open the page in")
"""For tests that need a browser."""


def opened(page: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The page as a real browser has drawn it."""
    quiet = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--no-sandbox", "--hide-scrollbars")  # fmt: skip
    command = [str(PROGRAM), "--headless", *quiet, *flags, f"--user-data-dir={folder / 'browser'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode and "svg" not in done.stdout:
        pytest.skip(f"chromium does not start here: {done.stderr[-200:]}")
    return done


def drawn(page: Path, folder: Path) -> set[str]:
    """The names of the plots of a page, of which each is drawn without a complaint."""
    done = opened(page, folder)
    places = re.findall(
        r'<div class="plot[^"]*" id="([\w-]+)"[^>]*>(.*?)<script type="application/json"', done.stdout, re.DOTALL
    )
    for name, inside in places:
        assert 'class="main-svg"' in inside, name
    assert "CONSOLE" not in done.stderr, done.stderr
    return {name for name, _ in places}
