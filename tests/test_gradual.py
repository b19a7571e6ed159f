"""Pruning in training: schedules, saliencies and masks against plain restatements."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from llmprune.errors import Failure, UserError
from llmprune.patterns import NM, Unstructured
from llmprune.recover import GradualPruning
from llmprune.recover.gradual import FILE, cubic
from llmprune.recover.masks import trained_linears
from tests.families import make
from tests.test_recover import trainer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=2)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    found = dict(model.named_parameters())
    return {linear.name: linear.view(found[linear.parameter].detach()).clone() for linear in trained_linears(model)}


class Watch(TrainerCallback):  # type: ignore[misc]
    """Keeps the weights and the gradients of every step, as the callbacks before it left them."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.gradients: dict[int, dict[str, torch.Tensor]] = {}
        self.held: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = matrices(kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        found = dict(model.named_parameters())
        self.gradients[state.global_step] = {
            linear.name: linear.view(found[linear.parameter].grad).clone() for linear in trained_linears(model)
        }
        self.held[state.global_step] = matrices(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = matrices(kwargs["model"])


def test_the_cubic_schedule() -> None:
    """By hand: from 10 % at step 4 to 50 % at step 14, s = 0.5 − 0.4 (1 − (t − 4)/10)³."""
    expected = {0: 0.1, 4: 0.1, 9: 0.45, 12: 0.5 - 0.4 * 0.008, 14: 0.5, 20: 0.5}
    for step, sparsity in expected.items():
        assert cubic(step, 4, 14, 0.1, 0.5) == pytest.approx(sparsity)


def test_magnitude_follows_the_schedule(llama: Path, tmp_path: Path) -> None:
    seen = Watch()
    gradual = GradualPruning("60%", begin=2, end=8, every=3, initial=0.1)
    trainer(load(llama), tmp_path, gradual, seen, steps=10, save_strategy="no").train()
    for step, updated in {1: None, 2: 2, 3: 2, 5: 5, 7: 5, 8: 8, 10: 8}.items():
        wanted = 0.0 if updated is None else 0.6 + (0.1 - 0.6) * (1 - (updated - 2) / 6) ** 3
        for name, weight in seen.weights[step].items():
            zeros = (weight == 0).sum(1)
            assert bool((zeros == int(wanted * weight.shape[1] + 1e-6)).all()), (step, name)
    for step in (2, 5, 8):  # those that go are the smallest in their row, and what went never comes back
        for name, weight in seen.weights[step].items():
            before = seen.weights[step - 1][name]
            gone = (weight == 0) & (before != 0)
            largest = torch.where(gone, before.abs(), 0).amax(1)
            kept = torch.where(weight != 0, weight.abs(), torch.inf).amin(1)
            assert bool((largest <= kept + 0.05).all())  # the step's own move lies between
            assert not bool(((before == 0) & (weight != 0)).any())


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
@pytest.mark.parametrize("saliency", ["magnitude", "movement"])
def test_patterns_hold_in_the_end(family: str, saliency: Any, tmp_path: Path) -> None:
    model = load(make(family, tmp_path / "model"))
    before = matrices(model)
    trainer(model, tmp_path, GradualPruning("2:4", saliency=saliency, end=5, every=2), save_strategy="no").train()
    for name, weight in matrices(model).items():
        groups = weight.reshape(weight.shape[0], -1, 4)
        assert bool(((groups == 0).sum(-1) == 2).all()), name
        assert not torch.equal(weight[weight != 0], before[name][weight != 0])


def test_movement_is_the_sum_over_steps(llama: Path, tmp_path: Path) -> None:
    """One update, after three steps: −Σ W·g, the lowest half of each matrix goes."""
    seen = Watch()
    gradual = GradualPruning("50%", scope="matrix", saliency="movement", begin=2, end=3, every=1)
    trainer(load(llama), tmp_path, gradual, seen, steps=3, save_strategy="no").train()
    for name, weight in seen.weights[3].items():
        score = -sum(seen.held[step][name] * seen.gradients[step][name] for step in range(3))
        keep = Unstructured(0.5, "matrix").keep(score)
        assert torch.equal(weight != 0, keep), name


def test_wanda_sees_the_inputs_since_the_last_update(llama: Path, tmp_path: Path) -> None:
    model = load(llama)
    squares: dict[str, torch.Tensor] = {}

    def caught(name: str) -> Any:
        def add(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            squares[name] = squares.get(name, 0) + given[0].detach().flatten(0, 1).square().sum(0)

        return add

    for linear in trained_linears(model):
        model.get_submodule(linear.module).register_forward_pre_hook(caught(linear.name))
    unpruned: dict[str, torch.Tensor] = {}

    class Before(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            unpruned.update(matrices(kwargs["model"]))

    gradual = GradualPruning("2:4", saliency="wanda", begin=1, end=3, every=2)
    trainer(model, tmp_path, Before(), gradual, steps=3, save_strategy="no").train()
    found = matrices(model)
    # The update after step 1 prunes nothing, for there the schedule begins; norms start anew behind it.
    first = {name: value.clone() for name, value in squares.items()}
    again = load(llama)
    squares.clear()
    for linear in trained_linears(again):
        again.get_submodule(linear.module).register_forward_pre_hook(caught(linear.name))
    trainer(again, tmp_path, steps=1, save_strategy="no").train()
    for name, weight in found.items():
        norms = (first[name] - squares[name]).clamp_min(0).sqrt()
        assert torch.equal(weight != 0, NM(2, 4).keep(unpruned[name].abs() * norms)), name


def test_the_gradient_passes_straight_through(llama: Path, tmp_path: Path) -> None:
    """SR-STE with plain SGD, restated by a second model: W ← W − rate (g(W∘M) + λ (1−M)∘W)."""
    rate, decay, steps = 0.5, 0.03, 3
    seen, orders = Watch(), []

    class Given(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs["model"]
            forward = model.forward

            def caught(*given: Any, **named: Any) -> Any:
                orders.append(named["input_ids"].clone())
                return forward(*given, **named)

            model.forward = caught

    model = load(llama)
    gradual = GradualPruning("2:4", straight_through=True, decay=decay, end=steps)
    options = {"optim": "sgd", "learning_rate": rate, "weight_decay": 0.0, "max_grad_norm": 0.0}
    trainer(model, tmp_path, gradual, Given(), seen, steps=steps, save_strategy="no", **options).train()
    again = load(llama)
    linears = {linear.parameter for linear in trained_linears(again)}
    dense = {name: value.detach().clone() for name, value in again.named_parameters()}
    masks = {}
    for step in range(steps + 1):
        for name, value in again.named_parameters():
            masks[name] = NM(2, 4).keep(dense[name].abs()) if name in linears else torch.tensor(True)
            value.data.copy_(dense[name] * masks[name])
        now = matrices(again)
        for name, weight in seen.weights[step].items():
            assert torch.allclose(weight, now[name], atol=1e-5), (step, name)
        if step < steps:
            again.zero_grad()
            again(input_ids=orders[step], labels=orders[step]).loss.backward()
            for name, value in again.named_parameters():
                assert value.grad is not None
                dense[name] -= rate * (value.grad + decay * ~masks[name] * dense[name])
    revived = [(seen.weights[0][name] == 0) & (weight != 0) for name, weight in seen.weights[steps].items()]
    assert any(bool(mask.any()) for mask in revived)  # masks are free until the end


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": "50%", "saliency": "magnitude"},
        {"sparsity": "2:4", "saliency": "movement"},
        {"sparsity": "2:4", "saliency": "wanda"},
        {"sparsity": "2:4", "straight_through": True},
    ],
)  # fmt: skip
def test_resuming_gives_what_an_unbroken_run_gives(options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    """Saved in the middle of the schedule (step 3 of 5, two after the last update), and once more when it is over."""
    chosen = {"end": 5, **({} if "straight_through" in options else {"every": 2}), **options}
    whole = load(llama)
    trainer(whole, tmp_path, GradualPruning(**chosen), steps=8).train()
    for step in (3, 6):
        again = load(llama)
        made = trainer(again, tmp_path, GradualPruning(**chosen), steps=8, save_strategy="no")
        made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for (name, one), two in zip(whole.named_parameters(), again.named_parameters(), strict=True):
            assert torch.equal(one, two[1]), (step, name)
    for other, words in (
        ({"ignore": ["*.q_proj"]}, "another ignore"),
        ({"end": 6}, r"another end \(5 there, 6 here\)"),
    ):
        made = trainer(load(llama), tmp_path, GradualPruning(**{**chosen, **other}), steps=8, save_strategy="no")
        with pytest.raises(UserError, match=words):
            made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-3" / FILE).unlink()
    made = trainer(load(llama), tmp_path, GradualPruning(**chosen), steps=8, save_strategy="no")
    with pytest.raises(UserError, match="was not saved by a training with GradualPruning"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": "4:2"}, "0 < N < M"),
        ({"saliency": "movment"}, "did you mean 'movement'"),
        ({"begin": 5, "end": 5}, "begin < end"),
        ({"initial": 0.7, "begin": 1}, "initial must lie in"),
        ({"initial": 0.1}, "must be at least 1"),
        ({"straight_through": True}, "for N:M patterns"),
        ({"sparsity": "2:4", "straight_through": True, "saliency": "wanda"}, "goes by magnitude"),
        ({"decay": -1.0}, "decay must be"),
        ({"sparsity": "2:4", "straight_through": True, "every": 3}, "leave every out"),
    ],
)
def test_mistakes(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        GradualPruning(**options)


def test_mistakes_that_show_when_training_begins(llama: Path, tmp_path: Path) -> None:
    experts = make("mixtral", tmp_path / "mixtral", num_hidden_layers=1)
    for folder, options, words in (
        (llama, {"end": 7}, "ends after step 7, but training has 6"),
        (llama, {"sparsity": "2:5"}, "needs in_features divisible by 5; model.layers.0.self_attn.q_proj has 32"),
        (llama, {"ignore": ["*"]}, "nothing to prune"),
        (experts, {"saliency": "wanda"}, "single experts"),
    ):
        with pytest.raises(UserError, match=words):
            trainer(load(folder), tmp_path, GradualPruning(**options), save_strategy="no").train()
    model = load(llama)
    model.peft_config = {"default": None}
    with pytest.raises(UserError, match="adapters"):
        trainer(model, tmp_path, GradualPruning(), save_strategy="no").train()
    model = load(experts)
    trainer(model, tmp_path, GradualPruning(saliency="wanda", ignore=["*.experts.*"]), save_strategy="no").train()
    assert {name: bool((weight == 0).any()) for name, weight in matrices(model).items()} == {
        name: ".experts." not in name for name in matrices(model)
    }


def test_the_weights_of_an_earlier_step_are_not_taken_back(llama: Path, tmp_path: Path) -> None:
    made = trainer(load(llama), tmp_path, GradualPruning("2:4"), save_strategy="no")
    made.args.load_best_model_at_end = True  # its own conditions are about evaluations
    with pytest.raises(UserError, match="load_best_model_at_end takes back weights of a step with other masks"):
        made.train()


def test_another_trainings_checkpoint_of_the_same_step_is_told(llama: Path, tmp_path: Path) -> None:
    """The Trainer's callbacks are not told from where it goes on: what lies beside other weights is no use."""
    chosen = {"sparsity": "2:4", "saliency": "movement", "end": 5, "every": 2}
    for name, rate in (("one", 1e-2), ("other", 1e-3)):
        trainer(load(llama), tmp_path / name, GradualPruning(**chosen), learning_rate=rate).train()
    there = str(tmp_path / "one" / "checkpoint-3")
    made = trainer(load(llama), tmp_path / "other", GradualPruning(**chosen), save_strategy="no")
    with pytest.raises(UserError, match=r"checkpoint-3.* lies beside other weights than .*resume_from_checkpoint="):
        made.train(resume_from_checkpoint=there)
    again = load(llama)
    made = trainer(
        again, tmp_path / "other", GradualPruning(**chosen), save_strategy="no", resume_from_checkpoint=there
    )
    made.train(resume_from_checkpoint=there)
    whole = load(tmp_path / "one" / "checkpoint-6")
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), again.parameters(), strict=True))


IN_PROCESSES = """
import sys
from pathlib import Path
from llmprune.recover import GradualPruning
import torch
from tests.test_gradual import load, matrices
from tests.test_recover import trainer

folder, out, batch = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
model = load(folder)
gradual = GradualPruning("2:4", saliency="wanda", end=4, every=2)
several = {"ddp_backend": "gloo"} if batch == 1 else {}
made = trainer(model, out, gradual, save_strategy="no", optim="sgd", batch=batch, **several)
if batch == 1 and made.args.process_index == 1:  # a linear whose inputs one process never sees
    known = gradual._see
    gradual._see = lambda path, *given: None if path.endswith("q_proj") else known(path, *given)
made.train()
torch.save(matrices(model), out / f"{made.args.process_index}.pt")
"""


def test_two_processes_prune_as_one(llama: Path, tmp_path: Path) -> None:
    """Each sees half of the inputs, and of one kind of linear one of them sees none at all."""
    python = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    (tmp_path / "in_processes.py").write_text(IN_PROCESSES)
    for start, name, batch in (([sys.executable], "one", "2"), (python, "two", "1")):
        command = [*start, str(tmp_path / "in_processes.py"), str(llama), str(tmp_path / name), batch]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=240, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two, other = (torch.load(tmp_path / f"{name}.pt") for name in ("one/0", "two/0", "two/1"))
    for name, weight in one.items():
        assert bool((two[name].unflatten(1, (-1, 4)) == 0).sum(-1).eq(2).all()), name
        assert torch.equal(two[name], other[name]), name
        if not name.endswith("q_proj"):
            assert float(((weight == 0) == (two[name] == 0)).float().mean()) > 0.99, name


def test_training_that_ends_too_early(llama: Path, tmp_path: Path) -> None:
    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    with pytest.raises(Failure, match=r"ended after 2 of the 4 steps in which 50% is reached"):
        trainer(load(llama), tmp_path, GradualPruning("50%"), Stop(), save_strategy="no").train()
