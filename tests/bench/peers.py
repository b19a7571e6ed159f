"""Seconds, memory and perplexity beside the authors' code and llm-compressor, in turns and on the same tokens.

python -m tests.bench.peers MODEL --calibration C4.jsonl --text wiki.test.raw --wanda CLONE --sparsegpt CLONE \
  --llmcompressor PYTHON [--rounds 3]

CLONE is a clone of github.com/locuslab/wanda or github.com/IST-DASLab/sparsegpt, PYTHON that of an environment with
llmcompressor; what is not given is left out. Every run is a process of its own, 50 % unstructured, the model in its own
dtype on the CPU. The others' code is run as it is, on a model whose decoder layers answer as those of the transformers
of its time did. Their seconds are those of pruning alone, ours those of the whole run; memory is the peak of the
process, of which `import torch, transformers` takes what the first line says.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

METHODS = ("wanda", "sparsegpt")
OURS, AUTHORS, COMPRESSOR, IDLE = "llmprune", "the authors' code", "llm-compressor", "idle"
SPARSITY = 0.5


def child(chosen: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own does: prune with one tool, save, and tell what it took."""
    import torch
    import transformers

    from llmprune.memory import peak

    if chosen.child == IDLE:
        return {"peak": peak()}
    tokens: Any = torch.load(chosen.tokens)
    if chosen.child == COMPRESSOR:
        model, seconds = compressed(chosen, tokens)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(chosen.model, dtype="auto")
        for layer in model.model.layers:
            as_before(layer, model.model.rotary_emb)
        model.seqlen, model.hf_device_map = tokens.shape[1], {}
        torch.cuda.synchronize = lambda *_: None  # they wait for a GPU even where there is none
        run = authors_wanda if chosen.method == "wanda" else authors_sparsegpt
        began = time.perf_counter()
        run(chosen, model, tokens)
        seconds = time.perf_counter() - began
        for layer in model.model.layers:
            del layer.forward
    told = {"peak": peak(), "seconds": seconds}
    model.save_pretrained(chosen.out)
    return told


def as_before(layer: Any, rotary: Any) -> None:
    """Let a decoder layer be called without the embeddings of the positions, and answer with a tuple."""
    import torch

    now = layer.forward

    def forward(hidden_states: Any, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        if "position_embeddings" in more:  # from the model of today
            return now(hidden_states, attention_mask=attention_mask, position_ids=position_ids, **more)
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1])[None]
        embedded = rotary(hidden_states, position_ids)
        return (now(hidden_states, attention_mask=attention_mask, position_embeddings=embedded),)

    layer.forward = forward


def module(folder: Path, name: str) -> Any:
    """A module of somebody's clone."""
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def authors_wanda(chosen: argparse.Namespace, model: Any, tokens: Any) -> None:
    import torch

    sys.modules.setdefault("lib.data", types.SimpleNamespace(get_loaders=None))  # type: ignore[arg-type]
    code = module(Path(chosen.clone), "lib.prune")
    code.get_loaders = lambda *_, **__: ([(row[None], None) for row in tokens], None)
    asked = argparse.Namespace(nsamples=len(tokens), seed=0, sparsity_ratio=SPARSITY, use_variant=False)
    code.prune_wanda(asked, model, None, torch.device("cpu"))


def authors_sparsegpt(chosen: argparse.Namespace, model: Any, tokens: Any) -> None:
    import torch

    code = module(Path(chosen.clone), "llama")
    code.args = argparse.Namespace(
        nsamples=len(tokens), true_sequential=False, minlayer=-1, maxlayer=10**6, prune_only="", invert=False, wbits=16,
        sparsity=SPARSITY, prunen=0, prunem=0, percdamp=0.01, blocksize=128,
    )  # fmt: skip
    code.llama_sequential(model, [(row[None], None) for row in tokens], torch.device("cpu"))


def compressed(chosen: argparse.Namespace, tokens: Any) -> tuple[Any, float]:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers import pruning
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype="auto")
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    kind = pruning.WandaPruningModifier if chosen.method == "wanda" else pruning.SparseGPTModifier
    recipe = kind(sparsity=SPARSITY, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])
    began = time.perf_counter()
    oneshot(
        model=model, tokenizer=AutoTokenizer.from_pretrained(chosen.model), dataset=Dataset.from_list(rows),
        recipe=recipe, max_seq_length=tokens.shape[1], num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )  # fmt: skip
    return model, time.perf_counter() - began


def start(python: str, *arguments: str) -> dict[str, Any]:
    """Run this file in a process of its own; what it tells stands in its last line."""
    known = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}  # the other environment has no llmprune
    done = subprocess.run([python, __file__, *arguments], capture_output=True, text=True, check=False, env=known)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def once(chosen: argparse.Namespace, tool: str, method: str, source: str, tokens: Path, out: str) -> dict[str, Any]:
    """One run of one tool."""
    if tool == OURS:
        given = ["--calibration", chosen.calibration, "--samples", chosen.samples, "--length", chosen.length]
        command = [sys.executable, "-m", "llmprune", "prune", source, "-o", out, "--method", method, *given]
        command += ["--sparsity", f"{SPARSITY:.0%}", "--device", "cpu", "--json"]
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return {"seconds": report["seconds"]["total"], "peak": report["peak_memory"]}
    python = chosen.llmcompressor if tool == COMPRESSOR else sys.executable
    clone = getattr(chosen, method) or ""
    asked = ["--child", tool, "--method", method, "--clone", clone, "--tokens", str(tokens), "--out", out]
    return start(python, source, *asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration")
    parser.add_argument("--text", help="measure the perplexity of one result of each on it")
    parser.add_argument("--samples", default="32")
    parser.add_argument("--length", default="1024")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--wanda", metavar="CLONE")
    parser.add_argument("--sparsegpt", metavar="CLONE")
    parser.add_argument("--llmcompressor", metavar="PYTHON")
    parser.add_argument("--results", type=Path, help="a file for what is done, with which the same command goes on")
    for name in ("--child", "--method", "--clone", "--tokens", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child is not None:
        print(json.dumps(child(chosen)))
    elif chosen.model and chosen.calibration:
        compare(chosen)
    else:
        parser.error("give MODEL and --calibration")


def compare(chosen: argparse.Namespace) -> None:
    """All tools in turns."""
    import torch

    import llmprune
    from llmprune import pipeline
    from llmprune.recipe import assemble
    from tests.bench.speed import table

    asked = {name: str(getattr(chosen, name)) for name in ("model", "calibration", "samples", "length")}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    if chosen.results and chosen.results.is_file():
        for line in map(json.loads, chosen.results.read_text().splitlines()):
            if line["asked"] == asked:
                found.setdefault((line["tool"], line["method"]), []).append(line)
    with tempfile.TemporaryDirectory() as folder:
        options = {"calibration": chosen.calibration, "samples": int(chosen.samples), "length": int(chosen.length)}
        checkpoint, _ = pipeline.plan(chosen.model, look=False, **options)
        drawn = pipeline.draw(checkpoint, assemble(None, options).settled(), int(chosen.length))
        tokens, source = Path(folder) / "tokens.pt", str(checkpoint.source.folder)
        torch.save(drawn.ids, tokens)
        print(f"idle: {start(sys.executable, '--child', IDLE)['peak'] / 2**30:.2f} GiB", file=sys.stderr)
        for turn in range(chosen.rounds):
            for method in chosen.methods:
                tools = [OURS, *([AUTHORS] if getattr(chosen, method) else [])]
                for tool in [*tools, *([COMPRESSOR] if chosen.llmcompressor else [])]:
                    runs = found.setdefault((tool, method), [])
                    if len(runs) > turn:
                        continue
                    with tempfile.TemporaryDirectory() as place:
                        out = f"{place}/out"
                        told = {"tool": tool, "method": method, **once(chosen, tool, method, source, tokens, out)}
                        if chosen.text and not any("perplexity" in run for run in runs):
                            for file in checkpoint.source.folder.glob("token*"):
                                (Path(out) / file.name).write_bytes(file.read_bytes())
                            measured = llmprune.perplexity(out, chosen.text, length=int(chosen.length), device="cpu")
                            told["perplexity"] = measured.value
                    runs.append(told)
                    print(told, file=sys.stderr, flush=True)
                    if chosen.results:
                        with chosen.results.open("a") as file:
                            file.write(json.dumps({"asked": asked, **told}) + "\n")

    def cell(runs: list[dict[str, Any]]) -> str:
        seconds, held = (statistics.median(run[name] for run in runs) for name in ("seconds", "peak"))
        lost = [f", perplexity {run['perplexity']:.2f}" for run in runs if "perplexity" in run]
        return f"{seconds:.0f} s, {held / 2**30:.2f} GiB{''.join(lost[:1])}"

    rows = [
        (tool, *(cell(found[tool, m]) if (tool, m) in found else "" for m in chosen.methods))
        for tool in dict.fromkeys(tool for tool, _ in found)
    ]
    table((f"median of {chosen.rounds}", *chosen.methods), rows)


if __name__ == "__main__":
    main()
