"""Code that comes with a model: never run unless asked, and then all the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.families import tokenizer
from tests.hub import Fault, environment, serving

CONFIGURATION = """
from pathlib import Path
from transformers import PretrainedConfig
Path(TRAP).write_text("the code of the config was run")

class TwigConfig(PretrainedConfig):
    model_type = "twig"

    def __init__(self, vocab_size=128, hidden_size=32, num_hidden_layers=3, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.max_position_embeddings = 64
        super().__init__(**kwargs)
"""

MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from .configuration_twig import TwigConfig

class TwigBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.out = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden):
        seen = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
        return hidden + self.out(torch.tanh(self.mix(self.norm(seen.to(hidden.dtype)))))

class TwigPreTrained(PreTrainedModel):
    config_class = TwigConfig
    base_model_prefix = "model"
    _no_split_modules = ["TwigBlock"]

    def _init_weights(self, module):
        pass

class TwigModel(TwigPreTrained):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(TwigBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.blocks:
            hidden = block(hidden)
        return BaseModelOutput(last_hidden_state=self.norm(hidden))

class TwigForCausalLM(TwigPreTrained, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = TwigModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}
"""


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    return tmp_path / "it-was-run"


@pytest.fixture
def twig(tmp_path: Path, trap: Path) -> Path:
    """A model that transformers does not know; its code leaves a file when it is run."""
    folder = tmp_path / "twig"
    folder.mkdir()
    (folder / "configuration_twig.py").write_text(CONFIGURATION.replace("TRAP", repr(str(trap))))
    (folder / "modeling_twig.py").write_text(MODELING)
    config = {
        "model_type": "twig",
        "architectures": ["TwigForCausalLM"],
        "dtype": "float32",
        "auto_map": {
            "AutoConfig": "configuration_twig.TwigConfig",
            "AutoModelForCausalLM": "modeling_twig.TwigForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    weights = {"model.embed.weight": torch.randn(128, 32), "lm_head.weight": torch.randn(128, 32) / 6}
    for norm in ("model.norm", *(f"model.blocks.{number}.norm" for number in range(3))):
        weights.update({f"{norm}.weight": torch.ones(32), f"{norm}.bias": torch.zeros(32)})
    for number in range(3):
        weights[f"model.blocks.{number}.mix.weight"] = torch.randn(64, 32) / 6
        weights[f"model.blocks.{number}.out.weight"] = torch.randn(32, 64) / 8
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog; 0123456789.\n\n" * 80)
    return str(path)


def run(*arguments: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    import os

    # Modules of models are kept in a folder of this test's own.
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-m", "llmprune", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def commands(model: Path, text: str, out: Path) -> dict[str, list[str]]:
    sparse = ["--method", "wanda", "--sparsity", "2:4", "--calibration", text, "--samples", "4", "--length", "32"]
    return {
        "plan": ["plan", str(model), *sparse],
        "prune": ["prune", str(model), "-o", str(out), *sparse, "--evaluate", text, "--set", "evaluate.length=32"],
        "eval": ["eval", str(model), "--perplexity", text, "--length", "32"],
    }


@pytest.mark.parametrize("command", ["plan", "prune", "eval"])
def test_code_is_not_run_unless_asked(command: str, twig: Path, trap: Path, text: str, tmp_path: Path) -> None:
    done = run(*commands(twig, text, tmp_path / "out")[command], tmp_path=tmp_path)
    assert done.returncode == 2
    assert f"{twig} brings code of its own" in done.stderr
    assert "then give --trust-remote-code" in done.stderr
    assert "Traceback" not in done.stderr
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


def test_where_it_is_asked_it_goes_all_the_way(twig: Path, trap: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments in commands(twig, text, out).values():
        done = run(*arguments, "--trust-remote-code", tmp_path=tmp_path)
        assert done.returncode == 0, done.stderr
    assert trap.exists()
    assert (out / "modeling_twig.py").read_text() == MODELING
    report = json.loads((out / "llmprune.json").read_text())
    assert len(report["linears"]) == 6
    assert report["sparse"]["value"] > report["dense"]["value"] * 0.9
    trap.unlink()
    done = run("verify", str(out), tmp_path=tmp_path)
    assert done.returncode == 2
    assert not trap.exists()
    done = run("verify", str(out), "--trust-remote-code", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 of 6 pruned linears are as promised" in done.stdout
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(*(float(block.mix.weight.eq(0).float().mean()) for block in model.model.blocks))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0.5"] * 3, done.stderr


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""


def test_tasks_run_on_it_too(twig: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.jsonl").write_text(
        "".join(json.dumps({"question": f"{number} and", "answer": " more"}) + "\n" for number in range(4))
    )
    greedy = "generation_kwargs: {until: ['.'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]"
    for name, kind, more in (("said", "loglikelihood", "metric_list: [{metric: perplexity}, {metric: acc}]"),
                             ("made", "generate_until", greedy)):  # fmt: skip
        task = TASK.format(name=name, file=tmp_path / "tasks" / "rows.jsonl", kind=kind, more=more)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(task)
    arguments = ["eval", str(twig), "--tasks", "said,made", "--include-path", str(tmp_path / "tasks"), "--json"]
    assert run(*arguments, tmp_path=tmp_path).returncode == 2
    done = run(*arguments, "--trust-remote-code", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    scores: list[dict[str, Any]] = json.loads(done.stdout)["tasks"]["scores"]
    assert {score["task"] for score in scores} == {"said", "made"}


def test_compare_sweep_report_and_push_run_code_only_where_asked(
    twig: Path, trap: Path, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sparse = ["--method", "magnitude", "--sparsity", "50%"]
    assert run("prune", str(twig), "-o", str(out), *sparse, "--trust-remote-code", tmp_path=tmp_path).returncode == 0
    measured = ["--perplexity", text]
    asking = {
        "compare": ["compare", str(twig), str(out), *measured, "--length", "32"],
        "sweep": ["sweep", str(twig), "-o", str(tmp_path / "swept"), *sparse, *measured, "--set", "evaluate.length=32"],
        "report": ["report", str(out), "--prompt", "The quick", "--tokens", "3"],
        "push": ["push", str(out), "--to", "owner/twig", "--dry-run"],
    }
    trap.unlink()
    for command, arguments in asking.items():
        done = run(*arguments, tmp_path=tmp_path)
        assert done.returncode == 2, command
        assert "then give --trust-remote-code" in done.stderr, command
        assert not trap.exists(), command
    said = {}
    for command, arguments in asking.items():
        done = run(*arguments, "--trust-remote-code", tmp_path=tmp_path)
        assert done.returncode == 0, done.stderr
        said[command] = done.stdout
    assert "trust_remote_code=True" in said["push"]
    (answer,) = json.loads((out / "evaluation" / "generations.json").read_text())
    assert answer["dense"]
    assert answer["sparse"]


def test_what_was_pruned_with_code_is_pushed_with_it(twig: Path, trap: Path, text: str, tmp_path: Path) -> None:
    """Also where it goes wrong: the command that is to be given later has the flag."""
    out = tmp_path / "out"
    with serving() as hub:
        settings = environment(hub, tmp_path / "home") | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
        command = [sys.executable, "-m", "llmprune", "prune", str(twig), "-o", str(out), "--method", "magnitude"]
        command += ["--push-to", "somebody/twig", "--trust-remote-code"]
        hub.faults.append(Fault("POST", r"/commit/", 403, message="the quota is used up", times=1))
        done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
        assert done.returncode == 1
        assert "could not be pushed: pushing to somebody/twig is not allowed" in done.stderr
        advised = f"push {out} --to somebody/twig --trust-remote-code"
        assert f"(`llmprune {advised}` does it later)" in done.stderr
        command[3:] = advised.split()
        done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
        assert done.returncode == 0, done.stderr
        assert hub.repositories["somebody/twig"].files["modeling_twig.py"].decode() == MODELING


def test_known_models_that_bring_code_too_are_run_by_transformers_own(tmp_path: Path, trap: Path) -> None:
    from llmprune.model.checkpoint import Checkpoint
    from llmprune.model.source import resolve
    from tests.families import make

    folder = make("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    (folder / "code.py").write_text(f"open({str(trap)!r}, 'w')")
    checkpoint = Checkpoint(resolve(folder))
    assert type(checkpoint.model).__module__ == "transformers.models.llama.modeling_llama"
    assert checkpoint.tokenizer is not None
    assert not trap.exists()
    assert AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False) is not None


def test_a_tokenizer_that_is_code(tmp_path: Path, trap: Path, text: str) -> None:
    from tests.families import make

    folder = make("llama", tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    told = {
        "tokenizer_class": "TwigTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_twig.TwigTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "tokenization_twig.py").write_text(f"open({str(trap)!r}, 'w')")
    done = run("eval", str(folder), "--perplexity", text, "--length", "32", tmp_path=tmp_path)
    assert done.returncode == 2
    assert "which is not run unless asked: read it, then give --trust-remote-code" in done.stderr
    assert not trap.exists()
