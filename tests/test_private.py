"""Nothing that goes to others tells where folders lay on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmprune.report.private import Names

NASTY = "/home/zoë/a \"b\" & 'c'/<model>"


def cleaned(data: Any) -> Any:
    return Names({"llmprune.json": data})(data)


def test_values_and_texts_that_hold_them() -> None:
    source = "/data/c4/first.jsonl"
    told = {"out": "/runs/out", "model": "owner/tiny", "calibration": {"source": source, "samples": 8}, "share": 0.5}
    told |= {"notes": [f"read\n{source}, twice", f"'{NASTY}'/evaluation", f"{source}.gz"], "of": NASTY, "none": None}
    assert cleaned(told) == {
        "out": "out",
        "model": "owner/tiny",
        "calibration": {"source": "first.jsonl", "samples": 8},
        "notes": ["read\nfirst.jsonl, twice", "'<model>'/evaluation", "first.jsonl.gz"],
        "of": "<model>",
        "share": 0.5,
        "none": None,
    }


def test_paths_that_begin_at_home_here_or_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/zoe")
    told = ["~/models/tiny", "../../acme/text.txt", "./acme/other.txt", "/home/zoe/models/tiny/", "acme/tiny", "~5 %"]
    assert cleaned(told) == ["tiny", "text.txt", "other.txt", "tiny", "acme/tiny", "~5 %"]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("work/customer/source", "source"),
        ("acme/private.txt", "private.txt"),
        ("acme/Private.JSONL.GZ", "Private.JSONL.GZ"),
        ("models/tiny.gguf", "tiny.gguf"),
        ("my texts/verses", "verses"),
        (".cache/verses", "verses"),
        ("~nobody-of-that-name/verses", "verses"),
        ("owner/tiny", "owner/tiny"),
        ("owner/tiny@v1", "owner/tiny@v1"),
        ("owner/tiny@refs/pr/1", "owner/tiny@refs/pr/1"),
        ("gpt2@refs/pr/1", "gpt2@refs/pr/1"),
        ("here/tiny", "tiny"),
        ("long/" + "x" * 300, "long/" + "x" * 300),
        ("c4", "c4"),
    ],
)
def test_relative_paths_and_names_on_the_hub(value: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "here" / "tiny").mkdir(parents=True)
    told = {"model": value, "perplexity": {"text": value}, "models": [{"path": value, "notes": [f"of {value}: none"]}]}
    assert Names({"eval.json": told}, [Path("/nowhere"), tmp_path])(told) == {
        "model": name,
        "perplexity": {"text": name},
        "models": [{"path": name, "notes": [f"of {name}: none"]}],
    }


@pytest.mark.parametrize(
    ("revision", "name"), [(None, "tiny"), ("9" * 64, "tiny"), ("9" * 40, "here/tiny")], ids=["folder", "file", "Hub"]
)
def test_a_model_with_its_revision(revision: str | None, name: str, tmp_path: Path) -> None:
    """A commit is of the Hub, even where a folder is called the same; what has none is of no Hub."""
    places = [tmp_path]
    if revision is not None:
        (tmp_path / "here" / "tiny").mkdir(parents=True)
    told = {"model": "here/tiny", "revision": revision}
    assert Names({"llmprune.json": told}, places)(told) == {**told, "model": name}
    base = {"base": {"name": "here/tiny"}, "earlier": [{**told, "revision": "9" * 40}], "distilled_from": "here/tiny"}
    assert Names({"llmprune.json": base}, places)(base) == base


@pytest.mark.parametrize("plan", ["acme/plan.yaml", "acme/plan", "/acme/plans/plan.yaml"])
def test_allocations(plan: str) -> None:
    name = Path(plan).name
    for told, shown in ((plan, name), ({"name": plan}, {"name": name}), ({"name": "file", "path": plan},
                                                                         {"name": "file", "path": name})):  # fmt: skip
        assert cleaned({"recipe": {"allocation": told}}) == {"recipe": {"allocation": shown}}


def test_two_ways_from_one_folder_to_another_are_one(tmp_path: Path) -> None:
    (tmp_path / "here" / "tiny").mkdir(parents=True)
    told = [{"path": "here/tiny"}, {"path": str(tmp_path / "here" / "tiny")}]
    assert Names({"comparison.json": told}, [tmp_path])(told) == [{"path": "tiny"}, {"path": "tiny"}]


def test_places_of_one_name_are_told_apart_everywhere() -> None:
    models = [{"name": path, "path": path} for path in ("/runs/wanda/out", "/runs/sparsegpt/out", "/old/wanda/out")]
    records = {"evaluation/comparison.json": {"models": models}, "llmprune.json": {"out": "/runs/wanda/out"}}
    records["inner/llmprune.json"] = {"out": "/other/name"}
    names = Names(records)
    told = names(records)
    assert [model["path"] for model in told["evaluation/comparison.json"]["models"]] == [
        "runs/wanda/out",
        "sparsegpt/out",
        "old/wanda/out",
    ]
    assert all(model["name"] == model["path"] for model in told["evaluation/comparison.json"]["models"])
    assert told["llmprune.json"]["out"] == "runs/wanda/out"
    assert told["inner/llmprune.json"]["out"] == "name"


def test_two_ways_to_one_place_are_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    told = [str(tmp_path / "real"), str(tmp_path / "link"), f"{tmp_path / 'real'}/"]
    assert cleaned(told) == ["real", "real", "real"]


def test_only_whole_paths() -> None:
    text = "at /a/b/cd /a/b/c-2 owner/a/b/c /a/b/c/d (/a/b/c) and/a/b/c https://hub.co/a/b/c"
    told = cleaned({"out": "/a/b/c", "note": text})
    assert told == {"out": "c", "note": "at cd c-2 owner/a/b/c c/d (c) and/a/b/c https://hub.co/a/b/c"}


def test_paths_that_are_nowhere_else() -> None:
    assert cleaned("cannot read /scratch/zoe/x.txt: no/such file, n/a, 3 / 4 or /x") == (
        "cannot read x.txt: no/such file, n/a, 3 / 4 or /x"
    )
    assert cleaned(["/", "//"]) == ["/", "//"]


def test_what_models_said_is_no_path() -> None:
    said = [{"prompt": "/or/else", "dense": "see /m/tiny"}]
    names = Names({"evaluation/generations.json": said, "llmprune.json": {"model": "/m/tiny"}})
    assert names(said, answers=True) == [{"prompt": "/or/else", "dense": "see tiny"}]
