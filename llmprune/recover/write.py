"""Writes the recovered checkpoint beside the training's own files, and moves it to its place when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmprune.errors import UserError
from llmprune.model.checkpoint import Checkpoint, LoadedBlock
from llmprune.model.files import copy_side_files, sha256_of, side_files
from llmprune.model.writer import ALLOCATION, INDEX


def stored_dtypes(checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """The dtype in which the files hold each parameter."""
    inside = [key for keys in (*checkpoint.block_keys, checkpoint.outer_keys) for key in keys]
    return {name: checkpoint.index[key].dtype for key in inside for name in checkpoint.targets(key)}


def check_writable(checkpoint: Checkpoint, names: set[str]) -> None:
    """See that parameters which will change can be put back into the files that they come from.

    Raises:
        UserError: one cannot; the message names it.
    """
    for number in range(len(checkpoint.blocks)):
        checkpoint.check_revertible(number)
    state = checkpoint.model.state_dict()
    for key in checkpoint.outer_keys:
        targets = checkpoint.targets(key)
        if names.intersection(targets) and tuple(state[targets[0]].shape) != checkpoint.index[key].shape:
            raise UserError(f"{key} of {checkpoint.source.name} is stored in another layout than {targets[0]} has")


def write(checkpoint: Checkpoint, model: nn.Module, names: set[str], into: Path) -> dict[str, str]:
    """Write a checkpoint with the same files, keys and dtypes, and what goes with the weights.

    Args:
        checkpoint: where the model came from; whatever is not changed is taken from there, equal to the bit.
        model: holds the parameters that changed.
        names: of these.
        into: an empty folder.

    Returns:
        File name to sha256, of the files of weights.
    """
    places = {key: number for number, keys in enumerate(checkpoint.block_keys) for key in keys}
    files: dict[str, list[str]] = {}
    for key, info in checkpoint.index.items():
        files.setdefault(info.file.name, []).append(key)
    hashes: dict[str, str] = {}
    last: tuple[int, dict[str, Tensor]] = (-1, {})
    for file, keys in sorted(files.items()):
        tensors: dict[str, Tensor] = {}
        for key in sorted(keys, key=lambda key: places.get(key, -1)):
            number = places.get(key)
            if number is None:
                tensors[key] = _outer(checkpoint, model, names, key)
                continue
            if last[0] != number:
                last = number, _block(checkpoint, model, names, number)
            tensors[key] = last[1][key]
        # Tensors that share memory, as views of one fused parameter may, are no tensors for safetensors.
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, into / file, metadata={"format": "pt"})
        hashes[file] = sha256_of(into / file)
    folder = checkpoint.source.folder
    copy_side_files(folder, into)
    for name in (INDEX, ALLOCATION):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, into / name)
    return hashes


def _block(checkpoint: Checkpoint, model: nn.Module, names: set[str], number: int) -> dict[str, Tensor]:
    targets = {name for key in checkpoint.block_keys[number] for name in checkpoint.targets(key)}
    changed = targets & names
    # Fused parameters are put back into their parts together with those that nothing has changed.
    state = {name: value.detach().cpu() for name, value in model.state_dict().items() if name in targets}
    name = checkpoint.blocks[number]
    return checkpoint.written_block(number, LoadedBlock(name, checkpoint.block(name), state), changed)


def _outer(checkpoint: Checkpoint, model: nn.Module, names: set[str], key: str) -> Tensor:
    targets = checkpoint.targets(key) if key in checkpoint.outer_keys else ()
    if not names.intersection(targets):
        return checkpoint.read([key])[key]
    return model.get_parameter(targets[0]).detach().cpu().to(checkpoint.index[key].dtype).contiguous()


def put(draft: Path, out: Path, report: str, told: Mapping[str, Any]) -> None:
    """Move a finished checkpoint to its place, file by file; what tells of it, and makes it a whole one, goes last."""
    (draft / report).write_text(json.dumps(told, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    found = sorted(path.relative_to(draft) for path in draft.rglob("*") if path.is_file())
    for path in sorted(found, key=lambda path: path.name == report):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        with (draft / path).open("rb") as file:
            os.fsync(file.fileno())
        (draft / path).chmod(0o644)
        (draft / path).rename(out / path)
    handle = os.open(out, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def files_of(folder: Path) -> list[str]:
    """What of a written folder is the model's: the weights, and what goes with them."""
    weights = (path.name for path in folder.glob("*.safetensors"))
    return sorted([*weights, *side_files(folder), *(name for name in (INDEX, ALLOCATION) if (folder / name).is_file())])
