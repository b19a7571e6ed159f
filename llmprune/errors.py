"""What can go wrong, in two kinds: a user's mistake (exit code 2) and a failure while working (exit code 1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """What an error says in its first line, and in the next where that is only its heading; else what kind it is."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__


class LLMPruneError(Exception):
    """Base of every error that llmprune raises on purpose: the message says what, where, and what to do.

    Attributes:
        told: another rank has the same error, and tells the user.
    """

    exit_code = 1
    told = False


class UserError(LLMPruneError):
    """The request cannot be carried out as given; nothing was written.

    Attributes:
        least: bytes of the host's memory that it takes, where there are fewer; None where that is not what is wrong.
    """

    exit_code = 2
    least: int | None = None


class Failure(LLMPruneError):
    """The request was sound, but the work could not be finished (a full disk, NaN weights, a broken file)."""


class NotFinite(Failure):
    """What a model says is no finite number: its weights are broken, or its dtype does not hold what it computes."""


class Interrupted(LLMPruneError, KeyboardInterrupt):
    """The user stopped the work; what was finished is kept."""

    exit_code = 130


class SingularGram(Failure):
    """A Gram matrix that cannot be factorised, even after every step of extra damping."""


MANY = 200
"""More names than anyone wants to read."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """An error for an unknown name that answers with the nearest known one."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = f"known: {', '.join(choices)}" if len(choices) <= MANY else f"one of {len(choices):,}"
    return UserError(f"unknown {what} {name!r}: {hint}{listed}")
