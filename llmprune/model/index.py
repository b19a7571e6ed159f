"""What a safetensors checkpoint holds: every tensor with its file, dtype and shape, from the headers alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmprune.errors import Failure, UserError
from llmprune.model.files import content_sha256

READERS = 4
"""Threads that read large tensors, or files, at the same time."""

_ALONE = 2**20
"""Bytes of a tensor that is worth a thread."""

_AT_ONCE = 2**20
"""Bytes of a tensor that are read at a time where only a part of them is taken."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Part:
    """What is taken of a stored tensor.

    Attributes:
        shape: as it is stored.
        places: which of its places along each dimension, in order; all along those that are not named.
        factor, shift: what is taken is multiplied by one, and the other is added.
        dtype: what it is taken in, where it is not rounded to the stored dtype.
    """

    shape: tuple[int, ...]
    places: Mapping[int, Tensor] = field(repr=False)
    factor: float = 1.0
    shift: float = 0.0
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a checkpoint stores it, `offset` bytes into its file, or a part of that."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    part: Part | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def stored(self) -> int:
        """Bytes on disk."""
        return self.nbytes if self.part is None else torch.Size(self.part.shape).numel() * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.numel * self.dtype.itemsize


def hash_files(folder: Path, files: Iterable[Path], digest: Callable[[Path], str] = content_sha256) -> dict[str, str]:
    """The sha256 of files, by their names in a folder."""
    files = sorted(files)
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip((str(path.relative_to(folder)) for path in files), pool.map(digest, files), strict=True))


def hash_weights(folder: Path, digest: Callable[[Path], str] = content_sha256) -> dict[str, str]:
    """The sha256 of each file that holds weights of the checkpoint in a folder; see `read_index`."""
    return hash_files(folder, {info.file for info in read_index(folder).values()}, digest)


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint in a folder, from the headers of its safetensors files alone.

    As transformers does, `model.safetensors` goes before an index; other files are not looked at.

    Raises:
        UserError: the folder holds no safetensors, or several that no index ties together.
        Failure: a shard is missing or broken.
    """
    single, listing = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if listing.is_file():
        return _read_listing(listing)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return read_header(files[0])
    if files:
        listed = ", ".join(path.name for path in files[:3])
        raise UserError(
            f"{folder} holds {len(files)} safetensors files ({listed}, ...) and no index that ties them together"
        )
    raise UserError(f"no *.safetensors in {folder}")


def _read_listing(listing: Path) -> dict[str, TensorInfo]:
    try:
        weight_map = json.loads(listing.read_text(encoding="utf-8"))["weight_map"]
        names = {str(key): str(name) for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"{listing} is broken: {type(error).__name__}: {error}; download it again") from None
    index: dict[str, TensorInfo] = {}
    for name in sorted(set(names.values())):
        index.update(read_header(listing.parent / name))
    for key, name in names.items():
        if key not in index or index[key].file.name != name:
            raise Failure(
                f"{listing.name} promises {key} in {name}, but it is not there: the shard is not the right one"
            )
    return {key: index[key] for key in names}


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Raises:
        Failure: the file is missing, cut short or broken.
    """
    if not path.is_file():
        raise Failure(f"shard {path.name} is missing from {path.parent}: download the model again")
    try:
        with safe_open(path, framework="pt") as file:
            found = {}
            places = _offsets(path)
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise Failure(f"{key} in {path} is stored as {part.get_dtype()}, which is not supported")
                found[key] = TensorInfo(path, dtype, tuple(part.get_shape()), places[key])
            return found
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise Failure(f"shard {path} ({size:,} bytes) is broken or cut short: {error}; download it again") from None


def read_tensors(infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Tensors exactly as the files hold them, in memory of their own, so that nothing of a file stays mapped.

    Of those of which a part is asked for a few rows at a time are read, so that no more is held of the rest.

    Raises:
        OSError: a file cannot be read, or ends too early.
    """
    found = {
        key: torch.empty(info.shape, dtype=(info.part and info.part.dtype) or info.dtype) for key, info in infos.items()
    }
    large = [key for key, info in infos.items() if info.nbytes > _ALONE]
    for key in infos.keys() - large:
        _read_into(found[key], infos[key])
    with ThreadPoolExecutor(READERS) as pool:  # copying from the system's cache keeps one core busy
        list(pool.map(lambda key: _read_into(found[key], infos[key]), large))
    return found


def _read_into(tensor: Tensor, info: TensorInfo) -> None:
    with io.FileIO(info.file) as file:
        file.seek(info.offset)
        if info.part is None:
            _fill(tensor, file)
        else:
            _take(tensor, info.part, info.dtype, file)


def _fill(tensor: Tensor, file: io.FileIO) -> None:
    """Read a tensor from where a file stands."""
    rest = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    while len(rest):
        count = file.readinto(rest)
        if not count:
            raise OSError(f"{file.name!s} ends before its header says")
        rest = rest[count:]


def _take(tensor: Tensor, part: Part, dtype: torch.dtype, file: io.FileIO) -> None:
    """Read a part of a tensor from where a file stands."""
    rows, inner = part.shape[0], part.shape[1:]
    step = max(1, _AT_ONCE // max(1, torch.Size(inner).numel() * dtype.itemsize))
    done = 0
    for first in range(0, rows, step):
        read = torch.empty((min(step, rows - first), *inner), dtype=dtype)
        _fill(read, file)
        for dim, places in part.places.items():
            here = places[(places >= first) & (places < first + step)] - first if dim == 0 else places
            read = read.index_select(dim, here)
        if part.factor != 1 or part.shift:
            read = read.double().mul_(part.factor).add_(part.shift)
        tensor[done : done + len(read)] = read
        done += len(read)


def _offsets(path: Path) -> dict[str, int]:
    """Where each tensor begins, by the file's header: eight bytes of length, then JSON, then the tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {key: 8 + length + part["data_offsets"][0] for key, part in header.items() if key != "__metadata__"}
