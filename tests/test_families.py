"""Every family of transformers is walked, pruned and written without knowing its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.model import blocks
from llmprune.model.checkpoint import Checkpoint, read_index
from llmprune.model.index import TensorInfo, read_tensors
from llmprune.model.linears import find_linears
from llmprune.model.quiet import quiet
from llmprune.model.source import resolve
from tests.families import FAMILIES, VOCABULARY, make

CORE = (
    "llama", "gemma3_text", "mixtral", "qwen3_moe", "gpt_oss", "opt", "gpt2", "deepseek_v3", "bloom", "falcon",
    "gpt_neox", "phi3", "qwen3", "cohere2", "olmo2", "qwen3_next", "mamba",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make(family, tmp_path_factory.mktemp(family) / "model") for family in FAMILIES}


def load(folder: Path) -> torch.nn.Module:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_the_promised_families_are_here() -> None:
    assert set(CORE) <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_gives_the_logits_of_the_whole_model(family: str, folders: dict[str, Path]) -> None:
    checkpoint = Checkpoint(resolve(folders[family]), "cpu")
    tokens = torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
    chain = blocks.probe(checkpoint)
    activations = blocks.start(checkpoint, chain, [tokens[:2], tokens[2:]])
    for number in range(len(checkpoint.blocks)):
        checkpoint.load_block(number)
        blocks.advance(checkpoint, number, activations)
        checkpoint.unload_block(number)
    checkpoint.load_outer(head=True)
    streamed = torch.cat(
        [
            blocks.logits(checkpoint, chain, part, activations.read(batch))
            for batch, part in enumerate((tokens[:2], tokens[2:]))
        ]
    )
    with torch.no_grad():
        whole = load(folders[family])(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(streamed, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_written_back_equal_to_the_bit(family: str, folders: dict[str, Path]) -> None:
    checkpoint = Checkpoint(resolve(folders[family]), "cpu")
    for number, name in enumerate(checkpoint.blocks):
        block = checkpoint.load_block(number)
        everything = {linear.parameter for linear in find_linears(block.module, name)}
        written = checkpoint.written_block(number, block, everything)
        stored = checkpoint.read(checkpoint.block_keys[number])
        assert written.keys() == stored.keys()
        for key, tensor in stored.items():
            assert written[key].dtype == tensor.dtype
            assert torch.equal(written[key], tensor), key
        checkpoint.unload_block(number)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_block_holds_as_it_is_stored_is_not_read_again(
    family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(resolve(folders[family]), "cpu")
    number, keys = 1, checkpoint.block_keys[1]
    block, stored = checkpoint.load_block(number), checkpoint.read(keys)
    changed = find_linears(block.module, block.name)[0].parameter
    block.state[changed].zero_()
    read: list[str] = []

    def watched(infos: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
        read.extend(infos)
        return read_tensors(infos)

    monkeypatch.setattr("llmprune.model.checkpoint.read_tensors", watched)
    written = checkpoint.written_block(number, block, {changed})
    buffers = dict(checkpoint.model.named_buffers())
    again = [key for key in read if checkpoint.targets(key)[0] not in buffers]
    # What is in another layout in the model is, and is counted as held twice.
    assert sum(checkpoint.index[key].nbytes for key in again) <= checkpoint.footprint(keys).converted
    for key, tensor in stored.items():
        if changed in checkpoint.targets(key):
            assert not written[key].equal(tensor)
        else:
            assert written[key].equal(tensor)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_and_loaded_by_plain_transformers(
    family: str, method: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 40)
    report = llmprune.prune(
        folders[family], out=tmp_path / "out", sparsity="2:4", method=method,
        calibration=str(text), samples=8, length=32,
    )  # fmt: skip
    assert report.pruned
    pruned = {record.name for record in report.pruned}
    # Some versions read this weight without calling its linear, so that its inputs cannot be seen.
    unseen = {record.name for record in report.linears if record.kept}
    assert all(family == "mamba" and name.endswith("dt_proj") for name in unseen)
    model = load(tmp_path / "out")
    checkpoint = Checkpoint(resolve(folders[family]), "cpu")
    changed = set()
    parameters = dict(model.named_parameters())
    for name in checkpoint.blocks:
        for linear in find_linears(model.get_submodule(name), name):
            if linear.name in unseen:
                continue
            assert linear.name in pruned
            changed.add(linear.parameter)
            weight = linear.view(parameters[linear.parameter])
            groups = weight.reshape(weight.shape[0], -1, 4)
            assert int((groups != 0).sum(-1).max()) <= 2, linear.name
            assert bool((weight != 0).any()), linear.name
    assert not any(part in name for name in changed for part in ("embed", "lm_head", "norm", "router"))
    stored, written = (Checkpoint(resolve(path), "cpu") for path in (folders[family], tmp_path / "out"))
    before, after = stored.read(stored.index), written.read(written.index)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert changed.intersection(stored.targets(key)) or torch.equal(tensor, after[key]), key
    tokens = torch.randint(3, VOCABULARY, (2, 16))
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=tokens).logits).all())
    assert llmprune.verify(tmp_path / "out").ok


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "gpt2"])
def test_files_keep_names_shapes_and_dtypes(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "model", dtype=torch.bfloat16)
    llmprune.prune(source, out=tmp_path / "out", sparsity="50%", method="magnitude")
    before, after = read_index(source), read_index(tmp_path / "out")
    assert {key: (info.shape, info.dtype) for key, info in before.items()} == {
        key: (info.shape, info.dtype) for key, info in after.items()
    }
