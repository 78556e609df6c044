import json

import pytest

from multiflora.errors import ConfigError, DataError
from multiflora.tasks import load_task

CHOICE = {"task": "x", "prompt": "p", "completion": " b", "choices": [" a", " b"], "answer": 1, "id": "x-0"}
NUMBER = {"prompt": "p", "completion": " #### 4", "answer": "4", "id": "n-0"}
WORD = {"prompt": "p", "completion": " yes", "answer": "yes"}
PLAIN = {"prompt": "p", "completion": " c"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def folder(tmp_path, row, name="mine"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "train.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path / name


@pytest.mark.parametrize(
    ("row", "score", "choices", "answer", "id_"),
    [
        (CHOICE, "choices", "choices", "answer", "id"),
        (NUMBER, "number", None, "answer", "id"),
        (WORD, "exact", None, "answer", None),
        (PLAIN, "nll", None, None, None),
        (CHAT, "nll", None, None, None),
    ],
)
def test_files_in_the_plain_schema_need_only_their_place(tmp_path, row, score, choices, answer, id_):
    spec = load_task(folder(tmp_path, row))
    assert (spec.name, spec.score, spec.choices, spec.answer, spec.id) == ("mine", score, choices, answer, id_)


def test_a_task_is_a_name_a_folder_a_file_a_task_file_or_a_mapping(tmp_path):
    place = folder(tmp_path, CHOICE)
    assert load_task("gsm8k").name == "gsm8k"
    assert load_task("mine", base=tmp_path).name == "mine"
    assert load_task("mine/train.jsonl", base=tmp_path).name == "mine"
    (place / "other.jsonl").write_text(json.dumps(PLAIN) + "\n")
    assert load_task("mine/other.jsonl", base=tmp_path).name == "other"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "written.yaml").write_text("source: ../mine\nweight: 3\n")
    written = load_task("tasks/written.yaml", base=tmp_path)
    assert (written.name, written.weight, written.source.folder) == ("written", 3, place)
    assert load_task({"name": "tasks/written.yaml", "weight": 5}, base=tmp_path).weight == 5
    assert load_task(written) is written


def test_a_shipped_name_wins_over_a_folder_of_that_name(tmp_path):
    folder(tmp_path, PLAIN, name="rte")
    assert load_task("rte", base=tmp_path).score == "choices"
    assert load_task("./rte", base=tmp_path).score == "nll"


def test_an_unknown_name_finds_the_nearest_and_says_what_else_it_could_be():
    for task in ("gsm9k", {"name": "gsm9k"}, {"name": "gsm9k", "weight": 2}):
        with pytest.raises(
            ConfigError, match=r"'gsm9k' is not a shipped task; did you mean gsm8k\?.*folder or file path"
        ):
            load_task(task)


def test_other_columns_need_templates(tmp_path):
    place = folder(tmp_path, {"question": "1", "answer": "2"})
    with pytest.raises(DataError, match=r"train\.jsonl has the columns question, answer; .* Write the templates"):
        load_task(place)


def test_a_missing_folder_a_missing_file_and_an_empty_file_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist; .*source: \{path: owner/name\}"):
        load_task("./nowhere", base=tmp_path)
    with pytest.raises(ConfigError, match=r"t\.yaml does not exist"):
        load_task("t.yaml", base=tmp_path)
    (tmp_path / "e.jsonl").touch()
    with pytest.raises(DataError, match=r"e\.jsonl has no rows"):
        load_task("e.jsonl", base=tmp_path)
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match=r"list\.yaml is no mapping; expected the keys of a task"):
        load_task("list.yaml", base=tmp_path)


def test_the_first_row_is_not_looked_at_where_templates_are_given(tmp_path):
    spec = load_task(
        {"name": "t", "source": str(tmp_path / "later.jsonl"), "prompt": "{{ q }}", "completion": " {{ a }}"}
    )
    assert spec.score == "nll"


def test_what_the_task_says_wins_over_the_first_row(tmp_path):
    place = folder(tmp_path, NUMBER)
    spec = load_task({"name": "t", "source": str(place), "score": "exact", "id": "prompt"})
    assert (spec.score, spec.id, spec.answer) == ("exact", "prompt", "answer")
