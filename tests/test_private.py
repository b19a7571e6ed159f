"""Nothing that goes to others tells where folders lay on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from llmprune.errors import UserError
from llmprune.report.private import without_paths

NASTY = "/home/zoë/a \"b\" & 'c'/<model>"


def folder(tmp_path: Path, report: dict[str, Any], page: str = "") -> Path:
    out = tmp_path / "out"
    (out / "evaluation").mkdir(parents=True)
    (out / "llmprune.json").write_text(json.dumps(report, indent=2))
    (out / "report.html").write_text(page, encoding="utf-8")
    return out


def test_values_and_texts_that_hold_them(tmp_path: Path) -> None:
    source = "/data/c4/first.jsonl"
    report = {"out": str(tmp_path / "out"), "model": "owner/tiny", "calibration": {"source": source, "samples": 8}}
    report |= {"notes": [f"read\n{source}, twice", "../near/here", "/data/c4/first.jsonl.gz"], "share": 0.5}
    told = json.loads(without_paths(folder(tmp_path, report))["llmprune.json"])
    assert told == {
        "out": "out",
        "model": "owner/tiny",
        "calibration": {"source": "first.jsonl", "samples": 8},
        "notes": ["read\nfirst.jsonl, twice", "../near/here", "first.jsonl.gz"],
        "share": 0.5,
    }


@pytest.mark.parametrize("ascii_only", [True, False])
def test_names_that_json_and_html_write_otherwise(ascii_only: bool, tmp_path: Path) -> None:
    data = json.dumps({"of": NASTY}, ensure_ascii=ascii_only)
    out = folder(tmp_path, {"model": NASTY}, f"<p>{escape(NASTY)}</p><p>{escape(NASTY)}/evaluation</p>{data}")
    told = without_paths(out)
    assert json.loads(told["llmprune.json"]) == {"model": "<model>"}
    assert told["report.html"] == '<p>&lt;model&gt;</p><p>&lt;model&gt;/evaluation</p>{"of": "<model>"}'


def test_programs_of_the_page_stay_as_their_hashes_say(tmp_path: Path) -> None:
    script = "<script>\nlet x = '/x'; y = (/x/g)\n</script>"
    out = folder(tmp_path, {"out": "/x"}, f"<p>/x</p>{script}<script type='application/json'>\"/x\"</script>")
    assert without_paths(out)["report.html"] == f"<p>x</p>{script}<script type='application/json'>\"x\"</script>"


def test_only_whole_paths(tmp_path: Path) -> None:
    page = "/a/b/cd /a/b/c-2 /z/a/b/c owner/a/b/c /a/b/c/d (/a/b/c) and/a/b/c"
    out = folder(tmp_path, {"out": "/a/b/c"}, page)
    assert without_paths(out)["report.html"] == "/a/b/cd /a/b/c-2 /z/a/b/c owner/a/b/c c/d (c) and/a/b/c"


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/zoe")
    page = "at /home/zoe/secret and /home/zoella and /home/zoe/models/tiny"
    out = folder(tmp_path, {"model": "/home/zoe/models/tiny"}, page)
    assert without_paths(out)["report.html"] == "at ~/secret and /home/zoella and tiny"
    monkeypatch.setenv("HOME", "/")
    assert without_paths(out)["report.html"] == "at /home/zoe/secret and /home/zoella and tiny"


def test_what_models_said_is_no_path(tmp_path: Path) -> None:
    out = folder(tmp_path, {"model": "/m/tiny"}, "either/or, /or")
    (out / "evaluation" / "generations.json").write_text(json.dumps([{"prompt": "/or", "dense": "see /m/tiny"}]))
    (out / "evaluation" / "comparison.json").write_text(json.dumps({"models": [{"path": "/m/other"}], "text": None}))
    told = without_paths(out)
    assert set(told) == {"llmprune.json", "evaluation/generations.json", "evaluation/comparison.json"}
    assert json.loads(told["evaluation/generations.json"]) == [{"prompt": "/or", "dense": "see tiny"}]
    assert json.loads(told["evaluation/comparison.json"])["models"] == [{"path": "other"}]


def test_nothing_to_hide(tmp_path: Path) -> None:
    assert without_paths(folder(tmp_path, {"model": "owner/tiny", "out": "out"}, "<p>out</p>")) == {}


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    out = folder(tmp_path, {})
    (out / "evaluation" / "eval.json").write_text("{")
    with pytest.raises(UserError, match=r"eval\.json cannot be used: "):
        without_paths(out)
