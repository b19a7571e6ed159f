"""Recovery: zeros stay zeros, what is minimised is what is said, and what is written is what was trained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaMLP

import llmprune
import llmprune.cli
from llmprune.errors import Failure, Interrupted, UserError
from llmprune.model.linears import find_linears
from llmprune.recover import KeepZeros, Training, recover
from llmprune.recover import run as running
from llmprune.recover.adapters import attach, merge
from llmprune.recover.masks import Keeper, check_training, check_whole, masks_of, trained_linears
from llmprune.recover.objective import Objective, divergence, next_token_loss, states_apart
from llmprune.recover.trained import choose, round_to
from llmprune.recover.write import write
from tests.families import FAMILIES, make

pytestmark = pytest.mark.usefixtures("no_pages")

SHORT: dict[str, Any] = {"steps": 4, "length": 16, "batch": 2, "held_out": 4, "rate": 1e-2, "save_every": 0}


def sparse(family: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Path, Path]:
    """A tiny model, and the same pruned to 2:4 by magnitude."""
    model = make(family, folder / "model", dtype=dtype)
    options = {"sparsity": "2:4", "method": "magnitude", **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmprune.pipeline.draw_page", lambda *_: None)
        llmprune.prune(model, out=folder / "out", **options)
    return model, folder / "out"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return sparse("llama", tmp_path_factory.mktemp("llama"), torch.bfloat16)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def train_with(callback: TrainerCallback, patch: pytest.MonkeyPatch) -> None:
    """Give a callback to the Trainer of each recovery."""
    make_trainer = running.make_trainer

    def made(*given: Any) -> Any:
        trainer = make_trainer(*given)
        trainer.add_callback(callback)
        return trainer

    patch.setattr(running, "make_trainer", made)


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "llmprune.json").read_text())
    return found


# -- what is minimised ------------------------------------------------------------------------------------------------


def test_divergence_is_the_sum_over_all_tokens() -> None:
    torch.manual_seed(0)
    mine, dense = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    total = 0.0
    for place in range(6):
        p = torch.softmax(dense.view(6, 7)[place] / 2.5, -1)
        q = torch.softmax(mine.view(6, 7)[place] / 2.5, -1)
        total += float((p * (p.log() - q.log())).sum())
    assert float(divergence(mine, dense, 2.5)) == pytest.approx(2.5**2 * total / 6, rel=1e-5)
    assert float(divergence(dense, dense)) == pytest.approx(0, abs=1e-6)


def test_parts_of_the_loss_add_up(pair: tuple[Path, Path]) -> None:
    dense, model = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in pair)
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = model(input_ids=ids, labels=ids, output_hidden_states=True)
        other = dense(input_ids=ids, output_hidden_states=True)
        apart = [
            float((a - b).square().sum() / b.square().sum())
            for a, b in zip(mine.hidden_states[1:], other.hidden_states[1:], strict=True)
        ]
        p, q = (told.logits.softmax(-1) for told in (other, mine))
        kl = float((p * (p / q).log()).sum(-1).mean())
        expected = 0.5 * float(mine.loss) + 2 * kl + 3 * sum(apart) / len(apart)
        assert float(Objective(dense, 1.0, 0.5, 2.0, 3.0)(model, ids)) == pytest.approx(expected, rel=1e-4)
        assert float(Objective()(model, ids)) == pytest.approx(float(mine.loss), rel=1e-5)
        assert float(states_apart(other.hidden_states, other.hidden_states)) == 0


# -- zeros stay zeros -------------------------------------------------------------------------------------------------


def test_a_step_of_adamw_on_masked_weights() -> None:
    """Three steps, restated from Adam's formulas with decoupled weight decay."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 4, bias=False)
    mask = torch.rand(4, 8) > 0.5
    with torch.no_grad():
        layer.weight.mul_(mask)
    w = layer.weight.detach().double().clone()
    keeper = Keeper(layer, {"weight": mask})
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.3)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, 4):
        x = torch.randn(5, 8)
        layer(x).square().sum().backward()
        optimiser.step()
        keeper.apply()
        optimiser.zero_grad()
        g = (2 * (x.double() @ w.T)).T @ x.double() * mask
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w = w * (1 - 0.1 * 0.3) - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        assert torch.allclose(layer.weight.double(), w, atol=1e-6)
        assert bool((layer.weight[~mask] == 0).all())


def test_an_infinite_gradient_of_a_zero_harms_nothing() -> None:
    layer = nn.Linear(4, 1, bias=False)
    keeper = Keeper(layer, {"weight": torch.tensor([[True, False, True, False]])})
    layer(torch.tensor([[1.0, torch.inf, 1.0, torch.nan]])).nan_to_num(1.0).sum().backward()
    (layer.weight * torch.tensor([[2.0, torch.inf, 3.0, torch.nan]])).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad[0, 1] == layer.weight.grad[0, 3] == 0
    keeper.release()
    layer.weight.grad = None
    layer.weight.sum().backward()
    assert bool((layer.weight.grad == 1).all())


class Meddler(TrainerCallback):  # type: ignore[misc]
    """An optimiser whose momentum and decay bring zeros back, if nobody prevents it."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for linear in trained_linears(kwargs["model"]):
                kwargs["model"].get_parameter(linear.parameter).add_(1e-3)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, count: int = 40) -> None:
        self.ids = torch.randint(3, 128, (count, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[number], "labels": self.ids[number]}


def trainer(
    model: Any, folder: Path, *callbacks: TrainerCallback, steps: int = 6, batch: int = 2, **options: Any
) -> Trainer:
    options = {"weight_decay": 0.1, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3, **options}
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch, use_cpu=True, report_to="none",
        disable_tqdm=True, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=list(callbacks))


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_any_trainer_keeps_zeros(family: str, tmp_path: Path) -> None:
    _, out = sparse(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(out)
    linears = trained_linears(model)
    before = {linear.name: linear.view(model.get_parameter(linear.parameter)).clone() for linear in linears}
    trainer(model, tmp_path / "run", Meddler(), KeepZeros(), save_strategy="no").train()
    moved = 0
    for linear in linears:
        after = linear.view(model.get_parameter(linear.parameter))
        assert bool((after[before[linear.name] == 0] == 0).all()), linear.name
        moved += int((after != before[linear.name]).sum())
    assert moved > 0
    model = AutoModelForCausalLM.from_pretrained(out)
    trainer(model, tmp_path / "run", Meddler(), save_strategy="no").train()
    free = linears[0].view(model.get_parameter(linears[0].parameter))
    assert int((free[before[linears[0].name] == 0] != 0).sum()) > 0  # without it they don't stay


def test_masks_go_with_the_trainers_checkpoints(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A kept weight that is zero at the moment of saving is trained on after resuming."""

    class Zeroing(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                with torch.no_grad():
                    kwargs["model"].model.layers[0].mlp.up_proj.weight.zero_()

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)

    whole = trainer(fresh(), tmp_path / "whole", Zeroing(), KeepZeros())
    whole.train()
    again = trainer(fresh(), tmp_path / "whole", KeepZeros())
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, one), two in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two), name
    mask = fresh().model.layers[0].mlp.up_proj.weight != 0
    assert torch.equal(again.model.model.layers[0].mlp.up_proj.weight != 0, mask)


def test_masks_beside_other_weights_are_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Two trainings have a checkpoint of the same step, and the Trainer's callbacks are not told which it is."""

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)

    for name, rate in (("one", 1e-2), ("other", 1e-3)):
        trainer(fresh(), tmp_path / name, KeepZeros(), learning_rate=rate).train()
    there = str(tmp_path / "one" / "checkpoint-3")
    with pytest.raises(UserError, match=r"lies beside other weights than those that training goes on with"):
        trainer(fresh(), tmp_path / "other", KeepZeros()).train(resume_from_checkpoint=there)
    again = trainer(fresh(), tmp_path / "other", KeepZeros(), resume_from_checkpoint=there, save_strategy="no")
    again.train(resume_from_checkpoint=there)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "checkpoint-6", dtype=torch.float32)
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), again.model.parameters(), strict=True))


def test_a_mixture_goes_on_only_where_all_of_its_weights_were_read(tmp_path: Path) -> None:
    """The Trainer of some transformers writes fused experts one by one, and does not read them again."""
    _, out = sparse("mixtral", tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    trainer(whole, tmp_path / "run", KeepZeros()).train()
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    made = trainer(again, tmp_path / "run", KeepZeros())
    there = tmp_path / "run" / "checkpoint-3"
    if "model.layers.0.mlp.experts.down_proj" in load_file(there / "model.safetensors"):
        made.train(resume_from_checkpoint=str(there))
        assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), again.parameters(), strict=True))
    else:
        with pytest.raises(UserError, match="the Trainer did not read all of its weights"):
            made.train(resume_from_checkpoint=str(there))


def test_adapters_that_would_fill_the_zeros_are_warned_of(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
    model.peft_config = {"default": None}
    callback = KeepZeros()
    made = trainer(model, tmp_path, save_strategy="no")
    with pytest.warns(UserWarning, match="fill the zeros of the weights that they are merged into"):
        callback.on_train_begin(made.args, made.state, made.control, model=model)


def test_keep_zeros_says_what_it_cannot_do(pair: tuple[Path, Path], tmp_path: Path) -> None:
    search = trainer(AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32), tmp_path, KeepZeros())
    search.state.is_hyper_param_search = True
    with pytest.raises(UserError, match="a search for hyperparameters has its checkpoints elsewhere"):
        check_training(search.model, search.args, search.state)
    dense = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    with pytest.raises(UserError, match="no zeros to keep"):
        trainer(dense, tmp_path, KeepZeros()).train()
    with pytest.raises(UserError, match="no such parameter"):
        trainer(dense, tmp_path, KeepZeros({"nowhere": torch.ones(1, dtype=torch.bool)})).train()
    with pytest.raises(UserError, match=r"has the shape \(1,\)"):
        trainer(dense, tmp_path, KeepZeros({"model.norm.weight": torch.ones(1, dtype=torch.bool)})).train()


def test_parameters_that_are_dealt_to_processes(
    pair: tuple[Path, Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An FSDP run takes several GPUs; that it is one is all that counts here."""
    model = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
    check_whole(model)

    class Fsdp:
        _shared_state: ClassVar[dict[str, Any]] = {"any": 1}
        distributed_type = "DistributedType.FSDP"

    with monkeypatch.context() as patch:
        patch.setattr("accelerate.state.AcceleratorState", Fsdp)
        with pytest.raises(UserError, match=r"dealt to the processes \(FSDP\)"):
            check_whole(model)
    make_trainer = running.make_trainer

    def dealing(*given: Any) -> Any:
        made = make_trainer(*given)
        monkeypatch.setattr("accelerate.state.AcceleratorState", Fsdp)
        return made

    monkeypatch.setattr(running, "make_trainer", dealing)
    for method in ("norms", "lora", "full"):
        with pytest.raises(UserError, match=r"dealt to the processes \(FSDP\)"):
            recover(pair[1], out=tmp_path / method, data=text, method=method, **SHORT)
        monkeypatch.undo()
        monkeypatch.setattr(running, "make_trainer", dealing)


def test_an_adapter_that_begins_at_zero_is_trained(pair: tuple[Path, Path], tmp_path: Path) -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.up(self.down(x))

    model = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
    model.model.layers[0].self_attn.q_proj = Adapted(model.model.layers[0].self_attn.q_proj)
    before = model.model.layers[0].self_attn.q_proj.base.weight.detach().clone()
    trainer(model, tmp_path, KeepZeros(), save_strategy="no").train()
    adapted = model.model.layers[0].self_attn.q_proj
    assert bool((adapted.up.weight != 0).all())
    assert torch.equal(adapted.base.weight != 0, before != 0)


def test_only_notable_zeros_are_a_pattern(pair: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    linears = trained_linears(model)
    assert not any(linear.name == "lm_head" for linear in linears)
    first, second = (model.get_submodule(linears[place].module).weight for place in (0, 1))
    with torch.no_grad():
        first.flatten()[: first.numel() // 10] = 0
        second.flatten()[: second.numel() // 50] = 0
    masks = masks_of(dict(model.named_parameters()), linears)
    assert set(masks) == {linears[0].parameter}
    assert torch.equal(masks[linears[0].parameter], first != 0)


# -- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "gpt2"])
def test_adapters_stay_in_the_mask_and_merge_exactly(family: str, tmp_path: Path) -> None:
    _, out = sparse(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    linears = find_linears(model.get_decoder(), "model" if family != "gpt2" else "transformer")
    masks = masks_of(dict(model.named_parameters()), linears, 0)
    before = {name: model.get_parameter(name).detach().clone() for name in masks}
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        start = model(input_ids=ids).logits
        trained = attach(model, masks, masks, 3, 0.7)
        assert torch.equal(model(input_ids=ids).logits, start)  # adapters begin at nothing
        for value in trained:
            value.copy_(torch.randn(value.shape) * 0.1)
        logits = model(input_ids=ids).logits
        assert not torch.allclose(logits, start, atol=1e-3)
        factors = {name: _factors(model, name) for name in masks}
        merge(model)
        assert torch.equal(model(input_ids=ids).logits, logits)
    for name, mask in masks.items():
        up, down = factors[name]
        expected = before[name] + mask * (0.7 * torch.einsum("...or,...ri->...oi", up, down))
        assert torch.allclose(model.get_parameter(name), expected, atol=1e-6), name
        assert bool((model.get_parameter(name)[~mask] == 0).all())


def _factors(model: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    module, _, leaf = name.rpartition(".")
    (adapter,) = model.get_submodule(module).parametrizations[leaf]
    return adapter.up.detach().clone(), adapter.down.detach().clone()


def test_what_each_method_trains(pair: tuple[Path, Path]) -> None:
    def names(method: str, **options: Any) -> set[str]:
        model = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
        linears = find_linears(model.model, "model")
        chosen = choose(model, linears, {}, Training(method=method, **options))
        return {name.replace("model.layers.", "") for name in chosen if not name.startswith("model.layers.1.")}

    norms = {f"{n}.{part}_layernorm.weight" for n in (0, 2) for part in ("input", "post_attention")}
    norms.add("model.norm.weight")
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    matrices = {f"{n}.{part}.weight" for n in (0, 2) for part in parts}
    assert names("norms") == norms
    assert names("lora") == names("full") == norms | matrices
    assert names("full", embeddings=True) == norms | matrices | {"model.embed_tokens.weight", "lm_head.weight"}


def test_biases_are_trained_with_norms(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make("gpt_oss", tmp_path / "model"))
    chosen = choose(model, [], {}, Training(method="norms"))
    for leaf in ("self_attn.q_proj.bias", "mlp.experts.gate_up_proj_bias", "mlp.router.bias", "input_layernorm.weight"):
        assert f"model.layers.0.{leaf}" in chosen
    assert not any(model.get_parameter(name).requires_grad for name in set(dict(model.named_parameters())) - chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kept_weight_that_vanishes_stays_a_kept_one(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, -1e-42, 1.001, 0.0]]))
    mask = torch.tensor([[True, True, True, False]])
    assert round_to(layer, {"weight"}, {"weight": dtype}, {"weight": mask}) == 2
    small = torch.finfo(dtype).smallest_normal
    assert layer.weight.tolist() == [[small, -small, float(torch.tensor(1.001).to(dtype)), 0.0]]
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(Failure, match="weight holds NaN"):
        round_to(layer, {"weight"}, {"weight": dtype}, {})


# -- a whole recovery -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora", "norms"])
def test_a_recovered_checkpoint(method: str, pair: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    dense, out = pair
    found = recover(out, out=tmp_path / "r", data=text, distill=dense, method=method, **{**SHORT, "steps": 12})
    assert llmprune.verify(tmp_path / "r").to_dict() == {
        "folder": str(tmp_path / "r"), "ok": True, "linears": 21, "problems": [], "changed": [],
    }  # fmt: skip
    before, after = weights(out), weights(tmp_path / "r")
    assert {key: (value.dtype, value.shape) for key, value in after.items()} == {
        key: (value.dtype, value.shape) for key, value in before.items()
    }
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    norms = {key for key in before if "norm" in key}
    matrices = {key for key in before if "proj" in key}
    assert changed <= (norms if method == "norms" else norms | matrices)
    assert changed & (norms if method == "norms" else matrices)
    assert {path.name for path in out.iterdir()} - {"README.md", "report.html"} == {
        path.name for path in (tmp_path / "r").iterdir()
    }
    assert found.kl_before is not None
    assert found.kl_after is not None
    assert found.kl_after < found.kl_before
    # What was measured is what anybody measures on the written files.
    ids = held_out(text, out)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "r", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert found.after.value == pytest.approx(float(next_token_loss(logits, ids).exp()), rel=1e-5)
    assert (found.after.tokens, found.after.length) == (4 * 15, 16)
    report = told(tmp_path / "r")
    assert report["recovery"] == found.record
    assert report["recovery"]["masked_linears"] == 21
    assert [record["mask_sha256"] for record in report["linears"]] == [
        record["mask_sha256"] for record in told(out)["linears"]
    ]


def held_out(text: str, out: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    from llmprune import data

    tokens = data.draw(data.documents(text), AutoTokenizer.from_pretrained(out), 4 + 24, 16, 0, text)
    return tokens.ids[:4]


@pytest.mark.parametrize("family", sorted({"mixtral", "gpt_oss", "opt", "mamba", "deepseek_v3"} & set(FAMILIES)))
@pytest.mark.parametrize("method", ["full", "lora"])
def test_families(family: str, method: str, text: str, tmp_path: Path) -> None:
    """Norms, biases, experts, routers and all: the files hold what plain transformers makes the same logits of."""
    _, out = sparse(family, tmp_path)
    caught: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "write", lambda c, model, *rest: caught.append(model) or write(c, model, *rest))
        recover(out, out=tmp_path / "r", data=text, method=method, **SHORT)
    assert llmprune.verify(tmp_path / "r").ok
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "r", dtype=torch.float32).eval()
    before = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = held_out(text, out)
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (caught[0].eval(), written, before)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2], atol=1e-3)


def test_the_language_models_own_loss_falls(pair: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    options = {**SHORT, "steps": 40, "length": 32, "batch": 4, "samples": 60, "rate": 3e-2, "embeddings": True}
    found = recover(pair[1], out=tmp_path / "r", data=text, **options)
    assert found.after.value < 0.5 * found.before.value
    assert found.kl_after is None
    losses = [entry["loss"] for entry in found.record["losses"]]
    assert losses[-1] < losses[0]


def test_a_checkpoint_of_somebody_elses(pair: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    """Without llmprune.json, in one file, float16; each linear that is notably zero keeps its zeros."""
    theirs = tmp_path / "theirs"
    model = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float16)
    model.save_pretrained(theirs)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(pair[1] / name, theirs / name)
    recover(theirs, out=tmp_path / "r", data=text, **SHORT)
    assert {path.name for path in (tmp_path / "r").glob("*.safetensors")} == {"model.safetensors"}
    before, after = weights(theirs), weights(tmp_path / "r")
    assert all(value.dtype == torch.float16 for value in after.values())
    for key in before:
        if "proj" in key:
            assert torch.equal(before[key] != 0, after[key] != 0), key
            assert not torch.equal(before[key], after[key])
    record = json.loads((tmp_path / "r" / "llmprune.recovery.json").read_text())
    assert record["masked_linears"] == 21
    assert record["of"] == str(theirs)
    recover(tmp_path / "r", out=tmp_path / "r2", data=text, **SHORT)
    assert json.loads((tmp_path / "r2" / "llmprune.recovery.json").read_text())["earlier"] == record


def test_a_shorter_dense_model(text: str, tmp_path: Path) -> None:
    model = make("llama", tmp_path / "model", num_hidden_layers=4)
    llmprune.prune(model, out=tmp_path / "out", depth={"drop": [1]})
    found = recover(tmp_path / "out", out=tmp_path / "r", data=text, distill=model, hidden_weight=1.0, **SHORT)
    assert found.record["masked_linears"] == 0
    assert found.kl_before is not None
    assert found.kl_before > 0
    report = told(tmp_path / "r")
    assert report["kept_blocks"] == [0, 2, 3]
    assert llmprune.verify(tmp_path / "r").ok


def test_hidden_states_of_a_model_that_was_shortened_in_earlier_runs(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block's states are compared with those of the dense block that it was."""
    model = make("llama", tmp_path / "model", num_hidden_layers=5)
    llmprune.prune(model, out=tmp_path / "four", depth={"drop": [1]})
    llmprune.prune(tmp_path / "four", out=tmp_path / "three", depth={"drop": [2]})
    llmprune.prune(tmp_path / "three", out=tmp_path / "out", sparsity="2:4", method="magnitude")
    seen: list[Any] = []

    class Noted(Objective):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            seen.append(self.places)

    monkeypatch.setattr(running, "Objective", Noted)
    for number, dense in enumerate(("model", "four", "three")):
        recover(
            tmp_path / "out",
            out=tmp_path / f"r{number}",
            data=text,
            distill=tmp_path / dense,
            hidden_weight=1.0,
            **SHORT,
        )
    assert seen == [(0, 2, 4, 5), (0, 1, 3, 4), (0, 1, 2, 3)]
    other = make("llama", tmp_path / "other", num_hidden_layers=6)
    with pytest.raises(UserError, match="leave hidden_weight out"):
        recover(tmp_path / "out", out=tmp_path / "r", data=text, distill=other, hidden_weight=1.0, **SHORT)


def test_zeros_are_not_counted_among_what_is_trained(pair: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    record = recover(pair[1], out=tmp_path / "r", data=text, **SHORT).record
    changed = {key: value for key, value in weights(pair[1]).items() if "embed" not in key and "lm_head" not in key}
    assert record["trained"] == sum(int((value != 0).sum()) for value in changed.values())


def test_zeros_stay_zeros_at_every_step(
    pair: tuple[Path, Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole model behind each step, and on the files of each of the Trainer's checkpoints."""
    before = {key: value == 0 for key, value in weights(pair[1]).items() if key.endswith("_proj.weight")}
    steps: list[int] = []

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            parameters = dict(kwargs["model"].named_parameters())
            for key, zero in before.items():
                assert torch.equal(parameters[key] == 0, zero), key
            steps.append(state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saved = weights(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            for key, zero in before.items():
                assert torch.equal(saved[key] == 0, zero), key
            steps.append(-state.global_step)

    train_with(Look(), monkeypatch)
    recover(pair[1], out=tmp_path / "r", data=text, **{**SHORT, "save_every": 2})
    assert steps == [1, 2, -2, 3, 4, -4]
    after = weights(tmp_path / "r")
    for key, zero in before.items():
        assert torch.equal(after[key] == 0, zero), key


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_was_stopped(method: str, pair: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    options = {**SHORT, "steps": 6, "save_every": 2, "method": method, "distill": pair[0]}
    recover(pair[1], out=tmp_path / "whole", data=text, **options)

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        train_with(Stop(), patch)
        with pytest.raises(Interrupted, match="goes on after step 4"):
            recover(pair[1], out=tmp_path / "broken", data=text, **options)
    assert [path.name for path in (tmp_path / "broken").iterdir()] == [running.WORK]
    with pytest.raises(UserError, match=r"unfinished recovery with another training\.rate"):
        recover(pair[1], out=tmp_path / "broken", data=text, **{**options, "rate": 0.5})
    found = recover(pair[1], out=tmp_path / "broken", data=text, **options)
    assert found.record["resumed_at"] == 4
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert not (tmp_path / "broken" / running.WORK).exists()
    with pytest.raises(UserError, match="holds a finished recovery"):
        recover(pair[1], out=tmp_path / "broken", data=text, **options)
    again = recover(pair[1], out=tmp_path / "broken", data=text, restart=True, **{**options, "seed": 1})
    assert again.record["resumed_at"] is None
    assert not all(torch.equal(value, weights(tmp_path / "broken")[key]) for key, value in one.items())


def test_zeros_that_came_back_are_caught(pair: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "KeepZeros", lambda masks: Meddler())
        with pytest.raises(Failure, match=r"does not hold what was promised.*does not hold 2:4"):
            recover(pair[1], out=tmp_path / "r", data=text, **SHORT)
    assert not list((tmp_path / "r").glob("*.safetensors"))


def test_training_that_breaks_down(pair: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="lower --rate"):
        recover(pair[1], out=tmp_path / "r", data=text, **{**SHORT, "rate": 1e30})
    assert not list((tmp_path / "r").glob("*.safetensors"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_blocks_computed_once_more_give_the_same(
    method: str, pair: tuple[Path, Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, forward = [0], LlamaMLP.forward

    def counted(self: Any, x: torch.Tensor) -> torch.Tensor:
        runs[-1] += self.training
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    for name, checkpointing in (("a", False), ("b", True)):
        recover(pair[1], out=tmp_path / name, data=text, method=method, checkpointing=checkpointing, **SHORT)
        runs.append(0)
    assert runs[1] == 2 * runs[0] > 0
    one, two = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_training_in_bfloat16(pair: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    """Products in bfloat16, weights in float32: close to training in float32, and not the same."""
    options = {**SHORT, "rate": 1e-3, "device": "cpu"}
    single = recover(pair[1], out=tmp_path / "a", data=text, dtype="float32", **options)
    half = recover(pair[1], out=tmp_path / "b", data=text, dtype="bfloat16", **options)
    assert llmprune.verify(tmp_path / "b").ok
    assert half.record["losses"] != single.record["losses"]
    assert half.record["losses"][-1]["loss"] == pytest.approx(single.record["losses"][-1]["loss"], rel=0.01)
    assert half.after.value == pytest.approx(single.after.value, rel=0.01)
    assert half.after.value < half.before.value


def test_card_and_report(pair: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    from llmprune.push import push
    from llmprune.report.page import verdict
    from llmprune.report.results import read_results

    out = shutil.copytree(pair[1], tmp_path / "out")
    figure = {"value": 9.0, "text": "wikitext2", "length": 8, "windows": 1, "tokens": 7, "seconds": 1.0, "stride": None}
    (out / "llmprune.json").write_text(json.dumps({**told(out), "dense": figure, "sparse": figure}))
    recover(out, out=tmp_path / "r", data=text, method="lora", distill=pair[0], **SHORT)
    recover(tmp_path / "r", out=tmp_path / "r2", data="builtin", **SHORT)
    report = told(tmp_path / "r")
    assert report["sparse"] is None
    assert report["recovery"]["pruned"] == figure
    pushed = push(tmp_path / "r2", "me/small", dry_run=True)
    for words in (
        "It was trained after that, within the same masks",
        "**Recovery**: adapters of rank 16 within the masks, merged, trained towards the answers of model for 4 steps",
        "of 2 x 16 tokens of verses.txt",
        "**Recovery**: all kept weights, trained for 4 steps of 2 x 16 tokens of builtin",
        report["recovery"]["data"]["tokens_sha256"],
        "llmprune recover OUT -o RECOVERED --data verses.txt --method lora",
        "llmprune recover RECOVERED -o RECOVERED-2 --data builtin --method full",
    ):
        assert words in pushed.card
    assert "9 |" not in pushed.card  # the figures of the weights before are not its own
    assert str(tmp_path) not in pushed.card
    sentences, _, _ = verdict(read_results(tmp_path / "r2"))
    assert any("trained after that for 4 steps" in sentence for sentence in sentences)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_train_as_one(method: str, text: str, tmp_path: Path) -> None:
    """Each takes its half of every batch: the same steps, but for the order of sums."""
    dense, out = sparse("llama", tmp_path)
    options = {"data": text, "steps": 3, "length": 16, "rate": 1e-3, "held-out": 4, "distill": dense, "device": "cpu"}
    options |= {"method": method}
    line = ["recover", out, *(part for name, value in options.items() for part in (f"--{name}", value)), "--json"]
    python = [sys.executable, "-m"]
    many = [*python, "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    for start, folder, batch in ((python, "one", 2), (many, "two", 1)):
        command = [*start, "llmprune", *line, "-o", tmp_path / folder, "--batch", batch]
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=240, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout)  # one of them prints
        assert record["ranks"] * record["batch"] == 2
        assert llmprune.verify(tmp_path / folder).ok
    start, one, two = weights(out), weights(tmp_path / "one"), weights(tmp_path / "two")
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=2e-4), key
    assert max(float((value - start[key]).abs().max()) for key, value in one.items()) > 1e-3


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "lara"}, "unknown method 'lara': did you mean 'lora'"),
        ({"step": 4}, "did you mean 'steps'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"rate": -1.0}, "rate must be greater than 0"),
        ({"length": 65}, "length 65 is more than the 64 tokens"),
        ({"steps": 4000}, "give more text, fewer --steps, or fewer --samples"),
        ({"data": "nowhere.txt"}, "no text file at nowhere.txt"),
        ({"hidden_weight": 1.0}, "about a dense teacher"),
        ({"lm_weight": 0.0}, "nothing but lm_weight"),
        ({"method": "lora", "embeddings": True}, "embeddings are trained by the method full"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
        ({"dtype": "float16", "device": "cpu"}, "float16 takes a GPU"),
    ],
)  # fmt: skip
def test_mistakes(options: dict[str, Any], words: str, pair: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        recover(pair[1], out=tmp_path / "r", **{"data": text, **SHORT, **options})
    assert not (tmp_path / "r").exists()


def test_mistakes_about_folders(pair: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    other = make("llama", tmp_path / "other", vocab_size=256)
    wide = make("llama", tmp_path / "wide", num_hidden_layers=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    harmed = shutil.copytree(pair[1], tmp_path / "harmed")
    file = next(iter(sorted(harmed.glob("*.safetensors"))))
    save_file({key: torch.ones_like(value) for key, value in load_file(file).items()}, file)
    for given, options, words in (
        (tmp_path / "nowhere", {}, "no such folder"),
        (tmp_path / "empty", {}, "no config.json|safetensors"),
        (pair[1], {"distill": other}, "have other tokens"),
        (pair[1], {"distill": wide, "hidden_weight": 1.0}, "hidden states of"),
        (pair[1], {"out": tmp_path / "full"}, "is not empty"),
        (pair[1], {"out": tmp_path / "full", "restart": True}, "is not empty"),
        (pair[1], {"out": pair[1]}, "is the model itself"),
        (pair[1], {"out": tmp_path / "full" / "notes.txt"}, "is a file"),
        (harmed, {}, "has other zeros than its llmprune.json promises"),
    ):
        with pytest.raises(UserError, match=words):
            recover(given, **{"out": tmp_path / "r", "data": text, **SHORT, **options})
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


# -- the command line -------------------------------------------------------------------------------------------------


def test_command_line(pair: tuple[Path, Path], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["recover", pair[1], "-o", tmp_path / "r", "--data", text, "--steps", 3, "--batch", 2]
    line += ["--held-out", 4, "--distill", pair[0], "--log-json"]
    assert llmprune.cli.main([*map(str, line), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["after"]["perplexity"]["tokens"] == 4 * 63
    marks = [json.loads(row) for row in printed.err.splitlines() if row.startswith("{")]
    training = [mark for mark in marks if mark.get("title") == "training"]
    assert [(mark["done"], mark["of"]) for mark in training] == [(1, 3), (2, 3), (3, 3)]
    assert llmprune.cli.main(list(map(str, line))) == 2
    assert "--restart" in capsys.readouterr().err
    assert llmprune.cli.main([*map(str, line), "--restart"]) == 0
    assert "21 masks verified" in " ".join(capsys.readouterr().out.split())
    assert llmprune.cli.main(["verify", str(tmp_path / "r")]) == 0
