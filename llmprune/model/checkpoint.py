"""A safetensors checkpoint, its index, and a skeleton of its model into which one block at a time is loaded.

The names of transformers' weight conversion, which turns the tensors of a checkpoint into the parameters of a model and
back, are private to transformers 5; all use of them is in this file.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from llmprune import memory
from llmprune.errors import Failure, UserError
from llmprune.model.index import TensorInfo, read_header, read_index, read_tensors
from llmprune.model.quiet import quiet
from llmprune.model.skeleton import (
    decoder_prefix,
    find_blocks,
    load_tokenizer,
    longest,
    make_skeleton,
    pick_device,
    read_config,
)
from llmprune.model.source import Source
from llmprune.parts import not_finite

_NOWHERE = "not written yet"
"""Stands for the file of a tensor that no file holds."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that some tensors take.

    Attributes:
        stored: as the files hold them.
        converted: those of them that are in another layout in the model, and held in both while they are written.
        reading: what is held for a moment besides while they are read and converted.
        copied: what is held besides, where they are run on another device or in another dtype.
    """

    stored: int
    converted: int
    reading: int
    copied: int


@dataclass(frozen=True)
class Shape:
    """What a model is to be, where that is not what its files say.

    Attributes:
        config: of the model.
        config_json: the same as the text of a config.json.
        index: its tensors by the keys that they have in it, wherever they are stored.
        before: the names of its blocks in the model that the files are of.
        gone: what each block of that takes which this has not.
        narrower: whether tensors of its blocks are smaller than those of the files. They cannot be read from these: its
            blocks are given (`place_block`), or read from where they were written.
        wide: the width of the hidden states in the model that it comes from, where that is larger.
    """

    config: Any
    config_json: str
    index: Mapping[str, TensorInfo]
    before: tuple[str, ...]
    gone: tuple[Footprint, ...] = ()
    narrower: bool = False
    wide: int | None = None


@dataclass
class LoadedBlock:
    """A block whose weights are in memory.

    Attributes:
        module: the block, in the dtype and on the device it is run in.
        state: parameter and buffer names (as in the whole model) to tensors in the checkpoint's own dtype, on the
            host; the same memory as in `module` where dtype and device agree.
        read: where those parameters were read from that are in `state` as a file holds them.
    """

    name: str
    module: nn.Module
    state: dict[str, Tensor]
    read: dict[str, TensorInfo] = field(default_factory=dict)

    def near(self, name: str) -> Tensor:
        """A tensor to look at, as in `state`; where the block is run, if it is the same there to the bit.

        A GPU computes with it without waiting for the host's memory.
        """
        parent, _, leaf = name.removeprefix(f"{self.name}.").rpartition(".")
        running: Tensor = getattr(self.module.get_submodule(parent), leaf).detach()
        return running if running.dtype == self.state[name].dtype else self.state[name]

    def refresh(self, names: Iterable[str]) -> None:
        """Carry changes of tensors in `state` over to the module."""
        running = self.module.state_dict(prefix=f"{self.name}.", keep_vars=True)
        for name in names:
            if running[name].data_ptr() != self.state[name].data_ptr():
                running[name].copy_(self.state[name])


class Checkpoint:
    """A model's files, the skeleton of its module, and the map between the two.

    Attributes:
        source: where it came from.
        shape: what the model is, where that is not what its files say.
        index: every tensor of the files.
        model: the whole model; everything that is not loaded is on the meta device.
        blocks: names of the decoder blocks, in order.
        block_keys: for each block, the keys of the files that make it up.
        outer_keys: the keys of everything else that belongs to the model.
        unclaimed_keys: keys that no module asks for.
        device, dtype: what the blocks are run on and in.
    """

    def __init__(self, source: Source, device: str = "auto", dtype: str = "auto", shape: Shape | None = None) -> None:
        """Read the headers of all files and build the skeleton; no weights are read.

        Args:
            shape: what the model is to be, where that is not what its files say.

        Raises:
            UserError: not a decoder that can be pruned here; the message says why.
            Failure: a file is missing or broken.
        """
        self.source, self.shape = source, shape
        self.device = pick_device(device)
        self.index = dict(shape.index) if shape is not None else read_index(source.folder)
        self._source_index = dict(self.index)
        with quiet():
            self.config = read_config(source) if shape is None else shape.config
            self.dtype = self._run_dtype(dtype)
            self.model = make_skeleton(self.config, self.dtype, source.trusted)
        self.model.eval()
        self.blocks = find_blocks(self.model)
        self._run_dtypes = self._plan_dtypes()
        self._map_keys()
        if shape is not None and shape.narrower:
            self._adopt_shapes()

    def reshaped(self, config: Any, config_json: str, device: str = "", dtype: str = "", **shape: Any) -> Checkpoint:
        """The same files as a model of another shape, on the same device and in the same dtype unless said otherwise.

        Args:
            config, config_json: see `Shape`.
            **shape: what else is other than it is here, by the names in `Shape`.
        """
        own = self.shape or Shape(config, config_json, self.index, tuple(self.blocks))
        made = replace(own, config=config, config_json=config_json, **{"index": self.index, **shape})
        return Checkpoint(
            self.source, device or str(self.device), dtype or str(self.dtype).removeprefix("torch."), made
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.source)

    def forget_tokenizer(self) -> None:
        """Give the memory of the tokenizer back; it is loaded again when it is asked for."""
        self.__dict__.pop("tokenizer", None)
        memory.give_back()

    @property
    def max_length(self) -> int | None:
        """The longest sequence that the model takes, None where its config does not say."""
        return longest(self.config)

    @property
    def weights(self) -> int:
        """How many weights the model has, whatever they are of."""
        return sum(info.numel for info in self.index.values())

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states."""
        return int(self.config.get_text_config().hidden_size)

    def check_tokens(self, ids: Tensor) -> None:
        """See that the model has an embedding for every token.

        Raises:
            UserError: the tokenizer gives larger ids than the model knows.
        """
        rows = self.model.get_input_embeddings().weight.shape[0]
        if int(ids.max()) >= rows:
            raise UserError(
                f"the tokenizer of {self.source.name} gives the id {int(ids.max()):,}, but the model has {rows:,} "
                "embeddings: it is not this model's tokenizer"
            )

    def name_before(self, number: int, name: str) -> str:
        """What something in a block is called in the model that the files are of."""
        return name if self.shape is None else self.shape.before[number] + name.removeprefix(self.blocks[number])

    def block(self, name: str) -> nn.Module:
        """A block of the skeleton, loaded or not."""
        module: nn.Module = self.model.get_submodule(name)
        return module

    def load_block(self, number: int, dense: bool = False) -> LoadedBlock:
        """Read one block's tensors from the files into the skeleton.

        Args:
            dense: from the source, whatever `read_from` said since.

        Raises:
            Failure: a tensor is missing or of another shape, or a weight is NaN or infinite.
        """
        name, keys, index = self.blocks[number], self.block_keys[number], self._source_index if dense else self.index
        state = self._load(keys, name + ".", index)
        parameters = {f"{name}.{own}" for own, _ in self.block(name).named_parameters(remove_duplicate=False)}
        targets = {key: self._targets[key][0] for key in keys if key not in self._converted}
        read = {target: index[key] for key, target in targets.items() if target in parameters}
        block = LoadedBlock(name, self.block(name), state, read)
        self.check_finite({key: block.near(key) for key in state})
        return block

    def place_block(self, number: int, state: Mapping[str, Tensor]) -> LoadedBlock:
        """Put tensors into a block of the skeleton, as if they had been read.

        Args:
            state: by their names in the model, as stored; all of the block's.
        """
        name = self.blocks[number]
        self._place(state, f"{name}.")
        return LoadedBlock(name, self.block(name), dict(state))

    def check_finite(self, tensors: dict[str, Tensor]) -> None:
        """See that weights hold no NaN and nothing infinite.

        Raises:
            Failure: one does; the message names it.
        """
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
                continue
            if bad := not_finite(tensor):
                raise Failure(
                    f"{name} in {self.source.name} holds {bad:,} NaN or infinite values: its weights are broken"
                )

    def load_outer(self, head: bool = False) -> None:
        """Read what surrounds the blocks: the embeddings and norms of the decoder, and with `head` the output layer."""
        self._load(self.outer(head), "", self.index)
        if self.tied:
            missing = {name for name, value in self.model.state_dict().items() if value.device.type == "meta"}
            with quiet():
                self.model.tie_weights(missing_keys=missing, recompute_mapping=False)

    def outer(self, head: bool) -> list[str]:
        """The keys that `load_outer` reads."""
        decoder = decoder_prefix(self.model)
        heads = {name for name, _ in self.model.named_children()} - {decoder.split(".")[0]}
        tied = {name for pair in self.tied.items() for name in pair}

        def needed(name: str) -> bool:
            return name.startswith(decoder) or name in tied or (head and name.split(".")[0] in heads)

        return [key for key in self.outer_keys if needed(self._targets[key][0])]

    def footprint(self, keys: Iterable[str]) -> Footprint:
        """What tensors of the files take when they are loaded."""
        stored = copied = 0
        converted: dict[str, int] = {}
        for key in sorted(keys, key=_natural):
            info, run = self.index[key], self._run_dtypes[self._targets[key][0]]
            stored += info.nbytes
            if key in self._converted:
                target = self._targets[key][0]
                converted[target] = converted.get(target, 0) + info.nbytes
            copied += info.numel * run.itemsize if self.device.type != "cpu" or run != info.dtype else 0
        most = before = stored - sum(converted.values())
        for size in converted.values():  # the parts, what is made of them on the way, and the result
            most, before = max(most, before + 3 * size), before + size
        return Footprint(stored, sum(converted.values()), max(0, most - stored), copied)

    def unload(self, prefix: str = "") -> None:
        """Put the loaded weights under a name prefix back on the meta device."""
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if name.startswith(prefix) and parameter.device.type != "meta":
                dtype = self._stored.get(name, parameter.dtype)
                self._set(name, torch.empty_like(parameter, device="meta", dtype=dtype))
        for name in [name for name in self._host_buffers if name.startswith(prefix)]:
            self._set(name, self._host_buffers.pop(name))
        for name, buffer in list(self.model.named_buffers()):
            if name.startswith(prefix) and name in self._stored and buffer.device.type != "cpu":
                self._set(name, buffer.cpu())
        memory.give_back()

    def unload_block(self, number: int) -> None:
        """Put one block's weights back on the meta device."""
        self.unload(self.blocks[number] + ".")

    def prefetch(self, number: int) -> None:
        """Ask the system to read a block's tensors into its cache of files, where it can; returns at once."""
        if not hasattr(os, "posix_fadvise") or number >= len(self.blocks):
            return
        with suppress(OSError):
            for key in self.block_keys[number]:
                info = self.index[key]
                with info.file.open("rb") as file:
                    os.posix_fadvise(file.fileno(), info.offset, info.stored, os.POSIX_FADV_WILLNEED)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Tensors exactly as the files hold them, in memory of their own.

        Raises:
            OSError: a file cannot be read, or ends too early.
        """
        return read_tensors({key: self.index[key] for key in keys})

    def read_parameter(self, name: str) -> Tensor:
        """One parameter of the model as the files hold it; only the tensors that make it up are read.

        Raises:
            Failure: it cannot be read.
        """
        try:
            return self._convert(self.read([key for key, targets in self._targets.items() if name in targets]))[name]
        except OSError as error:
            raise Failure(f"{self.source.name}: reading {name} failed: {error}") from None

    def read_from(self, file: Path, keys: Iterable[str]) -> None:
        """Take some tensors from another file from now on, which has them in the same dtype and shape."""
        found = read_header(file)
        self.index.update((key, found[key]) for key in keys)

    def written_block(self, number: int, block: LoadedBlock, changed: set[str]) -> dict[str, Tensor]:
        """A block's tensors under the checkpoint's own keys, layout and dtype.

        Args:
            changed: names of the parameters that were pruned. Tensors that hold none of them are equal to the bit to
                those of the files, and read anew only where the block does not hold them as they are.
        """
        untouched: list[str] = []
        direct: list[str] = []
        converted: list[str] = []
        for key in self.block_keys[number]:
            if not changed.intersection(self._targets[key]):
                held = block.read.get(self._targets[key][0]) is self.index[key]
                (direct if held else untouched).append(key)
            elif key in self._converted:
                converted.append(key)
            else:
                direct.append(key)
        written = self.read(untouched)
        written.update((key, block.state[self._targets[key][0]]) for key in direct)
        if converted:
            names = {target for key in converted for target in self._targets[key]}
            reverted = self._revert({name: block.state[name] for name in sorted(names)})
            written.update((key, reverted[key]) for key in converted)
        return {key: written[key].to(self.index[key].dtype).contiguous() for key in self.block_keys[number]}

    def targets(self, key: str) -> tuple[str, ...]:
        """The parameters of the model that a key of the files goes into."""
        return self._targets[key]

    # -- the map between files and modules ---------------------------------------------------------------------------

    def _run_dtype(self, asked: str) -> torch.dtype:
        if asked != "auto":
            chosen: torch.dtype = getattr(torch, asked)
            return chosen
        named = getattr(self.config, "dtype", None) or getattr(self.config.get_text_config(), "dtype", None)
        if isinstance(named, torch.dtype):
            return named
        floating = [info.dtype for info in self.index.values() if info.dtype.is_floating_point]
        return floating[0] if floating else torch.float32

    def _plan_dtypes(self) -> dict[str, torch.dtype]:
        """The dtype in which transformers runs each parameter; a few families keep some in float32."""
        make = getattr(self.model, "_get_dtype_plan", None)
        plan = make(self.dtype) if make is not None else self.model.dtype_plan
        return {
            name: next((dtype for part, dtype in plan.items() if re.search(part.replace("*", ".*"), name)), value.dtype)
            for name, value in self.model.state_dict().items()
        }

    def _map_keys(self) -> None:
        state = self.model.state_dict()
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix = self.model.base_model_prefix
        self._targets: dict[str, tuple[str, ...]] = {}
        self._converted: dict[str, tuple[WeightConverter, str]] = {}
        self._host_buffers: dict[str, Tensor] = {}
        self.unclaimed_keys: list[str] = []
        for key in self.index:
            target, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if target not in state and key in state:
                target, pattern = rename_source_key(key, [], [], prefix, state)
            targets = (target,)
            if pattern is not None:
                self._converted[key] = by_pattern[pattern], pattern
                first = by_pattern[pattern].target_patterns[0]
                targets = tuple(target.replace(first, other) for other in by_pattern[pattern].target_patterns)
            if all(name in state for name in targets):
                self._targets[key] = targets
            else:
                self.unclaimed_keys.append(key)
        self._prefixes = {key[: key.index("layers.")] for key in self._converted if "layers." in key}
        self._adopt_stored_dtypes(state)
        places = {name: number for number, name in enumerate(self.blocks)}
        self.block_keys: list[list[str]] = [[] for _ in self.blocks]
        self.outer_keys: list[str] = []
        for key in sorted(self._targets, key=_natural):
            parts = self._targets[key][0].split(".")
            inside = (places.get(".".join(parts[:depth])) for depth in range(1, len(parts)))
            number = next((place for place in inside if place is not None), None)
            (self.outer_keys if number is None else self.block_keys[number]).append(key)
        self._check_complete()

    def _adopt_stored_dtypes(self, state: dict[str, Tensor]) -> None:
        """Give each parameter of the skeleton the dtype of its stored tensor, so that loading never rounds."""
        self._stored: dict[str, torch.dtype] = {}
        for key, targets in self._targets.items():
            self._stored.update(dict.fromkeys(targets, self.index[key].dtype))
        for name, value in state.items():
            if value.device.type == "meta" and self._stored.get(name, value.dtype) != value.dtype:
                self._set(name, torch.empty(value.shape, dtype=self._stored[name], device="meta"))

    def _adopt_shapes(self) -> None:
        """Give each tensor the shape that the skeleton has for it; those that change are in no file yet.

        Keys that nothing is left for, those of experts past the last, are forgotten.
        """
        for keys in (*self.block_keys, self.outer_keys):
            names = {name: key in self._converted for key in keys for name in self._targets[key]}
            meta = {name: torch.empty_like(self._get(name), device="meta") for name in sorted(names)}
            reverted = self._revert({name: value for name, value in meta.items() if names[name]})
            for key in list(keys):
                made = reverted.get(key) if key in self._converted else meta[self._targets[key][0]]
                if made is None and keys is self.outer_keys:
                    raise Failure(f"transformers does not restore {key} of {self.source.name}")
                if made is None:
                    keys.remove(key)
                    del self.index[key], self._targets[key], self._converted[key]
                elif (shape := tuple(made.shape)) != self.index[key].shape:
                    self.index[key] = replace(self.index[key], file=Path(_NOWHERE), shape=shape)

    def _check_complete(self) -> None:
        claimed = {name for targets in self._targets.values() for name in targets}
        groups: dict[str, set[str]] = {}
        for name, other in self.tied.items():
            groups.setdefault(other, {other}).add(name)
        for other, names in groups.items():
            inside = sorted(name for name in names - claimed if name.startswith(tuple(f"{b}." for b in self.blocks)))
            if inside:
                raise UserError(
                    f"{type(self.model).__name__} cannot be walked block by block: its blocks share weights "
                    f"({inside[0]} is tied to {other})"
                )
        tied = {name for names in groups.values() if names & claimed for name in names}
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        missing = sorted(parameters - claimed - tied, key=_natural)
        if missing:
            listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise Failure(
                f"{self.source.name} lacks tensors that {type(self.model).__name__} needs: {listed}; "
                "a shard is missing, or config.json belongs to another model"
            )

    @property
    def tied(self) -> dict[str, str]:
        """Parameters that are the same as others, by whose names."""
        return dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    # -- moving weights ----------------------------------------------------------------------------------------------

    def _load(self, keys: list[str], prefix: str, index: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
        """Load keys into the skeleton; returns the tensors by their names in the model, as stored.

        What is put together from several keys is read and put together by itself, to hold little of it twice.
        """
        groups: dict[str, list[str]] = {}
        for key in sorted(keys, key=_natural):
            groups.setdefault(self._targets[key][0] if key in self._converted else "", []).append(key)
        loaded: dict[str, Tensor] = {}
        for group in groups.values():
            try:
                loaded.update(self._convert(read_tensors({key: index[key] for key in group})))
            except OSError as error:
                raise Failure(f"{self.source.name}: reading {prefix or 'the embeddings'} failed: {error}") from None
            if group[0] in self._converted:
                memory.give_back()
        self._place(loaded, prefix)
        return loaded

    def _place(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Put tensors into the skeleton as they are run."""
        for name in sorted(tensors, key=_natural):
            wanted = self._get(name).shape
            if tensors[name].shape != wanted:
                stored = tuple(tensors[name].shape)
                raise Failure(f"{self.source.name}: {name} has the shape {stored}, the config asks for {tuple(wanted)}")
            self._set(name, tensors[name].to(self.device, self._run_dtypes[name]))
        if self.device.type != "cpu":
            self._move_buffers(prefix)

    def _convert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the files to parameters of the model, by transformers' own converters."""
        made: dict[str, Tensor] = {}
        started: dict[str, WeightConverter] = {}
        for key in sorted(tensors, key=_natural):
            target = self._targets[key][0]
            if key not in self._converted:
                made[target] = tensors[key]
                continue
            converter, pattern = self._converted[key]
            started.setdefault(target, copy.deepcopy(converter)).add_tensor(target, key, pattern, tensors.pop(key))
        for target, converter in started.items():
            try:
                result = converter.convert(target, model=self.model, config=self.config)
            except (ValueError, RuntimeError, KeyError, IndexError) as error:
                raise Failure(f"{self.source.name}: {target} could not be put together: {error}") from None
            parts = result[0] if isinstance(result, tuple) else result
            made.update((name, part[0] if isinstance(part, list) else part) for name, part in parts.items())
        return made

    def _move_buffers(self, prefix: str) -> None:
        """Buffers that no file holds (rotary tables, masks) follow the weights to the device, and back at `unload`."""
        blocks = tuple(name + "." for name in self.blocks)
        for name, buffer in list(self.model.named_buffers()):
            outer = not prefix and not name.startswith(blocks)
            if (outer or (prefix and name.startswith(prefix))) and buffer.device.type == "cpu":
                self._host_buffers.setdefault(name, buffer)
                self._set(name, buffer.to(self.device))

    def _revert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Model parameters back to the keys and the layout of the files."""
        self.model._weight_conversions = None
        prefixes = {"", self.model.base_model_prefix + ".", decoder_prefix(self.model)}
        reverted = {}
        for key, tensor in revert_weight_conversion(self.model, state).items():
            bare = {key.removeprefix(prefix) for prefix in prefixes}
            spellings = (prefix + name for name in bare for prefix in (*prefixes, *self._prefixes))
            found = next((spelling for spelling in spellings if spelling in self._converted), None)
            if found is not None:
                reverted[found] = tensor
        return reverted

    def check_revertible(self, number: int) -> None:
        """Show on the meta device that a block can be written back under the keys and shapes it was read from.

        Raises:
            UserError: it cannot.
        """
        converted = [key for key in self.block_keys[number] if key in self._converted]
        names = sorted({target for key in converted for target in self._targets[key]})
        if not names:
            return
        meta = {name: torch.empty_like(self._get(name), device="meta") for name in names}
        reverted = self._revert(meta)
        for key in converted:
            if key not in reverted or tuple(reverted[key].shape) != self.index[key].shape:
                raise UserError(
                    f"{type(self.model).__name__} cannot be written back: transformers does not restore {key} "
                    f"of {self.source.name}"
                )

    def _get(self, name: str) -> Tensor:
        parent, _, leaf = name.rpartition(".")
        value: Tensor = getattr(self.model.get_submodule(parent), leaf)
        return value

    def _set(self, name: str, value: Tensor) -> None:
        parent, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(parent)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = nn.Parameter(value.detach(), requires_grad=False)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key in which layers.2 comes before layers.10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]
