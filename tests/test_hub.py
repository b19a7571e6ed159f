"""Pruning by name: the real client of the Hub against a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.families import make
from tests.hub import COMMIT, Hub, serving


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    source = make("llama", tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"the same weights once more")
    with serving(source) as running:
        yield running


def prune(hub: Hub, tmp_path: Path, model: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_ETAG_TIMEOUT": "5"}
    settings.update(HF_HUB_OFFLINE="0", LLMPRUNE_CACHE=str(tmp_path / "cache"))
    command = [sys.executable, "-m", "llmprune", "prune", model, "-o", str(tmp_path / "out"), "--method", "magnitude"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, check=False)


def test_by_name_and_revision(hub: Hub, tmp_path: Path) -> None:
    done = prune(hub, tmp_path, "owner/tiny@v1")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert (report["model"], report["revision"]) == ("owner/tiny@v1", COMMIT)
    assert not any("pytorch_model.bin" in path for path in hub.asked)


def test_a_download_that_breaks_off_can_be_repeated(hub: Hub, tmp_path: Path) -> None:
    hub.cut = "model.safetensors"
    done = prune(hub, tmp_path, "owner/tiny")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("llmprune: downloading owner/tiny failed: ")
    assert "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    hub.cut = None
    assert prune(hub, tmp_path, "owner/tiny").returncode == 0


def test_a_model_that_is_only_pickled(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    stored = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(stored, source / "pytorch_model-00001-of-00001.bin")
    listing = {"weight_map": dict.fromkeys(stored, "pytorch_model-00001-of-00001.bin")}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(listing))
    with serving(source) as hub:
        done = prune(hub, tmp_path, "owner/tiny")
    assert done.returncode == 0, done.stderr
    assert "converting pickled weights 1/1" in done.stderr


def test_what_cannot_be_dequantised_is_refused_before_its_weights_come(hub: Hub, tmp_path: Path) -> None:
    config = json.loads(hub.files["config.json"])
    hub.files["config.json"] = json.dumps({**config, "quantization_config": {"quant_method": "awq"}}).encode()
    done = prune(hub, tmp_path, "owner/tiny")
    assert done.returncode == 2
    assert "owner/tiny is quantised with awq, which transformers cannot undo" in done.stderr
    assert not any("model.safetensors" in path for path in hub.asked)


@pytest.mark.parametrize(
    ("model", "answer"),
    [
        ("owner/other", "no model 'owner/other': there is no such folder here, and no such model on the Hub"),
        ("owner/tiny@v9", "owner/tiny has no revision 'v9' on the Hub"),
    ],
)
def test_wrong_names(model: str, answer: str, hub: Hub, tmp_path: Path) -> None:
    done = prune(hub, tmp_path, model)
    assert done.returncode == 2
    assert answer in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gated_model_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    done = prune(hub, tmp_path, "owner/tiny")
    assert done.returncode == 2
    assert "owner/tiny is gated: accept its terms on its Hub page" in done.stderr
