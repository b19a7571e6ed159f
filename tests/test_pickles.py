"""Sources that are only there as pytorch_model.bin."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.errors import Failure, UserError
from llmprune.model import convert
from llmprune.model.index import read_index, read_tensors
from llmprune.model.pickles import read_pickle
from llmprune.model.source import present, resolve
from tests.families import make


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def old(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A model folder without weights, and the weights."""
    folder = make("llama", tmp_path / "old", torch.bfloat16)
    (folder / "LICENSE").write_text("do as you like")
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return folder, stored


def everything(folder: Path) -> dict[str, Tensor]:
    return read_tensors(read_index(folder))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def save_shards(folder: Path, stored: dict[str, Tensor]) -> list[str]:
    keys = sorted(stored)
    listing = {}
    for number, part in enumerate((keys[:7], keys[7:15], keys[15:]), 1):
        name = f"pytorch_model-{number:05d}-of-00003.bin"
        torch.save({key: stored[key] for key in part}, folder / name)
        listing.update(dict.fromkeys(part, name))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listing}))
    return sorted(set(listing.values()))


def test_shards_with_an_index(old: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, stored = old
    save_shards(folder, stored)
    torch.save({"stray": torch.ones(3)}, folder / "pytorch_model-00009-of-00009.bin")  # the index does not name it
    converted = resolve(folder).folder
    assert same(everything(converted), stored)
    assert len(list(converted.glob("*.safetensors"))) == 3
    assert (converted / "LICENSE").read_text() == "do as you like"
    assert not (converted / "pytorch_model.bin.index.json").exists()
    report = llmprune.prune(folder, out=tmp_path / "out", sparsity="2:4", method="magnitude")
    assert report.model == str(folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.layers[0].mlp.up_proj.weight.eq(0).float().mean() == 0.5


@pytest.mark.parametrize("zipped", [True, False], ids=["new format", "old format"])
def test_one_file_of_either_format(zipped: bool, old: tuple[Path, dict[str, Tensor]]) -> None:
    folder, stored = old
    torch.save(stored, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert same(everything(resolve(folder).folder), stored)


def test_a_missing_shard(old: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, stored = old
    names = save_shards(folder, stored)
    (folder / names[1]).unlink()
    with pytest.raises(Failure, match=f"shard {names[1]} is missing from .*: download the model again"):
        resolve(folder)
    (folder / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(UserError, match=r"no pytorch_model\.bin\.index\.json that ties such files together"):
        resolve(folder)
    (folder / "pytorch_model.bin.index.json").write_text("{")
    with pytest.raises(Failure, match="is broken"):
        resolve(folder)


def test_a_harmed_shard_leaves_nothing_behind(old: tuple[Path, dict[str, Tensor]], cache: Path) -> None:
    folder, stored = old
    names = save_shards(folder, stored)
    whole = (folder / names[2]).read_bytes()
    (folder / names[2]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Failure, match=f"{names[2]} cannot be read as plain weights"):
        resolve(folder)
    assert not [path for path in (cache / "bin").iterdir() if path.is_dir()]
    (folder / names[2]).write_bytes(whole)
    assert same(everything(resolve(folder).folder), stored)


class Touch:
    """Pickles to a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["new format", "old format", "bare pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(
    kind: str, old: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, stored = old
    trap = tmp_path / "it-was-run"
    evil = {**stored, "model.extra": Touch(trap)}
    if kind == "bare pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Touch(trap)}))
    else:
        torch.save(evil, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "new format")
    command = [sys.executable, "-m", "llmprune", "prune", str(folder), "-o", str(tmp_path / "out")]
    done = subprocess.run([*command, "--method", "magnitude"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot be read as plain weights (code in it is never run)" in done.stderr
    assert "Traceback" not in done.stderr
    if kind != "bare pickle":
        assert "system" in done.stderr  # what it would have called
    assert not trap.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(Touch(trap)))
    assert trap.exists()  # the trap works


class TestTensorsThatShareMemory:
    def test_tied_words_are_kept_once(self, old: tuple[Path, dict[str, Tensor]]) -> None:
        folder, stored = old
        torch.save({**stored, "lm_head.weight": stored["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
        assert "lm_head.weight" not in everything(resolve(folder).folder)

    def test_a_model_that_does_not_tie_gets_both(self, tmp_path: Path) -> None:
        folder = make("llama", tmp_path / "untied", torch.bfloat16, tie_word_embeddings=False)
        stored = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
        torch.save(stored, folder / "pytorch_model.bin")
        assert same(everything(resolve(folder).folder), stored)
        llmprune.prune(folder, out=tmp_path / "out", sparsity="2:4", method="magnitude")

    def test_parts_of_one_buffer(self, tmp_path: Path) -> None:
        buffer = torch.arange(36.0).reshape(6, 6)
        tensors = {
            "rows": buffer[:3],
            "rest": buffer[3:],
            "overlapping": buffer[2:5],
            "turned": buffer.T,
            "whole": buffer,
            "again": buffer,
        }
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        found = read_pickle(tmp_path / "pytorch_model.bin")
        del tensors["again"]
        assert same(found, tensors)
        assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == len(found)


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(2)], torch.ones(2)])
def test_files_without_weights(content: Any, old: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = old
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(Failure, match="cannot be read as plain weights"):
        resolve(folder)


def test_an_adapter_is_not_the_model(old: tuple[Path, dict[str, Tensor]]) -> None:
    from safetensors.torch import save_file

    folder, stored = old
    torch.save(stored, folder / "pytorch_model.bin")
    save_file({"lora": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    assert same(everything(resolve(folder).folder), stored)


def test_a_change_beside_the_weights_is_seen(old: tuple[Path, dict[str, Tensor]]) -> None:
    folder, stored = old
    torch.save(stored, folder / "pytorch_model.bin")
    first = resolve(folder).folder
    (folder / "generation_config.json").write_text('{"do_sample": true}')
    second = resolve(folder).folder
    assert second != first
    assert (second / "generation_config.json").read_text() == '{"do_sample": true}'
    assert resolve(folder).folder == second


def test_what_was_converted_is_found_again(old: tuple[Path, dict[str, Tensor]], cache: Path) -> None:
    folder, stored = old
    torch.save(stored, folder / "pytorch_model.bin")
    assert present(str(folder), None) is None
    assert not cache.exists()
    made = resolve(folder)
    assert present(str(folder), None) == made
    torch.save({"other": torch.ones(2)}, folder / "pytorch_model.bin")
    assert present(str(folder), None) is None


def test_a_killed_conversion_is_cleared_away(old: tuple[Path, dict[str, Tensor]], cache: Path) -> None:
    folder, stored = old
    torch.save(stored, folder / "pytorch_model.bin")
    converted = resolve(folder).folder
    shutil.rmtree(converted)
    draft = converted.with_name(f".{converted.name}.draft")
    draft.mkdir()
    (draft / "model-00001-of-00001.safetensors").write_bytes(b"half of it")
    (draft / "stray.json").write_text("{}")
    assert resolve(folder).folder == converted
    assert same(everything(converted), stored)
    assert not (converted / "stray.json").exists()
    assert not draft.exists()


def test_two_at_once_convert_it_once(old: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, stored = old
    torch.save(stored, folder / "pytorch_model.bin")
    began, going = threading.Event(), threading.Event()
    calls = []

    def slow(path: Path, aliases: bool) -> dict[str, Tensor]:
        calls.append(path)
        began.set()
        going.wait(10)
        return read_pickle(path, aliases)

    monkeypatch.setattr(convert, "read_pickle", slow)
    found: list[Path] = []
    workers = [threading.Thread(target=lambda: found.append(resolve(folder).folder)) for _ in range(2)]
    workers[0].start()
    began.wait(10)
    workers[1].start()
    going.set()
    for worker in workers:
        worker.join(20)
    assert len(calls) == 1
    assert found[0] == found[1]
    assert same(everything(found[0]), stored)


def test_a_full_disk_is_told(old: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    folder, stored = old
    torch.save(stored, folder / "pytorch_model.bin")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    with pytest.raises(Failure, match=r"converting .* failed: .*No space left on device; another folder can be chosen"):
        resolve(folder)
    assert not [path for path in (cache / "bin").iterdir() if path.is_dir()]
