"""Pages as a real browser shows them, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Seen:
    """A page in a window.

    Attributes:
        wide: what it takes, in pixels.
        window: the window's width.
        ground: the colour behind its text: red, green and blue.
        more: what an expression in JavaScript came to.
    """

    wide: int
    window: int
    ground: tuple[int, ...]
    more: str


def seen(text: str, folder: Path, width: int, dark: bool, more: str = "''") -> Seen:
    """A page as a reader of a theme sees it, who has a window of some width."""
    measure = f"""<script>addEventListener("load", () => setTimeout(() => {{
        const root = document.documentElement, colour = getComputedStyle(document.body).backgroundColor
        root.dataset.seen = [root.scrollWidth, innerWidth, colour].join(";")
        root.dataset.more = {more}
    }}, 5000))</script>"""
    text = re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", f"{measure}</body>")
    page = folder / "seen.html"
    page.write_text(text, encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    done = opened(page, folder, scheme, f"--window-size={width},900")
    found = re.search(r'data-seen="(\d+);(\d+);rgb\((\d+), (\d+), (\d+)\)"', done.stdout)
    told = re.search(r'data-more="([^"]*)"', done.stdout)
    assert found is not None
    assert told is not None
    wide, window, *ground = map(int, found.groups())
    return Seen(wide, window, tuple(ground), told[1])


def fits(page: Seen, width: int, dark: bool) -> None:
    """See that a page is no wider than its window, and as dark as its reader's theme."""
    assert page.window == width
    assert page.wide <= width
    assert (sum(page.ground) < 3 * 64) if dark else (sum(page.ground) > 3 * 192)
