"""The work is laid out for the memory there is: the output stays the same, and the peak stays below."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llmprune
from llmprune import budget, memory
from llmprune.budget import Needs, Room, Schedule, Work
from llmprune.errors import Failure, Interrupted, UserError
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import resolve
from llmprune.model.survey import Held
from llmprune.model.watch import Input, Stage
from llmprune.model.writer import JOURNAL, REPORT
from llmprune.pipeline import plan
from llmprune.progress import Silent
from llmprune.recipe import parse_size
from llmprune.report import tables
from llmprune.report.record import Report
from llmprune.solvers import Buffers
from llmprune.stats import LEVELS
from tests.families import SHAPES, make

GIB = 2**30
LENGTH = 16
OPTIONS: dict[str, Any] = {"samples": 6, "length": LENGTH}

MIXED: dict[str, Any] = {
    "sparsity": "2:4",
    "method": "sparsegpt",
    "rules": [
        {"match": "*.down_proj", "method": "magnitude"},
        {"match": "*.q_proj", "skip": True},
        {"match": "*.o_proj", "method": "wanda", "sparsity": "50%"},
        {"match": "re:.*layers\\.1\\..*", "sparsity": "75%"},
    ],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mixtral": ("mixtral", {}),
    "gpt2": ("gpt2", {}),
    "attention beside the mlp": ("gptj", {"sparsity": "50%"}),
    "shared experts, latent attention": ("deepseek_v3", {}),
    "shared experts": ("qwen2_moe", {"method": "wanda"}),
    "gate and up interleaved": ("gpt_oss", {}),
    "weights read without a call": ("mamba", {"rules": [{"match": "*.dt_proj", "method": "magnitude"}]}),
    "mixed": ("llama", MIXED),
    "mixed experts": ("mixtral", MIXED),
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Some are born great, some achieve greatness, and some have greatness thrust upon them. " * 1000)
    return str(path)


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def narrow(monkeypatch: pytest.MonkeyPatch, held: float) -> None:
    """Let there be room for `held` GiB, which the statistics of an input and a batch that stands still seem to take."""
    monkeypatch.setattr(budget, "_held", lambda entry: GIB)
    monkeypatch.setattr(Needs, "_still", lambda self, work, option: 0 if work.dense else GIB * option.held)
    monkeypatch.setattr("llmprune.prepare.room", lambda checkpoint, cap: roomy(held))


def crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cap, let there be too little room for activations on the host, and for any batch that stands still."""
    monkeypatch.setattr(memory, "available", lambda: 2 * GIB)
    monkeypatch.setattr(Needs, "_kept", lambda self, option: budget.Peak(3 * GIB if option.place == "host" else 0))
    monkeypatch.setattr(Needs, "_still", lambda self, work, option: 3 * GIB * option.held)


def roomy(held: float) -> Room:
    return Room(memory.current() + budget.GROWTH + budget.EXPERTS + int(held * GIB), None, True)


def calibrated(text: str, true_sequential: bool = True) -> dict[str, Any]:
    return {"calibration": {"source": text, **OPTIONS, "true_sequential": true_sequential}}


@pytest.mark.parametrize("held", [1.5, 2.5])
@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_leaner_schedules_write_the_same_bytes(
    case: str, true_sequential: bool, held: float, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = CASES[case]
    source = make(family, tmp_path / "model")
    monkeypatch.setitem(budget.BATCH_TOKENS, "cpu", LENGTH)  # one sequence at once, with little room and with much
    options = {"sparsity": "2:4", "method": "sparsegpt", **calibrated(text, true_sequential), **changes}
    _, fast = plan(source, **options)
    assert (fast.schedule.place, fast.schedule.overlap, fast.schedule.batch) == ("host", True, 1)
    assert fast.schedule.held == fast.schedule.batches == OPTIONS["samples"]
    before = llmprune.prune(source, out=tmp_path / "fast", **options)
    narrow(monkeypatch, held)
    _, lean = plan(source, **options)
    most = max(len(stage.inputs) for stages in fast.schedule.stages for stage in stages)
    assert max(len(stage.inputs) for stages in lean.schedule.stages for stage in stages) == min(most, int(held))
    if true_sequential:
        assert lean.schedule.held == (int(held) - 1 if most == 1 else 0)
    else:
        assert (lean.schedule.place, lean.schedule.overlap, lean.schedule.batch) == ("disk", False, 1)
        assert {len(stages) for stages in fast.schedule.stages} == {1}
        assert all(len(stages) > 1 for stages in lean.schedule.stages)
    after = llmprune.prune(source, out=tmp_path / "lean", **options)
    assert shards(tmp_path / "fast") == shards(tmp_path / "lean")
    assert after.linears == before.linears


@pytest.mark.parametrize(
    ("place", "overlap", "held"), [("host", False, 6), ("disk", True, 6), ("host", True, 0), ("disk", False, 1)]
)
@pytest.mark.parametrize(("family", "asymmetric"), [("llama", 0.0), ("llama", 0.5), ("gemma3_text", 0.5)])
def test_each_lean_choice_alone_writes_the_same_bytes(
    family: str,
    asymmetric: float,
    place: str,
    overlap: bool,
    held: int,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make(family, tmp_path / "model")
    monkeypatch.setitem(budget.BATCH_TOKENS, "cpu", LENGTH)
    options = {"sparsity": "2:4", "calibration": text, "calibration.asymmetric": asymmetric, **OPTIONS}
    llmprune.prune(model, out=tmp_path / "fast", **options)
    chosen = Needs.schedule

    def other(self: Needs, *arguments: Any) -> Schedule:
        return budget.replace(chosen(self, *arguments), place=place, overlap=overlap, held=held)

    monkeypatch.setattr(Needs, "schedule", other)
    _, made = plan(model, **options)
    assert (made.schedule.place, made.schedule.overlap, made.schedule.held) == (place, overlap, held)
    llmprune.prune(model, out=tmp_path / "lean", **options)
    assert shards(tmp_path / "fast") == shards(tmp_path / "lean")


def test_an_expert_that_the_first_batch_does_not_reach_is_seen_later(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make("mixtral", tmp_path / "model", num_local_experts=16, num_experts_per_tok=1)
    monkeypatch.setitem(budget.BATCH_TOKENS, "cpu", 2)
    options: dict[str, Any] = {"sparsity": "2:4", "method": "wanda", "calibration": text, "samples": 64, "length": 2}
    before = llmprune.prune(source, out=tmp_path / "fast", **options)
    first = {record.name: record.tokens for record in before.pruned if ".experts.0." in record.name}
    assert any(first.values())
    narrow(monkeypatch, 3.5)
    _, made = plan(source, **options)
    assert {len(stage.inputs) for stages in made.schedule.stages for stage in stages} == {1, 3}
    after = llmprune.prune(source, out=tmp_path / "lean", **options)
    assert after.linears == before.linears
    assert shards(tmp_path / "fast") == shards(tmp_path / "lean")


class TestRunTwice:
    """A block in which one linear is run twice is captured in one run: what it does first changes what it sees."""

    @pytest.fixture(autouse=True)
    def twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.models.llama.modeling_llama import LlamaMLP

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            once = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            more: torch.Tensor = once + self.down_proj(self.up_proj(x + once))
            return more

        monkeypatch.setattr(LlamaMLP, "forward", forward)

    def test_it_is_one_stage_or_none(
        self, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = {"sparsity": "2:4", "method": "wanda", "calibration": text, **OPTIONS}
        narrow(monkeypatch, 2.5)
        with pytest.raises(UserError, match="the smallest that can hold is"):
            plan(model, **options)
        narrow(monkeypatch, 7.5)
        _, made = plan(model, **options)
        assert [[stage.dense for stage in stages] for stages in made.schedule.stages] == [[True]] * 3
        report = llmprune.prune(model, out=tmp_path / "out", **options)
        seen = {record.name.rsplit(".", 1)[-1]: record.tokens for record in report.pruned}
        assert seen["up_proj"] == seen["down_proj"] == 2 * seen["gate_proj"] == 2 * 6 * LENGTH


class TestStages:
    """Of random work for a model of three blocks."""

    @pytest.fixture
    def checkpoint(self, model: Path) -> Checkpoint:
        return Checkpoint(resolve(model), "cpu")

    @pytest.fixture(autouse=True)
    def empty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "current", lambda: 0)

    def work(self, number: int, chance: random.Random, whole: bool = False) -> Work:
        dense = whole or chance.random() < 0.3
        count = chance.randint(0, 12)
        names = [f"{number}.{place}" for place in range(count)]
        features = [chance.choice((256, 1024, 4096, 11008)) for _ in names]
        inputs = tuple(
            Input((name,), width, chance.choice(LEVELS)) for name, width in zip(names, features, strict=True)
        )
        rows = {entry: chance.choice((256, 4096, 22016)) for entry in inputs}
        buffers = {entry: chance.choice((Buffers(), Buffers(factor=3, weights=7))) for entry in inputs}
        cuts = [0, *sorted(chance.sample(range(1, count), chance.randint(0, count - 1))), count] if count else [0]
        moments = tuple(inputs[start:end] for start, end in itertools.pairwise([0, count] if dense else cuts) if end)
        held = Held(chance.choice((0, 40_000, 400_000)), chance.choice((0, 32)))
        return Work(number, moments, rows, buffers, dense, whole, held, 11008, 4096 * 11008, 0)

    @pytest.mark.parametrize("seed", range(40))
    def test_every_input_once_in_as_few_stages_as_fit(self, seed: int, checkpoint: Checkpoint) -> None:
        chance = random.Random(seed)
        works = [self.work(number, chance) for number in range(3)]
        needs = Needs(checkpoint, works, 8, 64, None)
        counts: list[list[int]] = []
        holding: list[int] = []
        for host in sorted(int(2 ** chance.uniform(27, 33)) for _ in range(12)):
            had = Room(host, None, True)
            try:
                made = needs.schedule(8, had)
            except UserError as error:
                assert not counts  # what fits into less fits into more
                named = parse_size(str(error).rsplit(" ", 1)[-1])
                assert host < named
                continue
            assert had.holds(made.peak)
            for work, stages in zip(works, made.stages, strict=True):
                assert all(stage.inputs and stage.dense == work.dense for stage in stages)
                left = list(stages)
                for moment in work.moments:  # what is there at once may be split up, and then the last goes first
                    seen: tuple[Input, ...] = ()
                    while len(seen) < len(moment):
                        seen = left.pop(0).inputs + seen
                    assert seen == moment
                assert not left
            assert made.held == 0 or all(
                len(stages) == len(work.moments) for work, stages in zip(works, made.stages, strict=True)
            )
            counts.append([len(stages) for stages in made.stages])
            holding.append(made.held * made.batch)
        for fewer, more in zip(counts[1:], counts[:-1], strict=True):
            assert all(a <= b for a, b in zip(fewer, more, strict=True))
        assert holding == sorted(holding)

    @pytest.mark.parametrize("seed", range(10))
    def test_two_neighbours_that_would_fit_together_are_together(self, seed: int, checkpoint: Checkpoint) -> None:
        chance = random.Random(seed)
        works = [self.work(number, chance) for number in range(3)]
        needs = Needs(checkpoint, works, 8, 64, None)
        had = Room(self.least(needs), None, True)
        made = needs.schedule(8, had)
        for number, (work, stages) in enumerate(zip(works, made.stages, strict=True)):
            for place, (one, two) in enumerate(itertools.pairwise(stages)):
                together = two.inputs + one.inputs
                if any(set(together) <= set(moment) for moment in work.moments):
                    merged = (*stages[:place], Stage(together, work.dense, work.again), *stages[place + 2 :])
                    option = budget.replace(made, stages=(*made.stages[:number], merged, *made.stages[number + 1 :]))
                    assert not had.holds(needs._measured(option).peak)

    @pytest.mark.parametrize("seed", range(10))
    def test_a_block_that_is_whole_is_one_stage(self, seed: int, checkpoint: Checkpoint) -> None:
        chance = random.Random(seed)
        works = [self.work(number, chance, whole=number == 1) for number in range(3)]
        needs = Needs(checkpoint, works, 8, 64, None)
        made = needs.schedule(8, Room(self.least(needs), None, True))
        assert made.stages[1] == ((Stage(works[1].inputs, dense=True, again=True),) if works[1].inputs else ())

    def least(self, needs: Needs) -> int:
        """The smallest cap, as the refusal of none at all names it."""
        with pytest.raises(UserError) as caught:
            needs.schedule(8, Room(0, None, True))
        return parse_size(str(caught.value).rsplit(" ", 1)[-1])


PRUNE = """
import json, sys, llmprune
from llmprune import memory
model, out, text, method, cap = sys.argv[1:]
method = json.loads(method)
others = ("refine", "reconstruct", "calibration.asymmetric", "ignore")
after = {key: method.pop(key) for key in others if key in method}
before = memory.peak()
chosen = {"width": method} if {"channels", "hidden"} & method.keys() else {"sparsity": "2:4", "method": method}
report = llmprune.prune(model, out=out, calibration=text, samples=4, length=256, max_memory=cap, **chosen, **after)
print(json.dumps([report.predicted_memory, report.peak_memory, max(before, memory.peak()), report.sparsity]))
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PRUNE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("shape", "method"),
    [
        ("deep", {"name": "wanda"}),
        ("wide", {"name": "sparsegpt"}),
        ("sparse", {"name": "sparsegpt"}),
        ("wide", {"name": "admm", "iterations": 3, "gradual": 2}),
        ("wide", {"name": "alps", "iterations": 6}),
        (
            "wide",
            {
                "name": "wanda",
                "refine": [{"name": "swaps", "steps": 2}, "dsnot"],
                "reconstruct": [{"name": "cg", "steps": 2}],
            },
        ),
        ("deep", {"name": "wanda", "reconstruct": [{"name": "block", "steps": 4}]}),
        ("deep", {"name": "wanda", "reconstruct": ["cg"], "calibration.asymmetric": 0.5}),
        ("wide", {"name": "sparsegpt", "calibration.asymmetric": 0.5}),
        ("wide", {"channels": "25%", "by": "taylor"}),
        ("sparse", {"channels": "25%", "by": "taylor"}),
        ("wide", {"hidden": "25%"}),
        ("deep", {"hidden": "25%", "reconstruct": [{"name": "block", "steps": 4}]}),
    ],
)
def test_the_peak_is_below_the_smallest_cap_and_near_what_was_said(
    shape: str, method: dict[str, object], text: str, tmp_path: Path
) -> None:
    family, changes = SHAPES[shape]
    source, out = make(family, tmp_path / "model", dtype=torch.bfloat16, **changes), tmp_path / "out"
    refused = run(source, out, text, json.dumps(method), "1MB")
    assert not out.exists()
    found = re.search(r"UserError: --max-memory is .*: the smallest that can hold is (\S+)", refused.stderr)
    assert found is not None, refused.stderr
    done = run(source, out, text, json.dumps(method), found[1])
    assert done.returncode == 0, done.stderr
    predicted, measured, later, sparsity = json.loads(done.stdout.splitlines()[-1])
    assert sparsity > 0.49 or {"channels", "hidden"} & method.keys()
    assert measured <= later <= parse_size(found[1])
    assert 0.75 * measured <= predicted <= 1.25 * measured
    shutil.rmtree(tmp_path)


def test_what_is_left_of_a_large_block_is_held_once(text: str, tmp_path: Path) -> None:
    bulky = {**SHAPES["wide"][1], "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 32768}
    source, out = make("llama", tmp_path / "model", dtype=torch.bfloat16, **bulky), tmp_path / "out"
    ignored = [f"*.{name}" for name in ("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")]
    method = json.dumps({"name": "magnitude", "ignore": ignored})
    refused = run(source, out, text, method, "1MB")
    found = re.search(r"UserError: --max-memory is .*: the smallest that can hold is (\S+)", refused.stderr)
    assert found is not None, refused.stderr
    done = run(source, out, text, method, found[1])
    assert done.returncode == 0, done.stderr
    _, measured, later, _ = json.loads(done.stdout.splitlines()[-1])
    assert measured <= later <= parse_size(found[1])
    shutil.rmtree(tmp_path)


def test_a_cap_that_cannot_be_met_is_refused_before_work(model: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "llmprune", "prune", str(model), "-o", str(out), "--calibration", text]
    command += ["--samples", "6", "--length", str(LENGTH), "--max-memory"]
    refused = subprocess.run([*command, "100MiB"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert not out.exists()
    found = re.search(
        r"llmprune: --max-memory is 100MiB, but the phase '\w+' of this model takes more: "
        r"the smallest that can hold is (\S+)\n$",
        refused.stderr,
    )
    assert found is not None, refused.stderr
    done = subprocess.run([*command, found[1]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("use", ["calibration", "evaluate"])
def test_a_cap_that_a_text_would_break_is_refused_before_it_is_read(
    use: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "current", lambda: 400 * 2**20)  # other tests may have left more here
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        file.truncate(GIB)
    options = {"calibration": "builtin", **OPTIONS, use: str(path)}
    with pytest.raises(
        UserError, match=rf"--max-memory is 2.00GiB, but reading {path} as one text takes more"
    ) as caught:
        plan(model, max_memory="2GiB", **options)
    named = re.search(r"the smallest that can hold is (\S+); or give a shorter text", str(caught.value))
    assert named is not None
    assert 7.9 * GIB < parse_size(named[1]) < 12.7 * GIB
    _, made = plan(model, max_memory=named[1], **options)
    held = 7.9 * GIB if use == "evaluate" else 0
    assert all(peak.host > held for peak in made.schedule.memory.values())
    assert max(made.schedule.memory, key=lambda phase: made.schedule.memory[phase].host) == "tokens"


class TestWithoutACap:
    def test_what_does_not_fit_is_refused_with_a_way_out(
        self, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = {"out": tmp_path / "out", "calibration": text, **OPTIONS}
        monkeypatch.setattr(memory, "current", lambda: 400 * 2**20)
        monkeypatch.setattr(memory, "available", lambda: 10 * 2**20)
        told = (
            r"memory can be had, but this model needs (\S+) at the least .*; say --max-memory (\S+) to try it all the"
        )
        with pytest.raises(UserError, match=told) as caught:
            llmprune.prune(model, **options)
        assert not (tmp_path / "out").exists()
        found = re.search(told, str(caught.value))
        assert found is not None
        assert found[1] == found[2]
        llmprune.prune(model, **options, max_memory=found[1])

    def test_little_memory_does_not_change_the_batch(
        self, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        llmprune.prune(model, out=tmp_path / "a", calibration=text, **OPTIONS)
        crowd(monkeypatch)
        _, made = plan(model, calibration=text, **OPTIONS)
        assert (made.schedule.batch, made.schedule.place) == (6, "disk")
        assert made.schedule.held == 0
        llmprune.prune(model, out=tmp_path / "b", calibration=text, **OPTIONS)
        assert shards(tmp_path / "a") == shards(tmp_path / "b")


CAP = f"{budget.GROWTH + 130 * 2**20}B"
CAPPED: dict[str, Any] = {**OPTIONS, "max_memory": CAP}
SMALL, BIG, HUGE = (2**27 + 2**10 * more for more in (0, 1650, 1860))
"""What a process may hold: batches of six are the fastest, of three, of one; six fit under the cap in the first two."""


class Stopping(Silent):
    """Stops when some blocks are done."""

    def __init__(self, blocks: int = 2) -> None:
        self.blocks = blocks

    def over(self, items: Any, title: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if title == "pruning blocks" and number == self.blocks:
                raise KeyboardInterrupt
            yield item


class TestResuming:
    @pytest.fixture
    def whole(self, model: Path, text: str, tmp_path: Path) -> dict[str, bytes]:
        llmprune.prune(model, out=tmp_path / "whole", calibration=text, **OPTIONS)
        return shards(tmp_path / "whole")

    def stop(self, model: Path, out: Path, text: str, **options: Any) -> None:
        with pytest.raises(Interrupted, match="2 of 3 blocks are finished"):
            llmprune.prune(model, out=out, calibration=text, progress=Stopping(), **{**OPTIONS, **options})

    def test_with_another_cap(self, whole: dict[str, bytes], model: Path, text: str, tmp_path: Path) -> None:
        out = tmp_path / "out"
        self.stop(model, out, text, max_memory="20GiB")
        report = llmprune.prune(model, out=out, calibration=text, **OPTIONS, max_memory="19GiB")
        assert report.resumed == 2
        assert shards(out) == whole

    def test_where_other_batches_would_be_chosen_now(
        self, whole: dict[str, bytes], model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        self.stop(model, out, text)
        monkeypatch.setitem(budget.BATCH_TOKENS, "cpu", 2 * LENGTH)
        assert llmprune.prune(model, out=out, calibration=text, **OPTIONS).resumed == 2
        assert llmprune.verify(out).ok
        assert shards(out) == whole

    @pytest.mark.parametrize(("first", "later"), [(SMALL, BIG), (BIG, SMALL)])
    def test_a_process_that_holds_more_or_less(
        self, first: int, later: int, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It would take other batches, which would be other bytes."""
        whole = {}
        for held in (later, first):
            monkeypatch.setattr(memory, "current", lambda held=held: held)
            llmprune.prune(model, out=tmp_path / str(held), calibration=text, **CAPPED)
            whole[held] = shards(tmp_path / str(held))
        assert whole[first] != whole[later]
        out = tmp_path / "out"
        self.stop(model, out, text, max_memory=CAP)
        monkeypatch.setattr(memory, "current", lambda: later)
        report = llmprune.prune(model, out=out, calibration=text, **CAPPED)
        assert report.resumed == 2
        assert {block.batch for block in report.blocks} == {report.batch}
        assert tables.batch_notes(report) == []
        assert shards(out) == whole[first]

    def test_batches_for_which_there_is_no_room_are_told_of(
        self, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        monkeypatch.setattr(memory, "current", lambda: SMALL)
        self.stop(model, out, text, max_memory=CAP)
        monkeypatch.setattr(memory, "current", lambda: HUGE)
        report = llmprune.prune(model, out=out, calibration=text, **CAPPED)
        assert (report.batch, [block.batch for block in report.blocks]) == (6, [6, 6, 1])
        (note,) = tables.batch_notes(report)
        assert note.startswith("1 of 3 blocks took 1 sequences at once, not 6 as when the run began")
        assert note in tables.all_notes(Report.read(json.loads((out / REPORT).read_text()), out))

    def test_it_is_told_also_when_there_is_room_again(
        self, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        for held, blocks in ((SMALL, 1), (HUGE, 2)):
            monkeypatch.setattr(memory, "current", lambda held=held: held)
            with pytest.raises(Interrupted, match=f"{blocks} of 3 blocks are finished"):
                llmprune.prune(model, out=out, calibration=text, progress=Stopping(blocks), **CAPPED)
        monkeypatch.setattr(memory, "current", lambda: SMALL)
        report = llmprune.prune(model, out=out, calibration=text, **CAPPED)
        assert (report.batch, [block.batch for block in report.blocks]) == (6, [6, 1, 6])
        assert len(tables.batch_notes(report)) == 1

    @pytest.mark.parametrize("chosen", [{"width": {"hidden": "25%"}}, {"allocation": "owl", "sparsity": "50%"}])
    def test_batches_that_something_was_chosen_with(
        self, chosen: dict[str, Any], model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        llmprune.prune(model, out=tmp_path / "whole", calibration=text, **OPTIONS, **chosen)
        out = tmp_path / "out"
        self.stop(model, out, text, **chosen)
        header = json.loads((out / JOURNAL).read_text().splitlines()[0])
        assert header["batches"] == ({"choose": 6, "prune": 6} if "width" in chosen else {"prune": 6})
        monkeypatch.setitem(budget.BATCH_TOKENS, "cpu", LENGTH)
        report = llmprune.prune(model, out=out, calibration=text, **OPTIONS, **chosen)
        assert report.resumed == 2
        assert shards(out) == shards(tmp_path / "whole")

    @pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate here")
    def test_a_disk_without_room_for_the_activations(
        self, whole: dict[str, bytes], model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        self.stop(model, out, text)
        finished = shards(out)
        crowd(monkeypatch)

        def full(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(Failure, match=rf"cannot be kept in {out}: No space left on device; make room there"):
                llmprune.prune(model, out=out, calibration=text, **OPTIONS)
        assert shards(out) == finished
        report = llmprune.prune(model, out=out, calibration=text, **OPTIONS)
        assert report.resumed == 2
        assert shards(out) == whole
