"""The main job: what is pruned, how well, what is written, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.errors import Failure, UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import resolve
from llmprune.model.writer import JOURNAL
from llmprune.pipeline import plan
from tests.families import make, tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [
        {"text": f"Document {number}: " + "to be or not to be, that is the question. " * 4} for number in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def options(text: str, **changes: Any) -> dict[str, Any]:
    return {"calibration": text, "samples": 16, "length": 32, **changes}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def inputs_of(model: torch.nn.Module, name: str, tokens: torch.Tensor) -> torch.Tensor:
    caught: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    return caught[0].flatten(0, -2)


STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The linears of a Llama's block, in the order in which they are pruned."""


def calibrated(text: str, true_sequential: bool) -> dict[str, Any]:
    return {"calibration": {"source": text, "samples": 16, "length": 32, "true_sequential": true_sequential}}


@pytest.mark.parametrize("true_sequential", [True, False])
def test_all_that_comes_before_a_linear_is_pruned_and_errors_are_true(
    true_sequential: bool, model: Path, text: str, tmp_path: Path
) -> None:
    """The report's relative error is recomputed from scratch with plain transformers."""
    chosen = calibrated(text, true_sequential)
    report = llmprune.prune(model, out=tmp_path / "out", sparsity="50%", method="sparsegpt", **chosen)
    checkpoint = Checkpoint(resolve(model), "cpu")
    from llmprune import data

    tokens = data.draw(data.documents(text), checkpoint.tokenizer, 16, 32, 0, text)
    assert report.calibration is not None
    assert report.calibration["tokens_sha256"] == tokens.sha256
    dense, pruned = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (model, tmp_path / "out"))
    for number in range(3):
        for place, name in enumerate(("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")):
            full = f"model.layers.{number}.{name}"
            mixed = AutoModelForCausalLM.from_pretrained(model).eval()
            for before in range(number):
                mixed.model.layers[before].load_state_dict(pruned.model.layers[before].state_dict())
            for stage in STAGES[:place] if true_sequential else ():
                for linear in stage:
                    path = f"model.layers.{number}.{linear}"
                    mixed.get_submodule(path).load_state_dict(pruned.get_submodule(path).state_dict())
            x = inputs_of(mixed, full, tokens.ids)
            w, v = dense.get_submodule(full).weight, pruned.get_submodule(full).weight
            expected = (((v - w) @ x.T).square().sum() / (w @ x.T).square().sum()).item()
            record = next(record for record in report.linears if record.name == full)
            assert record.relative_error == pytest.approx(expected, rel=1e-3)
            assert record.tokens == 16 * 32


@pytest.mark.parametrize("true_sequential", [True, False])
def test_wanda_on_a_whole_model_equals_the_published_rule(
    true_sequential: bool, model: Path, text: str, tmp_path: Path
) -> None:
    chosen = calibrated(text, true_sequential)
    llmprune.prune(model, out=tmp_path / "out", sparsity="50%", method="wanda", **chosen)
    from llmprune import data

    tokens = data.draw(data.documents(text), Checkpoint(resolve(model), "cpu").tokenizer, 16, 32, 0, text)
    restated = AutoModelForCausalLM.from_pretrained(model).eval()
    for layer in range(3):
        block = restated.model.layers[layer]
        for names in STAGES if true_sequential else [[name for stage in STAGES for name in stage]]:
            inputs = {name: inputs_of(restated, f"model.layers.{layer}.{name}", tokens.ids) for name in names}
            for name in names:
                weight = block.get_submodule(name).weight.data
                score = weight.abs() * inputs[name].square().sum(0).sqrt()
                lowest = score.sort(dim=1, stable=True).indices[:, : weight.shape[1] // 2]
                weight.scatter_(1, lowest, 0.0)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same = total = 0
    for name, value in restated.named_parameters():
        if "proj" in name:
            same += int(((value != 0) == (written.get_parameter(name) != 0)).sum())
            total += value.numel()
    assert same / total >= 0.999


def test_the_same_recipe_and_seed_give_the_same_bytes(model: Path, text: str, tmp_path: Path) -> None:
    first = llmprune.prune(model, out=tmp_path / "a", sparsity="2:4", **options(text))
    second = llmprune.prune(model, out=tmp_path / "b", sparsity="2:4", **options(text))
    other = llmprune.prune(model, out=tmp_path / "c", sparsity="2:4", **options(text, seed=1))
    assert first.shards == second.shards != other.shards


def test_out_holds_everything_and_nothing_else(text: str, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "model", dtype=torch.bfloat16)
    words = copy.deepcopy(tokenizer())
    words.chat_template = "{{ messages }}"
    words.save_pretrained(source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (source / "README.md").write_text("the card of the dense model")
    (source / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    report = llmprune.prune(source, out=tmp_path / "out", sparsity="4:8", method="wanda", **options(text))
    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.temperature == 0.5
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(source).chat_template
    assert "tool_use" in AutoTokenizer.from_pretrained(out).chat_template
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    written = {path.name for path in out.iterdir()}
    assert not written & {"README.md", JOURNAL, "model.safetensors"}
    assert len(list(out.glob("model-*-of-*.safetensors"))) == 4
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(source).values())
    told = json.loads((out / "llmprune.json").read_text())
    assert told["recipe"]["sparsity"] == "4:8"
    assert told["shards"] == report.shards
    assert told["versions"]["transformers"]
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert all(path.stat().st_mode & 0o044 for path in out.iterdir())


def test_tensors_that_no_module_claims_are_copied(text: str, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "model")
    stored = load_file(source / "model.safetensors")
    stored["model.layers.0.self_attn.rotary_emb.old_buffer"] = torch.arange(7)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    llmprune.prune(source, out=tmp_path / "out", sparsity="2:4", method="magnitude")
    assert torch.equal(weights(tmp_path / "out")["model.layers.0.self_attn.rotary_emb.old_buffer"], torch.arange(7))


def test_a_narrower_run_dtype_does_not_touch_the_stored_weights(model: Path, text: str, tmp_path: Path) -> None:
    llmprune.prune(model, out=tmp_path / "out", sparsity="50%", method="wanda", dtype="bfloat16", **options(text))
    before, after = weights(model), weights(tmp_path / "out")
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype == torch.float32
        kept = after[key] != 0
        assert torch.equal(after[key][kept], tensor[kept])


def test_large_blocks_take_several_shards(model: Path, tmp_path: Path) -> None:
    llmprune.prune(model, out=tmp_path / "out", sparsity="2:4", method="magnitude", shard_size="20kB")
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 6
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].mlp.up_proj.weight.eq(0).float().mean()
        == 0.5
    )


def test_rules_and_ignore_decide_first_match_wins(model: Path, text: str, tmp_path: Path) -> None:
    recipe = {
        "sparsity": "2:4",
        "method": "wanda",
        "ignore": ["re:.*layers\\.0\\.mlp.*"],
        "rules": [
            {"match": "*.down_proj", "sparsity": "4:8", "method": "magnitude"},
            {"match": "*.q_proj", "skip": True},
            {"match": "*_proj", "sparsity": "75%", "method": {"name": "sparsegpt", "damping": 0.1}},
            {"match": "*.down_proj", "skip": True},
        ],
    }
    report = llmprune.prune(model, out=tmp_path / "out", recipe=recipe, **options(text))
    by_name = {record.name: record for record in report.linears}
    assert by_name["model.layers.0.mlp.up_proj"].kept == "ignored"
    assert by_name["model.layers.1.self_attn.q_proj"].kept == "skipped by rule 2"
    down, keys = by_name["model.layers.1.mlp.down_proj"], by_name["model.layers.1.self_attn.k_proj"]
    assert (down.method, down.pattern) == ("magnitude", "4:8")
    assert (keys.method, keys.pattern) == ("sparsegpt", "75%")
    assert keys.sparsity == pytest.approx(0.75, abs=0.01)
    stored = weights(tmp_path / "out")
    assert bool((stored["model.layers.0.mlp.up_proj.weight"] != 0).all())


def test_experts_without_tokens_are_pruned_by_magnitude_and_said(text: str, tmp_path: Path) -> None:
    source = make("mixtral", tmp_path / "model", num_experts_per_tok=1)
    stored = load_file(source / "model.safetensors")
    for key in stored:
        if key.endswith("gate.weight"):
            # One of the first two experts always has the highest score.
            direction = torch.randn_like(stored[key][0])
            stored[key] = torch.stack([direction, -direction, 0 * direction, 0 * direction])
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    report = llmprune.prune(source, out=tmp_path / "out", sparsity="2:4", **options(text))
    experts = [record for record in report.pruned if ".experts." in record.name]
    reached = [record for record in experts if record.tokens]
    unreached = [record for record in experts if not record.tokens]
    assert reached
    assert unreached
    assert all("no calibration token reached it" in (record.note or "") for record in unreached)
    assert llmprune.verify(tmp_path / "out").ok


def test_gguf_becomes_a_plain_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    words = [*"abcdefghijklmnopqrstuvwxyz0123456789"] + ["ab"] + [f"<{number}>" for number in range(27)]
    writer.add_token_list(words)
    writer.add_token_types([1] * 64)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(62)
    writer.add_eos_token_id(63)
    make_tensor = torch.Generator().manual_seed(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, torch.randn(shape, generator=make_tensor).numpy() / shape[-1] ** 0.5)

    add("token_embd.weight", 64, 32)
    add("output_norm.weight", 32)
    add("output.weight", 64, 32)
    for block in range(2):
        for name, rows, columns in (
            ("attn_q", 32, 32), ("attn_k", 16, 32), ("attn_v", 16, 32), ("attn_output", 32, 32),
            ("ffn_gate", 64, 32), ("ffn_up", 64, 32), ("ffn_down", 32, 64),
        ):  # fmt: skip
            add(f"blk.{block}.{name}.weight", rows, columns)
        add(f"blk.{block}.attn_norm.weight", 32)
        add(f"blk.{block}.ffn_norm.weight", 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = llmprune.prune(path, out=tmp_path / "out", sparsity="2:4", method="magnitude")
    assert report.revision
    assert len(report.pruned) == 14
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")


def test_gguf_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"pip install 'llmprune\[gguf\]'"):
        llmprune.prune(tmp_path / "model.gguf", out=tmp_path / "out")


def test_pytorch_files_are_converted_without_running_code(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    source = Path(shutil.copytree(model, tmp_path / "old"))
    stored = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"]  # tied: the same memory under two names
    torch.save(stored, source / "pytorch_model.bin")
    llmprune.prune(source, out=tmp_path / "out", sparsity="2:4", method="magnitude")
    llmprune.prune(model, out=tmp_path / "other", sparsity="2:4", method="magnitude")
    first, second = weights(tmp_path / "out"), weights(tmp_path / "other")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    torch.save({"a": print}, source / "pytorch_model.bin")
    with pytest.raises(Failure, match="code in it is never run"):
        llmprune.prune(source, out=tmp_path / "third", method="magnitude")


def test_the_file_that_transformers_would_load_is_the_one_that_is_pruned(model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "model"))
    stored = load_file(source / "model.safetensors")
    save_file({key: 3 * tensor for key, tensor in stored.items()}, source / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(stored, "model-00001-of-00001.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"lora": torch.ones(2, 2)}, source / "adapter_model.safetensors")
    llmprune.prune(source, out=tmp_path / "out", sparsity="2:4", method="magnitude")
    written = weights(tmp_path / "out")
    assert "lora" not in written
    for key, tensor in stored.items():
        kept = written[key] != 0
        assert torch.equal(written[key][kept], tensor[kept])
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="no index that ties them together"):
        llmprune.prune(source, out=tmp_path / "second", method="magnitude")


def test_no_negative_zeros_are_written(model: Path, text: str, tmp_path: Path) -> None:
    llmprune.prune(model, out=tmp_path / "out", sparsity="50%", method="wanda", **options(text))
    for tensor in weights(tmp_path / "out").values():
        assert not bool(torch.signbit(tensor[tensor == 0]).any())


class TestPlan:
    def test_counts_what_is_covered_and_what_is_not(self, model: Path) -> None:
        _, made = plan(model, sparsity="2:4", samples=2, length=16, ignore=["*.o_proj"])
        total = sum(tensor.numel() for tensor in weights(model).values())
        assert made.weights == total
        assert made.covered + sum(made.uncovered.values()) == pytest.approx(1.0)
        assert made.uncovered["ignored"] == pytest.approx(3 * 32 * 32 / total)

    def test_a_pattern_that_does_not_divide_names_the_linear_and_the_rule(self, tmp_path: Path) -> None:
        odd = make("llama", tmp_path / "odd", intermediate_size=18)
        with pytest.raises(
            UserError, match=r"2:4 needs in_features divisible by 4; model.layers.0.mlp.down_proj has 18"
        ):
            plan(odd, sparsity="2:4", samples=1, length=8)
        with pytest.raises(UserError, match=r"3:9 needs .* \(rule 1\)"):
            plan(odd, samples=1, length=8, recipe={"rules": [{"match": "*.q_proj", "sparsity": "3:9"}]})

    @pytest.mark.parametrize(
        ("given", "answer"),
        [
            ({"method": "sparsegtp"}, "did you mean 'sparsegpt'"),
            ({"sparsty": "2:4"}, "did you mean 'sparsity'"),
            ({"method.dampening": 0.1}, "did you mean 'damping'"),
            ({"ignore": ["*.q_porj"]}, r"did you mean '\*.q_proj'"),
            ({"recipe": {"rules": [{"match": "*.gate", "sparsity": "2:4"}]}}, "rule 1"),
            ({"length": 4096}, "longer than"),
            ({"device": "cuda:77"}, "cannot be used here"),
            ({"dtype": "int8"}, "dtype 'int8'"),
            ({"ignore": ["*"]}, "nothing is left to prune"),
            ({"sparsity": "50"}, "did you mean 50%"),
        ],
    )
    def test_mistakes_are_answered(self, model: Path, given: dict[str, Any], answer: str) -> None:
        with pytest.raises(UserError, match=answer):
            plan(model, **{"samples": 1, "length": 8, **given})

    def test_a_model_that_is_no_plain_chain_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"encoder-decoder|no causal LM"):
            plan(encoder_decoder(tmp_path / "t5"))
        with pytest.raises(UserError, match=r"not a plain chain of blocks|cannot be walked"):
            plan(gemma3n(tmp_path / "gemma3n"))
        with pytest.raises(UserError, match="its blocks share weights"):
            plan(zamba2(tmp_path / "zamba2"))


def encoder_decoder(folder: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def gemma3n(folder: Path) -> Path:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "gemma3n_text", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_kv_shared_layers=2, laurel_rank=4, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64, activation_sparsity_pattern=[0.0] * 4, pad_token_id=0, altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def zamba2(folder: Path) -> Path:
    """Its attention blocks share one set of weights."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "zamba2", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, mamba_d_state=8, n_mamba_heads=8, mamba_ngroups=1, num_mem_blocks=1, adapter_rank=8,
        layers_block_type=["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"], pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


class TestFailures:
    def copy(self, model: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(model, tmp_path / "model"))

    def test_a_missing_shard(self, model: Path, tmp_path: Path) -> None:
        llmprune.prune(model, out=tmp_path / "model", sparsity="2:4", method="magnitude")
        next((tmp_path / "model").glob("model-00002-*")).unlink()
        with pytest.raises(Failure, match=r"shard model-00002-of-00004\.safetensors is missing"):
            llmprune.prune(tmp_path / "model", out=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_shard_cut_short(self, model: Path, tmp_path: Path) -> None:
        source = self.copy(model, tmp_path)
        shard = source / "model.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1000])
        with pytest.raises(Failure, match="broken or cut short"):
            llmprune.prune(source, out=tmp_path / "out")

    def test_nan_in_a_weight(self, model: Path, tmp_path: Path) -> None:
        source = self.copy(model, tmp_path)
        stored = load_file(source / "model.safetensors")
        stored["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(Failure, match=r"model.layers.1.mlp.up_proj.weight .* 1 NaN"):
            llmprune.prune(source, out=tmp_path / "out", method="magnitude")

    def test_nan_outside_the_blocks(self, model: Path, tmp_path: Path) -> None:
        source = self.copy(model, tmp_path)
        stored = load_file(source / "model.safetensors")
        stored["model.norm.weight"][0] = float("inf")
        save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(Failure, match=r"model.norm.weight .* 1 NaN or infinite"):
            llmprune.prune(source, out=tmp_path / "out", method="magnitude")

    def test_a_tokenizer_of_another_model(self, text: str, tmp_path: Path) -> None:
        source = make("llama", tmp_path / "model", vocab_size=50)
        with pytest.raises(UserError, match="it is not this model's tokenizer"):
            llmprune.prune(source, out=tmp_path / "out", **options(text))

    def test_a_broken_index(self, model: Path, tmp_path: Path) -> None:
        source = self.copy(model, tmp_path)
        (source / "model.safetensors").unlink()
        for content in ("[]", '{"weight_map": []}', '{"a": 3}', "{"):
            (source / "model.safetensors.index.json").write_text(content)
            with pytest.raises(Failure, match=r"index\.json is broken"):
                llmprune.prune(source, out=tmp_path / "out", method="magnitude")

    def test_activations_that_overflow(self, model: Path, text: str, tmp_path: Path) -> None:
        source = self.copy(model, tmp_path)
        stored = load_file(source / "model.safetensors")
        stored["model.layers.0.mlp.up_proj.weight"] *= 1e30
        stored["model.layers.0.mlp.down_proj.weight"] *= 1e30
        save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(Failure, match="NaN or infinite"):
            llmprune.prune(source, out=tmp_path / "out", method="wanda", **options(text))

    def test_a_tensor_of_another_shape(self, model: Path, tmp_path: Path) -> None:
        source = self.copy(model, tmp_path)
        stored = load_file(source / "model.safetensors")
        stored["model.layers.0.mlp.up_proj.weight"] = torch.randn(60, 32)
        save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(Failure, match=r"up_proj.weight has the shape \(60, 32\)"):
            llmprune.prune(source, out=tmp_path / "out", method="magnitude")

    def test_a_tensor_that_is_not_there(self, model: Path, tmp_path: Path) -> None:
        source = self.copy(model, tmp_path)
        stored = load_file(source / "model.safetensors")
        del stored["model.layers.2.mlp.up_proj.weight"]
        save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(Failure, match=r"lacks tensors .* model.layers.2.mlp.up_proj.weight"):
            llmprune.prune(source, out=tmp_path / "out", method="magnitude")

    @pytest.mark.parametrize(
        ("name", "answer"),
        [("./nowhere", "no such folder"), ("missing.gguf", "no model at"), ("a b c", "no model at")],
    )
    def test_a_wrong_name(self, name: str, answer: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=answer):
            llmprune.prune(name, out=tmp_path / "out")

    def test_a_hub_that_cannot_be_reached(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(Failure, match="the Hub cannot be reached"):
            llmprune.prune("nobody/nothing-of-this-name", out=tmp_path / "out")

    def test_no_space_left_before_work(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(UserError, match="no space left"):
            llmprune.prune(model, out=tmp_path / "out", method="magnitude")
        assert not (tmp_path / "out").exists()

    def test_too_little_text_leaves_out_untouched(self, model: Path, text: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"has [\d,]+ tokens, but 4000 samples of 32 tokens need 128,000"):
            llmprune.prune(model, out=tmp_path / "out", **options(text, samples=4000))
        assert not (tmp_path / "out").exists()


class TestOut:
    def test_another_run_is_refused_and_restart_replaces_it(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        llmprune.prune(model, out=out, sparsity="2:4", method="magnitude")
        (out / "mine.txt").write_text("not llmprune's")
        with pytest.raises(UserError, match="a finished run"):
            llmprune.prune(model, out=out, sparsity="4:8", method="magnitude")
        other = Path(shutil.copytree(model, model.parent / "other"))
        (model.parent / "other" / "tokenizer_config.json").unlink()
        report = llmprune.prune(other, out=out, sparsity="4:8", method="magnitude", restart=True)
        assert report.pruned[0].pattern == "4:8"
        assert not (out / "tokenizer_config.json").exists()  # the first model's, not the second's
        assert (out / "mine.txt").exists()

    def test_foreign_files_are_never_overwritten(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
        with pytest.raises(UserError, match="not empty"):
            llmprune.prune(model, out=tmp_path / "out", method="magnitude", restart=True)
        with pytest.raises(UserError, match="is the model itself"):
            llmprune.prune(model, out=model, method="magnitude")

    def test_a_run_that_stops_midway_leaves_whole_shards_and_a_journal(
        self, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import llmprune.model.writer as writer

        calls = []

        def full(tensors: Any, path: Path, metadata: Any) -> None:
            calls.append(path)
            if len(calls) == 3:
                path.write_bytes(b"half of it")
                raise OSError(28, "No space left on device")
            save_file(tensors, path, metadata=metadata)

        monkeypatch.setattr(writer, "save_file", full)
        out = tmp_path / "out"
        with pytest.raises(Failure, match="no space left on the disk"):
            llmprune.prune(model, out=out, sparsity="2:4", **options(text))
        assert sorted(path.name for path in out.iterdir()) == [
            JOURNAL, "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors",
        ]  # fmt: skip
        lines = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]
        assert lines[0]["format"] == 1
        assert "config.json" in lines[0]["side_files"]
        assert set(lines[0]["fingerprint"]) == {
            "recipe", "revision", "files", "device", "tokens", "evaluation text", "versions", "allocation", "products",
        }  # fmt: skip
        assert [line["block"] for line in lines[1:]] == [0, 1]
        assert len(lines[1]["record"]["linears"]) == 7
        assert set(lines[1]["record"]["seconds"]) == {"read", "dense", "capture", "solve", "propagate", "write"}


class TestVerifyAndInspect:
    def test_a_mask_that_was_broken_is_found(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        llmprune.prune(model, out=out, sparsity="2:4", method="magnitude")
        path = out / "model-00002-of-00004.safetensors"
        stored = load_file(path)
        stored["model.layers.1.mlp.up_proj.weight"] *= 2
        save_file(stored, path, metadata={"format": "pt"})
        verdict = llmprune.verify(out)
        assert verdict.ok
        assert verdict.changed == [path.name]
        weight = stored["model.layers.1.mlp.up_proj.weight"]
        weight[0, :4] = torch.tensor([1.0, 2.0, 3.0, 0.0])
        save_file(stored, path, metadata={"format": "pt"})
        verdict = llmprune.verify(out)
        assert not verdict.ok
        assert "model.layers.1.mlp.up_proj does not hold 2:4" in verdict.problems[0]
        weight[0, :4] = torch.tensor([1.0, 0.0, 0.0, 0.0])
        save_file(stored, path, metadata={"format": "pt"})
        assert "another mask" in llmprune.verify(out).problems[0]

    def test_inspect_tells_sparsity_and_patterns_of_anything(self, model: Path, tmp_path: Path) -> None:
        llmprune.prune(
            model, out=tmp_path / "out", sparsity="2:4", method="magnitude", ignore=["*.o_proj"],
            recipe={"rules": [{"match": "*.down_proj", "sparsity": "1:4"}, {"match": "*.q_proj", "sparsity": "60%"}]},
        )  # fmt: skip
        found = {matrix.name: matrix for matrix in llmprune.inspect(tmp_path / "out").matrices}
        assert "2:4" in found["model.layers.0.mlp.up_proj.weight"].patterns
        assert "1:4" not in found["model.layers.0.mlp.up_proj.weight"].patterns
        assert found["model.layers.0.mlp.down_proj.weight"].patterns[0] == "1:4"
        assert found["model.layers.0.self_attn.q_proj.weight"].sparsity == pytest.approx(0.6, abs=0.01)
        assert found["model.layers.0.self_attn.q_proj.weight"].patterns == ()
        assert found["model.layers.0.self_attn.o_proj.weight"].sparsity == 0

    def test_inspect_reads_pickled_weights_but_runs_no_code(self, tmp_path: Path) -> None:
        weight = torch.randn(8, 8)
        weight[:, ::2] = 0
        torch.save({"a.weight": weight}, tmp_path / "pytorch_model.bin")
        assert "2:4" in llmprune.inspect(tmp_path / "pytorch_model.bin").matrices[0].patterns
        torch.save({"a": print}, tmp_path / "evil.bin")
        with pytest.raises(Failure, match="code in it is never run"):
            llmprune.inspect(tmp_path / "evil.bin")

    def test_conv1d_patterns_hold_along_its_inputs(self, text: str, tmp_path: Path) -> None:
        source = make("gpt2", tmp_path / "model")
        llmprune.prune(source, out=tmp_path / "out", sparsity="2:4", method="wanda", **options(text))
        found = {matrix.name: matrix for matrix in llmprune.inspect(tmp_path / "out").matrices}
        matrix = next(value for name, value in found.items() if name.endswith("h.0.mlp.c_fc.weight"))
        assert "2:4" in matrix.transposed_patterns


PEAK = """
import sys, llmprune
from llmprune import memory
model, out, text = sys.argv[1:]
before = memory.peak()
llmprune.prune(model, out=out, sparsity="2:4", method="sparsegpt", calibration=text, samples=8, length=64)
print(max(before, memory.peak()))
"""


def test_peak_memory_does_not_grow_with_the_number_of_blocks(text: str, tmp_path: Path) -> None:
    """4 and 32 blocks of 13 MB each: held at once, the larger model would take 370 MB more."""
    peaks = []
    for count in (4, 32):
        source = make(
            "llama", tmp_path / f"model{count}", num_hidden_layers=count, hidden_size=512, intermediate_size=1536,
            num_attention_heads=8, head_dim=64,
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(source), str(tmp_path / f"out{count}"), text],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout.split()[-1]))
        shutil.rmtree(source)
    assert peaks[1] <= 1.1 * peaks[0]
