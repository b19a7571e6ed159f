"""Where a model comes from: a Hub name, a local folder or a local `.gguf` file, brought to a local folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmprune import memory
from llmprune.errors import Failure, UserError
from llmprune.model import quantised
from llmprune.model.index import read_index
from llmprune.model.pickles import pickled, read_pickle
from llmprune.model.quantised import Quantisation, quantisation
from llmprune.progress import Progress, of_first
from llmprune.recipe import DTYPES, format_size

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
"""What a model needs to be loaded; other weight formats that lie beside it are not downloaded."""

COPIES = ["*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model", "consolidated*", "*.fp16.*", "*.fp32.*"]
"""The same model once more, in another layout or precision, or in a subfolder."""

NOT_COPIED = re.compile(
    r".*\.(safetensors|bin|pt|pth|h5|msgpack|onnx|gguf|ot|tflite|index\.json)|README\.md|llmprune.*|recipe\.yaml|\..*"
)
"""Files of a model folder that are not carried along."""

CHAT_TEMPLATES = "additional_chat_templates"
"""Where transformers keeps chat templates beside the main one."""

CACHE_VARIABLE = "LLMPRUNE_CACHE"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Source:
    """A model on this machine.

    Attributes:
        name: as it was asked for.
        folder: holds config.json, safetensors and the tokenizer.
        revision: the commit on the Hub, the sha256 of a `.gguf`, or None for a folder.
        trusted: code that comes with the model is run.
        origin: what was done to make its weights plain, in words; None where they are as they came.
    """

    name: str
    folder: Path
    revision: str | None = None
    trusted: bool = False
    origin: str | None = None


def resolve(
    model: str | Path,
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
    most: int | None = None,
    as_is: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Find the model, downloading or converting it where needed.

    Args:
        model: `owner/name` or `owner/name@revision` on the Hub, a folder, or a `.gguf` file. What exists on disk wins.
        dtype: what a `.gguf` or a quantised model is dequantised to; `auto` is bfloat16. Others keep their own.
        trust_remote_code: run code that comes with the model.
        most: bytes of memory that a conversion may take, where that needs the whole model; by default what is free.
        as_is: leave a quantised model quantised.
        progress: where to show how far a conversion is.

    Raises:
        UserError: there is no such model, it is quantised in a way that cannot be undone, a package for reading it is
            missing, or there is no room for a conversion.
        Failure: it could not be downloaded or converted.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    name, path, shown = str(model), Path(model).expanduser(), of_first(progress)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name} is a file, but not a .gguf: give a model folder, a .gguf file or a Hub name")
        return _from_gguf(path.resolve(), dtype, most, shown)
    if path.is_dir():
        source = Source(name, path.resolve(), trusted=trust_remote_code)
    else:
        named = _HUB_NAME.fullmatch(name)
        if named is None or name.startswith((".", "~")) or path.suffix == ".gguf":
            raise UserError(f"no model at {name}: no such folder or file, and it is not a Hub name (owner/name)")
        source = _from_hub(name, named["name"], named["revision"], trust_remote_code, as_is)
    return _from_pickles(source, shown) if as_is else _plain(source, dtype, most, shown)


def _from_hub(asked: str, name: str, revision: str | None, trusted: bool, as_is: bool) -> Source:
    wanted = [*HUB_FILES, "*.py"] if trusted else HUB_FILES
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["config.json"]))
        if not as_is and (found := quantisation(folder)):
            quantised.check(found, asked)  # before all the weights come
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=COPIES))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, revision=revision, allow_patterns=["pytorch_model*"])
    except GatedRepoError:
        raise UserError(
            f"{name} is gated: accept its terms on its Hub page, then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision!r} on the Hub") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"no model {name!r}: there is no such folder here, and no such model on the Hub that you may read "
            "(a private one needs `hf auth login` or HF_TOKEN)"
        ) from None
    except LocalEntryNotFoundError:
        raise Failure(
            f"{name} is not on this machine and the Hub cannot be reached: check the connection (and HF_HUB_OFFLINE), "
            "or give a local folder"
        ) from None
    except (HTTPError, OSError) as error:
        raise Failure(f"downloading {name} failed: {error}; run the same command again to go on with it") from None
    return Source(asked, folder, folder.name, trusted)


def cache_folder() -> Path:
    """Where converted and downloaded models are kept: $LLMPRUNE_CACHE, or llmprune in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmprune"


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def content_sha256(path: Path) -> str:
    """A file's sha256; in the Hub's cache the name of a large file is its sha256 already."""
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else sha256_of(path)


def side_files(folder: Path) -> list[str]:
    """What goes with the weights: config, tokenizer, chat templates, generation config, licence, code, ..."""
    found = [path.name for path in folder.iterdir() if path.is_file() and not NOT_COPIED.fullmatch(path.name)]
    found += [str(path.relative_to(folder)) for path in (folder / CHAT_TEMPLATES).glob("*.jinja")]
    return sorted(found)


def _plain(source: Source, dtype: str, most: int | None, shown: Progress) -> Source:
    """Safetensors with plain weights: what is pickled or quantised is converted."""
    if found := quantisation(source.folder):
        quantised.check(found, source.name)
    source = _from_pickles(source, shown)
    return source if found is None else _from_quantised(source, found, dtype, most, shown)


def _from_pickles(source: Source, shown: Progress) -> Source:
    """A folder with safetensors as it is; one that only has pytorch_model.bin is converted, file by file, once."""
    files = pickled(source.folder)
    if not files:
        return source
    folder = cache_folder() / "bin" / f"{source.folder.name}-{_digest(source.folder, files)}"
    with _drafted(folder, source.name, sum(path.stat().st_size for path in files)) as draft:
        if draft is not None:
            weight_map: dict[str, str] = {}
            aliases = not _ties_words(source)
            for number, path in enumerate(shown.over(files, "converting pickled weights"), 1):
                name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
                tensors = read_pickle(path, aliases)
                save_file(tensors, draft / name, metadata={"format": "pt"})
                weight_map.update(dict.fromkeys(tensors, name))
                del tensors
            quantised.write_index(draft, weight_map)
            _copy_side_files(source.folder, draft)
    return replace(source, folder=folder)


def _ties_words(source: Source) -> bool:
    """Whether the model has one tensor for words coming in and going out; then the second name of it is left out."""
    with contextlib.suppress(Exception), quiet():  # a config that cannot be used is told of when it is read for good
        config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trusted)
        return bool(getattr(config.get_text_config(), "tie_word_embeddings", True))
    return True


def _from_quantised(source: Source, found: Quantisation, dtype: str, most: int | None, shown: Progress) -> Source:
    """Dequantise into a plain folder, once."""
    config = quantised.plain_config(source.folder, dtype)
    wanted = config["dtype"]
    files = sorted({info.file for info in read_index(source.folder).values()})
    folder = cache_folder() / "dequantised" / f"{source.folder.name}-{_digest(source.folder, files)}-{wanted}"
    made = replace(source, folder=folder, origin=f"dequantised from {found.method} to {wanted}")
    if folder.is_dir():
        return made
    by_tensor = found.method in quantised.BY_TENSOR
    if by_tensor:
        size = quantised.plain_size(source.folder, found, wanted)
    else:
        size, peak = quantised.model_sizes(source, wanted)
        check_memory(source.name, peak, most)
    with _drafted(folder, source.name, size) as draft:
        if draft is not None:
            if by_tensor:
                quantised.dequantise(source.folder, draft, found, wanted, shown)
            else:
                with shown.waiting(f"dequantising {found.method}, the whole model at once"):
                    try:
                        with quiet():
                            quantised.dequantise_model(source, draft, found, wanted)
                    except (OSError, SafetensorError):
                        raise
                    except Exception as error:  # of transformers and the method's own package
                        reason = (str(error).splitlines() or [""])[0]
                        raise Failure(
                            f"{source.name}: transformers could not undo {found.method}: {type(error).__name__}: "
                            f"{reason}; prune the unquantised model"
                        ) from error
            _copy_side_files(source.folder, draft)
            (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return made


def _digest(folder: Path, weights: list[Path]) -> str:
    """Tells apart what a conversion depends on: the weights, and all that is copied beside them."""
    files = sorted([*weights, *(folder / name for name in side_files(folder))])
    return hashlib.sha256("".join(map(content_sha256, files)).encode()).hexdigest()[:16]


def _copy_side_files(source: Path, draft: Path) -> None:
    for name in side_files(source):
        (draft / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, draft / name)


@contextlib.contextmanager
def _drafted(folder: Path, name: str, size: int) -> Iterator[Path | None]:
    """A folder beside `folder` to write into, which takes its place at the end; None where it is there already.

    Processes wait for one another; what one that was killed left behind is cleared away.

    Args:
        name: the model's.
        size: bytes that will be written.

    Raises:
        UserError: the disk has no room for that.
        Failure: it could not be written.
    """
    if folder.is_dir():
        yield None
        return
    place = folder.parent
    draft = place / f".{folder.name}.draft"
    hint = f"another folder can be chosen with {CACHE_VARIABLE}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / f".{folder.name}.lock"):
            if folder.is_dir():
                yield None
                return
            shutil.rmtree(draft, ignore_errors=True)
            free = shutil.disk_usage(place).free
            if free < size:
                raise UserError(
                    f"no space left to convert {name} in {place}: it needs {size / 1e9:.2f} GB, and "
                    f"{free / 1e9:.2f} GB are free; {hint}"
                )
            draft.mkdir()
            try:
                yield draft
                draft.rename(folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise Failure(f"converting {name} in {place} failed: {error}; {hint}") from None


def check_memory(name: str, needed: int, most: int | None) -> None:
    """See that a conversion that holds the whole model fits into the memory.

    Raises:
        UserError: it does not.
    """
    free = memory.available()
    if needed > (free if most is None else min(free, most)):
        cap = f", and --max-memory allows {format_size(most)}" if most is not None and most < free else ""
        raise UserError(
            f"to convert {name} the whole model must be in memory for a moment: that takes {format_size(needed)}, "
            f"{format_size(free)} are free{cap}; convert it on a larger machine, or give the unquantised model"
        )


def _from_gguf(path: Path, dtype: str, most: int | None, shown: Progress) -> Source:
    """Dequantise into a plain folder, once; the whole model is in memory while that happens."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"reading {path.name} needs the gguf package: pip install 'llmprune[gguf]'") from None
    wanted = "bfloat16" if dtype == "auto" else dtype
    digest = sha256_of(path)
    folder = cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}-{wanted}"
    made = Source(str(path), folder, digest, origin=f"dequantised from GGUF to {wanted}")
    if folder.is_dir():
        return made
    unreadable = f"{path} could not be read as GGUF"
    try:
        size = sum(int(part.n_elements) for part in gguf.GGUFReader(path).tensors) * getattr(torch, wanted).itemsize
    except Exception as error:  # a broken file surfaces in many kinds
        raise Failure(f"{unreadable}: {type(error).__name__}: {error}") from None
    check_memory(path.name, size, most)
    with _drafted(folder, path.name, size) as draft, shown.waiting(f"dequantising {path.name}"):
        if draft is not None:
            try:
                with quiet():
                    _dequantise_gguf(path, draft, getattr(torch, wanted))
            except Exception as error:
                raise Failure(f"{unreadable}: {type(error).__name__}: {error}") from error
    return made


def _dequantise_gguf(path: Path, folder: Path, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
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
