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
    told = cleaned({"out": "/a/b/c", "text": text})
    assert told == {"out": "c", "text": "at cd c-2 owner/a/b/c c/d (c) and/a/b/c https://hub.co/a/b/c"}


def test_paths_that_are_nowhere_else() -> None:
    assert cleaned("cannot read /scratch/zoe/x.txt: no/such file, n/a, 3 / 4 or /x") == (
        "cannot read x.txt: no/such file, n/a, 3 / 4 or /x"
    )
    assert cleaned(["/", "//"]) == ["/", "//"]


def test_what_models_said_is_no_path() -> None:
    said = [{"prompt": "/or/else", "dense": "see /m/tiny"}]
    names = Names({"evaluation/generations.json": said, "llmprune.json": {"model": "/m/tiny"}})
    assert names(said, answers=True) == [{"prompt": "/or/else", "dense": "see tiny"}]
