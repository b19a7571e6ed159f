"""Where a model comes from: a Hub name, a local folder or a local `.gguf` file, brought to a local folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, metadata_load, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from yaml import YAMLError

from llmprune import hub
from llmprune.errors import Failure, UserError
from llmprune.recipe import DTYPES

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
"""What a model needs to be loaded; other weight formats that lie beside it are not downloaded."""

COPIES = ["*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model", "consolidated*", "*.fp16.*", "*.fp32.*"]
"""The same model once more, in another layout or precision, or in a subfolder."""

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What a model's card says that goes for a pruned one as well."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Source:
    """A model on this machine.

    Attributes:
        name: as it was asked for.
        folder: holds config.json, safetensors and the tokenizer.
        revision: the commit on the Hub, the sha256 of a `.gguf`, or None for a folder.
        base: for the card of what comes of it: its `name` on the Hub, and of its own card what is in `CARRIED`.
    """

    name: str
    folder: Path
    revision: str | None = None
    base: Mapping[str, Any] = field(default_factory=dict)


def resolve(model: str | Path, dtype: str = "auto") -> Source:
    """Find the model, downloading or converting it where needed.

    Args:
        model: `owner/name` or `owner/name@revision` on the Hub, a folder, or a `.gguf` file. What exists on disk wins.
        dtype: what a `.gguf` is dequantised to; `auto` is bfloat16. Others keep their own.

    Raises:
        UserError: there is no such model, or a package for reading it is missing.
        Failure: it could not be downloaded or converted.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    name, path = str(model), Path(model).expanduser()
    if path.is_dir():
        return _from_pickles(Source(name, path.resolve(), base=_of_card(path / "README.md")))
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name} is a file, but not a .gguf: give a model folder, a .gguf file or a Hub name")
        return _from_gguf(path.resolve(), dtype)
    named = _HUB_NAME.fullmatch(name)
    if named is None or name.startswith((".", "~")) or path.suffix == ".gguf":
        raise UserError(f"no model at {name}: no such folder or file, and it is not a Hub name (owner/name)")
    return _from_hub(name, named["name"], named["revision"])


def _from_hub(asked: str, name: str, revision: str | None) -> Source:
    doing = f"downloading {name}"
    try:
        folder = _fetch(name, revision, HUB_FILES)
        if not any(folder.glob("*.safetensors")):
            _fetch(name, revision, ["pytorch_model*"])
    except GatedRepoError as error:
        raise hub.failed(error, name, doing) from None
    except RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision!r} on the Hub") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"no model {name!r}: there is no such folder here, and no such model on the Hub that you may read "
            f"(a private one needs {hub.LOG_IN})"
        ) from None
    except (HTTPError, OSError, ValueError) as error:
        raise hub.failed(error, name, doing) from None
    base = {"name": name, **_of_card(_card(name, folder))}
    return _from_pickles(Source(asked, folder, folder.name, base))


def _fetch(name: str, revision: str | None, wanted: list[str]) -> Path:
    """Download files of a model, and see that they are what the Hub has.

    Raises:
        Failure: a file is not; it is taken out of the cache.
    """
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=COPIES))
    files = [path.name for path in folder.iterdir() if path.is_symlink()]
    chosen = [folder / file for file in filter_repo_objects(files, allow_patterns=wanted, ignore_patterns=COPIES)]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        harmed = [path for path, good in zip(chosen, pool.map(_is_whole, chosen), strict=True) if not good]
    for path in harmed:
        _discard(path)
    if harmed:
        raise Failure(
            f"{harmed[0].name} of {name} is not what the Hub says it is: its sha256 is another; it was taken out of "
            "the cache, and the same command downloads it again"
        )
    return folder


def _is_whole(path: Path) -> bool:
    """Whether a large file in the Hub's cache has the sha256 that it is named by; the client compares sizes alone.

    What was found good is noted, so that it is read once.
    """
    digest = path.readlink().name
    if not _SHA256.fullmatch(digest):
        return True  # a small file, which is kept in git
    status = path.stat()
    note = cache_folder() / "checked" / f"{digest}-{status.st_size}-{status.st_mtime_ns}"
    if note.exists():
        return True
    if sha256_of(path) != digest:
        return False
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    return True


def _discard(path: Path) -> None:
    """Remove a file from the Hub's cache, and all links that lead to it from there."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _card(name: str, folder: Path) -> Path | None:
    """The model's card, which tells its licence; a model without one, or one that cannot be had now, is fine too."""
    try:
        return Path(hf_hub_download(name, "README.md", revision=folder.name))
    except (HTTPError, OSError, EntryNotFoundError):
        return None


def _of_card(path: Path | None) -> dict[str, Any]:
    """What a model's card says that goes for a pruned one as well; nothing where it cannot be read."""
    if path is None or not path.is_file():
        return {}
    try:
        told = metadata_load(path) or {}
    except (OSError, ValueError, YAMLError):
        return {}
    kept = {key: told[key] for key in CARRIED if isinstance(told.get(key), (str, list))}
    return {key: list(map(str, value)) if isinstance(value, list) else value for key, value in kept.items()}


def present(name: str, revision: str | None, dtype: str = "auto") -> Source | None:
    """A model that was resolved before, if it is still on this machine; nothing is downloaded or converted.

    Args:
        name, revision, dtype: as a `Source` had them, and as `resolve` was given it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        folder = path.resolve()
    elif path.suffix == ".gguf":
        folder = _gguf_folder(path.stem, revision or "", dtype)
    else:
        try:
            named = name.partition("@")[0]
            options: dict[str, Any] = {"allow_patterns": HUB_FILES, "ignore_patterns": COPIES, "local_files_only": True}
            folder = Path(snapshot_download(named, revision=revision, **options))
        except (HFValidationError, OSError):
            return None
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(folder.glob("pytorch_model*.bin")) if folder.is_dir() else []
        if not pickles:
            return None
        folder = _pickle_folder(folder, pickles)
    return Source(name, folder, revision) if (folder / "config.json").is_file() else None


def cache_folder() -> Path:
    """Where converted and downloaded models are kept: $LLMPRUNE_CACHE, or llmprune in the user's cache folder."""
    if chosen := os.environ.get("LLMPRUNE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmprune"


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _from_pickles(source: Source) -> Source:
    """A folder with safetensors as it is; one that only has pytorch_model.bin is converted, file by file, once."""
    pickles = sorted(source.folder.glob("pytorch_model*.bin"))
    if not pickles or any(source.folder.glob("*.safetensors")):
        return source
    folder = _pickle_folder(source.folder, pickles)
    with _drafted(folder) as draft:
        if draft is not None:
            weight_map: dict[str, str] = {}
            for number, path in enumerate(pickles, 1):
                name = f"model-{number:05d}-of-{len(pickles):05d}.safetensors"
                tensors = read_pickle(path)
                save_file(tensors, draft / name, metadata={"format": "pt"})
                weight_map.update(dict.fromkeys(tensors, name))
            (draft / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
            for path in source.folder.iterdir():
                beside = path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.endswith(".index.json")
                if beside and path.is_file():
                    shutil.copyfile(path, draft / path.name)
    return replace(source, folder=folder)


def _pickle_folder(folder: Path, pickles: list[Path]) -> Path:
    """Where a model of pickles is converted to."""
    digest = hashlib.sha256("".join(sha256_of(path) for path in pickles).encode()).hexdigest()
    return cache_folder() / "bin" / f"{folder.name}-{digest[:16]}"


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PyTorch file by name, those that share their memory once; code in the file is never run.

    Raises:
        Failure: the file is broken, or holds more than plain weights.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Failure(f"{path} cannot be read as plain weights (code in it is never run): {reason}") from None
    first: dict[tuple[int, torch.Size], str] = {}
    for key, value in tensors.items():
        first.setdefault((value.data_ptr(), value.shape), key)
    return {key: tensors[key].contiguous() for key in first.values()}


@contextlib.contextmanager
def _drafted(folder: Path) -> Iterator[Path | None]:
    """A folder beside `folder` to write into, which takes its place at the end; None where it is there already."""
    if folder.is_dir():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        yield draft
        draft.chmod(0o755)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _from_gguf(path: Path, dtype: str) -> Source:
    """Dequantise into a plain folder, once; the whole model is in memory while that happens."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(f"reading {path.name} needs the gguf package: pip install 'llmprune[gguf]'") from None
    digest = sha256_of(path)
    folder = _gguf_folder(path.stem, digest, dtype)
    with _drafted(folder) as draft:
        if draft is not None:
            try:
                with quiet():
                    _dequantise(path, draft, getattr(torch, _gguf_dtype(dtype)))
            except Exception as error:
                raise Failure(f"{path} could not be read as GGUF: {type(error).__name__}: {error}") from error
    return Source(str(path), folder, digest)


def _gguf_folder(stem: str, digest: str, dtype: str) -> Path:
    """Where a `.gguf` of that sha256 is dequantised to."""
    return cache_folder() / "gguf" / f"{stem}-{digest[:16]}-{_gguf_dtype(dtype)}"


def _gguf_dtype(asked: str) -> str:
    return "bfloat16" if asked == "auto" else asked


def _dequantise(path: Path, folder: Path, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **options)
    # The weights are plain now, but the marks of the format they came from make save_pretrained refuse.
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own progress bars and notes off the terminal for a while; errors still come through."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.ERROR)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
