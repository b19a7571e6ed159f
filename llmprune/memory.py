"""The memory of this process and of the machine it runs on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

MUCH = 2**26
"""Bytes that are worth the milliseconds of giving them back."""

LITTLE = 2**24
"""Bytes that are not worth them: what is held is in use then."""

_level: int | None = None

_C_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


def peak() -> int:
    """The most resident memory that this process has had so far, or since `begin`, in bytes."""
    told = _status("VmHWM")  # Linux's ru_maxrss also counts what the parent process held when it started this one
    if told is not None:
        return told
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def begin() -> None:
    """Count the peak from now on, where the system can: this process may have done something else before."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def current() -> int:
    """The resident memory of this process, in bytes; the most that it has had where the system does not tell."""
    told = _status("VmRSS")
    return peak() if told is None else told


def _status(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next((line for line in status.read_text().splitlines() if line.startswith(f"{name}:")), None)
    return None if line is None else int(line.split()[1]) * 1024


def available() -> int:
    """Bytes of memory that can be had now, or a cautious guess where the system does not tell.

    In a container it is what its limit leaves.
    """
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        # What is free, and what the system keeps only as a cache of files.
        line = next((line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")), None)
        if line is not None:
            return max(0, min([int(line.split()[1]) * 1024, *_left_by_limits()]))
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 4 * 2**30


def _left_by_limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each control group that this process is in leaves of its limit; files that are cached can be let go."""
    found = []
    try:
        lines = membership.read_text().splitlines()
        own = root / next((line.split("::", 1)[1] for line in lines if "::" in line), "/").lstrip("/")
        for group in (own, *own.parents):
            if (limit := group / "memory.max").is_file() and (most := limit.read_text().strip()) != "max":
                counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                cached = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
                found.append(int(most) - int((group / "memory.current").read_text()) + cached)
            if group == root:
                break
    except (OSError, ValueError):
        return found
    return found


def frugal() -> None:
    """Set up the C library and oneDNN for large tensors that come and go; this holds as long as the process.

    By itself glibc would give large activations back to the system after every operation, and have them zeroed page by
    page for the next one, which takes a good part of the time of a forward: it keeps what is freed until `give_back`.
    oneDNN, and torch before it, keep code for each shape that was multiplied, a thousand of them, half a megabyte each;
    experts, each with another number of tokens, would fill that up. What the environment says goes before.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
    tune = getattr(_C_LIBRARY, "mallopt", None)
    if tune is not None:
        for option, value in ((_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**30)):
            tune(option, value)


def give_back() -> None:
    """Let the C library give freed memory back to the system; glibc would keep a little more of it with every block."""
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)


def ease_above(level: int | None) -> None:
    """Say from how many bytes on that this process holds `ease` gives back what was freed; None: never."""
    global _level
    _level = level


def ease() -> None:
    """Give freed memory back if this process holds more than it should, for use where something large was just freed.

    Tensors that come and go in other sizes each time leave pieces behind that fit no other, more with every batch.
    """
    global _level
    if _level is not None and (held := current()) > _level:
        give_back()
        if held - current() < LITTLE:
            _level = held + LITTLE
