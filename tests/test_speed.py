"""Measured speed: the statistics, exactly the tokens asked for, processes that die, mistakes, and what is shown."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import llmprune
from llmprune.cli import main
from llmprune.errors import Failure, UserError
from llmprune.evaluate import speed as room
from llmprune.evaluate import worker
from llmprune.evaluate.worker import Load, Turn, Worker
from llmprune.model.index import hash_weights
from llmprune.model.quiet import quiet
from llmprune.report import card, page, results
from llmprune.report import speed as told
from llmprune.report.speed import Ratio, Speed, Spread, Timed
from llmprune.report.tables import size
from tests.conftest import hears_interrupts
from tests.families import make

pytestmark = pytest.mark.usefixtures("no_pages")

BLOCKS = 4
SHORT: dict[str, Any] = {"prompt_tokens": 20, "new_tokens": 6, "rounds": 3, "threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("dense") / "dense", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def pruned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    llmprune.prune(dense, out=out, depth={"drop": [1]})
    return out


@pytest.fixture(scope="module")
def found(dense: Path, pruned: Path) -> Speed:
    return llmprune.speed(dense, [pruned], batch=2, out=pruned / "evaluation", **SHORT)


# -- statistics ------------------------------------------------------------------------------------------------------


def made_up(true: float, rounds: int, draw: numpy.random.Generator) -> tuple[list[float], list[float]]:
    """Speeds of two models on a machine whose own pace wanders by a third, with noise of 3 % for each."""
    pace = numpy.exp(draw.normal(0, 0.3, rounds))
    dense, model = (pace * numpy.exp(draw.normal(0, 0.03, rounds)) for _ in range(2))
    return list(100 * dense), list(100 * true * model)


def test_a_planted_difference_is_found_though_the_pace_wanders() -> None:
    draw = numpy.random.default_rng(0)
    for true, verdict in ((1.2, "faster"), (1 / 1.2, "slower")):
        seen = [room.compared(*made_up(true, 5, draw), together=2) for _ in range(200)]
        assert sum(one[3] == verdict for one in seen) > 190
        assert sum(one[1] <= true <= one[2] for one in seen) > 190  # type: ignore[operator]


def test_equal_models_are_called_equal_as_often_as_the_level_says() -> None:
    draw = numpy.random.default_rng(1)
    together = 4
    seen = [[room.compared(*made_up(1, 5, draw), together)[3] for _ in range(together)] for _ in range(1000)]
    wrong = sum(any(verdict != "no difference beyond noise" for verdict in one) for one in seen) / len(seen)
    # Of 1,000 results 50 are expected to have at least one, give or take 7.
    assert 0.025 < wrong < 0.075


def test_the_interval_is_that_of_students_t() -> None:
    dense, model = [100.0, 80, 120, 90], [130.0, 100, 150, 125]
    logs = [math.log(b / a) for a, b in zip(dense, model, strict=True)]
    reach = 4.176535 * statistics.stdev(logs) / 2  # of t with 3 degrees of freedom, 1.25 % on each side
    mean, low, high, verdict = room.compared(dense, model, together=2)
    assert mean == pytest.approx(math.prod(b / a for a, b in zip(dense, model, strict=True)) ** 0.25)
    assert (low, high) == (
        pytest.approx(mean / math.exp(reach), rel=1e-5),
        pytest.approx(mean * math.exp(reach), rel=1e-5),
    )
    assert verdict == "faster"


def test_the_ratio_and_its_interval_turn_over_with_the_models() -> None:
    one, other = made_up(1.1, 6, numpy.random.default_rng(2))
    there, back = room.compared(one, other), room.compared(other, one)
    assert there[0] * back[0] == pytest.approx(1)
    assert there[1] * back[2] == pytest.approx(1)  # type: ignore[operator]


def test_one_round_says_nothing() -> None:
    assert room.compared([100.0], [300.0]) == (pytest.approx(3), None, None, "not known")


def test_spread() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3, 2, 4, [4, 1, 3, 2, 5])
    assert Spread.of([7.0]) == Spread(7, 7, 7, [7])


def test_turns_go_there_and_back() -> None:
    assert [room.turns(3, number) for number in range(3)] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


def timed(name: str, speeds: list[float], decode: bool = True) -> Timed:
    rate = Spread.of(speeds)
    sizes = dict.fromkeys(("parameters", "file_bytes", "weight_bytes", "cache_bytes", "base_memory", "peak_memory"), 1)
    return Timed(name, name, {}, name == "dense", **sizes, cache_bytes_per_token=1.0, peak_device_memory=None,
                 dtype="x", cache="y", first_token=rate, prefill=rate, decode=rate if decode else None)  # fmt: skip


def test_each_model_has_a_ratio_in_each_phase_that_was_measured() -> None:
    models = [timed("dense", [10, 11, 10]), timed("a", [20, 22, 21]), timed("b", [10, 10.5, 10.2], decode=False)]
    made = room.ratios(models)
    assert [(one.model, one.phase) for one in made] == [("a", "prefill"), ("a", "decode"), ("b", "prefill")]
    assert made[0].low == room.compared([10, 11, 10], [20, 22, 21], together=3)[1]
    assert [one.verdict for one in made] == ["faster", "faster", "no difference beyond noise"]


# -- in the process --------------------------------------------------------------------------------------------------


def alone(folder: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy decoding without a cache: the whole sequence is run anew for each token."""
    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = torch.tensor(prompts)
        for _ in range(tokens):
            logits = model(input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, len(prompts[0]) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mamba"])
def test_exactly_the_tokens_of_greedy_decoding(family: str, tmp_path: Path) -> None:
    folder = make(family, tmp_path / "model")
    prompts = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(3)).tolist()
    expected = alone(folder, prompts, 9)
    config = json.loads((folder / "generation_config.json").read_text())
    # What would end it at the second token, draw, or make a static cache, if it were heeded.
    config |= {"eos_token_id": [expected[0][1]], "do_sample": True, "temperature": 5.0, "max_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(config))
    model = worker.load(Load(folder, "cpu", "auto", None, False))
    for look in (True, False):
        took = worker.generate(model, Turn(prompts, 9, look))
        assert took.made == expected
        assert took.first > 0
        assert took.rest > 0
    one = worker.generate(model, Turn(prompts, 1))
    assert one.made == [row[:1] for row in expected]


def test_the_bytes_of_a_cache_are_those_of_its_tensors() -> None:
    keys = torch.zeros(2, 4, 10, 8)
    cache = DynamicCache()
    for layer in range(3):
        cache.update(keys.clone(), keys.clone(), layer)
    assert worker.held(cache) == 3 * 2 * keys.nbytes
    assert worker.held({"a": [keys, keys[:, :, 3:]], "b": (keys,)}) == keys.nbytes  # one storage, which is held whole
    assert worker.held(None) == 0


# -- end to end ------------------------------------------------------------------------------------------------------


def test_two_models(found: Speed, dense: Path, pruned: Path) -> None:
    whole, less = found.models
    assert (whole.name, less.name) == ("dense", "out")
    assert (whole.dense, less.dense) == (True, False)
    with quiet():
        counts = [AutoModelForCausalLM.from_pretrained(folder).num_parameters() for folder in (dense, pruned)]
    for model, folder, blocks, count in zip(found.models, (dense, pruned), (BLOCKS, BLOCKS - 1), counts, strict=True):
        assert model.parameters == count
        assert model.weight_bytes == 4 * count
        assert model.file_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        each = blocks * 2 * 2 * 8 * 4  # keys and values of two heads, 8 wide, in float32
        assert model.cache_bytes_per_token == each
        assert model.cache_bytes == 2 * (20 + 6 - 1) * each
        assert model.cache == "DynamicCache"
        assert model.dtype == "float32"
        assert 50e6 < model.base_memory < model.peak_memory
        assert model.peak_device_memory is None
        assert model.decode is not None
        assert len(model.prefill.values) == len(model.decode.values) == 3
        assert model.prefill.values == [2 * 20 / seconds for seconds in model.first_token.values]
    assert found.ratios == room.ratios(found.models)
    assert len(found.ratios) == 2
    assert (found.device, found.threads, found.batch, found.rounds) == ("cpu", 1, 2, 3)
    assert found.device_name
    assert set(found.versions) >= {"torch", "transformers", "llmprune"}


def test_what_is_kept_is_what_is_returned(found: Speed, pruned: Path) -> None:
    kept = results.read_speed(pruned)
    assert kept == found
    assert kept is not None
    own = kept.own(hash_weights(pruned))
    assert own is not None
    assert own.name == "out"
    assert {path.name for path in (pruned / "evaluation").iterdir()} == {"speed.json"}


def test_what_is_of_another_model_is_not_of_this_one(found: Speed, dense: Path, pruned: Path, tmp_path: Path) -> None:
    assert found.own(hash_weights(dense)) is None
    shutil.copytree(pruned, tmp_path / "moved")
    assert found.own(hash_weights(tmp_path / "moved")) is found.models[1]


def test_the_same_prompts_by_the_same_seed(dense: Path) -> None:
    (candidate,) = room._find([dense], "auto", False, room.Silent())
    first, again, other = (room.draw_prompts(candidate, "builtin", 15, 3, seed) for seed in (4, 4, 5))
    assert first.shape == (3, 15)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_commands_json(dense: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt-tokens", "9", "--new-tokens", "1", "--rounds", "1", "--threads", "1", "--device", "cpu"]
    assert main(["speed", str(dense), "--json", "-o", str(tmp_path / "new"), *arguments]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads((tmp_path / "new" / "speed.json").read_text())
    assert printed["ratios"] == []
    assert printed["models"][0]["decode"] is None
    assert len(printed["models"]) == 1


def test_tables(found: Speed) -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    for table in told.tables_of(found):
        console.print(table)
    shown = console.export_text()
    for words in ("prefill, tokens/s", "Against dense", "DynamicCache", *(entry.verdict for entry in found.ratios)):
        assert words in shown + "\n".join(told.lines(found))
    assert "all 2 intervals together hold at 95%" in "\n".join(told.lines(found))


# -- where it is shown -----------------------------------------------------------------------------------------------


def planted(found: Speed, verdict: Any, ratio: float) -> Speed:
    again = Speed.read(json.loads(json.dumps(found.to_dict())))
    again.ratios = [Ratio("out", phase, ratio, ratio - 0.05, ratio + 0.05, verdict) for phase in told.PHASES]
    return again


def test_the_card_says_what_was_measured_and_no_more(found: Speed, pruned: Path) -> None:
    report, shards = json.loads((pruned / "llmprune.json").read_text()), hash_weights(pruned)

    def text(speed: str) -> str:
        return str(card.make_card(report, [], "me/small", {}, speed=speed).text)

    faster = text(card.known_speed(planted(found, "faster", 1.3), shards))
    assert "prefill is 1.3 times as fast (1.25 to 1.35); decode is 1.3 times as fast" in faster
    assert found.device_name in faster
    assert "not measured" not in faster.partition("## Speed")[2]
    equal = text(card.known_speed(planted(found, "no difference beyond noise", 1.02), shards))
    assert "no difference beyond noise in prefill" in equal
    assert "times as fast" not in equal
    assert "how much faster that is was not measured" in text(card.known_speed(None, shards))
    assert card.known_speed(found, {}) == ""  # of another model


def test_the_page_shows_it(found: Speed, pruned: Path) -> None:
    kept = results.read_results(pruned)
    _, rows, missing = page.verdict(kept)
    assert "speed" not in missing
    shown = {row.name: row for row in rows}
    assert shown["Decode, tokens/s"].difference == f"× {found.ratios[1]}"
    assert shown["Prefill, tokens/s"].dense == told.spread(found.dense.prefill)
    assert shown["Peak memory, loading included"].dense == size(found.dense.peak_memory)
    _, rows, missing = page.verdict(results.Results(kept.report, kept.shards))
    assert "speed" in missing
    assert not any("tokens/s" in row.name for row in rows)


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_process_that_fails_or_is_killed_is_named_with_the_reason(dense: Path, pruned: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(dense, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with worker.working(["one", "two"]) as (one, two):
        with pytest.raises(UserError, match="one: cannot be loaded"):
            one.load(Load(broken, "cpu", "auto", 1, False))
        for made, folder in ((one, dense), (two, pruned)):
            made.load(Load(folder, "cpu", "auto", 1, False))
        with pytest.raises(Failure, match="one: cannot generate: IndexError"):
            one.turn(Turn([[100_000]], 2))
        os.kill(two.pid, signal.SIGKILL)
        with pytest.raises(Failure, match=r"the process of two has died: it was killed, .* memory runs out"):
            two.turn(Turn([[5, 6, 7]], 2))
        assert len(one.turn(Turn([[5, 6, 7]], 2)).made[0]) == 2  # it goes on
    for made in (one, two):
        with pytest.raises(ProcessLookupError):
            os.kill(made.pid, 0)


def test_a_death_while_it_works_leaves_no_file(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, count = Worker.turn, iter(range(100))

    def turn(self: Worker, asked: Turn) -> Any:
        if next(count) == 3:
            os.kill(self.pid, signal.SIGSEGV)
        return whole(self, asked)

    monkeypatch.setattr(Worker, "turn", turn)
    with pytest.raises(Failure, match="the process of dense has died: signal SIGSEGV"):
        llmprune.speed(dense, out=tmp_path / "new", **SHORT)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_process_that_ends_by_an_error_tells_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'no such luck' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with (
        worker.working(["tiny"]) as (made,),
        pytest.raises(Failure, match="the process of tiny has died: exit code 3: no such luck"),
    ):
        made.load(Load(tmp_path, "cpu", "auto", 1, False))


def children(pid: int) -> list[int]:
    told = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(number) for number in told.read_text().split()] if told.exists() else []


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
def test_an_interrupt_ends_all(dense: Path, tmp_path: Path) -> None:
    command = ["-m", "llmprune", "speed", str(dense), "--rounds", "100000", "--threads", "1"]
    command += ["--prompt-tokens", "20", "--new-tokens", "6", "--device", "cpu", "-o", str(tmp_path / "new")]
    own_session: dict[str, Any] = {"start_new_session": True, "preexec_fn": hears_interrupts}
    with subprocess.Popen(
        [sys.executable, *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **own_session
    ) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("rounds 2/"))
        own = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        rest = process.stderr.read()
        assert process.wait(60) == 130, line + rest
    assert rest.rstrip().endswith("llmprune: interrupted")
    assert "Traceback" not in rest
    assert len(own) == 1
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in own) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in own)
    assert not (tmp_path / "new" / "speed.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_tokens": 0}, "--new-tokens takes a number of at least 1, not 0"),
        ({"prompt_tokens": 0}, "--prompt-tokens takes"),
        ({"rounds": 0}, "--rounds takes"),
        ({"batch": -1}, "--batch takes"),
        ({"threads": 0}, "--threads takes"),
        ({"prompt_tokens": 60}, r"60 tokens and 6 new ones are more than dense can take \(64\)"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"dtype": "float12"}, "dtype 'float12' is not one of"),
        ({"text": "no-such-text"}, "no-such-text"),
    ],
)
def test_mistakes_start_no_process(
    changes: dict[str, Any], message: str, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "working", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(UserError, match=message):
        llmprune.speed(dense, **{**SHORT, **changes})


def test_mistaken_models_and_folders(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "working", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(UserError, match=r"no config\.json"):
        llmprune.speed(dense, [tmp_path], **SHORT)
    with pytest.raises(UserError, match="no model at"):
        llmprune.speed(dense, ["./nowhere"], **SHORT)
    shutil.copyfile(dense / "config.json", tmp_path / "config.json")
    with pytest.raises(UserError, match=r"no \*\.safetensors in"):
        llmprune.speed(dense, [tmp_path], **SHORT)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(UserError, match="has 9 tokens, too few for a prompt of 20"):
        llmprune.speed(dense, text=str(short), **SHORT)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="results cannot be written"):
        llmprune.speed(dense, out=tmp_path / "file" / "evaluation", **SHORT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="run it without torchrun"):
        llmprune.speed(dense, **SHORT)


def test_models_that_do_not_fit_together(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(info.nbytes for info in room.read_index(dense).values())
    monkeypatch.setattr(room, "working", lambda *_: pytest.fail("a process was started"))
    monkeypatch.setattr("llmprune.memory.available", lambda: 2 * needed - 1)
    with pytest.raises(UserError, match="measure fewer at once"):
        llmprune.speed(dense, [dense], **SHORT)


def test_other_vocabularies(dense: Path, tmp_path: Path) -> None:
    larger = make("llama", tmp_path / "larger", vocab_size=160, num_hidden_layers=1)
    candidates = room._find([dense, larger], "auto", False, room.Silent())
    (note,) = room._check_tokens(candidates, torch.tensor([[5, 127]]))
    assert "larger and dense have other tokens (160 and 128)" in note
    tiny = make("llama", tmp_path / "tiny", vocab_size=40, num_hidden_layers=1)
    with pytest.raises(UserError, match="tiny knows 40: its vocabulary is not that of dense's tokenizer"):
        llmprune.speed(dense, [tiny], **SHORT)
