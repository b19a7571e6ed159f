"""Quantised sources: numbers and scales are restated here, and must come out as the weights that are pruned."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import llmprune
from llmprune import memory
from llmprune.errors import Failure, UserError
from llmprune.evaluate.compare import compare
from llmprune.model import quantised
from llmprune.model.index import read_index, read_tensors
from llmprune.model.source import present, resolve
from llmprune.report import page
from llmprune.report.card import make_card
from llmprune.sweep import sweep
from tests.families import make

LARGEST = 448.0  # of float8_e4m3fn


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog; 0123456789.\n\n" * 80)
    return str(path)


def everything(folder: Path) -> dict[str, Tensor]:
    return read_tensors(read_index(folder))


def mark(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def quantise_block_by_block(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers in 8 bits, a scale a block, and what both together stand for."""
    numbers = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    stands_for = torch.empty(weight.shape)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[place].abs().max() / LARGEST
            numbers[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            stands_for[place] = numbers[place].float() * scales[i, j]
    return numbers, scales, stands_for


def fp8(folder: Path, family: str = "llama", rows: int = 8, columns: int = 16) -> dict[str, Tensor]:
    """Save a tiny model whose projections are in FP8, in two files; returns what its weights stand for, in float32."""
    stored = load_file(make(family, folder, torch.bfloat16) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    written, plain = {}, {}
    for key, tensor in stored.items():
        plain[key] = tensor
        written[key] = tensor
        if key.endswith("_proj.weight"):
            written[key], written[f"{key}_scale_inv"], plain[key] = quantise_block_by_block(
                tensor.float(), rows, columns
            )
    # As in large models, a weight and its scale can lie in two files.
    halves = [{k: v for k, v in written.items() if k.endswith("_scale_inv") == late} for late in (False, True)]
    listing = {}
    for number, half in enumerate(halves, 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file(half, folder / name, metadata={"format": "pt"})
        listing.update(dict.fromkeys(half, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listing}))
    mark(folder, quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[rows, columns])
    return plain


@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (12, 20)], ids=["even", "blocks cut off at the edges"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_fp8_becomes_what_it_stands_for(
    family: str, rows: int, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "AT_ONCE", 600)  # one or two rows of blocks at a time
    plain = fp8(tmp_path / "model", family, rows, columns)
    source = resolve(tmp_path / "model")
    assert source.origin == "dequantised from fp8 to bfloat16"
    found = everything(source.folder)
    assert found.keys() == plain.keys()
    for key, tensor in plain.items():
        quantised_there = key.endswith("_proj.weight")  # others, some in float32, are kept as they are
        assert torch.equal(found[key], tensor.to(torch.bfloat16) if quantised_there else tensor), key
    config = json.loads((source.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    exact = everything(resolve(tmp_path / "model", "float32").folder)
    assert all(torch.equal(exact[key], plain[key]) for key in plain if key.endswith("_proj.weight"))


def test_fp8_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    fp8(tmp_path / "model", "qwen3_moe")
    settings = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=settings, dtype=torch.float32
    ).eval()
    ours = AutoModelForCausalLM.from_pretrained(
        resolve(tmp_path / "model", "float32").folder, dtype=torch.float32
    ).eval()
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)


def test_fp8_is_pruned_evaluated_and_converted_once(
    tmp_path: Path, cache: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fp8(tmp_path / "model")
    report = llmprune.prune(
        tmp_path / "model", out=tmp_path / "out", sparsity="2:4", method="magnitude",
        evaluate={"text": text, "length": 32, "max_perplexity": None},
    )  # fmt: skip
    assert report.origin == "dequantised from fp8 to bfloat16"
    assert json.loads((tmp_path / "out" / "llmprune.json").read_text())["origin"] == report.origin
    assert report.dense is not None
    assert report.dense.value == llmprune.perplexity(tmp_path / "model", text, length=32).value
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(model.config, "quantization_config")
    weight = model.model.layers[1].mlp.up_proj.weight
    kept = weight != 0
    assert kept.reshape(-1, 4).sum(1).le(2).all()
    assert torch.equal(weight[kept], plain["model.layers.1.mlp.up_proj.weight"].to(torch.bfloat16)[kept])
    assert llmprune.verify(tmp_path / "out").ok
    monkeypatch.setattr(quantised, "dequantise", lambda *_: pytest.fail("it was converted already"))
    assert resolve(tmp_path / "model").folder.parent == cache / "dequantised"


def test_files_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fp8(tmp_path / "model")
    monkeypatch.setattr(quantised, "SHARD", 10_000)
    folder = resolve(tmp_path / "model").folder
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 5
    for path in files:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 10_000
    assert everything(folder).keys() == plain.keys()


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((), torch.float32),
        ((1,), torch.float32),
        ((6, 1), torch.bfloat16),
        ((6,), torch.float32),
        ((3, 2), torch.uint8),
    ],
)
def test_scales_of_other_shapes_and_kinds(shape: tuple[int, ...], kind: torch.dtype, tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "model", num_hidden_layers=1)
    numbers = torch.randn(6, 8).to(torch.float8_e4m3fn)
    exponents = kind == torch.uint8
    scales = torch.randint(120, 130, shape, dtype=kind) if exponents else (torch.rand(shape) + 0.5).to(kind)
    save_file({"a.weight": numbers, "a.weight_scale_inv": scales}, folder / "model.safetensors")
    mark(folder, quant_method="mxfp8" if exponents else "fp8")
    found = everything(resolve(folder, "float32").folder)
    assert found.keys() == {"a.weight"}
    grid = scales.reshape(*shape, *[1] * (2 - len(shape)))
    for row in range(6):
        for column in range(8):
            scale = grid[row * grid.shape[0] // 6, column * grid.shape[1] // 8]
            scale = 2.0 ** (scale.float() - 127) if exponents else scale.float()
            assert found["a.weight"][row, column] == numbers[row, column].float() * scale


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "model", num_hidden_layers=1)
    numbers = torch.randn(3, 8, 12).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, 3) + 0.5
    save_file({"experts.up": numbers, "experts.up_scale_inv": scales}, folder / "model.safetensors")
    mark(folder, quant_method="fp8", weight_block_size=[4, 4])
    made = everything(resolve(folder, "float32").folder)["experts.up"]
    for expert, row, column in torch.cartesian_prod(torch.arange(3), torch.arange(8), torch.arange(12)).tolist():
        wanted = numbers[expert, row, column].float() * scales[expert, row // 4, column // 4]
        assert made[expert, row, column] == wanted


FOUR_BITS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def mxfp4(folder: Path) -> dict[str, Tensor]:
    """A tiny gpt-oss whose experts are four-bit numbers with an exponent for each 32; returns what they stand for."""
    stored = load_file(make("gpt_oss", folder, torch.bfloat16) / "model.safetensors")
    chance = torch.Generator().manual_seed(1)
    written, plain = {}, {}
    for key, tensor in stored.items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            plain[key] = written[key] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        codes = torch.randint(0, 16, (experts, outputs, inputs), generator=chance)
        powers = torch.randint(123, 127, (experts, outputs, inputs // 32), generator=chance)
        written[f"{key}_blocks"] = (
            (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8).reshape(experts, outputs, inputs // 32, 16)
        )
        written[f"{key}_scales"] = powers.to(torch.uint8)
        numbers = torch.tensor([FOUR_BITS[code] for code in codes.flatten().tolist()]).reshape(codes.shape)
        plain[key] = (numbers * 2.0 ** (powers - 127).repeat_interleave(32, -1)).transpose(1, 2)
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    mark(folder, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "model.layers.*.mlp.router"])
    return plain


def test_mxfp4_becomes_what_it_stands_for(tmp_path: Path, text: str) -> None:
    plain = mxfp4(tmp_path / "model")
    assert sum("experts.down_proj" in key and "bias" not in key for key in plain) == 3
    found = everything(resolve(tmp_path / "model").folder)
    assert found.keys() == plain.keys()
    for key, tensor in plain.items():
        assert torch.equal(found[key], tensor.to(torch.bfloat16)), key
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    ).eval()
    ours = AutoModelForCausalLM.from_pretrained(resolve(tmp_path / "model").folder).eval()
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    report = llmprune.prune(tmp_path / "model", out=tmp_path / "out", sparsity="2:4", method="magnitude")
    assert any(".experts." in record.name for record in report.pruned)
    assert llmprune.perplexity(tmp_path / "out", text, length=32).value > 1


class TestRefused:
    @pytest.mark.parametrize("method", ["gptq", "awq", "aqlm", "hqq", "fbgemm_fp8", "somethingnew"])
    def test_what_cannot_be_undone(self, method: str, tmp_path: Path) -> None:
        folder = make("llama", tmp_path / "model")
        mark(folder, quant_method=method, bits=4)
        with pytest.raises(UserError, match=f"is quantised with {method}, which cannot be undone here"):
            llmprune.prune(folder, out=tmp_path / "out", method="magnitude")
        assert not (tmp_path / "out").exists()

    def test_the_original_is_named_where_the_config_tells(self, tmp_path: Path) -> None:
        folder = make("llama", tmp_path / "model")
        mark(folder, quant_method="gptq", bits=4)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "owner/plain-7b"}))
        with pytest.raises(UserError, match=r"that it was made from \(owner/plain-7b\)"):
            resolve(folder)

    @pytest.mark.parametrize(
        ("module", "settings"),
        [
            ("bitsandbytes", {"load_in_4bit": True}),
            ("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
            ("compressed_tensors", {"quant_method": "compressed-tensors"}),
        ],
    )
    def test_a_missing_package(
        self, module: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = make("llama", tmp_path / "model")
        mark(folder, **settings)
        there = quantised.importlib.util.find_spec
        monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None if name == module else there(name))
        with pytest.raises(UserError, match=r"pip install 'llmprune\[quantised\]'"):
            resolve(folder)

    def test_a_scale_that_is_missing_or_does_not_fit(self, tmp_path: Path, cache: Path) -> None:
        folder = make("llama", tmp_path / "model")
        numbers = torch.randn(8, 8).to(torch.float8_e4m3fn)
        mark(folder, quant_method="fp8", weight_block_size=[4, 4])
        save_file({"a.weight": numbers}, folder / "model.safetensors")
        with pytest.raises(Failure, match=r"a\.weight_scale_inv is missing"):
            resolve(folder)
        save_file({"a.weight": numbers, "a.weight_scale_inv": torch.ones(3, 3)}, folder / "model.safetensors")
        with pytest.raises(Failure, match=r"a\.weight cannot be dequantised: \(3, 3\) scales do not fit"):
            resolve(folder)
        save_file({"a.weight": torch.ones(8, 4, dtype=torch.int8)}, folder / "model.safetensors")
        with pytest.raises(UserError, match=r"a\.weight is packed into int8"):
            resolve(folder)
        assert not [path for path in (cache / "dequantised").iterdir() if path.is_dir()]

    def test_no_space_for_the_plain_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fp8(tmp_path / "model")
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(
            UserError, match=r"no space left to convert .* another folder can be chosen with LLMPRUNE_CACHE"
        ):
            resolve(tmp_path / "model")


def test_inspect_takes_a_quantised_model_as_it_is(tmp_path: Path, cache: Path) -> None:
    fp8(tmp_path / "model")
    found = {matrix.name: matrix for matrix in llmprune.inspect(tmp_path / "model").matrices}
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == "float8_e4m3fn"
    assert not cache.exists()


def test_the_dense_model_of_a_run_is_found_once_it_is_plain(tmp_path: Path, cache: Path) -> None:
    fp8(tmp_path / "model")
    name = str(tmp_path / "model")
    assert present(name, None) is None
    assert not cache.exists()
    made = resolve(name)
    assert present(name, None) == made
    assert present(name, None, "float32") is None
    save_file({}, tmp_path / "model" / "model.safetensors")
    assert present(name, None) is None


def test_quantised_models_are_compared_and_swept(tmp_path: Path, text: str) -> None:
    fp8(tmp_path / "model")
    name = str(tmp_path / "model")
    report = llmprune.prune(name, out=tmp_path / "out", method="magnitude")
    found = compare(name, [tmp_path / "out"], text=text, length=32)
    assert [model.name for model in found.models] == ["model", "out"]
    made = sweep(name, out=tmp_path / "swept", sparsity=["50%"], method=["magnitude"], evaluate=text)
    assert [point.name for point in made.points] == ["magnitude-50"]
    drawn = page.draw(tmp_path / "out")
    assert drawn.source == resolve(name).folder
    card = str(make_card(report.to_dict(), [], "owner/sparse", {}))
    assert "The dense weights were dequantised from fp8 to bfloat16 before." in card


def compressed(folder: Path) -> dict[str, Tensor]:
    """A tiny model with FP8 weights that have a scale for each row, as compressed-tensors writes it."""
    stored = load_file(make("llama", folder, torch.bfloat16) / "model.safetensors")
    plain = dict(stored)
    for key, tensor in list(stored.items()):
        if key.endswith("_proj.weight"):
            numbers, scales, plain[key] = quantise_block_by_block(tensor.float(), 1, tensor.shape[1])
            stored[key], stored[f"{key}_scale"] = numbers, scales
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    bits = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**bits, "strategy": "token", "dynamic": True},
    }
    mark(
        folder, quant_method="compressed-tensors", format="float-quantized", quantization_status="compressed",
        config_groups={"group_0": group}, ignore=["lm_head"],
    )  # fmt: skip
    return plain


class TestByTransformers:
    """What takes a package of its own."""

    def test_compressed_tensors(self, tmp_path: Path) -> None:
        pytest.importorskip("compressed_tensors")
        plain = compressed(tmp_path / "model")
        source = resolve(tmp_path / "model", "float32")
        assert source.origin == "dequantised from compressed-tensors to float32"
        found = everything(source.folder)
        assert found.keys() == plain.keys()
        for key, tensor in plain.items():
            assert torch.allclose(found[key], tensor.float(), rtol=1e-6, atol=0), key
        llmprune.prune(tmp_path / "model", out=tmp_path / "out", sparsity="2:4", method="magnitude")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.dtype == torch.bfloat16
        assert llmprune.verify(tmp_path / "out").ok

    @pytest.mark.parametrize("bits", [4, 8])
    def test_bitsandbytes(self, bits: int, tmp_path: Path) -> None:
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        settings = (
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            if bits == 4
            else BitsAndBytesConfig(load_in_8bit=True)
        )
        folder = make("llama", tmp_path / "model", torch.bfloat16, hidden_size=64, head_dim=16)
        loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")
        weight = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].float()
        loaded.save_pretrained(tmp_path / "small")
        shutil.copyfile(folder / "tokenizer.json", tmp_path / "small" / "tokenizer.json")
        shutil.copyfile(folder / "tokenizer_config.json", tmp_path / "small" / "tokenizer_config.json")
        source = resolve(tmp_path / "small")
        found = everything(source.folder)["model.layers.1.mlp.up_proj.weight"]
        assert found.dtype == torch.bfloat16
        apart = float((found.float() - weight).norm() / weight.norm())
        assert 0 < apart < (0.15 if bits == 4 else 0.02)
        llmprune.prune(tmp_path / "small", out=tmp_path / "out", sparsity="2:4", method="magnitude")
        assert llmprune.verify(tmp_path / "out").ok

    def test_the_whole_model_must_fit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("compressed_tensors")
        compressed(tmp_path / "model")
        monkeypatch.setattr(memory, "available", lambda: 100_000)
        with pytest.raises(UserError, match="the whole model must be in memory for a moment: that takes"):
            resolve(tmp_path / "model")
        monkeypatch.setattr(memory, "available", lambda: 2**40)
        with pytest.raises(UserError, match=r"are free, and --max-memory allows 97\.7KiB"):
            resolve(tmp_path / "model", most=100_000)


def test_the_plan_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from llmprune.cli import main

    fp8(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["llmprune", "plan", str(tmp_path / "model"), "--method", "magnitude"])
    assert main() == 0
    assert "dequantised from fp8 to bfloat16, kept in" in " ".join(capsys.readouterr().out.split())
