"""Pushing: the real client of the Hub against a server on this machine, and what others download from there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmprune
import llmprune.cli
from llmprune.evaluate.compare import compare
from llmprune.model.source import resolve
from llmprune.push import push
from llmprune.report import page
from llmprune.report.results import read_run
from tests.families import make
from tests.hub import COMMIT, READ_TOKEN, TOKEN, Fault, Hub, environment, reach, serving

TO = "some-lab/tiny-2-4"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make("llama", tmp_path_factory.mktemp("llama") / "source", vocab_size=2048)
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: some/older\n---\n# The dense one's own card\n"
    )
    (folder / "LICENSE").write_text("Apache License\n")
    return folder


@pytest.fixture(scope="module")
def pruned(source: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What came of `owner/tiny`, as if it had been pruned by that name."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    options = {"calibration": text, "samples": 8, "length": 32, "sparsity": "2:4", "method": "wanda"}
    llmprune.prune(source, out=out, evaluate={"text": text, "length": 32, "max_perplexity": None}, **options)
    report = json.loads((out / "llmprune.json").read_text())
    report |= {"model": "owner/tiny@v1", "revision": COMMIT, "base": {"name": "owner/tiny", "license": "apache-2.0"}}
    (out / "llmprune.json").write_text(json.dumps(report))
    page.draw(out)
    return out


@pytest.fixture
def out(pruned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "out"))


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(source) as running:
        reach(running, monkeypatch, tmp_path / "home")
        yield running


def call(*arguments: object) -> int:
    try:
        return llmprune.cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def sent(hub: Hub) -> list[str]:
    """Everything that was asked of the server and could change it."""
    harmless = ("POST /api/validate-yaml",)
    return [asked for asked in hub.asked if not asked.startswith(("GET", "HEAD")) and asked not in harmless]


def test_there_and_back_in_processes(hub: Hub, out: Path, source: Path, text: str, tmp_path: Path) -> None:
    """Pushed by one command, pruned further by name by another, the same to the byte; the token is nowhere."""
    settings = environment(hub, tmp_path / "other")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llmprune", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=settings, check=False)

    done = run("push", out, "--to", TO, "--private", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    there = hub.repositories[TO]
    assert told["commit"] == there.heads["main"]
    assert there.private
    again = Path(snapshot_download(TO))
    local = {path.name: path.read_bytes() for path in out.iterdir()}
    arrived = {path.name: path.read_bytes() for path in again.iterdir() if path.name != ".gitattributes"}
    for name in ("llmprune.json", "report.html"):  # these alone tell of folders here
        assert b"pytest-of-" in local[name]
        assert b"pytest-of-" not in arrived[name]
        assert b"llmprune-push-" not in arrived[name]
        local[name] = arrived[name]
    assert arrived == local
    assert json.loads(arrived["llmprune.json"])["linears"] == json.loads((out / "llmprune.json").read_text())["linears"]
    assert set(told["files"]) == set(local)
    model = AutoModelForCausalLM.from_pretrained(again)
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    assert torch.equal((weight.view(-1, 4) != 0).sum(1).clamp(max=2), (weight.view(-1, 4) != 0).sum(1))
    further = run("prune", TO, "-o", tmp_path / "further", "--method", "magnitude", "--sparsity", "1:4")
    assert further.returncode == 0, further.stderr
    report = json.loads((tmp_path / "further" / "llmprune.json").read_text())
    assert report["base"] == {
        "name": TO,
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
    }
    written = json.loads((out / "llmprune.json").read_text())["sparse"]["value"]
    assert llmprune.perplexity(TO, text, length=32).value == pytest.approx(written, rel=1e-6)
    seen = "".join(process.stdout + process.stderr for process in (done, further))
    files = [path for folder in (out, tmp_path / "further", tmp_path / "other") for path in folder.rglob("*")]
    assert TOKEN not in seen
    assert [path for path in files if path.is_file() and TOKEN.encode() in path.read_bytes()] == []
    assert hub.leaked == []


def test_what_is_not_sent(hub: Hub, out: Path) -> None:
    (out / "evaluation").mkdir()
    (out / "evaluation" / "lm_eval.json").write_text("{}")
    (out / "evaluation" / "generations.json").write_text("[]")
    for name in (".model-00001-of-00005.safetensors.draft", ".llmprune.lock", "llmprune.journal.jsonl"):
        (out / name).write_text("left over")
    left = {"evaluation/lm_eval.json", "llmprune.journal.jsonl"}
    (out / "swept" / "points").mkdir(parents=True)
    (out / "swept" / "sweep.json").write_text("{}")
    for name in ("lm_eval.json", "inner/eval/lm_eval.json", "swept/points/wanda-50.json", "swept/points/request.json",
                 "request.json", "inner/llmprune.journal.jsonl", "swept/sweep.html"):  # fmt: skip
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(json.dumps({"model": "/home/me/tiny"}))
        left.add(name)
    pushed = push(out, TO)
    assert set(hub.repositories[TO].files) == {*pushed.files, ".gitattributes"}
    assert left.isdisjoint(pushed.files)
    assert "swept/sweep.json" in pushed.files
    assert not any(name.startswith(".") for name in pushed.files)
    assert {"evaluation/generations.json", "README.md", "LICENSE", "llmprune.json", "config.json"} <= set(pushed.files)


def test_nothing_that_is_sent_tells_of_folders_here(hub: Hub, out: Path, source: Path, tmp_path: Path) -> None:
    other = shutil.copytree(out, tmp_path / "other" / "out")
    told = compare(source, [out, other], text=str(source / "README.md"), length=4, out=out / "evaluation")
    assert [model.name for model in told.models] == ["source", str(out), str(other)]
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "_name_or_path": str(source)}))
    (out / "inner").mkdir()
    for name in ("llmprune.json", "report.html"):
        shutil.copy(out / name, out / "inner")
    drawn = page.draw(out, linears=["*.0.mlp.up_proj"], source=resolve(source))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    pushed = push(out, TO)
    sent = hub.repositories[TO].files
    assert {path: path.read_bytes() for path in before} == before
    assert [name for name, content in sent.items() if b"pytest-of-" in content or b"llmprune-push-" in content] == []
    assert pushed.files == {name: len(sent[name]) for name in pushed.files}
    assert "inner/llmprune.json" in sent
    assert "inner/report.html" not in sent
    models = json.loads(sent["evaluation/comparison.json"])["models"]
    ours, theirs = (f"{path.parent.name}/{path.name}" for path in (out, other))
    assert [model["path"] for model in models] == ["source", ours, theirs]
    shown = sent["report.html"].decode()
    assert f"{ours} (this one)" in shown
    assert theirs in shown
    assert page.drawn_on(shown, read_run(out)) == drawn.histograms == ["model.layers.0.mlp.up_proj"]


def test_paths_that_look_like_names(
    hub: Hub, out: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were given from a folder that is above OUT, and it is pushed from elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(source, tmp_path / "customer" / "secret")
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "private").write_text("text")
    report = json.loads((out / "llmprune.json").read_text())
    report["recipe"]["allocation"] = {"name": "file", "path": "acme/plans/mine.yaml"}
    report["recipe"]["calibration"]["source"] = report["calibration"]["source"] = "acme/private"
    report["recipe"]["evaluate"]["text"] = report["sparse"]["text"] = report["dense"]["text"] = "acme/texts/other.txt"
    report["linears"][0]["note"] = "acme/private is short"
    (out / "llmprune.json").write_text(json.dumps(report))
    (out / "allocation.yaml").write_text("# as acme/plans/mine.yaml says\ndefault: '2:4'\n")
    template = "{{ '/or/else/acme/private' }}"
    told = {"name_or_path": "customer/secret", "chat_template": template}
    (out / "tokenizer_config.json").write_text(json.dumps(told))
    figures = {"model": "customer/secret", "shards": report["shards"], "perplexity": {**report["sparse"], "text": "c4"}}
    (out / "evaluation").mkdir()
    (out / "evaluation" / "eval.json").write_text(json.dumps(figures))
    page.draw(out)
    pushed = push(out, TO)
    sent = hub.repositories[TO].files
    private = [b"acme", b"customer", b"pytest-of-"]
    names = [name for name, content in sent.items() if any(part in content for part in private)]
    assert names == ["tokenizer_config.json"]
    assert json.loads(sent["tokenizer_config.json"]) == {"name_or_path": "secret", "chat_template": template}
    assert json.loads(sent["llmprune.json"])["model"] == "owner/tiny@v1"
    assert json.loads(sent["evaluation/eval.json"])["model"] == "secret"
    assert sent["allocation.yaml"].decode() == "# as mine.yaml says\ndefault: '2:4'\n"
    assert "allocation: allocation.yaml\n" in pushed.card
    assert "private, 8 x 32 tokens" in pushed.card
    assert "base_model: owner/tiny\n" in pushed.card
    assert "datasets" not in pushed.card.partition("\n---\n")[0]


def test_what_was_pulled_and_drawn_again_tells_nothing_either(hub: Hub, out: Path, tmp_path: Path) -> None:
    push(out, TO)
    again = Path(snapshot_download(TO, local_dir=tmp_path / "mine" / "pulled"))
    page.draw(again)
    assert str(again) in (again / "report.html").read_text()
    push(again, "some-lab/other")
    sent = hub.repositories["some-lab/other"].files
    assert sent["llmprune.json"] == hub.repositories[TO].files["llmprune.json"]
    assert str(again).encode() not in sent["report.html"]
    assert b"<dd>pulled</dd>" in sent["report.html"]


def test_a_record_that_is_none_is_not_sent(hub: Hub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "README.md").write_text("mine")
    (out / "evaluation").mkdir()
    (out / "evaluation" / "speed.json").write_text("{")
    assert call("push", out, "--to", TO) == 2
    assert "speed.json cannot be used: " in capsys.readouterr().err
    assert sent(hub) == []


def test_what_is_not_as_promised_is_not_sent(hub: Hub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = min(out.glob("*.safetensors"))
    save_file({key: value + 1 for key, value in load_file(shard).items()}, shard, metadata={"format": "pt"})
    assert call("push", out, "--to", TO) == 1
    assert "nothing was pushed: model.layers.0." in capsys.readouterr().err
    assert sent(hub) == []
    assert not (out / "README.md").exists()


def test_nothing_but_what_llmprune_wrote(hub: Hub, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("push", source, "--to", TO) == 2
    assert "it was not written by llmprune" in capsys.readouterr().err
    assert hub.asked == []


def test_dry_run(hub: Hub, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = sorted(out.iterdir())
    assert call("push", out, "--to", TO, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "base_model: owner/tiny" in shown
    assert "model-00001-of-00005.safetensors" in shown
    assert "nothing was sent" in shown
    assert (sorted(out.iterdir()), sent(hub)) == (before, [])


def test_a_push_again_sends_nothing(hub: Hub, out: Path) -> None:
    first = push(out, TO)
    received = dict(hub.received)
    assert push(out, TO).commit == first.commit
    assert hub.received == received


def test_a_large_file_goes_in_parts(hub: Hub, out: Path) -> None:
    push(out, TO)
    assert any("/storage/" in asked and asked.endswith("/2") for asked in hub.asked)
    assert any("/storage/" in asked and asked.count("/") == 2 for asked in hub.asked)


def test_a_connection_that_breaks_once(hub: Hub, out: Path) -> None:
    hub.faults.append(Fault("PUT", r"/storage/", cut=True, times=1))
    pushed = push(out, TO)
    assert {name: len(content) for name, content in hub.repositories[TO].files.items()}.items() >= pushed.files.items()


def test_a_push_that_breaks_off_goes_on(hub: Hub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults.append(Fault("PUT", r"/storage/[^/]+/2", cut=True))  # only the largest file has a second part
    assert call("push", out, "--to", TO) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"llmprune: pushing to {TO} failed: ")
    assert "run the same command again" in said
    assert "model.safetensors.index.json" not in hub.repositories[TO].files
    arrived = set(hub.objects)
    assert len(arrived) == 4
    hub.faults.clear()
    received = dict(hub.received)
    assert call("push", out, "--to", TO) == 0
    assert {oid: hub.received[oid] for oid in arrived} == {oid: received[oid] for oid in arrived}
    assert set(hub.repositories[TO].files) > {path.name for path in out.iterdir()} - {".gitattributes"}


def test_a_process_that_is_killed_in_the_middle(hub: Hub, out: Path, tmp_path: Path) -> None:
    hub.faults.append(Fault("PUT", r"/storage/[^/]+/2", 503))
    command = [sys.executable, "-m", "llmprune", "push", str(out), "--to", TO]
    process = subprocess.Popen(command, env=environment(hub, tmp_path / "other"), stderr=subprocess.DEVNULL)
    try:
        while not any(asked.endswith("/2") for asked in hub.asked):
            assert process.poll() is None
            threading.Event().wait(0.05)
    finally:
        process.kill()
        process.wait()
    assert "README.md" not in hub.repositories[TO].files
    hub.faults.clear()
    push(out, TO)
    assert "README.md" in hub.repositories[TO].files


def test_weights_of_an_earlier_push_are_taken_away(hub: Hub, out: Path) -> None:
    push(out, TO)
    repository = hub.repositories[TO]
    repository.files["model.safetensors"] = b"dense, and loaded before any shards"
    repository.files["model-00009-of-00009.safetensors"] = b"of another layout"
    repository.files["notes.txt"] = b"somebody's"
    (out / "config.json").write_text((out / "config.json").read_text() + "\n")
    push(out, TO)
    assert {"model.safetensors", "model-00009-of-00009.safetensors"}.isdisjoint(repository.files)
    assert repository.files["notes.txt"] == b"somebody's"


def test_a_branch(hub: Hub, out: Path) -> None:
    push(out, TO, revision="wanda")
    repository = hub.repositories[TO]
    assert "config.json" in repository.at("wanda")[1]
    assert "config.json" not in repository.files


def test_a_pull_request(hub: Hub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("push", out, "--to", TO, "--create-pr") == 2
    assert f"there is no {TO} on the Hub to open a pull request at" in capsys.readouterr().err
    hub.add("others/model", {"README.md": b"theirs"})
    assert call("push", out, "--to", "others/model", "--create-pr") == 0
    assert "/others/model/discussions/1" in capsys.readouterr().out
    repository = hub.repositories["others/model"]
    assert "config.json" in repository.at("refs/pr/1")[1]
    assert repository.files == {"README.md": b"theirs"}
    assert call("push", out, "--to", "others/model", "--create-pr", "--revision", "main") == 2


@pytest.mark.parametrize("command", ["push", "prune"])
@pytest.mark.parametrize(
    ("token", "to", "answer"),
    [
        (None, TO, "needs a token of yours: `hf auth login` or HF_TOKEN"),
        (
            "hf_ThisOneHasExpiredLongAgo",
            TO,
            "does not take the token from HF_TOKEN (401), which is wrong or has expired",
        ),
        (READ_TOKEN, TO, "yours may only read"),
        (TOKEN, "strangers/new", "somebody cannot create strangers/new: it may do so under somebody, some-lab"),
        (TOKEN, "owner/tiny", "pushing to owner/tiny is not allowed with this token (403)"),
        (TOKEN, "no name", "a repository to push to is named owner/name"),
        (TOKEN, "name", "a repository to push to is named owner/name"),
    ],
)
def test_who_may_not(
    command: str,
    token: str | None,
    to: str,
    answer: str,
    hub: Hub,
    out: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is told before any work: `verify` reads nothing, and `prune` begins nothing."""
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    ways = {"push": ("push", out, "--to", to), "prune": ("prune", source, "-o", tmp_path / "new", "--push-to", to)}
    assert call(*ways[command]) == 2
    said = capsys.readouterr()
    assert answer in said.err
    assert token is None or token not in said.err + said.out
    assert "verifying" not in said.err
    assert sent(hub) == []
    assert not (tmp_path / "new").exists()


def test_a_public_repository_is_not_private(hub: Hub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(out, TO)
    assert call("push", out, "--to", TO, "--private") == 2
    assert "is public, and --private would not change that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "code", "answer"),
    [
        (Fault("POST", r"/commit/", 429, {"Retry-After": "60"}), 1, "too many requests for now (429); run the same"),
        (Fault("POST", r"/preupload/", 503), 1, "the Hub is in trouble (503)"),
        (
            Fault("PUT", r"/storage/", 403, message="the signature has expired"),
            1,
            "the storage behind the Hub refused it (403): the signature has expired; the addresses there are good for "
            "a while only: run the same command again",
        ),
        (
            Fault("POST", r"/repos/create", 403, message="you may not"),
            2,
            "not allowed with this token (403): you may not",
        ),
        (Fault("GET", r"/whoami-v2", 429, {"Retry-After": "60"}), 1, "run the same command again in 60 s"),
    ],
)
def test_what_the_hub_refuses(
    fault: Fault, code: int, answer: str, hub: Hub, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults.append(fault)
    assert call("push", out, "--to", TO) == code
    said = capsys.readouterr()
    assert answer in said.err.splitlines()[-1]
    assert "Traceback" not in said.err
    assert TOKEN not in said.err + said.out


def test_the_client_waits_as_long_as_the_hub_asks(hub: Hub, out: Path) -> None:
    hub.faults.append(Fault("POST", r"/preupload/", 429, {"Retry-After": "60"}, times=1))
    push(out, TO)
    assert 61 in hub.waited


def test_a_token_on_the_command_line(out: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("push", out, "--to", TO, "--token", TOKEN) == 2
    said = capsys.readouterr().err
    assert "a token is never taken from the command line" in said
    assert TOKEN not in said


def test_prune_and_push(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("-o", tmp_path / "new", "--method", "magnitude", "--json")
    assert call("prune", "owner/tiny@v1", *options, "--push-to", TO, "--private") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pushed"]["to"] == TO
    assert hub.repositories[TO].private
    card = ModelCard(hub.repositories[TO].files["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("owner/tiny", "apache-2.0")
    assert f"llmprune prune owner/tiny@{COMMIT} --recipe" in card.text


def test_of_many_ranks_the_first_pushes(hub: Hub, source: Path, tmp_path: Path) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "llmprune",
    ]
    options = ["prune", str(source), "-o", str(tmp_path / "new"), "--method", "magnitude", "--device", "cpu"]
    settings = environment(hub, tmp_path / "other") | {"OMP_NUM_THREADS": "1"}
    command = [*torchrun, *options, "--push-to", TO]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"pushed to {TO}") == 1
    assert len([asked for asked in hub.asked if "/commit/" in asked]) == 1
    assert hub.asked.count("GET /api/whoami-v2") == 2  # before the work and before the push


def test_prune_and_a_push_that_fails(
    hub: Hub, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults.append(Fault("POST", r"/commit/", 403, message="the quota is used up"))
    new = tmp_path / "new"
    assert call("prune", source, "-o", new, "--method", "magnitude", "--json", "--push-to", TO) == 1
    said = capsys.readouterr()
    assert "pushed" not in json.loads(said.out)
    assert f"{new} is finished and stays, but it could not be pushed" in said.err
    assert f"`llmprune push {new} --to {TO}` does it later" in said.err
    hub.faults.clear()
    assert call("push", new, "--to", TO) == 0


def test_private_alone_means_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("prune", source, "-o", tmp_path / "new", "--private") == 2
    assert "--private is about the repository of --push-to" in capsys.readouterr().err


def test_a_card_by_hand_is_kept(hub: Hub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(out, TO)
    mine = (out / "README.md").read_text().replace("## Quality", "## Quality\n\nI like it.")
    (out / "README.md").write_text(mine)
    assert call("push", out, "--to", TO) == 0
    assert "README.md was written or changed by hand and is kept" in capsys.readouterr().out
    assert hub.repositories[TO].files["README.md"].decode() == mine
    assert push(out, TO, card="new").notes == []
    assert "I like it." not in (out / "README.md").read_text()


def test_a_card_of_ours_is_renewed(hub: Hub, out: Path) -> None:
    push(out, TO)
    push(out, "some-lab/other")
    assert '"some-lab/other"' in (out / "README.md").read_text()


def test_a_card_that_the_hub_does_not_take(hub: Hub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "README.md").write_text("---\nbase_model_relation: cousin\n---\nmine\n")
    assert call("push", out, "--to", TO) == 1
    assert "base_model_relation" in capsys.readouterr().err
    assert sent(hub) == []


def test_a_licence_that_only_the_hub_knows(hub: Hub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((out / "llmprune.json").read_text())
    (out / "llmprune.json").write_text(json.dumps({**report, "base": {}, "model": "/home/me/tiny", "revision": None}))
    assert call("push", out, "--to", TO, "--dry-run") == 0
    unknown = capsys.readouterr().out
    assert "the licence of the dense model is not known and not on the card (--license NAME)" in unknown
    assert "base_model" not in unknown
    assert "license:" not in unknown
    assert "/home/me" not in unknown
    assert call("push", out, "--to", TO, "--dry-run", "--base-model", "owner/tiny") == 0
    assert "license: apache-2.0" in capsys.readouterr().out
    assert call("push", out, "--to", TO, "--dry-run", "--base-model", "owner/nowhere", "--license", "mit") == 0
    asked = capsys.readouterr().out
    assert "there is no owner/nowhere on the Hub" in asked
    assert "license: mit" in asked
