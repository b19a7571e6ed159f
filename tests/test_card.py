"""The model card: what it says, read back with the Hub's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import llmprune
from llmprune.recipe import Recipe
from llmprune.report.card import is_ours, known_results, make_card, marked
from llmprune.report.record import short_name
from tests.families import make

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PERPLEXITY = {
    "value": 30.0,
    "text": "wikitext2",
    "length": 32,
    "windows": 3,
    "tokens": 93,
    "seconds": 1.0,
    "stride": None,
}
ACCURACY = {"task": "arc_easy", "metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.01, "documents": 2376}
ACCURACY |= {"shots": 0, "higher_is_better": True}
BASE = {"name": "owner/tiny", "license": "mit", "language": ["en"], "pipeline_tag": "image-text-to-text"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    model = make("llama", folder / "model")
    rules = [{"match": "*.o_proj", "sparsity": "50%", "method": "magnitude"}]
    calibration = {"source": "builtin", "samples": 4, "length": 32}
    options = {"sparsity": "2:4", "method": "wanda", "rules": rules, "ignore": ["*.up_proj"]}
    llmprune.prune(model, out=folder / "out", calibration=calibration, **options)
    return folder / "out"


@pytest.fixture
def report(out: Path) -> dict[str, Any]:
    told = json.loads((out / "llmprune.json").read_text())
    return {**told, "model": "owner/tiny@main", "revision": COMMIT}


OTHERS = {"model-00001-of-00001.safetensors": "0" * 64}
"""The hashes of other weights."""


def results_of(folder: Path, report: dict[str, Any], **files: Any) -> dict[str, Any]:
    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    for name, told in files.items():
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(told))
    return {result.measure: result for result in known_results(folder, report, report["shards"])}


def test_what_it_says(report: dict[str, Any]) -> None:
    card = ModelCard(marked(make_card(report, [], "me/small", BASE)))
    told = card.data.to_dict()
    assert (told["base_model"], told["base_model_relation"]) == ("owner/tiny", "finetune")
    assert (told["license"], told["language"], told["pipeline_tag"]) == ("mit", ["en"], "image-text-to-text")
    assert told["tags"] == ["llmprune", "pruned", "sparse", "wanda", "magnitude", "2:4", "unstructured"]
    assert "datasets" not in told
    assert "model-index" not in told
    for words in (
        "2:4 (at most 2 of every 4 consecutive inputs are kept) by wanda, 15 linears",
        "50% (counted over each matrix) by magnitude, 3 linears",
        "**Left dense**: 3 linears",
        "builtin, 4 x 32 tokens, seed 0",
        report["calibration"]["tokens_sha256"],
        "It was not measured.",
        'from_pretrained("me/small"',
        "No speed-up was measured",
        f"llmprune prune owner/tiny@{COMMIT} --recipe recipe.yaml -o OUT",
    ):
        assert words in card.text


def test_the_recipe_in_it_is_the_recipe(report: dict[str, Any]) -> None:
    text = make_card(report, [], "me/small", BASE).text
    shown = text.partition("```yaml\n")[2].partition("```")[0]
    path = Path(report["out"]).parent / "recipe.yaml"
    path.write_text(shown)
    assert Recipe.read(path).to_dict() == report["recipe"]


def test_nothing_of_somebodys_machine(report: dict[str, Any]) -> None:
    report |= {"model": "/home/me/models/tiny", "revision": None}
    report["recipe"]["calibration"]["source"] = report["calibration"]["source"] = "/home/me/texts/mine.txt"
    card = str(make_card(report, [], "me/small", {}))
    assert "/home/me" not in card
    assert "mine.txt, 4 x 32 tokens" in card
    assert "base_model" not in card
    assert "license" not in card.partition("\n---\n")[0]


@pytest.mark.parametrize("plan", ["/home/me/secret/plan.yaml", "secret/plan.yml"])
@pytest.mark.parametrize("how", ["{}", {"path": "{}"}, {"name": "file", "path": "{}"}], ids=["plain", "path", "file"])
def test_a_plan_file_is_the_one_beside_the_card(how: Any, plan: str, report: dict[str, Any]) -> None:
    """Of an earlier run no plan file lies there: only what it was called is told."""
    filled = plan if isinstance(how, str) else {key: value.format(plan) for key, value in how.items()}
    report["recipe"]["allocation"] = filled
    earlier = {**report, "recipe": json.loads(json.dumps(report["recipe"])), "changed": False}
    card = str(make_card({**report, "earlier": [earlier]}, [], "me/small", BASE))
    assert "secret" not in card
    recipes = [part.partition("```")[0] for part in card.split("```yaml\n")[1:]]
    assert "allocation: allocation.yaml\n" in recipes[-1]
    assert Recipe.from_dict(yaml.safe_load(recipes[-1])).allocation == "allocation.yaml"
    report["revision"] = None
    both = str(make_card({**report, "earlier": [{**earlier, "revision": COMMIT}]}, [], "me/small", BASE))
    assert "secret" not in both
    first, last = (part.partition("```")[0] for part in both.split("```yaml\n")[1:])
    assert Path(plan).name in first
    assert "allocation.yaml" not in first
    assert "allocation: allocation.yaml\n" in last


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("owner/model", "owner/model"), ("owner/model@refs/pr/1", "owner/model@refs/pr/1"), ("model", "model"),
        ("/home/me/model", "model"), ("./model", "model"), ("~/models/model", "model"), ("my/own/model", "model"),
        ("/home/me@work/model", "model"),
    ],
)  # fmt: skip
def test_names(name: str, shown: str) -> None:
    assert short_name(name) == shown


@pytest.mark.parametrize(
    ("source", "named"),
    [("c4", "allenai/c4"), ("someone/texts", "someone/texts"), ("builtin", None), ("a/b.txt", None)],
)
def test_data_sets(source: str, named: str | None, report: dict[str, Any]) -> None:
    report["calibration"]["source"] = source
    assert make_card(report, [], "me/small", BASE).data.datasets == ([named] if named else None)


def test_terms_that_lie_beside_the_dense_model(report: dict[str, Any]) -> None:
    terms = {"license": "other", "license_name": "theirs", "license_link": "LICENSE"}
    link = "https://huggingface.co/owner/tiny/blob/main/LICENSE"
    assert make_card(report, [], "me/small", {**BASE, **terms}).data.license_link == link
    report["side_files"].append("LICENSE")
    assert make_card(report, [], "me/small", {**BASE, **terms}).data.license_link == "LICENSE"


def test_what_the_run_measured(report: dict[str, Any], tmp_path: Path) -> None:
    report |= {"dense": {**PERPLEXITY, "value": 20.0}, "sparse": PERPLEXITY}
    (found,) = known_results(tmp_path, report, report["shards"])
    assert (found.dense, found.sparse) == (20.0, 30.0)
    assert known_results(tmp_path, report, OTHERS) == []
    card = ModelCard(str(make_card(report, [found], "me/small", BASE)))
    (told,) = card.data.eval_results
    assert (told.metric_type, told.metric_value) == ("perplexity", 30.0)
    named = (told.dataset_type, told.dataset_config, told.dataset_split)
    assert named == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    assert "| perplexity | 20 | 30 | wikitext2, context 32, no overlap, 93 predicted tokens |" in card.text


def test_what_eval_measured_later(report: dict[str, Any], tmp_path: Path) -> None:
    report |= {"dense": {**PERPLEXITY, "value": 20.0}, "sparse": PERPLEXITY}
    apart = {"dense": "owner/tiny", "kl": 0.25, "stderr": None, "agreement": 0.9, "text": "wikitext2"}
    apart |= {"length": 32, "windows": 3, "tokens": 93, "seconds": 1.0}
    told = {"model": "out", "perplexity": {**PERPLEXITY, "value": 29.0}, "divergence": apart}
    told |= {"shards": report["shards"], "tasks": {"scores": [ACCURACY], "means": {}}}
    found = results_of(tmp_path, report, eval=told)
    assert (found["perplexity"].dense, found["perplexity"].sparse) == (20.0, 29.0)
    assert found["KL(dense ‖ this model), nats a token"].sparse == 0.25
    assert (found["arc_easy acc"].dense, found["arc_easy acc"].sparse) == (None, 0.5)
    assert set(results_of(tmp_path, report, eval={**told, "shards": OTHERS})) == {"perplexity"}  # of the run
    assert known_results(tmp_path, report, OTHERS) != []  # measured since somebody has changed the weights
    text = make_card(report, list(found.values()), "me/small", BASE).text
    assert "| arc_easy acc | not measured | 0.5 ± 0.01 | lm-eval, 0 shots, 2,376 documents |" in text
    assert "| same most likely token as the dense model | 1 | 0.9 | wikitext2, context 32, 93 tokens |" in text


def test_every_figure_is_in_the_index(report: dict[str, Any], tmp_path: Path) -> None:
    report |= {"dense": {**PERPLEXITY, "value": 20.0}, "sparse": PERPLEXITY}
    apart = {"dense": "owner/tiny", "kl": 0.25, "stderr": 0.01, "agreement": 0.9, "text": "wikitext2"}
    apart |= {"length": 32, "windows": 3, "tokens": 93, "seconds": 1.0}
    told = {"model": "out", "divergence": apart, "shards": report["shards"], "tasks": {"scores": [ACCURACY]}}
    found = list(results_of(tmp_path, report, eval=told).values())
    card = ModelCard(str(make_card(report, found, "me/small", BASE)))
    index = {entry.metric_type: entry for entry in card.data.eval_results}
    values = {"perplexity": 30.0, "kl_divergence": 0.25, "top1_agreement": 0.9, "acc": 0.5}
    assert {kind: entry.metric_value for kind, entry in index.items()} == values
    table = card.text.partition("## Quality")[2].partition("## ")[0]
    assert len([line for line in table.splitlines() if line.startswith("|")]) - 2 == len(values)
    assert (index["kl_divergence"].dataset_type, index["kl_divergence"].dataset_split) == (
        "Salesforce/wikitext",
        "test",
    )


def test_what_compare_measured(report: dict[str, Any], tmp_path: Path) -> None:
    def model(name: str, value: float, **more: Any) -> dict[str, Any]:
        told = {"name": name, "path": str(tmp_path / name), "dense": False, "perplexity": None, "divergence": None}
        told |= {"bytes": 9, "weights": 9, "sparsity": 0.4, "linears_sparsity": 0.5, "shards": {name: "0"}}
        return {**told, "scores": [{**ACCURACY, "value": value}], **more}

    def compared(models: list[dict[str, Any]]) -> dict[str, Any]:
        told: dict[str, Any] = {"dense": "dense", "text": None, "models": models, "differences": []}
        return {**told, "judged": {}, "notes": [], "versions": {}}

    models = [model("dense", 0.75, dense=True), model("other", 0.1)]
    models.append(model("out", 0.5, shards=report["shards"]))
    found = results_of(tmp_path / "out", report, comparison=compared(models))
    assert [(result.dense, result.sparse) for result in found.values()] == [(0.75, 0.5)]
    card = ModelCard(str(make_card(report, list(found.values()), "me/small", BASE)))
    (told,) = card.data.eval_results
    assert (told.dataset_type, told.metric_type, told.metric_value) == ("arc_easy", "acc", 0.5)
    assert results_of(tmp_path / "out", report, comparison=compared(models[:2])) == {}


@pytest.mark.parametrize("told", ["{", '{"perplexity": {"value": 1}}', '{"tasks": 3}'])
def test_results_that_are_none(told: str, report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "eval.json").write_text(told)
    with pytest.raises(llmprune.UserError, match="evaluation"):
        known_results(tmp_path, report, report["shards"])


def test_who_wrote_it(report: dict[str, Any]) -> None:
    ours = marked(make_card(report, [], "me/small", BASE))
    assert is_ours(ours)
    assert not is_ours(ours.replace("license: mit", "license: gpl"))
    assert not is_ours(f"{ours}And one thing more.\n")
    assert not is_ours("# By hand\n")


def test_weights_that_were_trained_since(report: dict[str, Any]) -> None:
    assert "It was not trained after that" in make_card(report, [], "me/small", BASE).text
    text = make_card(report, [], "me/small", BASE, changed=True).text
    assert "Its weights were changed after that" in text
    assert "not trained" not in text
