"""Checkpoints that are only there as pytorch_model.bin: read as plain weights, without running code in them."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from llmprune.errors import Failure, UserError, first_line
from llmprune.model.files import has_safetensors, listed

SINGLE = "pytorch_model.bin"
LISTING = f"{SINGLE}.index.json"

_CULPRIT = re.compile(r"Unsupported \w+:.*?(?=\. Please|\. In PyTorch|$)|Trying to .*?(?=\. Please|$)")
"""What the unpickler would not do, in its long message."""


def pickled(folder: Path) -> list[Path]:
    """The PyTorch files of a checkpoint that has no safetensors; none where there are safetensors, or no such files.

    As transformers does, `pytorch_model.bin` goes before an index.

    Raises:
        UserError: several files that no index ties together.
        Failure: a file that the index names is missing, or the index is broken.
    """
    if has_safetensors(folder):
        return []
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / LISTING).is_file():
        try:
            names = listed(folder / LISTING)
        except ValueError as error:
            raise Failure(f"{folder / LISTING} is broken: {error}") from None
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise Failure(f"shard {name} is missing from {folder}: download the model again")
        return [folder / name for name in names]
    files = sorted(folder.glob("pytorch_model*.bin"))
    if files:
        raise UserError(f"{folder} holds {files[0].name} and no {LISTING} that ties such files together")
    return []


def read_pickle(path: Path, aliases: bool = False) -> dict[str, Tensor]:
    """The tensors of a PyTorch file by name, of the old format or the new; code in the file is never run.

    Args:
        aliases: a tensor that the file has under several names is returned under each, with memory of its own; else
            under the first alone.

    Raises:
        Failure: the file is broken, or holds more than plain weights.
    """
    try:
        # The old format is a chain of pickles, which cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        tensors = dict(_separate({str(k): v for k, v in state.items() if isinstance(v, Tensor)}, aliases))
    except Exception as error:  # a file that is no pickle, or a harmed one, surfaces in many kinds
        reason = _CULPRIT.search(str(error).replace("\n", " "))
        told = reason[0].strip() if reason else first_line(error)
        raise Failure(f"{path} cannot be read as plain weights (code in it is never run): {told}") from None
    if not tensors:
        raise Failure(f"{path} cannot be read as plain weights: it holds no tensors by name")
    return tensors


def _separate(tensors: dict[str, Tensor], aliases: bool) -> Iterator[tuple[str, Tensor]]:
    """Tensors of which no two share memory."""
    views, storages = set(), set()
    for key, value in tensors.items():
        view = (value.data_ptr(), value.dtype, value.shape, value.stride())
        storage = value.untyped_storage().data_ptr()
        shared = value.numel() > 0 and storage in storages
        if shared and view in views and not aliases:
            continue
        views.add(view)
        storages.add(storage)
        yield key, value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
