"""A run that was cut off at any moment goes on, and its output is the same to the byte."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import llmprune
from llmprune import pipeline, prepare
from llmprune.errors import Failure, Interrupted, UserError
from llmprune.model import writer
from llmprune.model.writer import DRAFTS, JOURNAL, LOCK, PAGE, REPORT, read_journal
from llmprune.progress import Silent
from tests.conftest import hears_interrupts
from tests.families import make

BLOCKS = 6
SETTINGS: dict[str, Any] = {"sparsity": "2:4", "method": "sparsegpt", "samples": 8, "length": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Brevity is the soul of wit, and tediousness the limbs and outward flourishes. " * 60)
    return str(path)


@pytest.fixture(scope="module")
def whole(model: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    llmprune.prune(model, out=out, calibration=text, **SETTINGS)
    return digests(out)


def digests(out: Path) -> dict[str, str]:
    """Name to hash of all files but the report and its page, which tell times."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name not in (REPORT, PAGE))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def victim(model: str, out: str, text: str, moment: str, count: int, changes: dict[str, Any]) -> None:
    """A run in a process of its own that ends itself at a given moment, the `count`th of its kind."""
    torch.set_num_threads(2)
    left = [count]

    def due() -> bool:
        left[0] -= 1
        return left[0] < 0

    append, rename, close = writer.Writer._append, Path.rename, writer.Writer.close
    write_text = writer.Writer._write_text

    def half_a_shard(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata=metadata)
        if due():
            os.truncate(path, path.stat().st_size // 2)
            kill()

    def with_a_draft_of_its_own(tensors: Any, path: Path, metadata: Any) -> None:
        if due():
            path.with_name(".tmpA1b2C3").touch()  # as safetensors does, under another name each time
            kill()
        save_file(tensors, path, metadata=metadata)

    def before_the_rename(path: Path, target: Path) -> Path:
        return kill() or path if due() else rename(path, target)  # type: ignore[func-returns-value]

    def before_the_line(self: writer.Writer, line: dict[str, Any]) -> None:
        if due():
            kill()
        append(self, line)

    def half_a_header(self: writer.Writer, name: str, text: str) -> None:
        if name == JOURNAL and due():
            (self.out / DRAFTS).mkdir()
            (self.out / DRAFTS / name).write_text(text[:40])
            kill()
        write_text(self, name, text)

    def half_a_line(self: writer.Writer, line: dict[str, Any]) -> None:
        if due():
            with (self.out / JOURNAL).open("a") as file:
                file.write(json.dumps(line)[:40])
                file.flush()
                kill()
        append(self, line)

    def before_the_report(self: writer.Writer, report: dict[str, Any]) -> None:
        kill()

    def before_the_journal_goes(self: writer.Writer, report: dict[str, Any]) -> None:
        Path.unlink = lambda path, missing_ok=False: kill()  # type: ignore[assignment,method-assign]
        close(self, report)

    if moment == "half a shard":
        writer.save_file = half_a_shard  # type: ignore[attr-defined]
    elif moment == "a library's draft":
        writer.save_file = with_a_draft_of_its_own  # type: ignore[attr-defined]
    elif moment == "before the rename":
        Path.rename = before_the_rename  # type: ignore[method-assign,assignment]
    elif moment == "before the line":
        writer.Writer._append = before_the_line  # type: ignore[method-assign]
    elif moment == "half a header":
        writer.Writer._write_text = half_a_header  # type: ignore[method-assign]
    elif moment == "half a line":
        writer.Writer._append = half_a_line  # type: ignore[method-assign]
    elif moment == "before the report":
        writer.Writer.close = before_the_report  # type: ignore[method-assign]
    elif moment == "before the journal goes":
        writer.Writer.close = before_the_journal_goes  # type: ignore[method-assign]
    llmprune.prune(model, out=out, calibration=text, **{**SETTINGS, **changes})


def start_victim(
    model: Path, out: Path, text: str, moment: str = "none", count: int = 0, **changes: Any
) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmprune.pipeline", "tests.test_resume"])
    process = context.Process(target=victim, args=(str(model), str(out), text, moment, count, changes))
    process.start()
    return process


def run_victim(model: Path, out: Path, text: str, moment: str, count: int, **changes: Any) -> int | None:
    process = start_victim(model, out, text, moment, count, **changes)
    process.join(120)
    return process.exitcode


def wait_until_begun(process: ForkServerProcess, out: Path) -> None:
    """Until a run has a journal, its own or one that it goes on with; there must be no lock of an earlier one."""
    while process.is_alive() and not ((out / LOCK).exists() and (out / JOURNAL).exists()):
        time.sleep(0.001)


def is_whole(out: Path) -> None:
    """No file that has its final name is broken."""
    for path in out.glob("*.safetensors"):
        load_file(path)
    for path in out.glob("*.json"):
        json.loads(path.read_text())


CHAINS = [
    [("half a shard", 0), ("half a shard", 0), ("half a shard", 3), ("half a line", 0)],
    [("before the rename", 3), ("before the line", 3), ("half a line", 1)],
    [("half a header", 0), ("before the rename", 0), ("before the line", 0), ("half a line", 6)],
    [("before the line", 6), ("before the report", 0), ("before the journal goes", 0)],
    [("half a shard", 6), ("before the rename", 0), ("before the rename", 5)],
    [("a library's draft", 0), ("a library's draft", 2), ("a library's draft", 3)],
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: ", ".join(f"{moment} {count}" for moment, count in chain))
def test_killed_in_the_worst_moments(
    chain: list[tuple[str, int]], model: Path, text: str, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for moment, count in chain:
        assert run_victim(model, out, text, moment, count) == -signal.SIGKILL
        is_whole(out)
    report = llmprune.prune(model, out=out, calibration=text, **SETTINGS)
    assert digests(out) == whole
    assert llmprune.verify(out).ok
    assert len(report.blocks) == BLOCKS
    assert len(report.linears) == 7 * BLOCKS


@pytest.fixture(scope="module")
def rest(model: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds that an uninterrupted run takes from its journal to its report."""
    out = tmp_path_factory.mktemp("rest") / "out"
    process = start_victim(model, out, text)
    wait_until_begun(process, out)
    began = time.monotonic()
    while process.is_alive() and not (out / REPORT).exists():
        time.sleep(0.001)
    spent = time.monotonic() - began
    process.kill()
    process.join()
    return spent


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(
    seed: int, model: Path, text: str, whole: dict[str, str], rest: float, tmp_path: Path
) -> None:
    out, chance = tmp_path / "out", random.Random(seed)
    killed = tried = 0
    while killed < 3 and tried < 12:
        tried += 1
        (out / LOCK).unlink(missing_ok=True)
        done = max(0, len(read_journal(out / JOURNAL)) - 1) / (BLOCKS + 2)
        process = start_victim(model, out, text)
        wait_until_begun(process, out)
        process.join(chance.uniform(0, rest * (1 - done)))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if (out / REPORT).exists():
            shutil.rmtree(out)  # it was done before it could be killed: begin anew, and wait less
            rest /= 2
            continue
        is_whole(out)
        killed += len(read_journal(out / JOURNAL)) > 0
    assert killed == 3
    llmprune.prune(model, out=out, calibration=text, **SETTINGS)
    assert digests(out) == whole


def test_what_was_found_out_stays_while_more_is_written(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"sparsity": "50%", "depth": {"drop": 1}, "allocation": "owl"}
    llmprune.prune(model, out=tmp_path / "whole", calibration=text, **{**SETTINGS, **changes})
    out = tmp_path / "out"
    assert run_victim(model, out, text, "half a header", 1, **changes) == -signal.SIGKILL
    (header,) = read_journal(out / JOURNAL)
    assert "kept" in header
    assert "allocation" not in header
    monkeypatch.setattr(prepare, "choose", lambda *_: pytest.fail("chosen again"))
    llmprune.prune(model, out=out, calibration=text, **{**SETTINGS, **changes})
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("finished", [False, True])
def test_killed_between_an_earlier_run_and_its_own_header(
    finished: bool, model: Path, text: str, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if finished:
        llmprune.prune(model, out=out, calibration=text, **{**SETTINGS, "sparsity": "4:8"})
    else:
        stop_after(3, model, out, text, sparsity="4:8")
    assert run_victim(model, out, text, "half a header", 0, restart=True) == -signal.SIGKILL
    assert not list(out.glob("*.safetensors"))
    assert (out / JOURNAL).exists() != finished
    llmprune.prune(model, out=out, calibration=text, restart=True, **SETTINGS)
    assert digests(out) == whole


class Stopping(Silent):
    """Stops a run when some blocks are done, as a user would by Ctrl-C."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def over(self, items: Any, title: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if title == "pruning blocks" and number == self.blocks:
                raise KeyboardInterrupt
            yield item


@contextlib.contextmanager
def cut_off(owner: type, name: str, calls: int) -> Iterator[None]:
    """Inside, a run is interrupted when a method is called once more than so many times."""
    method, left = getattr(owner, name), [calls]

    def cut(self: Any, *given: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return method(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, cut)
        with pytest.raises(Interrupted):
            yield


def stop_after(blocks: int, model: Path, out: Path, text: str, **changes: Any) -> None:
    with pytest.raises(Interrupted, match=f"{blocks} of {BLOCKS} blocks are finished in .*the same command goes on"):
        llmprune.prune(model, out=out, calibration=text, progress=Stopping(blocks), **{**SETTINGS, **changes})


class TestRecovery:
    def test_finished_blocks_are_not_pruned_again(
        self, model: Path, text: str, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        stop_after(4, model, out, text)
        pruned: list[str] = []
        solve_stage = pipeline.solve_stage

        def counting(checkpoint: Any, block: Any, *arguments: Any) -> Any:
            pruned.append(block.name)
            return solve_stage(checkpoint, block, *arguments)

        monkeypatch.setattr(pipeline, "solve_stage", counting)
        report = llmprune.prune(model, out=out, calibration=text, **SETTINGS)
        assert sorted(set(pruned)) == ["model.layers.4", "model.layers.5"]
        assert report.resumed == 4
        assert digests(out) == whole

    @pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
    @pytest.mark.parametrize("shard", [2, 4])
    def test_a_shard_that_was_harmed_is_found_and_redone_with_all_after_it(
        self, harm: str, shard: int, model: Path, text: str, whole: dict[str, str], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        stop_after(4, model, out, text)
        path = out / f"model-{shard:05d}-of-{BLOCKS + 1:05d}.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        if harm == "gone":
            path.unlink()
        else:
            path.write_bytes(data if harm == "flipped" else data[:-5])
        assert llmprune.prune(model, out=out, calibration=text, **SETTINGS).resumed == shard - 1
        assert digests(out) == whole

    def test_a_broken_line_that_ends_is_cut_off(
        self, model: Path, text: str, whole: dict[str, str], tmp_path: Path
    ) -> None:
        """Else nobody could read those that are written behind it."""
        out = tmp_path / "out"
        stop_after(3, model, out, text)
        with (out / JOURNAL).open("a") as file:
            file.write('{"shard": "model-0\n')
        stop_after(5, model, out, text)
        assert len(read_journal(out / JOURNAL)) == 1 + 5
        assert llmprune.prune(model, out=out, calibration=text, **SETTINGS).resumed == 5
        assert digests(out) == whole

    def test_blocks_of_several_shards(self, model: Path, text: str, tmp_path: Path) -> None:
        changes = {"shard_size": "20KB"}
        llmprune.prune(model, out=tmp_path / "whole", calibration=text, **SETTINGS, **changes)
        out = tmp_path / "out"
        stop_after(3, model, out, text, **changes)
        lines = (out / JOURNAL).read_text().splitlines(keepends=True)
        assert len(lines) > 7  # the header, and more than one a block
        (out / JOURNAL).write_text("".join(lines[:-1]))  # the last block lacks its last shard
        assert llmprune.prune(model, out=out, calibration=text, **SETTINGS, **changes).resumed == 2
        assert digests(out) == digests(tmp_path / "whole")

    def test_methods_without_data_skip_what_is_done(self, model: Path, text: str, tmp_path: Path) -> None:
        settings = {**SETTINGS, "method": "magnitude"}
        llmprune.prune(model, out=tmp_path / "whole", calibration=text, **settings)
        stop_after(3, model, tmp_path / "out", text, method="magnitude")
        assert llmprune.prune(model, out=tmp_path / "out", calibration=text, **settings).resumed == 3
        assert digests(tmp_path / "out") == digests(tmp_path / "whole")

    def test_the_dense_model_is_measured_once(
        self, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changes = {"evaluate": {"text": text, "length": 32, "max_perplexity": 1e9}}
        whole = llmprune.prune(model, out=tmp_path / "whole", calibration=text, **SETTINGS, **changes)
        stop_after(2, model, tmp_path / "out", text, **changes)
        monkeypatch.setattr(pipeline.perplexity, "dense", lambda *_: pytest.fail("measured again"))
        report = llmprune.prune(model, out=tmp_path / "out", calibration=text, **SETTINGS, **changes)
        assert report.dense is not None
        assert whole.dense is not None
        assert report.dense.value == whole.dense.value
        assert report.sparse is not None
        assert whole.sparse is not None
        assert report.sparse.value == whole.sparse.value

    def test_how_to_go_on_after_a_restart(self, model: Path, text: str, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with pytest.raises(Interrupted, match="the same command without --restart goes on"):
            llmprune.prune(model, out=out, calibration=text, restart=True, progress=Stopping(3), **SETTINGS)
        assert llmprune.prune(model, out=out, calibration=text, **SETTINGS).resumed == 3

    def test_a_restart_that_stops_before_it_begins_changes_nothing(
        self, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, changes = tmp_path / "out", {"evaluate": {"text": text, "length": 32, "max_perplexity": 1e9}}
        stop_after(2, model, out, text, **changes)
        before = digests(out)

        def stopped(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(pipeline.perplexity, "dense", stopped)
            with pytest.raises(Interrupted, match="stopped: the same command begins anew"):
                llmprune.prune(model, out=out, calibration=text, restart=True, **SETTINGS, **changes)
        assert digests(out) == before

    def test_another_kind_of_cpu_is_refused(
        self, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What it computes in half precision would differ by more than last bits."""
        out = tmp_path / "out"
        monkeypatch.setattr("llmprune.model.cpu._halves", lambda: "all")
        stop_after(2, model, out, text, dtype="bfloat16")
        monkeypatch.setattr("llmprune.model.cpu._halves", lambda: "none")
        with pytest.raises(UserError, match="products"):
            llmprune.prune(model, out=out, calibration=text, dtype="bfloat16", **SETTINGS)
        monkeypatch.setattr("llmprune.model.cpu._halves", lambda: "all")
        assert llmprune.prune(model, out=out, calibration=text, dtype="bfloat16", **SETTINGS).resumed == 2

    def test_a_plan_file_that_a_restart_would_take_away_is_refused(
        self, model: Path, text: str, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        chosen = {**SETTINGS, "sparsity": "50%", "calibration": text}
        llmprune.prune(model, out=out, allocation="owl", **chosen)
        before = digests(out)
        chosen["allocation"] = str(out / "allocation.yaml")
        with pytest.raises(UserError, match=r"--restart would take away .*allocation\.yaml, the plan file"):
            llmprune.prune(model, out=out, restart=True, **chosen)
        assert digests(out) == before
        shutil.copy(out / "allocation.yaml", tmp_path / "own.yaml")
        chosen["allocation"] = str(tmp_path / "own.yaml")
        assert llmprune.prune(model, out=out, restart=True, **chosen).pruned

    def test_a_journal_without_its_header_loses_nothing(self, model: Path, text: str, tmp_path: Path) -> None:
        out = tmp_path / "out"
        stop_after(3, model, out, text)
        (out / JOURNAL).write_text("?" + (out / JOURNAL).read_text())
        before = digests(out)
        with pytest.raises(UserError, match=r"the first line of .* cannot be read"):
            llmprune.prune(model, out=out, calibration=text, **SETTINGS)
        assert digests(out) == before

    def test_a_shard_that_changes_before_the_end_fails_the_run(
        self, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finish = writer.Writer.finish

        def harming(self: writer.Writer, *given: Any) -> None:
            finish(self, *given)
            path = self.out / self.shards[-1].name
            stored = load_file(path)
            save_file({name: tensor + 1 for name, tensor in stored.items()}, path, metadata={"format": "pt"})

        monkeypatch.setattr(writer.Writer, "finish", harming)
        with pytest.raises(Failure, match="no longer holds what was written"):
            llmprune.prune(model, out=tmp_path / "out", calibration=text, **SETTINGS)
        assert not (tmp_path / "out" / REPORT).exists()

    def test_restart_begins_anew(self, model: Path, text: str, whole: dict[str, str], tmp_path: Path) -> None:
        out = tmp_path / "out"
        stop_after(3, model, out, text, sparsity="4:8")
        report = llmprune.prune(model, out=out, calibration=text, restart=True, **SETTINGS)
        assert report.resumed is None
        assert digests(out) == whole


class TestAnotherRun:
    def test_a_report_of_somebody_else_deletes_nothing_outside(self, model: Path, text: str, tmp_path: Path) -> None:
        out, precious = tmp_path / "out", tmp_path / "precious.txt"
        out.mkdir()
        precious.write_text("years of work")
        names = ["../precious.txt", str(precious), None, "config.json"]
        (out / REPORT).write_text(json.dumps({"side_files": names}))
        (out / "config.json").write_text("{}")
        llmprune.prune(model, out=out, calibration=text, restart=True, **SETTINGS)
        assert precious.read_text() == "years of work"

    def test_another_evaluation_text(self, model: Path, text: str, tmp_path: Path) -> None:
        own = Path(shutil.copyfile(text, tmp_path / "own.txt"))
        changes = {"evaluate": {"text": str(own), "length": 32, "max_perplexity": 1e9}}
        stop_after(2, model, tmp_path / "out", text, **changes)
        own.write_text(own.read_text().replace("wit", "fun"))
        with pytest.raises(UserError, match="another evaluation text"):
            llmprune.prune(model, out=tmp_path / "out", calibration=text, **SETTINGS, **changes)

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"sparsity": "1:4"}, r"another recipe\.sparsity \(\"2:4\" there, \"1:4\" here\)"),
            ({"method": "wanda"}, r"another recipe\.method"),
            ({"seed": 1}, r"another recipe\.calibration\.seed \(0 there, 1 here\)"),
            ({"ignore": ["*.o_proj"]}, r"another recipe\.ignore"),
        ],
    )
    def test_another_request_is_refused_by_name(
        self, changes: dict[str, Any], named: str, model: Path, text: str, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        stop_after(2, model, out, text)
        before = digests(out)
        with pytest.raises(UserError, match=f"{named}.*: give the same .* --restart"):
            llmprune.prune(model, out=out, calibration=text, **{**SETTINGS, **changes})
        assert digests(out) == before

    def test_other_weights_of_the_same_shapes(self, model: Path, text: str, tmp_path: Path) -> None:
        copy, out = Path(shutil.copytree(model, tmp_path / "copy")), tmp_path / "out"
        stop_after(2, copy, out, text)
        stored = load_file(copy / "model.safetensors")
        stored["model.layers.5.mlp.up_proj.weight"][3, 3] += 1
        save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"another files\.model\.safetensors"):
            llmprune.prune(copy, out=out, calibration=text, **SETTINGS)

    def test_other_calibration_text(self, model: Path, text: str, tmp_path: Path) -> None:
        own = Path(shutil.copyfile(text, tmp_path / "own.txt"))
        stop_after(2, model, tmp_path / "out", str(own))
        own.write_text(own.read_text().replace("wit", "fun"))
        with pytest.raises(UserError, match="another tokens"):
            llmprune.prune(model, out=tmp_path / "out", calibration=str(own), **SETTINGS)

    @pytest.mark.parametrize("module", [llmprune, torch, transformers], ids=lambda module: module.__name__)
    def test_another_version(
        self, module: Any, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_after(2, model, tmp_path / "out", text)
        was = str(module.__version__)
        monkeypatch.setattr(module, "__version__", "9.9.9")
        differs = rf'another versions\.{module.__name__} \("{re.escape(was)}" there, "9\.9\.9" here\)'
        with pytest.raises(UserError, match=differs):
            llmprune.prune(model, out=tmp_path / "out", calibration=text, **SETTINGS)

    def test_another_revision(self, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        find, revisions = pipeline.find, iter(("first", "second"))
        monkeypatch.setattr(pipeline, "find", lambda *given: replace(find(*given), revision=next(revisions)))
        stop_after(2, model, tmp_path / "out", text)
        with pytest.raises(UserError, match=r'another revision \("first" there, "second" here\)'):
            llmprune.prune(model, out=tmp_path / "out", calibration=text, **SETTINGS)

    def test_another_kind_of_device(self, model: Path, text: str, tmp_path: Path) -> None:
        stop_after(2, model, tmp_path / "out", text, device="cpu")
        journal = tmp_path / "out" / JOURNAL
        journal.write_text(journal.read_text().replace('"device": "cpu", "tokens"', '"device": "cuda", "tokens"', 1))
        with pytest.raises(UserError, match=r'another device \("cuda" there, "cpu" here\)'):
            llmprune.prune(model, out=tmp_path / "out", calibration=text, device="cpu", **SETTINGS)

    def test_another_format_of_the_journal(self, model: Path, text: str, tmp_path: Path) -> None:
        stop_after(2, model, tmp_path / "out", text)
        journal = tmp_path / "out" / JOURNAL
        journal.write_text(journal.read_text().replace('"format": 1', '"format": 7', 1))
        with pytest.raises(UserError, match="format 7, this version of llmprune reads 1"):
            llmprune.prune(model, out=tmp_path / "out", calibration=text, **SETTINGS)

    def test_two_at_once(self, model: Path, text: str, whole: dict[str, str], tmp_path: Path) -> None:
        out = tmp_path / "out"

        class Second(Silent):
            refused = False

            def over(self, items: Any, title: str) -> Iterator[Any]:
                for item in items:
                    if title == "pruning blocks" and not self.refused:
                        for restart in (False, True):
                            with pytest.raises(UserError, match=r"another run of llmprune is writing to .*/out: wait"):
                                llmprune.prune(model, out=out, calibration=text, restart=restart, **SETTINGS)
                        self.refused = True
                    yield item

        second = Second()
        llmprune.prune(model, out=out, calibration=text, progress=second, **SETTINGS)
        assert second.refused
        assert digests(out) == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, check=False
    )  # fmt: skip
    if not mounted or mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=False)


def test_a_disk_that_fills_up(model: Path, text: str, whole: dict[str, str], small_disk: Path) -> None:
    """Something else takes the rest of the disk while the third block is at work."""
    out, filler = small_disk / "out", small_disk / "filler"

    class Filling(Silent):
        def over(self, items: Any, title: str) -> Iterator[Any]:
            for number, item in enumerate(items):
                if title == "pruning blocks" and number == 2:
                    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                        while True:
                            file.write(bytes(2**12))
                yield item

    with pytest.raises(Failure, match=r"no space left on the disk; [123] finished blocks stay in it"):
        llmprune.prune(model, out=out, calibration=text, progress=Filling(), **SETTINGS)
    is_whole(out)
    filler.unlink()
    report = llmprune.prune(model, out=out, calibration=text, **SETTINGS)
    assert report.resumed in (1, 2, 3)
    assert digests(out) == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_on_the_command_line(
    number: signal.Signals, code: int, model: Path, text: str, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = [f"--{key}={value}" for key, value in SETTINGS.items()]
    command = [sys.executable, "-m", "llmprune", "prune", str(model), "-o", str(out), "--calibration", text, *settings]
    command += ["--log-json"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hears_interrupts) as process:
        assert process.stderr is not None
        events = []
        for line in process.stderr:
            if not line.startswith("{"):
                break
            events.append(json.loads(line))
            if events[-1].get("name") == "model.layers.0":
                process.send_signal(number)
        if process.wait() != 0:  # it may have been at its end already
            assert process.returncode == code
            assert re.fullmatch(r"llmprune: stopped; \d of 6 blocks are finished in .*: the same command .*\n", line)
    blocks = [event for event in events if event["event"] == "block"]
    assert blocks
    assert set(blocks[0]["seconds"]) == {"read", "dense", "capture", "solve", "propagate", "write"}
    assert blocks[0]["peak_memory"] > 2**20
    if process.returncode:
        llmprune.prune(model, out=out, calibration=text, **SETTINGS)
    assert digests(out) == whole
