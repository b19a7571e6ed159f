"""Pruning by name: the real client of the Hub against a server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import llmprune.cli
from llmprune import hub as rules
from llmprune.model import download
from llmprune.model.source import present, resolve
from tests.families import make
from tests.hub import COMMIT, TOKEN, Fault, Hub, environment, reach, serving

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
    assert "model.safetensors of owner/tiny is not what the Hub says it is: its sha256 is another" in said
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
    assert present("owner/tiny", COMMIT) is None
    assert prune("owner/tiny")[0] == 0
    found = present("owner/tiny", COMMIT)
    assert found is not None
    assert found.folder.parent.name == "bin"
    written = load_file(found.folder / "model-00001-of-00001.safetensors")
    assert all(torch.equal(written[key], stored[key]) for key in written)


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


def test_a_private_model_without_a_token(hub: Hub, prune, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["owner/tiny"].private = True
    monkeypatch.delenv("HF_TOKEN")
    code, said = prune("owner/tiny")
    assert code == 2
    assert "a private one needs `hf auth login` or HF_TOKEN" in said


def test_a_token_that_has_expired(hub: Hub, prune) -> None:
    hub.tokens.clear()
    code, said = prune("owner/tiny")
    assert code == 2
    assert "does not take the token from HF_TOKEN (401), which is wrong or has expired" in said


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
