"""Tasks through lm-eval: block by block, the figures are those that lm-eval finds with the whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llmprune import cli
from llmprune.errors import Failure, NotFinite, UserError
from llmprune.evaluate import tasks
from llmprune.evaluate.tasks import Streamed, evaluate
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.source import resolve
from llmprune.progress import Silent
from tests.families import make

HEAD = """
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
fewshot_split: validation
"""
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
doc_to_choice: "choices"
""",
    "tiny_last": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{' ' + choices[label]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
""",
    "tiny_generate": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["."], max_gen_toks: 5}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}
NAMES = tuple(TASKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of the user's own, with answers of one and of many tokens, and questions that several documents share."""
    place = tmp_path_factory.mktemp("tasks")
    draw = torch.Generator().manual_seed(0)

    def letters(count: int) -> str:
        return "".join(chr(97 + int(code)) for code in torch.randint(0, 26, (count,), generator=draw))

    documents = []
    for number in range(24):
        length = int(torch.randint(3, 30, (), generator=draw))
        choices = [
            letters(1 if number % 3 == 0 else 1 + int(torch.randint(0, 9, (), generator=draw))) for _ in range(4)
        ]
        page = " ".join(letters(7) for _ in range(20))
        question = documents[-1]["question"] if number % 8 == 1 else letters(length)
        documents.append({"question": question, "choices": choices, "label": number % 4, "page": page})
    data = place / "documents.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    for name, text in TASKS.items():
        (place / f"{name}.yaml").write_text(f"task: {name}{HEAD.format(data=data)}{text}")
    return place


def by_lm_eval(model: Path, folder: Path, names: tuple[str, ...], **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    runner = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=4)
    found = lm_eval.simple_evaluate(runner, tasks=list(names), task_manager=manager, **options)
    assert found is not None
    return dict(found["results"])


@pytest.mark.parametrize("shots", [None, 2])
def test_figures_are_those_of_the_whole_model(shots: int | None, model: Path, folder: Path) -> None:
    expected = by_lm_eval(model, folder, NAMES, num_fewshot=shots)
    found = evaluate(model, NAMES, include_path=[folder], shots=shots, batch=64)
    assert {score.task for score in found.scores} == set(NAMES)
    for score in found.scores:
        theirs = expected[score.task]
        assert score.value == pytest.approx(theirs[f"{score.metric},{score.filter}"], rel=1e-5)
        error = theirs.get(f"{score.metric}_stderr,{score.filter}")
        assert score.stderr == (pytest.approx(error, rel=1e-2) if isinstance(error, float) else None)
        assert score.documents == 24
        assert score.shots == (shots or 0)
    metrics = {(score.task, score.metric): score.higher_is_better for score in found.scores}
    assert metrics["tiny_choice", "acc_norm"] is True
    assert metrics["tiny_last", "perplexity"] is False


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "mamba", "gemma2"])
def test_other_families(family: str, folder: Path, tmp_path: Path) -> None:
    source = make(family, tmp_path / "model")
    expected = by_lm_eval(source, folder, ("tiny_choice", "tiny_last"))
    for score in evaluate(source, ("tiny_choice", "tiny_last"), include_path=[folder], batch=100).scores:
        assert score.value == pytest.approx(expected[score.task][f"{score.metric},{score.filter}"], rel=1e-4)


@pytest.fixture(scope="module")
def runner(model: Path) -> Streamed:
    with torch.no_grad():
        return Streamed(Checkpoint(resolve(model), "cpu"), 50, Silent())


class TestLogProbabilities:
    """Of token sequences, against the plain model."""

    def test_equal_the_plain_model_in_every_shape(self, runner: Streamed, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        whole = AutoModelForCausalLM.from_pretrained(model).eval()
        draw = torch.Generator().manual_seed(1)
        requests = []
        for context, answer in [(1, 1), (5, 3), (20, 1), (63, 1), (60, 4), (70, 10), (40, 64), (2, 2)]:
            ids = torch.randint(3, 128, (context + answer,), generator=draw).tolist()
            requests.append((None, ids[:context], ids[context:]))
        same = requests[1][1]
        requests += [(None, same, [7]), (None, same, [8]), (None, same, requests[1][2])]  # one context, many answers
        with torch.no_grad():
            found = runner._loglikelihood_tokens(requests)
            for (_, context, answer), (value, greedy) in zip(requests, found, strict=True):
                ids = torch.tensor([(context + answer)[-65:]])
                logs = whole(input_ids=ids[:, :-1]).logits[0].double().log_softmax(-1)[-len(answer) :]
                assert value == pytest.approx(float(logs.gather(1, torch.tensor(answer)[:, None]).sum()), rel=1e-5)
                assert greedy == bool((logs.argmax(-1) == torch.tensor(answer)).all())

    def test_what_is_greedy_is_told(self, runner: Streamed, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        whole = AutoModelForCausalLM.from_pretrained(model).eval()
        ids = [5, 9, 11]
        with torch.no_grad():
            for _ in range(4):
                ids.append(int(whole(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            wrong = [*ids[:-1], (ids[-1] + 1) % 128]
            found = runner._loglikelihood_tokens([(None, ids[:3], ids[3:]), (None, ids[:3], wrong[3:])])
        assert [greedy for _, greedy in found] == [True, False]

    def test_an_answer_that_is_too_long_is_refused(self, runner: Streamed) -> None:
        with pytest.raises(UserError, match="a continuation of 65 tokens cannot be scored"):
            runner._loglikelihood_tokens([(None, [1], [2] * 65)])


def test_batches_are_full_and_of_one_length() -> None:
    sequences = [(number,) * length for number, length in enumerate([3, 9, 9, 1, 4, 30, 2, 9])]
    batches = list(tasks._batches(tasks._by_length(sequences), 20))
    assert sorted(len(one) for batch in batches for one in batch) == sorted(map(len, sequences))
    assert [len(batch[0]) for batch in batches] == [30, 9, 9, 3]
    assert all(len(batch) == 1 or len(batch) * len(batch[0]) <= 20 for batch in batches)


class Short:
    """A device that holds so many tokens at once, and texts to generate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int, texts: int) -> None:
        self.tried: list[int] = []
        states, generate = tasks.final_states, HFLM._model_generate

        def run(checkpoint: Any, chain: Any, batches: list[torch.Tensor], *rest: Any) -> Any:
            self.allow(max(batch.numel() for batch in batches), tokens)
            return states(checkpoint, chain, batches, *rest)

        def say(runner: Any, context: torch.Tensor, *rest: Any, **options: Any) -> Any:
            self.allow(len(context), texts)
            return generate(runner, context, *rest, **options)

        monkeypatch.setattr(tasks, "final_states", run)
        monkeypatch.setattr(HFLM, "_model_generate", say)

    def allow(self, size: int, most: int) -> None:
        self.tried.append(size)
        if size > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_where_memory_is_short_less_runs_at_once(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {
        (score.task, score.metric): score.value for score in evaluate(model, NAMES, include_path=[folder]).scores
    }
    short = Short(monkeypatch, tokens=200, texts=3)
    found = evaluate(model, NAMES, include_path=[folder])
    assert {(score.task, score.metric): pytest.approx(score.value, rel=1e-5) for score in found.scores} == expected
    assert max(short.tried) > 200
    assert [size for size in short.tried if size <= 3]
    assert len([size for size in short.tried if size > 200]) < 6  # what did not fit is not tried again
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, ["tiny_choice"], include_path=[folder], batch=1000)
    said = {
        score.metric: score.value for score in evaluate(model, ["tiny_generate"], include_path=[folder], batch=9).scores
    }
    assert said["exact_match"] == expected["tiny_generate", "exact_match"]  # so many tokens, but texts as they fit
    Short(monkeypatch, tokens=3, texts=0)
    with pytest.raises(Failure, match=r"the memory of cpu does not hold one sequence of .*model"):
        evaluate(model, ["tiny_choice"], include_path=[folder])


def test_the_set_of_the_papers_has_a_mean(monkeypatch: pytest.MonkeyPatch, model: Path, folder: Path) -> None:
    monkeypatch.setitem(tasks.SETS, "mine", ("tiny_choice", "tiny_last"))
    found = evaluate(model, ["mine"], include_path=[folder])
    values = [score.value for score in found.scores if score.metric == "acc"]
    assert found.means == {"mine": pytest.approx(sum(values) / 2)}


def test_the_set_of_the_papers_is_seven_tasks_of_lm_eval_with_accuracies() -> None:
    class Loader(yaml.SafeLoader):
        """Does not run the functions that a task names."""

    Loader.add_multi_constructor("!", lambda loader, kind, node: kind)

    def read(path: Path) -> dict[str, Any]:
        told = yaml.load(path.read_text(), Loader)
        return {**(read(path.parent / told["include"]) if "include" in told else {}), **told}

    assert len(tasks.SETS["pruning"]) == len(set(tasks.SETS["pruning"])) == 7
    manager, names = tasks.find(["pruning"], [])
    assert names == list(tasks.SETS["pruning"])
    for name in names:
        told = read(Path(manager.task_index[name].yaml_path))
        assert told["task"] == name
        assert "acc" in [entry["metric"] for entry in told["metric_list"]]
        assert not told.get("num_fewshot")


def test_an_unknown_task_answers_with_the_nearest(model: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="unknown task 'tiny_choise': did you mean 'tiny_choice'"):
        evaluate(model, ["tiny_choise"], include_path=[folder])


def test_a_folder_that_is_not_there_is_said(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder with tasks at"):
        evaluate(model, ["tiny_choice"], include_path=[tmp_path / "nowhere"])


def test_documents_that_are_not_there_are_said(model: Path, tmp_path: Path) -> None:
    gone = HEAD.format(data=tmp_path / "gone.jsonl")
    (tmp_path / "own.yaml").write_text(f"task: own{gone}{TASKS['tiny_choice']}")
    with pytest.raises(UserError, match=r"documents of own cannot be had: .*gone\.jsonl.* from the folder in which"):
        evaluate(model, ["own"], include_path=[tmp_path])


def test_a_file_that_is_no_yaml_is_named(model: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: own\n  metric_list: [")
    with pytest.raises(UserError, match=r"own\.yaml is not the YAML of a task: "):
        evaluate(model, ["own"], include_path=[tmp_path])
    head = HEAD.format(data=folder / "documents.jsonl")
    (tmp_path / "own.yaml").write_text(f"task: own{head}doc_to_text: !function a.b")
    with pytest.raises(UserError, match="unknown task 'other'"):  # tags of lm-eval's own are fine
        evaluate(model, ["other"], include_path=[tmp_path])


def test_questions_that_cannot_be_made_are_said(model: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the questions of tiny_choice cannot be made by lm-eval: ValueError: .*larger"
    ):
        evaluate(model, ["tiny_choice"], include_path=[folder], shots=500)
    broken = TASKS["tiny_choice"].replace("{{question}}", "{{question.nothing.at.all}}")
    (tmp_path / "own.yaml").write_text(f"task: own{HEAD.format(data=folder / 'documents.jsonl')}{broken}")
    with pytest.raises(UserError, match="the questions of own cannot be made by lm-eval: UndefinedError: "):
        evaluate(model, ["own"], include_path=[tmp_path])


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--limit", "0", "--limit takes"), ("--limit", "-3", "--limit takes"), ("--limit", "nan", "--limit takes"),
     ("--few-shot", "-1", "--few-shot takes"), ("--batch-tokens", "0", "--batch-tokens takes"),
     ("--stride", "8", "--stride is for a perplexity"), ("--length", "8", "--length is for a perplexity"),
     ("--text-column", "page", "--text-column is for a perplexity")],
)  # fmt: skip
def test_numbers_that_make_no_sense(
    option: str, value: str, said: str, model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["eval", str(model), "--tasks", "tiny_choice", "--include-path", str(folder)]
    assert cli.main([*given, f"{option}={value}"]) == 2
    assert said in capsys.readouterr().err


def test_what_was_found_is_kept_whatever_comes_after(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / "kept" / "eval.json").read_text())
        return found

    text = tmp_path / "text.txt"
    text.write_text("a line of words, and one more of them\n" * 40)
    given = ["eval", str(model), "-o", str(tmp_path / "kept")]
    own = ["--include-path", str(folder), "--limit", "4", "--tasks"]
    measured = ["--perplexity", str(text), "--length", "16"]
    assert cli.main([*given, *measured, *own, "tiny_choise"]) == 2
    assert not (tmp_path / "kept" / "eval.json").exists()  # it is told before any work
    assert cli.main([*given, *measured, "--against", str(tmp_path / "nowhere")]) == 2
    assert "no model at" in capsys.readouterr().err
    assert not (tmp_path / "kept" / "eval.json").exists()
    with monkeypatch.context() as changed:
        changed.setattr("llmprune.evaluate.tasks.evaluate", None)
        assert cli.main([*given, *measured, *own, "tiny_choice"]) == 1
    assert set(kept()) == {"model", "shards", "perplexity"}
    assert cli.main([*given, *own, "tiny_choice"]) == 0
    assert set(kept()) == {"model", "shards", "perplexity", "tasks"}
    assert cli.main([*given, *measured, "--against", str(model), "--stride", "4"]) == 2
    assert "leave out --stride or --against" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (shard,) = other.glob("*.safetensors")
    save_file({name: tensor * 2 for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    given[1] = str(other)
    assert cli.main([*given, *measured]) == 0
    assert set(kept()) == {"model", "shards", "perplexity"}  # the others were of other weights


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A model that says nothing finite."""
    place = tmp_path / "broken"
    shutil.copytree(model, place)
    (shard,) = place.glob("*.safetensors")
    weights = load_file(shard)
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, shard, metadata={"format": "pt"})
    return place


@pytest.mark.parametrize("task", ["tiny_choice", "tiny_rolling", "tiny_generate"])
def test_a_model_that_says_nothing_finite_has_no_accuracy(task: str, broken: Path, folder: Path) -> None:
    with pytest.raises(NotFinite, match=r"what .*broken says is not finite"):
        evaluate(broken, [task], include_path=[folder], limit=4)


def test_a_broken_model_on_the_command_line(
    broken: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["eval", str(broken), "--tasks", "tiny_choice", "--include-path", str(folder), "--limit", "4"]
    assert cli.main([*given, "--json"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "says is not finite; try --dtype float32" in told.err


def test_a_figure_that_is_not_finite_is_noted(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*arguments: Any, **options: Any) -> Any:
        found = whole(*arguments, **options)
        found["results"]["tiny_choice"]["acc_norm,none"] = float("nan")
        return found

    whole = lm_eval.simple_evaluate
    monkeypatch.setattr(lm_eval, "simple_evaluate", asked)
    given = ["eval", str(model), "--tasks", "tiny_choice", "--include-path", str(folder), "--limit", "4"]
    assert cli.main([*given, "--json", "-o", str(tmp_path / "kept")]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [score["metric"] for score in told["tasks"]["scores"]] == ["acc"]
    assert told["tasks"]["broken"] == ["tiny_choice acc_norm"]
    assert json.loads((tmp_path / "kept" / "eval.json").read_text(), parse_constant=pytest.fail) == told
    assert cli.main(given) == 0
    assert "tiny_choice acc_norm is not finite, and left out" in capsys.readouterr().out


def test_what_is_too_large_for_a_number_is_said(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise OverflowError("math range error")

    monkeypatch.setattr(lm_eval, "simple_evaluate", asked)
    with pytest.raises(NotFinite, match=r"a figure of .* on tiny_last is too large"):
        evaluate(model, ["tiny_last"], include_path=[folder])


class TestNames:
    """Which tasks are meant."""

    def test_a_group_of_ones_own_may_have_tasks_of_lm_eval(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "group.yaml").write_text("group: mine\ntask: [arc_easy, piqa]\n")
        manager, names = tasks.find(["mine"], [str(tmp_path)])
        assert names == ["mine"]
        assert {"arc_easy", "piqa"} <= set(manager.all_subtasks)

    def test_a_pattern_is_matched_with_all(self, tmp_path: Path) -> None:
        (tmp_path / "own.yaml").write_text(f"task: arc_own{HEAD.format(data='nowhere')}{TASKS['tiny_choice']}")
        _, names = tasks.find(["arc_*"], [str(tmp_path)])
        assert {"arc_own", "arc_easy", "arc_challenge"} <= set(names)

    def test_single_tasks_of_ones_own_need_not_wait_for_all_others(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manager, names = tasks.find(["tiny_choice", "tiny_last"], [str(folder)])
        assert names == ["tiny_choice", "tiny_last"]
        assert set(manager.all_tasks) == set(NAMES)


def test_groups_and_parts_of_the_documents(model: Path, folder: Path, tmp_path: Path) -> None:
    for name in NAMES:
        shutil.copy(folder / f"{name}.yaml", tmp_path)
    pair = "group: pair\ntask: [tiny_choice, tiny_last]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (tmp_path / "pair.yaml").write_text(pair)
    found = {
        (score.task, score.metric): score
        for score in evaluate(model, ["pair"], include_path=[tmp_path], limit=0.25).scores
    }
    assert found["tiny_choice", "acc"].documents == found["tiny_last", "acc"].documents == 6
    both = (found["tiny_choice", "acc"].value + found["tiny_last", "acc"].value) / 2
    assert found["pair", "acc"].value == pytest.approx(both)


def test_code_that_a_model_writes_runs_only_where_that_is_allowed(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (folder / "tiny_generate.yaml").read_text().replace("task: tiny_generate", "task: tiny_code")
    (tmp_path / "tiny_code.yaml").write_text(f"{text}unsafe_code: true\n")
    given = ["eval", str(model), "--tasks", "tiny_code", "--include-path", str(tmp_path), "--limit", "2"]
    assert cli.main(given) == 2
    assert "tiny_code runs code that the model writes" in capsys.readouterr().err
    assert cli.main([*given, "--run-unsafe-code"]) == 0


@pytest.mark.parametrize(
    "given",
    [["--few-shot", "2"], ["--limit", "3"], ["--include-path", "."], ["--batch-tokens", "9"], ["--run-unsafe-code"]],
)
@pytest.mark.parametrize("command", ["eval", "compare"])
def test_options_of_tasks_without_any_are_refused(
    command: str, given: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, *[str(model)] * (2 if command == "compare" else 1), *given]) == 2
    assert f"{given[0]} is for tasks, and none is asked for" in capsys.readouterr().err


def test_files_that_go_while_a_task_scores_are_not_told_as_its_documents(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise FileNotFoundError("model.safetensors")

    monkeypatch.setattr("llmprune.evaluate.tasks.final_states", gone)
    with pytest.raises(FileNotFoundError, match=r"^model\.safetensors$"):
        evaluate(model, ["tiny_choice"], include_path=[folder], limit=2)


def test_one_document_has_no_standard_error(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["eval", str(model), "--tasks", "tiny_choice", "--include-path", str(folder), "--limit", "1", "--json"]
    assert cli.main(given) == 0
    told = json.loads(capsys.readouterr().out)
    assert all(score["documents"] == 1 for score in told["tasks"]["scores"])
    assert all(score["stderr"] is None for score in told["tasks"]["scores"])


def test_the_command_line(model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(model), "--tasks", "tiny_choice,tiny_last", "--include-path", str(folder), "--limit", "8"]
    assert cli.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {score["task"] for score in told["tasks"]["scores"]} == {"tiny_choice", "tiny_last"}
    assert all(score["documents"] == 8 for score in told["tasks"]["scores"])
    assert told["lm_eval"]["results"]["tiny_choice"]["acc,none"] == told["tasks"]["scores"][0]["value"]
    assert "perplexity" not in told
    assert cli.main([*arguments, "-o", str(tmp_path / "kept")]) == 0
    shown = capsys.readouterr().out
    assert "tiny_choice" in shown
    assert "acc_norm" in shown
    kept = json.loads((tmp_path / "kept" / "lm_eval.json").read_text())
    assert len(kept["samples"]["tiny_choice"]) == 8
    assert json.loads((tmp_path / "kept" / "eval.json").read_text())["tasks"]["scores"] == told["tasks"]["scores"]
    assert cli.main([*arguments, "-o", str(folder / "documents.jsonl")]) == 2
    assert "results cannot be written to" in capsys.readouterr().err
    assert cli.main(["eval", str(model), "--tasks", ","]) == 2
    assert "--tasks names none" in capsys.readouterr().err
