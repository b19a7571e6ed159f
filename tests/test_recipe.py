"""The recipe: what YAML gives, what is refused, and how single keys are changed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmprune import allocate, reconstruct, refine, solvers
from llmprune.cli.options import add_recipe, recipe_options
from llmprune.errors import UserError
from llmprune.recipe import (
    SHORT,
    Calibration,
    Evaluation,
    Recipe,
    Rule,
    assemble,
    check_said,
    format_size,
    parse_size,
    read_value,
)

FULL = Recipe(
    sparsity="2:4",
    method={"name": "sparsegpt", "damping": 0.05, "block_size": 64},
    scope="row",
    calibration=Calibration("owner/name", 16, 512, 7, config="en", split="test", column="body"),
    ignore=("*.q_proj", r"re:model\.layers\.\d+\.mlp\..*"),
    rules=(
        Rule("*.down_proj", sparsity=0.3, method="wanda", scope="matrix"),
        Rule("model.layers.0.*", skip=True),
        Rule("*.up_proj", sparsity="1:4", method={"name": "sparsegpt", "damping": 1e-5}),
    ),
    device="cuda:1",
    dtype="bfloat16",
    shard_size="200MB",
    max_memory="8GiB",
    evaluate=Evaluation("wikitext2", 1024, max_perplexity=50.0),
)


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(values: Any) -> str:
    with pytest.raises(UserError) as caught:
        Recipe.from_dict(values)
    return str(caught.value)


@pytest.mark.parametrize("recipe", [Recipe(), FULL], ids=["defaults", "full"])
def test_round_trips(recipe: Recipe, tmp_path: Path) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.read(written(tmp_path, recipe.to_yaml())) == recipe
    assert Recipe.read(str(written(tmp_path, recipe.to_yaml()))) == recipe


@pytest.mark.parametrize("recipe", [Recipe(), FULL], ids=["defaults", "full"])
def test_other_yaml_readers_read_the_same(recipe: Recipe) -> None:
    assert yaml.safe_load(recipe.to_yaml()) == recipe.to_dict()


LIKE_NUMBERS = ["5", "-3", "+5", "0.5", "1.", ".5", ".inf", ".nan", "1e5", "1e-3", "5E3", "08", "007", "0x1F", "1_000"]
LIKE_OTHERS = [
    "2:4",
    "12:30:45",
    "2024-01-01",
    "yes",
    "null",
    "~",
    "",
    " x ",
    "a: b",
    "#c",
    "[1]",
    "*a",
    "a\nb",
    "\t",
    "é",
]


@pytest.mark.parametrize("text", [*LIKE_NUMBERS, *LIKE_OTHERS])
def test_any_text_round_trips_as_text(text: str, tmp_path: Path) -> None:
    recipe = Recipe(calibration=Calibration(config=text))
    assert Recipe.read(written(tmp_path, recipe.to_yaml())) == recipe
    assert yaml.safe_load(recipe.to_yaml())["calibration"]["config"] == text


def test_an_empty_recipe_is_all_defaults(tmp_path: Path) -> None:
    assert Recipe.from_dict({}) == Recipe()
    assert Recipe.read(written(tmp_path, "{}")) == Recipe()
    assert Recipe.read(written(tmp_path, "calibration: {}\nevaluate: {}")) == Recipe()


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "4:8", "16:32", "10:59", "1:60"])
def test_unquoted_patterns_stay_text(pattern: str, tmp_path: Path) -> None:
    text = (
        f"sparsity: {pattern}\nrules:\n- {{match: '*.a', sparsity: {pattern}}}\n- match: '*.b'\n  sparsity: {pattern}\n"
    )
    recipe = Recipe.read(written(tmp_path, text))
    assert recipe.sparsity == pattern
    assert [rule.sparsity for rule in recipe.rules] == [pattern, pattern]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.5", 0.5), (".5", 0.5), ("5e-1", 0.5), ("50%", "50%"), ("'0.5'", "0.5"), ("1", 1.0), ('"2:4"', "2:4")],
)
def test_sparsity_as_yaml_writes_it(text: str, expected: str | float, tmp_path: Path) -> None:
    found = Recipe.read(written(tmp_path, f"sparsity: {text}")).sparsity
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "expected"), [("1e-3", 1e-3), ("1E3", 1e3), ("5", 5), ("-0.5", -0.5), ("true", True), ("null", None)]
)
def test_plain_scalars_are_numbers_truths_and_nothing(text: str, expected: object, tmp_path: Path) -> None:
    method = Recipe.read(written(tmp_path, f"method: {{name: x, option: {text}}}")).method
    assert method == {"name": "x", "option": expected}
    assert type(method["option"]) is type(expected)  # type: ignore[index]


@pytest.mark.parametrize("text", ["2024-01-01", "2024-01-01 10:00:00", "12:30:45", "1.2.3", "0x1F", "1:30.5"])
def test_dates_times_and_versions_stay_text(text: str, tmp_path: Path) -> None:
    assert Recipe.read(written(tmp_path, f"calibration: {{config: {text}}}")).calibration.config == text
    assert Recipe().override("calibration.split", read_value(text)).calibration.split == text


def test_lists_become_tuples() -> None:
    recipe = Recipe.from_dict({"ignore": ["a", "b"], "rules": [{"match": "*", "skip": True}, {"match": "x"}]})
    assert recipe.ignore == ("a", "b")
    assert recipe.rules == (Rule("*", skip=True), Rule("x"))
    assert recipe.to_dict()["ignore"] == ["a", "b"]
    assert recipe.to_dict()["rules"][0] == {
        "match": "*",
        "sparsity": None,
        "method": None,
        "scope": None,
        "skip": True,
    }


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().sparsity = "2:4"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsty": 0.5}, "unknown recipe key 'sparsty': did you mean 'sparsity'?"),
        ({"calibration": {"sample": 4}}, "unknown calibration key 'sample': did you mean 'samples'?"),
        ({"evaluate": {"txt": "c4"}}, "unknown evaluate key 'txt': did you mean 'text'?"),
        (
            {"rules": [{"match": "*"}, {"match": "*", "skipp": True}]},
            "unknown rules[1] key 'skipp': did you mean 'skip'?",
        ),
        ({"zzz": 1}, "unknown recipe key 'zzz': known: allocation, calibration, depth,"),
        ({1: 2}, "unknown recipe key '1': known: "),
    ],
)
def test_unknown_keys_name_the_nearest(values: dict[Any, Any], message: str) -> None:
    assert message in refused(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"calibration": {"samples": "many"}}, "calibration.samples must be int, not 'many'"),
        ({"calibration": {"samples": 1.5}}, "calibration.samples must be int, not 1.5"),
        ({"calibration": {"samples": True}}, "calibration.samples must be int, not True"),
        ({"calibration": {"samples": None}}, "calibration.samples must be int, not None"),
        ({"calibration": {"source": 3}}, "calibration.source must be str, not 3"),
        ({"calibration": {"config": 1}}, "calibration.config must be str or nothing, not 1"),
        ({"calibration": "c4"}, "calibration must be a mapping of keys to values, not 'c4'"),
        ({"evaluate": None}, "evaluate must be a mapping of keys to values, not None"),
        ({"evaluate": {"max_perplexity": "high"}}, "evaluate.max_perplexity must be float or nothing, not 'high'"),
        ({"sparsity": True}, "sparsity must be str or float or nothing, not True"),
        ({"method": None}, "method must be str or dict, not None"),
        ({"sparsity": [0.5]}, "sparsity must be str or float or nothing, not [0.5]"),
        ({"method": ["wanda"]}, "method must be str or dict, not ['wanda']"),
        ({"ignore": "*.q_proj"}, "ignore must be a list, not '*.q_proj'"),
        ({"ignore": [1]}, "ignore[0] must be str, not 1"),
        ({"rules": {"match": "*"}}, "rules must be a list, not {'match': '*'}"),
        ({"rules": ["*"]}, "rules[0] must be a mapping of keys to values, not '*'"),
        ({"rules": [{"skip": True}]}, "rules[0] lacks a key: match"),
        ({"rules": [{"match": "*", "skip": 1}]}, "rules[0].skip must be bool, not 1"),
        (
            {"rules": [{"match": "*"}, {"match": "*", "sparsity": {}}]},
            "rules[1].sparsity must be str or float or nothing",
        ),
        ([], "recipe must be a mapping of keys to values, not []"),
    ],
)
def test_wrong_types_say_where_and_what_was_expected(values: Any, message: str) -> None:
    assert message in refused(values)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "key", ["calibration.samples", "calibration.length", "evaluate.length", "evaluate.max_perplexity"]
)
def test_numbers_that_must_be_above_0(key: str, value: int) -> None:
    part, name = key.split(".")
    assert refused({part: {name: value}}).startswith(f"{key} must be above 0, not {value}")


def test_whole_numbers_are_floats_where_floats_are_expected() -> None:
    assert Recipe.from_dict({"evaluate": {"max_perplexity": 20}}).evaluate.max_perplexity == 20.0
    assert isinstance(Recipe.from_dict({"evaluate": {"max_perplexity": 20}}).evaluate.max_perplexity, float)


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    with pytest.raises(UserError) as caught:
        Recipe.read(path)
    assert str(caught.value) == f"cannot read recipe {path}: No such file or directory"


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read recipe .*: Is a directory"):
        Recipe.read(tmp_path)


@pytest.mark.parametrize(
    "text", ["a: [1", "a: b: c", "\tsparsity: 1", "a: *b", "a: !!python/name:os.system", b"a: \xff"]
)
def test_what_is_not_yaml(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe .*recipe\.yaml is not valid YAML"):
        Recipe.read(written(tmp_path, text))


@pytest.mark.parametrize("text", ["", "2:4", "- a\n- b", "null", "# nothing"])
def test_yaml_that_is_no_mapping(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe\.yaml must be a mapping of keys to values"):
        Recipe.read(written(tmp_path, text))


def test_errors_inside_a_file_name_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "sparsity: 2:4\nmetod: wanda\n")
    with pytest.raises(UserError) as caught:
        Recipe.read(path)
    assert str(caught.value).startswith(f"{path}: unknown recipe key 'metod': did you mean 'method'?")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("sparsity", "2:4", {"sparsity": "2:4"}),
        ("sparsity", "0.3", {"sparsity": "0.3"}),
        ("sparsity", 0.3, {"sparsity": 0.3}),
        ("sparsity", "30%", {"sparsity": "30%"}),
        ("method", "wanda", {"method": "wanda"}),
        ("method", "{name: wanda}", {"method": "{name: wanda}"}),
        ("method", {"name": "wanda"}, {"method": {"name": "wanda"}}),
        ("method.damping", 0.1, {"method": {"name": "sparsegpt", "damping": 0.1}}),
        ("method.damping", "0.1", {"method": {"name": "sparsegpt", "damping": "0.1"}}),
        ("method.name", "wanda", {"method": {"name": "wanda"}}),
        ("calibration.samples", 4, {"calibration": Calibration(samples=4)}),
        ("calibration", {"samples": 4}, {"calibration": Calibration(samples=4)}),
        ("calibration.config", "null", {"calibration": Calibration(config="null")}),
        ("calibration.config", None, {"calibration": Calibration()}),
        ("calibration.source", "notes #1.txt", {"calibration": Calibration("notes #1.txt")}),
        ("calibration.source", "[a", {"calibration": Calibration("[a")}),
        ("calibration.source", " a: b ", {"calibration": Calibration(" a: b ")}),
        ("calibration.column", "*", {"calibration": Calibration(column="*")}),
        ("calibration.column", "", {"calibration": Calibration(column="")}),
        ("evaluate.text", "wikitext2", {"evaluate": Evaluation("wikitext2")}),
        ("evaluate.max_perplexity", 30, {"evaluate": Evaluation(max_perplexity=30.0)}),
        ("ignore", ["a", "re:b.*", "[c]"], {"ignore": ("a", "re:b.*", "[c]")}),
        ("ignore", ["*.a", "b"], {"ignore": ("*.a", "b")}),
        ("ignore", ("*.a",), {"ignore": ("*.a",)}),
        ("ignore", [], {"ignore": ()}),
        ("rules", [{"match": "x", "sparsity": "1:4"}], {"rules": (Rule("x", sparsity="1:4"),)}),
        ("rules", [{"match": "*.x", "skip": True}], {"rules": (Rule("*.x", skip=True),)}),
    ],
)
def test_override_changes_one_key(key: str, value: Any, expected: dict[str, Any]) -> None:
    before = Recipe()
    after = before.override(key, value)
    assert after == dataclasses.replace(before, **expected)
    assert repr(after) == repr(dataclasses.replace(before, **expected))  # 1 and 1.0 are equal, but not the same
    assert before == Recipe()


def test_overrides_add_up_and_keep_the_rest() -> None:
    recipe = FULL.override("method.damping", 0.2).override("calibration.samples", 4).override("sparsity", "4:8")
    assert recipe.method == {"name": "sparsegpt", "damping": 0.2, "block_size": 64}
    assert recipe.calibration == dataclasses.replace(FULL.calibration, samples=4)
    assert recipe == dataclasses.replace(FULL, sparsity="4:8", method=recipe.method, calibration=recipe.calibration)
    assert FULL.method == {"name": "sparsegpt", "damping": 0.05, "block_size": 64}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sparsty", "0.5", "unknown recipe key 'sparsty': did you mean 'sparsity'?"),
        ("", "0.5", "unknown recipe key ''"),
        ("calibraton.samples", "4", "unknown recipe key 'calibraton': did you mean 'calibration'?"),
        ("calibration.sampels", "4", "unknown calibration key 'sampels': did you mean 'samples'?"),
        ("calibration.samples.x", "4", "recipe key 'calibration.samples.x': samples has no keys below it"),
        ("sparsity.x", "4", "recipe key 'sparsity.x': sparsity has no keys below it"),
        ("rules.0", "x", "recipe key 'rules.0': rules has no keys below it"),
        ("calibration.samples", "many", "calibration.samples must be int, not 'many'"),
        ("calibration.samples", "4", "calibration.samples must be int, not '4'"),
        ("calibration.samples", None, "calibration.samples must be int, not None"),
        ("evaluate.max_perplexity", "30", "evaluate.max_perplexity must be float or nothing, not '30'"),
        ("calibration", "c4", "calibration must be a mapping"),
        ("calibration", "{samples: 4}", "calibration must be a mapping of keys to values, not '{samples: 4}'"),
        ("ignore", "a", "ignore must be a list, not 'a'"),
        ("ignore", "[a, 're:b.*']", "ignore must be a list, not \"[a, 're:b.*']\""),
        ("ignore", "[]", "ignore must be a list, not '[]'"),
        ("rules", "[{match: x}]", "rules must be a list, not '[{match: x}]'"),
        ("rules", [{}], "rules[0] lacks a key: match"),
    ],
)
def test_overrides_that_make_no_sense(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe().override(key, value)
    assert message in str(caught.value)


VALUES = [
    ("sparsity", "2:4", {"sparsity": "2:4"}),
    ("sparsity", "0.3", {"sparsity": 0.3}),
    ("sparsity", "'0.3'", {"sparsity": "0.3"}),
    ("sparsity", "30%", {"sparsity": "30%"}),
    ("method", "wanda", {"method": "wanda"}),
    ("method", "{name: wanda}", {"method": {"name": "wanda"}}),
    ("method.damping", "0.1", {"method": {"name": "sparsegpt", "damping": 0.1}}),
    ("method.damping", "1e-3", {"method": {"name": "sparsegpt", "damping": 0.001}}),
    ("method.block_size", "64", {"method": {"name": "sparsegpt", "block_size": 64}}),
    ("calibration.samples", "4", {"calibration": Calibration(samples=4)}),
    ("calibration.source", "'notes #1.txt'", {"calibration": Calibration("notes #1.txt")}),
    ("calibration.config", "2024-01-01", {"calibration": Calibration(config="2024-01-01")}),
    ("calibration.config", "'null'", {"calibration": Calibration(config="null")}),
    ("evaluate.text", "wikitext2", {"evaluate": Evaluation("wikitext2")}),
    ("evaluate.max_perplexity", "30", {"evaluate": Evaluation(max_perplexity=30.0)}),
    ("evaluate.max_perplexity", "null", {"evaluate": Evaluation(max_perplexity=None)}),
    ("ignore", "[a, 're:b.*']", {"ignore": ("a", "re:b.*")}),
    ("ignore", "[]", {"ignore": ()}),
    ("rules", "[{match: x, sparsity: 1:4}]", {"rules": (Rule("x", sparsity="1:4"),)}),
    ("rules", "[{match: '*.x', skip: true}]", {"rules": (Rule("*.x", skip=True),)}),
]
"""A key, its value as YAML writes it, and what it changes."""


@pytest.mark.parametrize(("key", "text", "expected"), VALUES)
def test_values_written_as_yaml(key: str, text: str, expected: dict[str, Any]) -> None:
    after = Recipe().override(key, read_value(text))
    assert after == dataclasses.replace(Recipe(), **expected)
    assert repr(after) == repr(dataclasses.replace(Recipe(), **expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4", 4),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("2:4", "2:4"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("0x1F", "0x1F"),
        ("._", "._"),
        ("-._", "-._"),
        ("'4'", "4"),
        (" x ", "x"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("[a, 2:4, 0.5]", ["a", "2:4", 0.5]),
        ("{a: [1]}", {"a": [1]}),
        ("notes #1.txt", "notes"),
    ],
)
def test_what_a_written_value_is(text: str, expected: object) -> None:
    assert read_value(text) == expected
    assert type(read_value(text)) is type(expected)


@pytest.mark.parametrize(
    "text", ["[a", "*.a", "{", "a: b: c", "'a", "@a", "a\x00b", "!!python/name:os.system", "{[a]: b}"]
)
def test_what_is_no_written_value(text: str) -> None:
    with pytest.raises(UserError) as caught:
        read_value(text)
    assert str(caught.value) == f"{text!r} is not a valid YAML value"


@pytest.mark.parametrize("value", ["._", "-._"])
def test_values_that_only_look_like_numbers_are_no_traceback(value: str) -> None:
    assert Recipe().override("device", read_value(value)).device == value


# The command line's options.


def asked(*arguments: str) -> Recipe:
    """The recipe that a command line asks for."""
    parser = argparse.ArgumentParser()
    add_recipe(parser)
    options = recipe_options(parser.parse_args(arguments))
    return assemble(options.pop("recipe"), options)


@pytest.mark.parametrize(("key", "text", "expected"), VALUES)
def test_set_reads_its_value_as_yaml(key: str, text: str, expected: dict[str, Any]) -> None:
    made = asked("--set", f"{key}={text}")
    assert repr(made) == repr(dataclasses.replace(Recipe(), **expected))


def test_set_splits_at_the_first_equals_sign_and_repeats() -> None:
    made = asked("--set", "calibration.source=a=b.txt", "--set", "calibration.samples = 4")
    assert made == Recipe(calibration=Calibration("a=b.txt", samples=4))


@pytest.mark.parametrize("key", ["calibration.config", "calibration.length", "evaluate.text", "scope"])
def test_set_can_take_a_value_back(key: str, tmp_path: Path) -> None:
    path = str(written(tmp_path, FULL.to_yaml()))
    assert asked("--recipe", path) == FULL
    assert asked("--recipe", path, "--set", f"{key}=null") == FULL.override(key, None)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("calibration.samples", "--set takes KEY=VALUE, not 'calibration.samples'"),
        ("ignore=*.a", "'*.a' is not a valid YAML value"),
        ("ignore=[a", "'[a' is not a valid YAML value"),
        ("method.damping={", "'{' is not a valid YAML value"),
        ("rules=[{}]", "rules[0] lacks a key: match"),
        ("calibration.samples='4'", "calibration.samples must be int, not '4'"),
        ("calibration.samples=null", "calibration.samples must be int, not None"),
        ("calibration.sample=null", "unknown calibration key 'sample': did you mean 'samples'?"),
        ("calibration.sample=4", "unknown calibration key 'sample': did you mean 'samples'?"),
    ],
)
def test_set_entries_that_make_no_sense(entry: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        asked("--set", entry)
    assert message in str(caught.value)


def test_other_options_are_taken_as_they_are() -> None:
    arguments = ["--calibration", "notes #1.txt", "--evaluate", "[a", "--device", "null", "--sparsity", "0.50"]
    assert asked(*arguments, "--ignore", "*.a", "--ignore", "re:[b]", "--samples", "4") == Recipe(
        sparsity="0.50",
        calibration=Calibration("notes #1.txt", samples=4),
        ignore=("*.a", "re:[b]"),
        device="null",
        evaluate=Evaluation("[a"),
    )


# Putting a recipe together.


def test_assemble_takes_a_recipe_plain_data_a_file_or_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, FULL.to_yaml())
    for source in (FULL, FULL.to_dict(), path, str(path)):
        assert assemble(source, {}) == FULL
    assert assemble(None, {}) == Recipe()


@pytest.mark.parametrize(
    ("name", "value"),
    [("calibration", "builtin"), ("samples", 4), ("length", 64), ("seed", 3), ("evaluate", "builtin")],
)
def test_assemble_knows_short_names(name: str, value: str | int) -> None:
    part, key = SHORT[name].split(".")
    made = assemble(FULL, {name: value})
    assert getattr(getattr(made, part), key) == value
    assert made == dataclasses.replace(FULL, **{part: dataclasses.replace(getattr(FULL, part), **{key: value})})


@pytest.mark.parametrize("name", ["samples", "length", "seed"])
@pytest.mark.parametrize("key", ["short", "dotted"])
def test_numbers_written_as_text_are_refused_in_assemble(name: str, key: str) -> None:
    place = f"calibration.{name}"
    with pytest.raises(UserError, match=rf"^{place} must be int( or nothing)?, not '4'$"):
        assemble(FULL, {name if key == "short" else place: "4"})


@pytest.mark.parametrize("text", [*LIKE_NUMBERS, *LIKE_OTHERS, "notes #1.txt", "[a", "{", "'a'", "a=b"])
def test_texts_stay_as_they_are_in_assemble(text: str) -> None:
    made = assemble(FULL, {"calibration": text, "evaluate": text, "calibration.column": text, "sparsity": text})
    assert made == dataclasses.replace(
        FULL,
        sparsity=text,
        calibration=dataclasses.replace(FULL.calibration, source=text, column=text),
        evaluate=dataclasses.replace(FULL.evaluate, text=text),
    )


def test_assemble_takes_whole_parts_and_dotted_keys() -> None:
    changes = {
        "calibration": {"source": "builtin", "samples": 32},
        "evaluate": {"text": "builtin", "length": 64},
        "length": 128,
        "method.damping": 0.1,
        "rules": [{"match": "*.x", "skip": True}],
        "ignore": ["*.y"],
    }
    assert assemble(None, changes) == Recipe(
        method={"name": "sparsegpt", "damping": 0.1},
        calibration=Calibration("builtin", 32, 128),
        evaluate=Evaluation("builtin", 64),
        rules=(Rule("*.x", skip=True),),
        ignore=("*.y",),
    )


def test_none_changes_nothing_in_assemble() -> None:
    assert assemble(FULL, dict.fromkeys([*SHORT, "sparsity", "method.damping", "no such key"])) == FULL


def test_assemble_names_the_nearest_key() -> None:
    with pytest.raises(UserError, match="unknown recipe key 'sparsiti': did you mean 'sparsity'"):
        assemble(None, {"sparsiti": 0.5})


@pytest.mark.parametrize(
    ("count", "text"),
    [(1, "1B"), (1023, "1023B"), (1024, "1.00KiB"), (1025, "1.01KiB"), (10 * 2**20, "10.0MiB"), (2**30 - 1, "1024MiB"),
     (2**30, "1.00GiB"), (6 * 2**30 + 1, "6.01GiB"), (123 * 2**30, "123GiB"), (5 * 2**50, "5120TiB")],
)  # fmt: skip
def test_sizes_are_written_in_three_figures(count: int, text: str) -> None:
    assert format_size(count) == text


def test_a_written_size_is_never_less_and_hardly_more() -> None:
    chance = random.Random(0)
    for _ in range(2000):
        count = int(2 ** chance.uniform(0, 50))
        assert count <= parse_size(format_size(count)) <= 1.01 * count


@pytest.mark.parametrize("text", ["0", "GiB", "-1GB", "1 GB 2", "8 gigs", "nan"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"size .* is not understood: write 5GB"):
        Recipe(max_memory=text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "wanda", "width.channels": "20%"}, "method is about zeros, and no sparsity is asked for"),
        ({"scope": "row", "depth.drop": 1}, "scope is about zeros"),
    ],
)
def test_what_has_no_effect_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_said(assemble(None, options).settled(), options)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda"},
        {"method": "wanda", "sparsity": "2:4", "depth.drop": 2, "depth.by": "influence"},
        {"quality": "best", "depth.drop": 2},
        {"method": "wanda", "depth.drop": 2, "allocation": "plan.yaml"},
        {"method": "wanda", "depth.drop": 2, "allocation": {"name": "plan.yml"}},
        {"width.by": "flap", "width.params": "80%", "experts.drop": 1, "experts.by": "norm"},
        {"method": "wanda", "depth.drop": 2, "rules": [{"match": "*", "sparsity": "2:4"}]},
    ],
)
def test_what_has_an_effect_is_not(options: dict[str, Any]) -> None:
    check_said(assemble(None, options).settled(), options)


@pytest.mark.parametrize(
    ("load", "name", "option", "value"),
    [
        (refine.load, "dsnot", "threshold", ".inf"),
        (refine.load, "dsnot", "power", ".nan"),
        (refine.load, "dsnot", "power", "-.inf"),
        (reconstruct.load, "block", "rate", ".inf"),
        (solvers.load, "ria", "exponent", ".inf"),
        (solvers.load, "admm", "rho", ".inf"),
        (solvers.load, "alps", "rho", ".inf"),
        (allocate.load, "owl", "multiple", ".inf"),
    ],
)
def test_options_that_are_not_finite_are_refused_by_name(load: Any, name: str, option: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{name}\.{option} must be a finite number, not -?(inf|nan)"):
        load({"name": name, option: read_value(value)})


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_recipe_keys_that_are_not_finite_are_refused_by_name(value: str) -> None:
    number = read_value(value)
    assert f"sparsity must be a finite number, not {number}" in refused({"sparsity": number})
    assert "rules[0].sparsity must be a finite number" in refused({"rules": [{"match": "*", "sparsity": number}]})
    assert "evaluate.max_perplexity must be" in refused({"evaluate": {"max_perplexity": number}})
