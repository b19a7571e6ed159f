"""The memory of this process and of the machine it runs on."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h

_C_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


def peak() -> int:
    """The most resident memory that this process has had so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux's ru_maxrss also counts what the parent process held when it started this one.
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available() -> int:
    """Bytes of memory that can be had now, or a cautious guess where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        # What is free, and what the system keeps only as a cache of files.
        line = next((line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 4 * 2**30


def hold_on() -> None:
    """Let the C library keep what is freed until `give_back`, where it is glibc; this holds as long as the process.

    By itself it would give large activations back to the system after every operation, and have them zeroed page by
    page for the next one, which takes a good part of the time of a forward.
    """
    tune = getattr(_C_LIBRARY, "mallopt", None)
    if tune is not None:
        for option, value in ((_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**30), (_TOP_PAD, 2**25)):
            tune(option, value)


def give_back() -> None:
    """Let the C library give freed memory back to the system; glibc would keep a little more of it with every block."""
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)
