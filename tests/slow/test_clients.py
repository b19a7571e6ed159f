"""The pruned SmolLM2 in programs other than transformers: those that are installed must give transformers' numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llmprune
from llmprune.demo import get_model
from llmprune.errors import Failure
from tests.bench.clients import CLIENTS

pytestmark = pytest.mark.slow


def missing(name: str) -> list[pytest.MarkDecorator]:
    packages = ", ".join(CLIENTS[name].packages)
    return [pytest.mark.skipif(not CLIENTS[name].installed, reason=f"not installed: {packages}")]


BENCH = Path(__file__).resolve().parents[1] / "bench" / "clients.py"


WAYS: dict[str, dict[str, Any]] = {
    "zeros": {"sparsity": "2:4", "method": "wanda"},
    "blocks": {"depth": {"drop": "20%", "by": "influence"}},
    "channels": {"width": {"channels": "20%"}},
}


@pytest.fixture(scope="module", params=WAYS)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        model = get_model()
    except Failure as failure:
        pytest.skip(f"the model cannot be had here: {failure}")
    out = tmp_path_factory.mktemp("clients") / "out"
    calibration = {"source": "builtin", "samples": 4, "length": 256}
    llmprune.prune(model, out=out, calibration=calibration, **WAYS[request.param])
    return out


@pytest.mark.parametrize("name", [pytest.param(name, marks=missing(name)) for name in CLIENTS])
def test_gives_the_numbers_of_transformers(name: str, pruned: Path) -> None:
    command = [sys.executable, str(BENCH), str(pruned), "--only", name, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (row,) = json.loads(done.stdout)
    assert row["failure"] is None
    assert row["same"] == row["of"] == 32
    if row["perplexity"] is not None:
        assert row["perplexity"] == pytest.approx(row["reference"], rel=1e-3)
