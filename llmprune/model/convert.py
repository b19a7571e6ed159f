"""Models made plain: pickles, quantised weights and `.gguf` files become safetensors with plain weights, once each.

They are kept in the cache folder under a name that tells apart all that a conversion depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmprune import memory
from llmprune.errors import Failure, UserError
from llmprune.model import quantised
from llmprune.model.files import cache_folder, content_sha256, copy_side_files, drafted, sha256_of, side_files
from llmprune.model.index import read_index
from llmprune.model.pickles import pickled, read_pickle
from llmprune.model.quantised import Quantisation, quantisation
from llmprune.model.quiet import quiet
from llmprune.progress import Progress
from llmprune.recipe import format_size

if TYPE_CHECKING:
    from llmprune.model.source import Source


def plain(source: Source, dtype: str, most: int | None, shown: Progress) -> Source:
    """Safetensors with plain weights: what is pickled or quantised is converted.

    Args:
        dtype: of what was quantised, as for `resolve`.
        most: bytes of memory that the conversion may take.
    """
    found = quantisation(source.folder)
    if found is not None:
        quantised.check(found, source.name)
    source = unpickled(source, shown)
    return source if found is None else _dequantised(source, found, dtype, most, shown)


def made_before(source: Source, dtype: str) -> Source | None:
    """What `plain` would return, if nothing is left to do for it; nothing is written."""
    if files := pickled(source.folder):
        source = _of_pickles(source, files)
    if found := quantisation(source.folder):
        source = _of_quantised(source, found, quantised.plain_config(source.folder, dtype)["dtype"])
    return source if source.folder.is_dir() else None


def unpickled(source: Source, shown: Progress) -> Source:
    """A folder with safetensors as it is; one that only has pytorch_model.bin is converted, file by file, once."""
    files = pickled(source.folder)
    if not files:
        return source
    made = _of_pickles(source, files)
    with drafted(made.folder, source.name, sum(path.stat().st_size for path in files)) as draft:
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
            copy_side_files(source.folder, draft)
    return made


def _of_pickles(source: Source, files: list[Path]) -> Source:
    """A model of pickles as it is once converted."""
    return replace(source, folder=cache_folder() / "bin" / f"{source.folder.name}-{_digest(source.folder, files)}")


def _ties_words(source: Source) -> bool:
    """Whether the model has one tensor for words coming in and going out; then the second name of it is left out."""
    with contextlib.suppress(Exception), quiet():  # a config that cannot be used is told of when it is read for good
        config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trusted)
        return bool(getattr(config.get_text_config(), "tie_word_embeddings", True))
    return True


def _dequantised(source: Source, found: Quantisation, dtype: str, most: int | None, shown: Progress) -> Source:
    """Dequantise into a plain folder, once."""
    config = quantised.plain_config(source.folder, dtype)
    wanted = config["dtype"]
    made = _of_quantised(source, found, wanted)
    if made.folder.is_dir():
        return made
    by_tensor = found.method in quantised.BY_TENSOR
    if by_tensor:
        size = quantised.plain_size(source.folder, found, wanted)
    else:
        size, peak = quantised.model_sizes(source, wanted)
        _check_memory(source.name, peak, most)
    with drafted(made.folder, source.name, size) as draft:
        if draft is not None:
            if by_tensor:
                quantised.dequantise(source.folder, draft, found, wanted, shown)
            else:
                with shown.waiting(f"dequantising {found.method}, the whole model at once"):
                    _dequantise_whole(source, draft, found, wanted)
            copy_side_files(source.folder, draft)
            (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return made


def _of_quantised(source: Source, found: Quantisation, dtype: str) -> Source:
    """A quantised model as it is once dequantised."""
    files = {info.file for info in read_index(source.folder).values()}
    folder = cache_folder() / "dequantised" / f"{source.folder.name}-{_digest(source.folder, files)}-{dtype}"
    return replace(source, folder=folder, origin=f"dequantised from {found.method} to {dtype}")


def _dequantise_whole(source: Source, draft: Path, found: Quantisation, dtype: str) -> None:
    try:
        with quiet():
            quantised.dequantise_model(source, draft, found, dtype)
    except (OSError, SafetensorError):
        raise
    except Exception as error:  # of transformers and the method's own package
        reason = (str(error).splitlines() or [""])[0]
        raise Failure(
            f"{source.name}: transformers could not undo {found.method}: {type(error).__name__}: {reason}; prune the "
            "unquantised model"
        ) from error


def from_gguf(source: Source, dtype: str, most: int | None, shown: Progress) -> Source:
    """Dequantise into a plain folder, once; the whole model is in memory while that happens.

    Args:
        source: by the path of the file.
        dtype, most: as for `plain`.
    """
    path = Path(source.name)
    try:
        import gguf
    except ImportError:
        raise UserError(f"reading {path.name} needs the gguf package: pip install 'llmprune[gguf]'") from None
    made = of_gguf(replace(source, revision=sha256_of(path)), dtype)
    if made.folder.is_dir():
        return made
    unreadable, wanted = f"{path} could not be read as GGUF", getattr(torch, _gguf_dtype(dtype))
    try:
        size = sum(int(part.n_elements) for part in gguf.GGUFReader(path).tensors) * wanted.itemsize
    except Exception as error:  # a broken file surfaces in many kinds
        raise Failure(f"{unreadable}: {type(error).__name__}: {error}") from None
    _check_memory(path.name, size, most)
    with drafted(made.folder, path.name, size) as draft, shown.waiting(f"dequantising {path.name}"):
        if draft is not None:
            try:
                with quiet():
                    _dequantise_gguf(path, draft, wanted)
            except Exception as error:
                raise Failure(f"{unreadable}: {type(error).__name__}: {error}") from error
    return made


def of_gguf(source: Source, dtype: str) -> Source:
    """A `.gguf` file as it is once dequantised; the source has its sha256 as revision."""
    wanted = _gguf_dtype(dtype)
    folder = cache_folder() / "gguf" / f"{Path(source.name).stem}-{(source.revision or '')[:16]}-{wanted}"
    return replace(source, folder=folder, origin=f"dequantised from GGUF to {wanted}")


def _gguf_dtype(asked: str) -> str:
    return "bfloat16" if asked == "auto" else asked


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


def _digest(folder: Path, weights: Iterable[Path]) -> str:
    """Tells apart what a conversion depends on: the weights, and all that is copied beside them."""
    files = sorted([*weights, *(folder / name for name in side_files(folder))])
    return hashlib.sha256("".join(map(content_sha256, files)).encode()).hexdigest()[:16]


def _check_memory(name: str, needed: int, most: int | None) -> None:
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
