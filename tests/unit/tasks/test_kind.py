"""The score's kind follows from all rows; what was chosen gives a perfect model 1 and wrong answers 0."""

import csv
import json

import pytest

from multiflora.errors import DataError
from multiflora.tasks import load_task, verify
from multiflora.tasks.kind import explain
from multiflora.tasks.load import examples_of


def task(folder, rows, **keys):
    (folder / "k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_task({"name": "k", "source": {"test": str(folder / "k.jsonl")}, **keys})


@pytest.mark.parametrize(
    ("answers", "wrong", "score"),
    [
        (["1492", "Rome", "Paris"], ["1493", "x", "x"], "exact"),
        (["Rome", "1,234"], ["x", "1235"], "exact"),
        (["vitamin B12", "iron"], ["vitamin A12", "x"], "exact"),
        (["5 March 1999", "7 May 1999"], ["1 June 1999", "7 May"], "exact"),
        (["10:30", "11:30"], ["12:30", "1:30"], "exact"),
        (["1/2", "3/4"], ["7/2", "4"], "exact"),
        (["5 km", "7 kg"], ["5 kg", "7"], "exact"),
        (["50%", "7%"], ["50", "57%"], "exact"),
        (["1.2.3", "2.2.3"], ["9.9.3", "2.2"], "exact"),
        (["007", "08"], ["7", "8"], "exact"),
        (["a\nb", "c"], ["a", "d"], "exact"),
        ([10**17 + 1, 2**53 + 1], [10**17, 2**53], "number"),
        (["$1,234.50", "-3"], ["1234", "3"], "number"),
        (["work #### 18", "#### 7"], ["work #### 17", "18"], "number"),
    ],
)
def test_the_kind_is_chosen_from_all_rows(tmp_path, answers, wrong, score):
    rows = [{"prompt": f"q{i}", "completion": f" {a}", "answer": a} for i, a in enumerate(answers)]
    spec = task(tmp_path, rows)
    examples = examples_of(spec, "test")
    assert spec.score == score
    assert [verify(spec, e, e.completion) for e in examples] == [1.0] * len(rows)
    assert [verify(spec, e, str(w)) for e, w in zip(examples, wrong, strict=True)] == [0.0] * len(rows)


def test_what_was_chosen_is_said_with_the_reason(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": " x", "answer": a} for i, a in enumerate(["1", "two"])]
    said = explain([task(tmp_path, rows)])["k"]
    assert said.startswith("k is scored by exact: ")
    assert "not every answer is a number: 'two' in " in said
    assert said.endswith("k.jsonl, line 2.")
    assert explain([task(tmp_path, rows[:1])])["k"].endswith("each of the 1 answers is a number.")
    assert explain([task(tmp_path, rows, score="rouge")])["k"].endswith("with the reference, as the task says.")
    assert explain([load_task("gsm8k")])["gsm8k"].endswith("as the task says.")


def test_a_blank_line_before_the_number_does_not_end_the_answer(tmp_path):
    spec = task(tmp_path, [{"prompt": "q", "completion": " First 5.\n\nThen 7.\n#### 7", "answer": "7"}])
    assert (spec.score, spec.stop) == ("number", ())
    assert [verify(spec, e, e.completion) for e in examples_of(spec, "test")] == [1.0]


def test_rows_that_are_left_out_have_no_say(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": " x", "answer": a} for i, a in enumerate(["1", "two"])]
    assert task(tmp_path, rows, keep="answer != 'two'").score == "number"


def test_choices_stand_in_every_row_or_in_none(tmp_path):
    row = {"prompt": "q", "completion": " yes"}
    with pytest.raises(DataError, match=r"k\.jsonl, line 1 has no 'choices', but .*line 2 has; expected it in every"):
        task(tmp_path, [row, {**row, "choices": [" no", " yes"], "answer": 1}])


def test_choices_of_a_csv_file_are_json(tmp_path):
    with (tmp_path / "c.csv").open("w", newline="") as stream:
        write = csv.writer(stream).writerow
        write(["prompt", "completion", "choices", "answer"])
        write(["q", " yes", '[" no", " yes"]', "1"])
    spec = load_task({"name": "c", "source": {"test": str(tmp_path / "c.csv")}})
    assert spec.score == "choices"
    assert examples_of(spec, "test")[0].choices == (" no", " yes")


def test_a_reference_that_no_answer_could_equal_is_refused(tmp_path):
    rows = [{"prompt": "q", "completion": " 5 km", "answer": "5 km"}]
    with pytest.raises(DataError, match=r"line 1: the answer of task k is '5 km', but its score is number"):
        examples_of(task(tmp_path, rows, score="number"), "test")
    rows = [{"prompt": "q", "completion": " a", "answer": "a\nb"}]
    with pytest.raises(DataError, match=r"holds the stop '\\n', so that even a right one would be cut"):
        examples_of(task(tmp_path, rows, prompt="{{ prompt }}", completion="{{ completion }}", answer="answer"), "test")
