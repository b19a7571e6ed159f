"""Runs on what earlier runs had made: the whole way stays known, and what the card says makes the model again."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmprune
from llmprune.cli import main
from llmprune.errors import UserError
from llmprune.recover import recover
from llmprune.report.card import make_card
from tests.families import make
from tests.test_distributed import Ranks
from tests.test_recover import told, weights
from tests.test_resume import digests

pytestmark = pytest.mark.usefixtures("no_pages")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = COMMIT[::-1]
SETTINGS: dict[str, Any] = {"calibration": "builtin", "samples": 4, "length": 32}
SHORT: dict[str, Any] = {"steps": 2, "length": 16, "batch": 2, "held_out": 4, "save_every": 0}
SPARSE: dict[str, Any] = {"sparsity": "2:4", "method": "wanda", **SETTINGS}


def change(folder: Path, **keys: Any) -> None:
    (folder / "llmprune.json").write_text(json.dumps({**told(folder), **keys}))


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture that lost an expert, was trained, and got zeros: `model`, `few`, `again`, `out`."""
    folder = tmp_path_factory.mktemp("way")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmprune.pipeline.draw_page", lambda *_: None)
        make("mixtral", folder / "model")
        (folder / "text.txt").write_text("\n\n".join(f"A line of text, number {n}, to learn." for n in range(200)))
        llmprune.prune(folder / "model", out=folder / "few", experts={"drop": 1}, **SETTINGS)
        recover(folder / "few", out=folder / "again", data=folder / "text.txt", **SHORT)
        llmprune.prune(folder / "again", out=folder / "out", **SPARSE)
    return folder


def test_the_last_report_tells_of_the_first(way: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, few = told(way / "out"), told(way / "again")
    (run,) = report["earlier"]
    assert report["model"] == str(way / "again")
    assert few["earlier"] == []
    for key in ("model", "recipe", "weights", "dense_weights", "widths", "sparsity", "recovery", "versions"):
        assert run[key] == few[key], key
    assert not run["changed"]
    share = few["weights"] / few["dense_weights"]
    said = f"of model num_local_experts 3 of 4: {share:.2%} of the weights, trained after that."
    assert said in make_card(report, [], "me/small", {}).text
    assert main(["report", str(way / "out")]) == 0
    capsys.readouterr()
    page = (way / "out" / "report.html").read_text()
    assert said in page
    assert "What that costs in quality has not been measured." in page
    assert report["sparsity"] == 0.5
    assert llmprune.verify(way / "out").ok


def test_what_the_card_says_makes_it_again(way: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = make_card(told(way / "out"), [], "me/small", {}).text.partition("## How to make it again")[2]
    commands = text.partition("```bash\n")[2].partition("\n```")[0].splitlines()
    recipes = dict(re.findall(r"with this `(recipe-\d\.yaml)`.*?```yaml\n(.*?)```", text, re.DOTALL))
    assert [command.split()[1] for command in commands] == ["prune", "recover", "prune"]
    assert sorted(recipes) == ["recipe-1.yaml", "recipe-2.yaml"]
    shutil.copytree(way / "model", tmp_path / "model")
    shutil.copy(way / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, recipe in recipes.items():
        Path(name).write_text(recipe)
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0
    assert digests(tmp_path / "OUT-2") == digests(way / "out")


def test_what_came_from_the_hub_in_between_is_where_the_card_begins(way: Path, tmp_path: Path) -> None:
    shutil.copytree(way / "again", tmp_path / "again")
    base = {"name": "owner/mixture", "license": "mit"}
    change(tmp_path / "again", model="owner/mixture", revision=COMMIT, base=base)
    llmprune.prune(tmp_path / "again", out=tmp_path / "out", **SPARSE)
    report = told(tmp_path / "out")
    assert report["base"] == base
    card = make_card(report, [], "me/small", report["base"])
    assert card.data.to_dict()["base_model"] == "owner/mixture"
    assert f"[owner/mixture](https://huggingface.co/owner/mixture) at commit `{COMMIT}`" in card.text
    assert f"llmprune prune owner/mixture@{COMMIT} --recipe recipe-1.yaml -o OUT-1\n" in card.text
    # What was made of it was pushed as well: whoever has that need not make it.
    public = {**report, "model": "me/few", "revision": OTHER}
    text = make_card(public, [], "me/small", {"name": "me/few"}).text
    assert f"llmprune prune me/few@{OTHER} --recipe recipe.yaml -o OUT\n" in text
    assert "recover" not in text.partition("## How to make it again")[2].partition("```yaml")[0]
    assert "of owner/mixture num_local_experts 3 of 4" in text
    # Somebody says on pushing what it was made of: the commit is that of another model.
    named = make_card(report, [], "me/small", {"name": "me/few"}).text
    assert COMMIT not in named
    assert "llmprune prune owner/mixture --recipe recipe-1.yaml -o OUT-1" in named


def test_a_licence_of_ones_own(way: Path, tmp_path: Path) -> None:
    shutil.copytree(way / "few", tmp_path / "few")
    change(tmp_path / "few", base={"name": "owner/mixture", "license": "other", "license_name": "theirs"})
    (tmp_path / "few" / "README.md").write_text("---\nlicense: mit\n---\n")
    llmprune.prune(tmp_path / "few", out=tmp_path / "out", sparsity="2:4", method="magnitude")
    assert told(tmp_path / "out")["base"] == {"name": "owner/mixture", "license": "mit"}


def test_three_runs(way: Path, tmp_path: Path) -> None:
    llmprune.prune(way / "out", out=tmp_path / "third", depth={"drop": [0]}, **SETTINGS)
    report = told(tmp_path / "third")
    assert [run["widths"] is None for run in report["earlier"]] == [False, True]
    assert report["earlier"][1]["sparsity"] == 0.5
    said = make_card(report, [], "me/small", {}).text
    assert "trained after that; of that 50.00% zeros in the pruned linears." in said
    assert "in 3 runs. The last one: it has 2 of 3 blocks, without 0" in said
    assert "llmprune prune OUT-2 --recipe recipe-3.yaml -o OUT-3" in said


def test_a_training_keeps_the_zeros_of_an_earlier_run(way: Path, tmp_path: Path) -> None:
    """Also where the last run promises none."""
    llmprune.prune(way / "out", out=tmp_path / "short", depth={"drop": [0]}, **SETTINGS)
    before = weights(tmp_path / "short")
    recover(tmp_path / "short", out=tmp_path / "trained", data=way / "text.txt", rate=1e-2, **SHORT)
    after = weights(tmp_path / "trained")
    sparse = {key: value for key, value in before.items() if (value == 0).float().mean() > 0.4}
    assert sum("self_attn" in key for key in sparse) == 8
    assert sum("experts" in key for key in sparse) >= 2
    for key, value in sparse.items():
        assert torch.equal(after[key] == 0, value == 0), key
        assert not torch.equal(after[key], value), key


@pytest.mark.parametrize("how", ["changed", "under another name"])
def test_weights_that_something_else_has_changed(how: str, way: Path, tmp_path: Path) -> None:
    shutil.copytree(way / "few", tmp_path / "few")
    path = next(iter(sorted((tmp_path / "few").glob("*.safetensors"))))
    factor, to = (0.5, path) if how == "changed" else (1.0, path.with_name("weights.safetensors"))
    tensors = {key: value * factor for key, value in load_file(path).items()}
    path.unlink()
    save_file(tensors, to, metadata={"format": "pt"})
    index = tmp_path / "few" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(path.name, to.name))
    llmprune.prune(tmp_path / "few", out=tmp_path / "out", sparsity="2:4", method="magnitude")
    report = told(tmp_path / "out")
    assert report["earlier"][0]["changed"]
    text = make_card(report, [], "me/small", {}).text
    assert "changed after that by something else" in text
    assert "# something else has changed the weights in OUT-1 after that" in text


@pytest.mark.parametrize(("content", "reason"), [("{", "Expecting"), ("[]", "not a mapping"), ("{}", "lacks 'model'")])
def test_a_report_that_cannot_be_read(content: str, reason: str, way: Path, tmp_path: Path) -> None:
    shutil.copytree(way / "few", tmp_path / "few")
    (tmp_path / "few" / "llmprune.json").write_text(content)
    with pytest.raises(UserError, match=rf"llmprune.json cannot be used: .*{reason}"):
        llmprune.prune(tmp_path / "few", out=tmp_path / "out", sparsity="2:4", method="magnitude")
    assert not (tmp_path / "out").exists()


def sparse_on(model: Path, out: Path) -> None:
    llmprune.prune(model, out=out, **SPARSE)


def test_ranks_agree(way: Path, tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, sparse_on, way / "again", tmp_path / "out") as ranks:
        ranks.all_well()
    assert told(tmp_path / "out")["earlier"] == told(way / "out")["earlier"]
