"""What flows between two blocks: on the device, in the host's memory, or in a file that is mapped batch by batch."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from llmprune.errors import Failure

Place = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Call:
    """The arguments of one block for one batch, with `HIDDEN` in the place of the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


HIDDEN = object()
"""Stands in a recorded call where the hidden states go."""


class Activations:
    """Hidden states (sequences, length, hidden) of all batches, and what each block is called with.

    Attributes:
        calls: per block and batch, its own arguments; equal tensors are kept once.
    """

    def __init__(self, blocks: int, device: torch.device, place: Place = "host", folder: Path | None = None) -> None:
        """Nothing is held yet.

        Args:
            blocks: how many blocks there are.
            device: where the blocks are run.
            place: where the hidden states lie between two blocks.
            folder: for `disk`, where the file is to be; it has no name there, and is gone when the process is. Where
                there is no such folder (on a rank that does not see OUT), the system's own for such files.
        """
        self.calls: list[list[Call]] = [[] for _ in range(blocks)]
        self._device = device
        self._home = device if place == "device" else torch.device("cpu")
        self._file = _File(folder) if place == "disk" else None
        self._held: list[Tensor | _Span] = []

    def __len__(self) -> int:
        return len(self._held)

    def add(self, hidden: Tensor) -> None:
        """Take in the hidden states of one more batch."""
        self._held.append(self._kept(hidden))

    def read(self, batch: int) -> Tensor:
        """The hidden states of a batch, on the device. They are not to be written to."""
        held = self._held[batch]
        return (held if isinstance(held, Tensor) else held.map()).to(self._device)

    def write(self, batch: int, hidden: Tensor) -> None:
        """Put others in the place of a batch's hidden states."""
        held = self._held[batch]
        if held.dtype != hidden.dtype or held.shape != hidden.shape:
            self._held[batch] = self._kept(hidden)
        else:  # in place: memory that is freed and taken again batch by batch falls to pieces
            (held if isinstance(held, Tensor) else held.map()).copy_(hidden)

    def twin(self, batches: int) -> Activations:
        """Others of their own that hold the same first batches, for a second way through the blocks; without calls."""
        made = Activations(0, self._device)
        made._home, made._file = self._home, self._file
        for batch in range(batches):
            made.add(self.read(batch))
        return made

    def _kept(self, hidden: Tensor) -> Tensor | _Span:
        if self._file is None or hidden.numel() == 0:  # no part of a file can be empty
            return hidden.detach().to(self._home, copy=True)
        span = self._file.span(hidden)
        span.map().copy_(hidden)
        return span


class Slim(Activations):
    """Some channels of hidden states, to be read.

    Attributes:
        whole: all of them, which are kept.
    """

    def __init__(self, whole: Activations, kept: Tensor) -> None:
        """Take in what is looked at.

        Args:
            kept: (channels,) their numbers.
        """
        self.whole, self._places = whole, kept

    def __len__(self) -> int:
        return len(self.whole)

    def read(self, batch: int) -> Tensor:
        """The hidden states of a batch in these channels, on the device."""
        hidden = self.whole.read(batch)
        return hidden.index_select(-1, self._places.to(hidden.device))


def apart(found: Tensor, wanted: Tensor) -> Tensor:
    """How far states are from those that are wanted, the mean over tokens of d = ‖x − x₀‖² / ‖x₀‖²: a scalar.

    Beyond 1, where nothing is left of a token, 1 + ln d stands for d. Here and there one gets a massive activation that
    it has not in the dense model, and a d of hundreds: it would stand for all the others.

    Args:
        found, wanted: x and x₀, (sequences, length, hidden).
    """
    target = wanted.float()
    lost = (found.float() - target).square().sum(-1)
    size = target.square().sum(-1)
    each = lost / size.masked_fill_(size == 0, torch.inf)  # a padding token's states may be zero
    return (each.clamp(max=1) + each.clamp(min=1).log()).mean()


@dataclass(frozen=True)
class _Span:
    """The place of one tensor in a file."""

    file: IO[bytes]
    offset: int
    dtype: torch.dtype
    shape: torch.Size

    def map(self) -> Tensor:
        """The tensor as part of the file; it is mapped for as long as it is held."""
        size = self.shape.numel() * self.dtype.itemsize
        mapped = mmap.mmap(self.file.fileno(), size, offset=self.offset)
        return torch.frombuffer(mapped, dtype=self.dtype).view(self.shape)


class _File:
    """A file without a name that grows span by span."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder if folder is not None and folder.is_dir() else Path(tempfile.gettempdir())
        with self._failing():
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        self._end = 0

    def span(self, tensor: Tensor) -> _Span:
        """Room for a tensor: its bytes are taken from the disk now, so that no later write can fail for want of it."""
        size, offset = tensor.numel() * tensor.dtype.itemsize, self._end
        with self._failing():
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), offset, size)
            else:
                self._file.seek(offset)
                self._file.write(bytes(size))
                self._file.flush()
        self._end = -(-(offset + size) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        return _Span(self._file, offset, tensor.dtype, tensor.shape)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Failure(
                f"the activations between two blocks cannot be kept in {self._folder}: {error.strerror}; make room "
                "there, or let them be held in memory (a larger --max-memory, fewer --samples)"
            ) from None
