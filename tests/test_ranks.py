"""Several ranks prune as one does, and what a dead rank leaves is gone on with by any number of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llmprune
from llmprune import distributed, pipeline
from llmprune.budget import room
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import resolve
from llmprune.model.writer import JOURNAL, REPORT, Elsewhere, Writer
from llmprune.progress import Silent
from llmprune.solve import _tasks
from tests.families import make
from tests.test_distributed import QUICK, Ranks
from tests.test_resume import cut_off

LLAMA = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 16}
# One block: random ones make much of little, so that all behind a single tie that is broken otherwise is different.
MIXTRAL = {**LLAMA, "num_hidden_layers": 1, "num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 2}
SETTINGS: dict[str, Any] = {"samples": 24, "length": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    draw = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (200, 90), generator=draw).tolist()
    path.write_text("\n".join(json.dumps({"text": "".join(map(chr, line))}) for line in letters))
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": make("llama", folder / "llama", **LLAMA),
        "mixtral": make("mixtral", folder / "mixtral", **MIXTRAL),
    }


def prune(model: Path, out: Path, text: str, options: dict[str, Any]) -> None:
    report = llmprune.prune(model, out=out, calibration=text, **{**SETTINGS, **options})
    assert report.ranks == int(os.environ.get("WORLD_SIZE", 1))
    assert report.linears  # every rank is told


@contextlib.contextmanager
def other_threads() -> Iterator[None]:
    """More threads than the ranks have, of which each has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(out.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def masks_that_agree(first: Path, second: Path) -> float:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    matrices = [name for name, weight in one.items() if weight.ndim == 2 and "embed" not in name]
    same = sum(int(((one[name] == 0) == (other[name] == 0)).sum()) for name in matrices)
    return same / sum(one[name].numel() for name in matrices)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("family", "method", "sparsity"),
    [("llama", "sparsegpt", "2:4"), ("llama", "sparsegpt", "50%"), ("llama", "wanda", "50%"),
     ("llama", "ria", "50%"), ("mixtral", "sparsegpt", "2:4"), ("mixtral", "wanda", "4:8")],
)  # fmt: skip
def test_many_ranks_agree_with_one(
    size: int, family: str, method: str, sparsity: str, models: dict[str, Path], text: str, tmp_path: Path
) -> None:
    evaluate = {"text": text, "length": 64, "max_perplexity": None}
    options = {"method": method, "sparsity": sparsity, "evaluate": evaluate}
    prune(models[family], tmp_path / "one", text, options)
    with Ranks(tmp_path, size, prune, models[family], tmp_path / "many", text, options) as ranks:
        ranks.all_well()
    assert masks_that_agree(tmp_path / "one", tmp_path / "many") >= 0.999
    one, many = (json.loads((tmp_path / name / REPORT).read_text()) for name in ("one", "many"))
    for when in ("dense", "sparse"):
        assert many[when]["value"] == pytest.approx(one[when]["value"], rel=1e-3)
        assert many[when]["tokens"] == one[when]["tokens"]
    for mine, theirs in zip(one["linears"], many["linears"], strict=True):
        assert mine["name"] == theirs["name"]
        # A router that is undecided may send a token elsewhere when its sums are rounded otherwise.
        assert theirs["tokens"] == pytest.approx(mine["tokens"], rel=0.01 if "experts" in mine["name"] else 0)
        sampled = mine["error_from"] == "sample"
        assert theirs["relative_error"] == pytest.approx(mine["relative_error"], rel=0.5 if sampled else 0.01)
    assert (one["ranks"], many["ranks"]) == (1, size)
    assert llmprune.verify(tmp_path / "many").ok


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "sparsegpt", "sparsity": "50%"},
        {"method": "sparsegpt", "sparsity": "2:4", "calibration.asymmetric": 0.5},
        {"method": "wanda", "sparsity": "50%", "refine": ["swaps"], "reconstruct": ["cg"]},
        {"method": "alps", "sparsity": "2:4"},
        {"width": {"channels": "25%"}},
        {"method": "wanda", "sparsity": "50%", "allocation": "owl"},
    ],
    ids=str,
)
def test_batches_that_are_the_same_give_the_same_bits(
    size: int, chosen: dict[str, Any], models: dict[str, Path], text: str, tmp_path: Path
) -> None:
    options = {"samples": 64, **chosen}  # batches of 16 on any number of ranks
    with other_threads():
        prune(models["llama"], tmp_path / "one", text, options)
    with Ranks(tmp_path, size, prune, models["llama"], tmp_path / "many", text, options) as ranks:
        ranks.all_well()
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert [name for name in one if not torch.equal(one[name], many[name])] == []


@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "wanda", "sparsity": "50%", "refine": ["swaps"], "reconstruct": ["cg"]},
        {"method": "magnitude", "sparsity": "2:4", "refine": ["dsnot", "swaps"], "reconstruct": ["cg"]},
        {"method": "admm", "sparsity": "4:8"},
        {"method": "alps", "sparsity": "50%"},
        {"method": "sparsegpt", "sparsity": "2:4", "calibration.asymmetric": 0.5},
    ],
)
def test_what_takes_many_steps_is_as_good_with_many_ranks(
    chosen: dict[str, Any], models: dict[str, Path], text: str, tmp_path: Path
) -> None:
    """Step builds on step: where sums are rounded otherwise, one of two that are alike goes instead of the other."""
    prune(models["llama"], tmp_path / "one", text, chosen)
    with Ranks(tmp_path, 2, prune, models["llama"], tmp_path / "many", text, chosen) as ranks:
        ranks.all_well()
    assert masks_that_agree(tmp_path / "one", tmp_path / "many") >= 0.95
    one, many = (json.loads((tmp_path / name / REPORT).read_text()) for name in ("one", "many"))
    for mine, theirs in zip(one["linears"], many["linears"], strict=True):
        assert theirs["relative_error"] == pytest.approx(mine["relative_error"], rel=0.05)
        assert theirs.get("course", {}).keys() == mine.get("course", {}).keys()


def test_more_ranks_than_sequences(models: dict[str, Path], text: str, tmp_path: Path) -> None:
    options = {"method": "wanda", "sparsity": "50%", "samples": 2}
    prune(models["llama"], tmp_path / "one", text, options)
    with Ranks(tmp_path, 4, prune, models["llama"], tmp_path / "many", text, options) as ranks:
        ranks.all_well()
    assert masks_that_agree(tmp_path / "one", tmp_path / "many") >= 0.999


def test_a_method_without_data(models: dict[str, Path], text: str, tmp_path: Path) -> None:
    options = {"method": "magnitude", "sparsity": "50%"}
    prune(models["mixtral"], tmp_path / "one", text, options)
    with Ranks(tmp_path, 2, prune, models["mixtral"], tmp_path / "many", text, options) as ranks:
        ranks.all_well()
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_mistake_is_told_on_every_rank(models: dict[str, Path], text: str, tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, prune, models["llama"], tmp_path / "out", text, {"sparsity": "3:7"}) as ranks:
        for rank in range(2):
            code, errors = ranks.wait(rank)
            assert code == 1
            assert "needs in_features divisible by 7" in errors
    assert not (tmp_path / "out").exists()


class Dying(Silent):
    """Ends one rank by force when so many blocks are done."""

    def __init__(self, rank: int, blocks: int) -> None:
        self.rank, self.blocks = rank, blocks

    def over(self, items: Any, title: str) -> Any:
        for number, item in enumerate(items):
            if title == "pruning blocks" and number == self.blocks and distributed.rank() == self.rank:
                time.sleep(0.5)  # the first rank may still write the block before
                os.kill(os.getpid(), signal.SIGKILL)
            yield item


def prune_and_die(model: Path, out: Path, text: str, options: dict[str, Any], rank: int, blocks: int) -> None:
    Silent.over = Dying(rank, blocks).over  # type: ignore[method-assign]
    prune(model, out, text, options)


@pytest.mark.parametrize(("dies", "then"), [(1, 1), (1, 3), (0, 2)])
def test_a_dead_rank_ends_the_run_and_any_number_goes_on(
    dies: int, then: int, models: dict[str, Path], text: str, tmp_path: Path
) -> None:
    options = {"method": "sparsegpt", "sparsity": "2:4"}
    out, given = tmp_path / "out", (models["llama"], tmp_path / "out", text, options)
    with Ranks(tmp_path, 2, prune_and_die, *given, dies, 2, **QUICK) as ranks:
        assert ranks.wait(dies)[0] == -signal.SIGKILL
        code, errors = ranks.wait(1 - dies)
        assert code == 1
        assert f"rank {dies} of 2 no longer answers" in errors
        if dies != 0:  # the first rank knows what is finished
            assert re.search(
                r"2 of 3 blocks are finished in .*the same command goes on .*another number of ranks", errors
            )
    finished = sum('"record"' in line for line in (out / JOURNAL).read_text().splitlines())
    assert finished == 2
    if then == 1:
        prune(*given)
    else:
        (tmp_path / "again").mkdir()
        with Ranks(tmp_path / "again", then, prune, *given) as ranks:
            ranks.all_well()
    assert json.loads((out / REPORT).read_text())["resumed"] == 2
    prune(models["llama"], tmp_path / "one", text, options)
    assert masks_that_agree(tmp_path / "one", out) >= 0.999


def far_away(model: Path, out: Path, text: str, options: dict[str, Any]) -> None:
    """The ranks but the first are on other machines, which don't see OUT; their folder of that name stays empty."""
    here = out if os.environ["RANK"] == "0" else out.with_name("elsewhere")
    prune(model, here, text, options)
    assert os.environ["RANK"] == "0" or not here.exists()


def stop_and_go_on(folder: Path, *given: Any) -> None:
    """A rank dies when two blocks are done, and all go on without seeing OUT but the first."""
    with Ranks(folder, 2, prune_and_die, *given, 1, 2, **QUICK) as ranks:
        assert ranks.wait(0)[0] == 1
    (folder / "again").mkdir()
    with Ranks(folder / "again", 2, far_away, *given) as ranks:
        ranks.all_well()


def test_only_the_first_rank_needs_to_see_out(models: dict[str, Path], text: str, tmp_path: Path) -> None:
    evaluate = {"text": text, "length": 64, "max_perplexity": None}
    options = {"method": "sparsegpt", "sparsity": "2:4", "evaluate": evaluate}
    stop_and_go_on(tmp_path, models["llama"], tmp_path / "out", text, options)
    prune(models["llama"], tmp_path / "one", text, options)
    assert masks_that_agree(tmp_path / "one", tmp_path / "out") >= 0.999
    one, many = (json.loads((tmp_path / name / REPORT).read_text()) for name in ("one", "out"))
    assert many["sparse"]["value"] == pytest.approx(one["sparse"]["value"], rel=1e-3)


def test_channels_change_places_alike_on_all_ranks(models: dict[str, Path], text: str, tmp_path: Path) -> None:
    """Also what is left dense and has moved: ranks that don't see OUT are sent it when a run goes on."""
    options = {"method": "sparsegpt", "sparsity": "2:4", "permute": True, "ignore": ["*.gate_proj"]}
    stop_and_go_on(tmp_path, models["llama"], tmp_path / "out", text, options)
    prune(models["llama"], tmp_path / "one", text, options)
    assert llmprune.verify(tmp_path / "out").ok
    one, many = (json.loads((tmp_path / name / REPORT).read_text())["linears"] for name in ("one", "out"))
    for mine, theirs in zip(one, many, strict=True):
        assert theirs["permuted"] == mine["permuted"] == mine["name"].endswith(("o_proj", "down_proj"))
        if "kept" not in mine:
            assert theirs["relative_error"] == pytest.approx(mine["relative_error"], rel=0.01)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(launcher: str, models: dict[str, Path], text: str, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", *LAUNCHERS[launcher], "-m", "llmprune",
        "prune", str(models["llama"]), "-o", str(tmp_path / "out"), "--sparsity", "2:4",
        "--calibration", text, "--samples", "8", "--length", "64", "--device", "cpu", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # one rank prints
    assert report["ranks"] == 2
    assert llmprune.verify(tmp_path / "out").ok
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert again.returncode != 0
    told = [line for line in again.stderr.splitlines() if line.startswith("llmprune: ")]
    assert len(told) == 1
    assert "holds a finished run of llmprune" in told[0]
    with cut_off(Writer, "commit_block", 1):
        llmprune.prune(
            models["llama"], out=tmp_path / "part", sparsity="2:4", calibration=text, samples=8, length=64, device="cpu"
        )
    command[command.index("2:4")], command[command.index(str(tmp_path / "out"))] = "50%", str(tmp_path / "part")
    other = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert other.returncode != 0
    told = [line for line in other.stderr.splitlines() if "unfinished run with another recipe.sparsity" in line]
    assert len(told) == 1


def test_torchrun_of_which_a_rank_is_killed(models: dict[str, Path], text: str, tmp_path: Path) -> None:
    """The launcher ends the others before they miss it."""
    script, out, root = tmp_path / "script.py", tmp_path / "out", Path(__file__).parents[1]
    script.write_text(
        "from llmprune.cli import main\n"
        "from llmprune.progress import Silent\n"
        "from tests.test_ranks import Dying\n"
        "Silent.over = Dying(1, 2).over\n"
        "raise SystemExit(main())\n"
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script),
        "prune", str(models["llama"]), "-o", str(out), "--sparsity", "2:4", "--calibration", text,
        *(f"--{name}={value}" for name, value in SETTINGS.items()),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("llmprune: ")]
    assert told == [f"llmprune: stopped; 2 of 3 blocks are finished in {out}: the same command goes on from there"]
    prune(models["llama"], out, text, {"sparsity": "2:4"})
    assert json.loads((out / REPORT).read_text())["resumed"] == 2


def test_what_is_dealt_covers_every_row_once(models: dict[str, Path], text: str) -> None:
    _, plan = pipeline.plan(models["mixtral"], calibration=text, sparsity="2:4", **SETTINGS)
    _, matrix = pipeline.plan(models["llama"], calibration=text, sparsity="50%", **SETTINGS)
    for made in (plan, matrix):
        for ranks in (1, 2, 3, 8):
            choices = made.blocks[0]
            inputs = tuple(entry for stage in made.schedule.stages[0] for entry in stage.inputs)
            tasks = _tasks(inputs, choices, ranks)
            rows: dict[tuple[str, ...], list[tuple[int, int]]] = {}
            for task in tasks:
                rows.setdefault(tuple(choice.linear.name for choice in task.choices), []).append(task.rows)
            assert sorted(name for names in rows for name in names) == sorted(
                choice.linear.name for choice in choices if choice.kept is None
            )
            for names, spans in rows.items():
                count = sum(choice.linear.shape[0] for choice in choices if choice.linear.name in names)
                assert spans[0][0] == 0
                assert spans[-1][1] == count
                assert all(first[1] == second[0] for first, second in itertools.pairwise(spans))
                assert len(spans) == 1 or made is plan


class TestMemory:
    def test_the_ranks_of_a_machine_share_its_cap(
        self, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:

        checkpoint = Checkpoint(resolve(models["llama"]), "cpu")
        assert room(checkpoint, 2**33).host == 2**33
        monkeypatch.setattr(distributed, "local_size", lambda: 4)
        assert room(checkpoint, 2**33).host == 2**31


def test_the_writer_alone_writes() -> None:

    public = {name for name, value in vars(Writer).items() if callable(value) and not name.startswith("_")}
    assert public == {name for name in vars(Elsewhere) if not name.startswith("_")}
