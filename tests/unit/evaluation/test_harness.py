"""What is written for the harness: complete, readable by it, and without a trace of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from multiflora.evaluation.harness import metric_of, read_rows, row_of, score_nll, score_text, specs_in, to_harness
from multiflora.tasks import Example, load_task

ROWS = [{"task": "t", "id": "t-0", "prompt": "{{ 1 + 1 }}?", "completion": " 2", "answer": "2", "tokens": 2}]
CHOICES = [{**ROWS[0], "prompt": "7", "choices": [" 1", " 2"], "completion": " 2", "answer": 1}]


def spec(**changes: Any) -> Any:
    plain = {"name": "t", "source": {"path": "some/set"}, "score": "number", "answer": "answer"}
    return load_task({**plain, **changes})


def loaded(folder: Path) -> Any:
    return TaskManager(include_path=str(folder), include_defaults=False).load(["t"])["tasks"]["t"]


def test_a_prompt_is_not_taken_for_a_template_nor_digits_for_a_number(tmp_path: Path) -> None:
    to_harness(spec(), ROWS, tmp_path, max_new_tokens=5)
    task = loaded(tmp_path)
    assert task.doc_to_text(task.eval_docs[0]) == "{{ 1 + 1 }}?"
    to_harness(spec(score="choices", choices=["a", "b"]), CHOICES, tmp_path, max_new_tokens=5)
    task = loaded(tmp_path)
    assert task.doc_to_text(task.eval_docs[0]) == "7"


def test_choices_are_asked_as_they_are(tmp_path: Path) -> None:
    to_harness(spec(score="choices", choices=["a", "b"]), CHOICES, tmp_path, max_new_tokens=5)
    task = loaded(tmp_path)
    task.set_fewshot_seed(0)
    task.build_all_requests()
    assert [request.args for request in task.instances] == [("7", " 1"), ("7", " 2")]


@pytest.mark.parametrize(("own", "expected"), [(None, 5), (9, 9)])
def test_an_answer_has_its_tasks_length_and_stops(tmp_path: Path, own: int | None, expected: int) -> None:
    to_harness(spec(max_new_tokens=own, stop=["\n", "Q:"]), ROWS, tmp_path, max_new_tokens=5)
    settings = loaded(tmp_path).config.generation_kwargs
    assert settings["max_gen_toks"] == expected
    assert settings["until"] == ["Q:"]  # a line end is a stop only behind an answer, which the scoring knows
    assert settings["do_sample"] is False


def test_what_scoring_needs_is_all_that_is_kept_of_a_task(tmp_path: Path) -> None:
    data = tmp_path / "secret-folder" / "t.jsonl"
    data.parent.mkdir()
    data.write_text(json.dumps({"prompt": "a", "completion": " b", "answer": "b"}) + "\n")
    to_harness(load_task({"name": "t", "source": str(data)}), ROWS, tmp_path / "harness", max_new_tokens=5)
    for path in (tmp_path / "harness").iterdir():
        if path.is_file():
            assert "secret-folder" not in path.read_text(), path.name
    kept = specs_in(tmp_path / "harness")["t"]
    assert kept.score == "exact"
    assert kept.stop == ("\n",)


def test_tasks_of_one_folder_do_not_lose_each_other(tmp_path: Path) -> None:
    for name in ("a", "b", "a"):
        to_harness(spec(name=name), ROWS, tmp_path, max_new_tokens=5)
    assert sorted(specs_in(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("number", " so 2", {"number_match": 1.0}),
        ("exact", "2\n", {"exact_match": 1.0}),
        ("exact", "3", {"exact_match": 0.0}),
        ("exact", "\n 2\n3", {"exact_match": 1.0}),
        ("number", "\n\n2\n\n3", {"number_match": 1.0}),
        ("rouge", " 2", {"rougeL": 1.0}),
    ],
)
def test_texts_are_scored_by_the_tasks_own_rule(kind: str, text: str, expected: dict[str, float]) -> None:
    assert score_text(spec(score=kind), ROWS[0], text) == expected


def test_a_verifier_judges_the_row_it_made(tmp_path: Path) -> None:
    from multiflora.tasks.load import examples_of

    task = load_task({"name": "t", "source": {"generator": "basic_arithmetic", "sizes": {"train": 3, "test": 2}}})
    rows = [row_of(e, lambda e: (e.prompt, e.completion)) for e in examples_of(task, "test")]
    to_harness(task, rows, tmp_path, max_new_tokens=5)
    kept = specs_in(tmp_path)["t"]
    for row in read_rows(tmp_path / "t.jsonl"):
        assert score_text(kept, row, row["completion"]) == {"verifier": 1.0}
        assert score_text(kept, row, "nonsense")["verifier"] < 0.1


def test_nats_are_per_token() -> None:
    assert score_nll({"tokens": 4}, (-6.0, False)) == {"nll": 1.5}


def test_a_row_carries_the_texts_as_the_model_reads_them() -> None:
    example = Example("t", "t-0", "q", " b", choices=(" a", " b"), answer=1)
    row = row_of(example, lambda e: (f"<{e.prompt}>", e.completion.strip()))
    assert row == {
        "task": "t",
        "id": "t-0",
        "prompt": "<q>",
        "completion": "b",
        "choices": ["a", "b"],
        "answer": 1,
    }


def test_length_normalised_choices_have_their_own_metric() -> None:
    choices = {"score": "choices", "choices": ["a", "b"]}
    assert metric_of(spec(**choices)) == "acc"
    assert metric_of(spec(**choices, length_normalised=True)) == "acc_bytes"
