"""Values of a row: texts and whole numbers are text, an answer means a choice; the rest is refused by its column."""

import json

import pytest

from multiflora.errors import DataError
from multiflora.tasks import load_task
from multiflora.tasks.load import examples_of

CHOICES = {"prompt": "{{ prompt }}", "choices": "choices", "answer": "answer"}


def example(tmp_path, line, **keys):
    (tmp_path / "v.jsonl").write_text(line + "\n")
    return examples_of(load_task({"name": "v", "source": {"test": str(tmp_path / "v.jsonl")}, **keys}), "test")[0]


@pytest.mark.parametrize("column", ["prompt", "completion", "answer"])
@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("NaN", "nan, which is no number"),
        ("-Infinity", "-inf, which is no number"),
        ("1e20", "1e[+]20, a number with a fraction"),
        ("0.1", "0.1, a number with a fraction"),
        ("true", "True, true or false"),
        ('["a", "b"]', "'a', 'b'., a list"),
        ('{"a": 1}', "'a': 1., an object"),
        ('"a\\u0000b"', "holds a NUL character"),
        ('"a\\ud800b"', "half of a character"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, column, value, told):
    row = {"prompt": '"q"', "completion": '" c"', "answer": '"c"'} | {column: value}
    line = "{" + ", ".join(f'"{key}": {text}' for key, text in row.items()) + "}"
    with pytest.raises(DataError, match=rf"v\.jsonl, line 1: the {column} of task v .*{told}"):
        example(tmp_path, line, prompt="{{ prompt }}", completion="{{ completion }}", answer="answer", score="exact")


def test_a_template_makes_a_text_of_anything(tmp_path):
    line = '{"prompt": 0.5, "completion": ["a", "b"]}'
    made = example(tmp_path, line, prompt="{{ prompt | string }}", completion=" {{ completion | join(', ') }}")
    assert (made.prompt, made.completion) == ("0.5", " a, b")
    assert example(tmp_path, '{"prompt": 12, "completion": 10000000000000000000000}').completion == "1" + "0" * 22


@pytest.mark.parametrize("answer", [1, True, 1.0, "1", " b", "b", "b "])
def test_an_answer_means_a_choice(tmp_path, answer):
    line = json.dumps({"prompt": "q", "choices": [" a", " b"], "answer": answer})
    assert example(tmp_path, line, **CHOICES).answer == 1


@pytest.mark.parametrize("answer", ["¹", "١", "--1", "1.0", "-1", -1, 2, 0.5, None, "B", "", [1], {"a": 1}, 10**30])
def test_an_answer_that_means_no_choice_is_refused(tmp_path, answer):
    line = json.dumps({"prompt": "q", "choices": [" a", " b"], "answer": answer})
    with pytest.raises(DataError, match=r"v\.jsonl, line 1: the answer of task v is .*0 to 1, or a choice's text"):
        example(tmp_path, line, **CHOICES)


def test_labels_are_those_of_the_data_set(tmp_path):
    line = json.dumps({"prompt": "q", "choices": [" 1", " 0"], "answer": "B"})
    assert example(tmp_path, line, **CHOICES, labels=["A", "B"]).answer == 1
    line = json.dumps({"prompt": "q", "choices": {"text": [" x", " y"], "label": ["1", "2"]}, "answer": "1"})
    assert example(tmp_path, line, **CHOICES).answer == 0
    line = json.dumps({"prompt": "q", "choices": [" 1", " 0"], "answer": "1"})
    with pytest.raises(DataError, match="which could mean choice 0, ' 1' and choice 1, ' 0'"):
        example(tmp_path, line, **CHOICES)
    with pytest.raises(DataError, match="expected a name for each of the 2 choices"):
        example(tmp_path, line, **CHOICES, labels=["A"])


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"choices": [" a", "a "]}, "hold 'a' twice"),
        ({"choices": [" a"]}, "expected two or more"),
        ({"choices": [1, 2]}, "expected a list of texts"),
        ({"choices": "a, b"}, "expected a list of texts"),
        ({"completion": " a"}, "completion of task v is ' a' but choice 1 is ' b'"),
    ],
)
def test_choices_that_make_no_question_are_refused(tmp_path, keys, told):
    line = json.dumps({"prompt": "q", "choices": [" a", " b"], "answer": 1} | keys)
    with pytest.raises(DataError, match=f"line 1: the .*{told}"):
        example(tmp_path, line, **CHOICES)


@pytest.mark.parametrize("name", [None, [1], True])
def test_a_name_of_a_row_is_a_text(tmp_path, name):
    line = json.dumps({"prompt": "q", "completion": " c", "id": name})
    with pytest.raises(DataError, match="line 1: the id of task v is"):
        example(tmp_path, line, id="id")
