"""Run a pruned folder in programs other than transformers, and compare their numbers with transformers' own.

    python tests/bench/clients.py FOLDER --text wiki.test.raw

Each program that is installed beside torch and transformers (see CLIENTS) loads the folder, or what its own converter
makes of it, in a process of its own; computes the logits of some windows of the text, and goes on with its beginning
greedily. All compute in float32. The table tells the largest difference of a logit, the perplexity of both, how many of
the greedy tokens are the same, and the tokens a second where a program keeps what it has seen. `--json` gives the same
as JSON. llmprune itself is not needed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

WINDOWS, LENGTH, PROMPT = 4, 128, 32
SOURCES = "LLAMA_CPP"
"""The variable of the environment that says where llama.cpp's sources lie, with its converter."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Answer:
    """What a program says.

    Attributes:
        logits: (windows, length, vocabulary).
        tokens: those that it goes on with.
        speed: of these, a second; None where it computes everything anew for each.
    """

    logits: numpy.ndarray
    tokens: list[int]
    speed: float | None = None


@dataclass
class Row:
    """A line of the table."""

    client: str
    versions: str
    how: str
    ok: bool = False
    difference: float | None = None
    perplexity: float | None = None
    reference: float | None = None
    same: int | None = None
    of: int | None = None
    speed: float | None = None
    failure: str | None = None


def stepwise(logits: Callable[[numpy.ndarray], numpy.ndarray], prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of a program that keeps nothing."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits(numpy.array([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def timed(make: Callable[[], list[int]]) -> tuple[list[int], float]:
    began = time.monotonic()
    tokens = [int(token) for token in make()]
    return tokens, len(tokens) / (time.monotonic() - began)


def with_torch(folder: Path, windows: numpy.ndarray, prompt: list[int], count: int) -> Answer:
    """Transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor(row[None])).logits for row in windows]).numpy()
        ids = torch.tensor([prompt])
        options: dict[str, Any] = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count}
        tokens, speed = timed(lambda: model.generate(ids, **options)[0, len(prompt) :].tolist())
    return Answer(logits, tokens, speed)


ANY_SHAPE = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}


class Bare(torch.nn.Module):
    """Token ids in, logits out."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.config.use_cache = False

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def openvino_direct(folder: Path, work: Path, windows: numpy.ndarray, prompt: list[int], count: int) -> Answer:
    """torch.export.export, openvino.convert_model."""
    import openvino

    with torch.no_grad():
        program = torch.export.export(Bare(folder), (torch.tensor(windows[:2, :48]),), dynamic_shapes=ANY_SHAPE)
    converted = openvino.convert_model(program)
    openvino.save_model(converted, work / "model.xml", compress_to_fp16=False)
    compiled = openvino.Core().compile_model(work / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def logits(ids: numpy.ndarray) -> numpy.ndarray:
        return numpy.array(compiled(ids)[0])

    return Answer(numpy.concatenate([logits(row[None]) for row in windows]), stepwise(logits, prompt, count))


def export_for_openvino(folder: Path, work: Path) -> Any:
    from optimum.intel import OVModelForCausalLM

    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    return OVModelForCausalLM.from_pretrained(folder, export=True, load_in_8bit=False, ov_config=settings)


def optimum_intel(folder: Path, work: Path, windows: numpy.ndarray, prompt: list[int], count: int) -> Answer:
    """OVModelForCausalLM.from_pretrained(FOLDER, export=True)."""
    model = export_for_openvino(folder, work)
    logits = torch.cat([model(input_ids=torch.tensor(row[None]), attention_mask=torch.ones(1, len(row))).logits
                        for row in windows])  # fmt: skip
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count}
    ids = torch.tensor([prompt])
    tokens, speed = timed(lambda: model.generate(ids, **options)[0, len(prompt) :].tolist())
    return Answer(logits.numpy(), tokens, speed)


def openvino_genai(folder: Path, work: Path, windows: numpy.ndarray, prompt: list[int], count: int) -> Answer:
    """The export of optimum-intel in openvino_genai.LLMPipeline."""
    import openvino
    import openvino_genai as genai
    from openvino_tokenizers import convert_tokenizer

    export_for_openvino(folder, work).save_pretrained(work)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(work)
    first, second = convert_tokenizer(tokenizer, with_detokenizer=True)
    openvino.save_model(first, work / "openvino_tokenizer.xml")
    openvino.save_model(second, work / "openvino_detokenizer.xml")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "ATTENTION_BACKEND": "SDPA"}
    pipeline = genai.LLMPipeline(str(work), "CPU", **settings)
    chosen = genai.GenerationConfig(do_sample=False, max_new_tokens=count, min_new_tokens=count, ignore_eos=True)
    ids, mask = numpy.array([prompt]), numpy.ones((1, len(prompt)), dtype=numpy.int64)
    inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(mask))
    tokens, speed = timed(lambda: pipeline.generate(inputs, chosen).tokens[0])
    return Answer(numpy.empty(0), tokens, speed)  # it gives no logits


def onnx_runtime(folder: Path, work: Path, windows: numpy.ndarray, prompt: list[int], count: int) -> Answer:
    """torch.onnx.export, onnxruntime.InferenceSession."""
    import onnxruntime

    example = (torch.tensor(windows[:2, :48]),)
    with torch.no_grad():
        torch.onnx.export(
            Bare(folder), example, work / "model.onnx", dynamo=True, input_names=["input_ids"],
            output_names=["logits"], dynamic_shapes=ANY_SHAPE, external_data=True,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(work / "model.onnx"), providers=["CPUExecutionProvider"])

    def logits(ids: numpy.ndarray) -> numpy.ndarray:
        return session.run(["logits"], {"input_ids": ids})[0]

    return Answer(numpy.concatenate([logits(row[None]) for row in windows]), stepwise(logits, prompt, count))


def with_ctranslate2(folder: Path, work: Path, windows: numpy.ndarray, prompt: list[int], count: int) -> Answer:
    """ctranslate2.converters.TransformersConverter, Generator."""
    import ctranslate2

    converted = work / "converted"
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted), quantization="float32")
    generator = ctranslate2.Generator(str(converted), compute_type="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = [row.tolist() for row in windows]
    logits = numpy.array(generator.forward_batch(batch))
    start = tokenizer.convert_ids_to_tokens(prompt)
    options: dict[str, Any] = {"include_prompt_in_result": False, "sampling_topk": 1, "end_token": []}
    tokens, speed = timed(
        lambda: generator.generate_batch([start], max_length=count, min_length=count, **options)[0].sequences_ids[0]
    )
    return Answer(logits, tokens, speed)


def write_gguf(folder: Path, path: Path) -> None:
    """A plain conversion of a Llama with a byte-level vocabulary, in float32, through the gguf package."""
    import gguf
    from safetensors import safe_open

    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "llama":
        raise ValueError(f"only Llama is converted here, not {config.model_type}")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    told = json.loads((folder / "tokenizer.json").read_text())
    words = {number: word for word, number in told["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in told["added_tokens"]}
    words.update(special)
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in told["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([words.get(number, f"<unused {number}>") for number in range(config.vocab_size)])
    writer.add_token_types([kinds[number in special] for number in range(config.vocab_size)])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                module = key.removesuffix(".weight")
                tensor = opened.get_tensor(key).float()
                if module in outer:
                    name = outer[module]
                else:
                    _, _, block, part = module.split(".", 3)
                    name = f"blk.{block}.{inner[part]}"
                    if inner[part] in ("attn_q", "attn_k"):
                        # llama.cpp turns neighbours, transformers the two halves of a head: order the rows for that.
                        tensor = tensor.reshape(-1, 2, head // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
                writer.add_tensor(f"{name}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(folder: Path, work: Path, windows: numpy.ndarray, prompt: list[int], count: int) -> Answer:
    """A float32 GGUF written with the gguf package, llama_cpp.Llama."""
    write_gguf(folder, work / "model.gguf")
    return with_llama_cpp(work / "model.gguf", windows, prompt, count)


def llama_cpp_converted(folder: Path, work: Path, windows: numpy.ndarray, prompt: list[int], count: int) -> Answer:
    """A float32 GGUF by llama.cpp's own convert_hf_to_gguf.py, llama_cpp.Llama."""
    script, path = Path(os.environ[SOURCES]) / "convert_hf_to_gguf.py", work / "model.gguf"
    command = [sys.executable, str(script), str(folder.resolve()), "--outfile", str(path), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{script.name} failed: {done.stderr[-200:]}")
    return with_llama_cpp(path, windows, prompt, count)


def with_llama_cpp(path: Path, windows: numpy.ndarray, prompt: list[int], count: int) -> Answer:
    """What llama.cpp makes of a GGUF."""
    import gguf
    from llama_cpp import Llama

    single = {"type_k": gguf.GGMLQuantizationType.F32, "type_v": gguf.GGMLQuantizationType.F32}  # else float16
    model = Llama(str(path), n_ctx=LENGTH + count, logits_all=True, verbose=False, **single)
    rows = []
    for row in windows:
        model.reset()
        model.eval(row.tolist())
        rows.append(numpy.array(model.scores[: len(row)]))

    def greedy() -> list[int]:
        model.reset()
        found: list[int] = []
        for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0, reset=True):
            found.append(token)
            if len(found) == count:
                break
        return found

    tokens, speed = timed(greedy)
    return Answer(numpy.stack(rows), tokens, speed)


@dataclass(frozen=True)
class Client:
    """A program.

    Attributes:
        run: makes it answer.
        modules: what must be importable.
        packages: of which the table tells the versions.
        variable: of the environment, that must say where something lies.
    """

    run: Callable[[Path, Path, numpy.ndarray, list[int], int], Answer]
    modules: tuple[str, ...]
    packages: tuple[str, ...] = field(default=())
    variable: str | None = None

    @property
    def installed(self) -> bool:
        there = all(importlib.util.find_spec(name) is not None for name in self.modules)
        return there and (self.variable is None or self.variable in os.environ)


CLIENTS = {
    "OpenVINO": Client(openvino_direct, ("openvino",), ("openvino",)),
    "OpenVINO, by optimum-intel": Client(optimum_intel, ("openvino", "optimum"), ("optimum-intel", "openvino")),
    "OpenVINO GenAI": Client(openvino_genai, ("openvino_genai", "optimum"), ("openvino-genai", "optimum-intel")),
    "ONNX Runtime": Client(onnx_runtime, ("onnxruntime", "onnxscript"), ("onnxruntime", "onnx", "onnxscript")),
    "CTranslate2": Client(with_ctranslate2, ("ctranslate2",), ("ctranslate2",)),
    "llama.cpp": Client(llama_cpp, ("llama_cpp", "gguf"), ("llama-cpp-python", "gguf")),
    "llama.cpp, its own converter": Client(
        llama_cpp_converted, ("llama_cpp", "gguf", "sentencepiece"), ("llama-cpp-python", "gguf"), SOURCES
    ),
}


def perplexity(logits: numpy.ndarray, windows: numpy.ndarray) -> float:
    scores = torch.from_numpy(logits[:, :-1]).float().flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(scores, torch.from_numpy(windows[:, 1:]).flatten()).exp())


def compare(name: str, folder: Path, given: Path) -> Row:
    """Let one program answer, and compare it with the reference that lies in a file."""
    client = CLIENTS[name]
    known = [package for package in (*client.packages, "transformers") if package_version(package)]
    row = Row(name, ", ".join(f"{package} {package_version(package)}" for package in known), str(client.run.__doc__))
    kept = numpy.load(given)
    windows, tokens = kept["windows"], kept["tokens"].tolist()
    try:
        with tempfile.TemporaryDirectory() as work:
            found = client.run(folder, Path(work), windows, kept["prompt"].tolist(), len(tokens))
    except Exception as error:
        row.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return row
    row.same, row.of = sum(a == b for a, b in zip(found.tokens, tokens, strict=False)), len(tokens)
    row.speed, row.reference, row.ok = found.speed, perplexity(kept["logits"], windows), row.same == row.of
    if found.logits.size:
        row.difference = float(numpy.abs(found.logits - kept["logits"]).max())
        row.perplexity = perplexity(found.logits, windows)
        row.ok = row.ok and abs(row.perplexity / row.reference - 1) < 1e-3
    return row


def package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def in_process(name: str, folder: Path, given: Path) -> Row:
    """The same in a process of its own, whose death is an answer too."""
    command = [sys.executable, __file__, str(folder), "--only", name, "--given", str(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return Row(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return Row(name, "", str(CLIENTS[name].run.__doc__), failure=f"ended with {done.returncode}: {last}")


def reference(folder: Path, text: str, count: int, path: Path) -> Answer:
    """Keep what transformers says of the beginning of a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"][: WINDOWS * LENGTH]
    windows = numpy.array(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    prompt = ids[:PROMPT]
    found = with_torch(folder, windows, prompt, count)
    numpy.savez(path, logits=found.logits, tokens=found.tokens, windows=windows, prompt=prompt)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, default=ROOT / "README.md")
    parser.add_argument("--tokens", type=int, default=32, help="how many to go on with")
    parser.add_argument("--only", action="append", choices=CLIENTS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--given", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.given is not None:
        print(json.dumps(asdict(compare(chosen.only[0], chosen.folder, chosen.given))))
        return 0
    names = [name for name in chosen.only or CLIENTS if CLIENTS[name].installed]
    absent = [name for name in chosen.only or CLIENTS if name not in names]
    with tempfile.TemporaryDirectory() as work:
        given = Path(work) / "reference.npz"
        theirs = reference(chosen.folder, chosen.text.read_text(encoding="utf-8"), chosen.tokens, given)
        rows = [in_process(name, chosen.folder, given) for name in names]
    if chosen.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(f"transformers {transformers.__version__}, float32: {theirs.speed:.1f} tokens/s")
        print("| program | how | largest difference of a logit | perplexity (transformers) | same tokens | tokens/s |")
        print("|---|---|---:|---:|---:|---:|")
        for row in rows:
            if row.failure:
                print(f"| {row.versions or row.client} | {row.how} | {row.failure} | | | |")
                continue
            apart = "-" if row.difference is None else f"{row.difference:.1e}"
            both = "-" if row.perplexity is None else f"{row.perplexity:.3f} ({row.reference:.3f})"
            speed = "-" if row.speed is None else f"{row.speed:.1f}"
            print(f"| {row.versions} | {row.how} | {apart} | {both} | {row.same} of {row.of} | {speed} |")
        for name in absent:
            print(f"not installed: {name} ({', '.join(CLIENTS[name].packages)})")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
