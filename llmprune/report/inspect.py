"""Looks at any checkpoint, whoever wrote it: how sparse is each weight, and which N:M patterns hold?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmprune.errors import UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.index import read_header, read_index
from llmprune.model.linears import find_linears
from llmprune.model.pickles import read_pickle
from llmprune.model.source import resolve
from llmprune.parts import zeros

CANDIDATES = ((1, 2), (1, 4), (2, 4), (3, 4), (2, 8), (4, 8), (6, 8), (8, 16))
"""The N:M patterns that are tried."""


@dataclass(frozen=True)
class Matrix:
    """One weight of a checkpoint.

    Attributes:
        name: its key in the files.
        shape, dtype: as stored.
        sparsity: fraction of zeros.
        patterns: N:M patterns that hold along the last dimension, the tightest first.
        transposed_patterns: the same along the dimension before it, which is where the inputs lie in `Conv1D`
            (GPT-2) and in some fused experts.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float
    patterns: tuple[str, ...] = ()
    transposed_patterns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """All matrices of a checkpoint."""

    name: str
    matrices: tuple[Matrix, ...]

    @property
    def sparsity(self) -> float:
        """The fraction of zeros over all matrices."""
        total = sum(torch.Size(matrix.shape).numel() for matrix in self.matrices)
        return sum(matrix.sparsity * torch.Size(matrix.shape).numel() for matrix in self.matrices) / max(total, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"name": self.name, "sparsity": self.sparsity, "matrices": [asdict(matrix) for matrix in self.matrices]}


def inspect(path: str | Path) -> Inspection:
    """Count the zeros in every tensor of two or three dimensions.

    Args:
        path: a folder, a single .safetensors or PyTorch .bin file, a `.gguf` file, or a Hub name.

    Raises:
        UserError: there is no such checkpoint, or it holds no matrices.
        Failure: a file is missing or broken.
    """
    matrices = tuple(_look(key, tensor) for key, tensor in _tensors(Path(path).expanduser(), str(path)))
    if not matrices:
        raise UserError(f"{path} holds no weight matrices")
    return Inspection(str(path), matrices)


@dataclass(frozen=True)
class Counts:
    """The size of a checkpoint.

    Attributes:
        bytes: of its safetensors files.
        weights: elements of all its tensors.
        sparsity: the fraction of zeros among them.
        linears_sparsity: the same in the parameters that hold the linears which can be pruned.
    """

    bytes: int
    weights: int
    sparsity: float
    linears_sparsity: float


def count(checkpoint: Checkpoint) -> Counts:
    """Count the weights and the zeros of a checkpoint, one tensor in memory at a time."""
    linears = {linear.parameter for name in checkpoint.blocks for linear in find_linears(checkpoint.block(name), name)}
    inside = {key for keys in checkpoint.block_keys for key in keys if linears.intersection(checkpoint.targets(key))}
    weights = dict.fromkeys((False, True), 0)
    zero = dict(weights)
    for key, info in checkpoint.index.items():
        weights[key in inside] += info.numel
        zero[key in inside] += zeros(checkpoint.read([key])[key].reshape(1, -1).T)
    size = sum(file.stat().st_size for file in {info.file for info in checkpoint.index.values()})
    total = sum(weights.values())
    return Counts(size, total, sum(zero.values()) / max(total, 1), zero[True] / max(weights[True], 1))


def _tensors(path: Path, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every float tensor of two or three dimensions, one in memory at a time where the format allows."""
    if path.is_file() and path.suffix == ".safetensors":
        index = read_header(path)
    elif path.is_file() and path.suffix == ".bin":
        for key, tensor in read_pickle(path).items():
            if tensor.ndim in (2, 3) and tensor.is_floating_point():
                yield key, tensor
        return
    else:
        folder = resolve(path if path.exists() else name, as_is=True).folder
        index = read_index(folder)
    for key, info in index.items():
        if len(info.shape) in (2, 3) and info.dtype.is_floating_point:
            with safe_open(info.file, framework="pt") as file:
                yield key, file.get_tensor(key)


def _look(name: str, tensor: Tensor) -> Matrix:
    zero = tensor == 0
    sparsity = float(zero.sum()) / max(tensor.numel(), 1)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if sparsity < 0.2:
        return Matrix(name, tuple(tensor.shape), dtype, sparsity)
    return Matrix(name, tuple(tensor.shape), dtype, sparsity, _holding(zero), _holding(zero.transpose(-1, -2)))


def _holding(zero: Tensor) -> tuple[str, ...]:
    found = []
    for n, m in sorted(CANDIDATES, key=lambda pair: (pair[0] / pair[1], pair[1])):
        if zero.shape[-1] % m == 0 and not bool(zero.all()):
            groups = zero.reshape(*zero.shape[:-1], -1, m)
            if bool((groups.sum(-1) >= m - n).all()):
                found.append(f"{n}:{m}")
    return tuple(found)
