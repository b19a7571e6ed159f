"""Every recipe that is shipped can be read, opens with its command, and plans on a model of its family."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmprune.course import Course
from llmprune.pipeline import plan
from llmprune.recipe import Recipe
from tests.families import make

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))

FAMILY = {
    "llama": "llama", "qwen3": "qwen3", "mixtral": "mixtral", "opt": "opt", "smollm2": "llama", "gpt-oss": "gpt_oss",
    "gemma3": "gemma3_text", "qwen3-moe": "qwen3_moe", "mistral": "mistral",
}  # fmt: skip


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 6


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path, tmp_path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    said = re.fullmatch(rf"# llmprune (prune|run) [\w./-]+ --recipe recipes/{re.escape(path.name)} -o [\w.-]+", first)
    assert said
    recipe = Recipe.read(path) if said[1] == "prune" else Course.read(path).prune
    family = next(FAMILY[name] for name in sorted(FAMILY, key=len, reverse=True) if path.stem.startswith(name))
    source = make(family, tmp_path / "model")
    _, made = plan(source, recipe=recipe.override("calibration.length", 16).override("evaluate.text", None))
    assert made.pruned
    assert made.covered > 0.3
