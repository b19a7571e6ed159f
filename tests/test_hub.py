"""Pruning by name: the real client of the Hub against a server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import XetDownloadError
from safetensors.torch import load_file, save_file

import llmprune.cli
from llmprune import hub as rules
from llmprune.model import download
from llmprune.model.index import read_index
from llmprune.model.source import present, resolve
from llmprune.model.writer import PAGE
from llmprune.push import push
from llmprune.report import weights
from tests.families import make
from tests.hub import COMMIT, TOKEN, Fault, Hub, environment, reach, serving
from tests.test_report_page import parsed

CARD = (
    "---\nlicense: other\nlicense_name: tiny-terms\nlicense_link: LICENSE\nlanguage: [en, de]\ndate: 2026-01-01\n---\n"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = make("llama", tmp_path_factory.mktemp("llama") / "source")
    (source / "pytorch_model.bin").write_bytes(b"the same weights once more")
    (source / "README.md").write_text(f"{CARD}# Tiny\n")
    return source


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(model) as running:
        reach(running, monkeypatch, tmp_path / "home")
        yield running


@pytest.fixture
def prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> object:
    def run(model: str) -> tuple[int, str]:
        code = llmprune.cli.main(["prune", model, "-o", str(tmp_path / "out"), "--method", "magnitude"])
        said = capsys.readouterr()
        assert TOKEN not in said.out + said.err
        return code, (said.err.splitlines() or [""])[-1]

    return run


def test_by_name_and_revision(hub: Hub, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmprune", "prune", "owner/tiny@v1", "-o", str(tmp_path / "out")]
    settings = environment(hub, tmp_path / "other")
    done = subprocess.run(
        [*command, "--method", "magnitude"], capture_output=True, text=True, env=settings, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert (report["model"], report["revision"]) == ("owner/tiny@v1", COMMIT)
    terms = {"license": "other", "license_name": "tiny-terms", "license_link": "LICENSE", "language": ["en", "de"]}
    assert report["base"] == {"name": "owner/tiny", **terms}
    assert not any("pytorch_model.bin" in path for path in hub.asked)
    assert hub.leaked == []  # the client keeps the token from the storage


def test_a_folder_beside_its_card(model: Path, tmp_path: Path) -> None:
    report = llmprune.prune(model, out=tmp_path / "out", method="magnitude")
    assert report.base["license_name"] == "tiny-terms"
    assert "name" not in report.base


def test_a_download_that_breaks_off_goes_on(hub: Hub, prune, model: Path, tmp_path: Path) -> None:
    hub.faults.append(Fault("GET", r"/storage/", cut=True, times=2))
    assert prune("owner/tiny")[0] == 0
    stored = next(Path(tmp_path / "home" / "hub").rglob("model.safetensors"))
    assert stored.read_bytes() == (model / "model.safetensors").read_bytes()
    assert len([path for path in hub.asked if path.startswith("GET /storage/")]) == 3


def test_a_download_that_never_gets_through(hub: Hub, prune, tmp_path: Path) -> None:
    hub.faults.append(Fault("GET", r"/storage/", cut=True))
    code, said = prune("owner/tiny")
    assert code == 1
    assert said.startswith("llmprune: downloading owner/tiny failed: ")
    assert "run the same command again" in said
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    hub.asked.clear()
    assert prune("owner/tiny")[0] == 0
    assert not any("/resolve/" in path and path.endswith("config.json") for path in hub.asked)  # it was there already


def test_a_file_with_another_hash(hub: Hub, prune, tmp_path: Path) -> None:
    hub.harmed.add("model.safetensors")
    code, said = prune("owner/tiny")
    assert code == 1
    told = "model.safetensors of owner/tiny is not what the Hub says it is: its sha256 is another"
    assert said.startswith(f"llmprune: {told}")
    assert not (tmp_path / "out").exists()
    hub.harmed.clear()
    assert prune("owner/tiny")[0] == 0
    assert load_file(next(Path(tmp_path / "home" / "hub").rglob("model.safetensors")))


def test_a_file_is_read_for_its_hash_once(hub: Hub, prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prune("owner/tiny")[0] == 0
    stored = next(Path(tmp_path / "home" / "hub").rglob("model.safetensors")).resolve()
    read: list[Path] = []
    monkeypatch.setattr(download, "sha256_of", lambda path: read.append(path) or "")
    resolve("owner/tiny")
    assert read == []
    stored.write_bytes(b"other")
    with pytest.raises(llmprune.Failure, match="its sha256 is another"):
        resolve("owner/tiny")


def test_a_model_that_is_only_pickled(hub: Hub, model: Path, tmp_path: Path, prune) -> None:
    files = hub.repositories["owner/tiny"].files
    stored = load_file(model / "model.safetensors")
    del files["model.safetensors"], files["pytorch_model.bin"]
    torch.save(stored, tmp_path / "stored.bin")
    files["pytorch_model-00001-of-00001.bin"] = (tmp_path / "stored.bin").read_bytes()
    listing = {"weight_map": dict.fromkeys(stored, "pytorch_model-00001-of-00001.bin")}
    files["pytorch_model.bin.index.json"] = json.dumps(listing).encode()
    files["pytorch_model.bf16-00001-of-00001.bin"] = b"the same weights once more"
    assert present("owner/tiny", COMMIT) is None
    assert prune("owner/tiny")[0] == 0
    found = present("owner/tiny", COMMIT)
    assert found is not None
    assert not any("bf16" in path for path in hub.asked)
    assert found.folder.parent.name == "bin"
    written = load_file(found.folder / "model-00001-of-00001.safetensors")
    assert all(torch.equal(written[key], stored[key]) for key in written)


MORE = (
    *("model.fp16-00001-of-00002.safetensors", "model.bf16.safetensors", "model.int8.safetensors"),
    *("adapter_model.safetensors", "adapter_config.json", "consolidated.safetensors", "onnx/model.safetensors"),
    *("model.safetensors.index.fp16.json", "pytorch_model.bin", "model.onnx"),
)
"""What else lies beside the weights of models."""


@pytest.mark.parametrize(
    ("shards", "indexed"),
    [
        (["model.safetensors"], False),
        (["model.safetensors"], True),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], True),
        (["model.fp8-first.safetensors", "rest [2].safetensors"], True),
        (["weights.safetensors"], False),
    ],
)
def test_no_weights_but_the_model_s_own_are_downloaded(
    shards: list[str], indexed: bool, hub: Hub, model: Path, tmp_path: Path
) -> None:
    files = hub.repositories["owner/tiny"].files
    stored = load_file(model / "model.safetensors")
    del files["model.safetensors"]
    weight_map = {key: shards[number % len(shards)] for number, key in enumerate(stored)}
    for shard in shards:
        save_file({key: stored[key] for key in stored if weight_map[key] == shard}, tmp_path / "shard")
        files[shard] = (tmp_path / "shard").read_bytes()
    if indexed:
        listed = dict.fromkeys(stored, "of another.safetensors") if shards == ["model.safetensors"] else weight_map
        files["model.safetensors.index.json"] = json.dumps({"weight_map": listed}).encode()
    beside = {*MORE} if shards == ["weights.safetensors"] else {*MORE, "of another.safetensors"}
    files.update(dict.fromkeys(beside, b"{}"))
    found = resolve("owner/tiny")
    came = {path.split("/", 5)[-1] for path in hub.asked if "/resolve/" in path}
    assert {name for name in came if name.endswith(".safetensors")} == set(shards)
    assert came.isdisjoint(beside)
    assert read_index(found.folder).keys() == stored.keys()
    hub.asked.clear()
    again = present("owner/tiny", COMMIT)
    assert again is not None
    assert again.folder == found.folder
    assert hub.asked == []
    for path in (found.folder / shard for shard in shards):
        path.unlink()
        assert present("owner/tiny", COMMIT) is None


@pytest.fixture
def no_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """As older clients: of what was downloaded no list is kept."""
    monkeypatch.setattr("huggingface_hub._snapshot_download.write_tree_cache", lambda *_: None, raising=False)


@pytest.mark.usefixtures("no_tree")
def test_a_shard_that_is_gone_where_no_list_was_kept(hub: Hub, model: Path, tmp_path: Path) -> None:
    files = hub.repositories["owner/tiny"].files
    content = files.pop("model.safetensors")
    stored = load_file(model / "model.safetensors")
    files |= {"a.safetensors": content, "b.safetensors": content}
    weight_map = {key: "ab"[number % 2] + ".safetensors" for number, key in enumerate(stored)}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    folder = resolve("owner/tiny").folder
    assert present("owner/tiny", COMMIT) is not None
    (folder / "b.safetensors").unlink()
    assert present("owner/tiny", COMMIT) is None


def test_the_dense_model_of_a_name_is_seen_in_the_report_and_where_it_is_pushed(
    hub: Hub, prune, tmp_path: Path
) -> None:
    out, name = tmp_path / "out", "model.layers.0.mlp.up_proj"
    assert prune("owner/tiny@v1")[0] == 0
    hub.asked.clear()
    assert llmprune.cli.main(["report", str(out), "--linears", name, "--prompt", "To be", "--tokens", "3"]) == 0
    assert hub.asked == []
    assert json.loads((out / "evaluation" / "generations.json").read_text())[0]["dense"] is not None
    push(out, "somebody/small")
    there = tmp_path / "there"
    there.mkdir()
    (there / PAGE).write_bytes(hub.repositories["somebody/small"].files[PAGE])
    for place in (out, there):
        shown = parsed(place)
        assert "The dense model was not on this machine" not in shown.text
        (figure,) = (data for key, data in shown.data.items() if key.startswith("weights-"))
        assert [len(trace["y"]) for trace in figure["data"]] == [weights.BINS, weights.BINS]


@pytest.mark.parametrize("kind", [RuntimeError, XetDownloadError])
def test_errors_of_another_kind(
    kind: type[Exception], hub: Hub, prune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As hf_xet raises them, which transfers large files where it is installed."""

    def broken(*_: object, **__: object) -> str:
        raise kind("Data processing error:\nCAS service error")

    monkeypatch.setattr(download, "snapshot_download", broken)
    code, said = prune("owner/tiny")
    assert code == 1
    told = "Data processing error:; CAS service error; run the same command again to go on with it"
    assert said == f"llmprune: downloading owner/tiny failed: {told}"
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_dequantised_is_refused_before_its_weights_come(hub: Hub, prune) -> None:
    files = hub.repositories["owner/tiny"].files
    config = json.loads(files["config.json"])
    files["config.json"] = json.dumps({**config, "quantization_config": {"quant_method": "awq"}}).encode()
    code, said = prune("owner/tiny")
    assert code == 2
    assert "owner/tiny is quantised with awq, which cannot be undone here" in said
    assert not any("model.safetensors" in path for path in hub.asked)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("owner/other", "no model 'owner/other': there is no such folder here, and no such model on the Hub"),
        ("owner/tiny@v9", "owner/tiny has no revision 'v9' on the Hub"),
    ],
)
def test_wrong_names(name: str, answer: str, hub: Hub, prune) -> None:
    code, said = prune(name)
    assert code == 2
    assert answer in said


def test_a_gated_model_says_what_to_do(hub: Hub, prune) -> None:
    hub.repositories["owner/tiny"].gated = True
    code, said = prune("owner/tiny")
    assert code == 2
    assert "owner/tiny is gated: accept its terms on its Hub page" in said


@pytest.mark.parametrize("code", [401, 403])
def test_a_gated_model_that_is_told_of_and_not_given(code: int, hub: Hub, prune, tmp_path: Path) -> None:
    """As the Hub does it: all may see which files there are."""
    hub.faults.append(Fault("HEAD", r"/resolve/", code, {"X_Error_Code": "GatedRepo"}, "Access is restricted."))
    found, said = prune("owner/tiny")
    assert found == 2
    assert "owner/tiny is gated: accept its terms on its Hub page" in said
    assert any(path.startswith("GET /api/models/owner/tiny") for path in hub.asked)
    assert not (tmp_path / "out").exists()


def test_a_private_model_without_a_token(hub: Hub, prune, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["owner/tiny"].private = True
    monkeypatch.delenv("HF_TOKEN")
    code, said = prune("owner/tiny")
    assert code == 2
    assert "a private one needs `hf auth login` or HF_TOKEN" in said


@pytest.mark.parametrize(
    ("variable", "origin"),
    [
        ("HF_TOKEN", "HF_TOKEN"),
        ("HUGGING_FACE_HUB_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
        (None, "`hf auth login`"),
    ],
)
def test_a_token_that_has_expired(
    variable: str | None, origin: str, hub: Hub, prune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if variable is not None:
        monkeypatch.setenv(variable, TOKEN)
    else:
        (tmp_path / "home").mkdir(exist_ok=True)
        (tmp_path / "home" / "token").write_text(TOKEN)
    hub.tokens.clear()
    code, said = prune("owner/tiny")
    assert code == 2
    assert f"does not take the token from {origin} (401), which is wrong or has expired" in said


@pytest.mark.parametrize(
    ("fault", "code", "answer"),
    [
        (
            Fault("GET", r"^/api/models", 403, message="not for you"),
            2,
            "not allowed with this token (403): not for you",
        ),
        (Fault("GET", r"^/api/models", 429, {"Retry-After": "77"}), 1, "too many requests for now (429); run the same"),
        (Fault("HEAD", r"/resolve/", 429, {"Retry-After": "77"}), 1, "command again in 77 s"),
        (
            Fault("HEAD", r"/resolve/", 429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
            1,
            "command again after 2026-10-21 07:28:00 UTC",
        ),
        (Fault("HEAD", r"/resolve/", 429, {"Retry-After": "a while"}), 1, "command again in some minutes"),
        (Fault("GET", r"/storage/", 403), 1, "the storage behind the Hub refused it (403)"),
        (Fault("GET", r"^/api/models", 503), 1, "the Hub is in trouble (503)"),
        (Fault("GET", r"^/api/models", 451, message="not here"), 1, "failed (451): not here"),
    ],
)
def test_what_the_hub_refuses(fault: Fault, code: int, answer: str, hub: Hub, prune) -> None:
    hub.faults.append(fault)
    found, said = prune("owner/tiny")
    assert found == code
    assert answer in said


def test_the_client_waits_as_long_as_the_hub_asks(hub: Hub, prune) -> None:
    hub.faults.append(Fault("GET", r"/tree/", 429, {"Retry-After": "77"}, times=1))
    assert prune("owner/tiny")[0] == 0
    assert 78 in hub.waited


def test_no_token_is_ever_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-unusual-token")
    told = rules.failed(OSError(f"no, an-unusual-token!\nand not {TOKEN}, not {TOKEN}"), "a/b", "pushing to a/b")
    assert str(told).count("(token)") == 3
    assert "unusual" not in str(told)
    assert TOKEN not in str(told)
