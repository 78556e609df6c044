"""Conversations as fine-tuning files have them: each becomes the text that is meant, or is refused by its turn."""

import json

import pytest

from multiflora.errors import DataError
from multiflora.tasks import load_task
from multiflora.tasks.load import examples_of

U, A = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "Yes."}
S = {"role": "system", "content": "s"}
CALLS = [{"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"up": 1}'}}]
CALL = {"role": "assistant", "content": None, "tool_calls": CALLS}
WRITTEN = '{"name": "look", "arguments": {"up": 1}}'


def part(text):
    return {"type": "text", "text": text}


def example(tmp_path, messages, **keys):
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages, **keys.pop("row", {})}) + "\n")
    task = {"name": "c", "source": {"train": str(tmp_path / "c.jsonl")}, "split_sizes": {}, **keys}
    return examples_of(load_task(task), "train")[0]


@pytest.mark.parametrize(
    ("messages", "prompt", "completion"),
    [
        ([{"role": "user", "content": [part("Q"), part("?")]}, A], "User: Q?\nAssistant:", " Yes."),
        ([U, {"role": "assistant", "content": [part("Yes.")]}], "User: Q?\nAssistant:", " Yes."),
        ([U, {"role": "assistant", "content": 0}], "User: Q?\nAssistant:", " 0"),
        ([U, CALL, U, A], f"User: Q?\nAssistant: {WRITTEN}\nUser: Q?\nAssistant:", " Yes."),
        ([U, CALL], "User: Q?\nAssistant:", f" {WRITTEN}"),
        ([U, {**CALL, "content": "Wait."}], "User: Q?\nAssistant:", f" Wait.\n{WRITTEN}"),
        (
            [U, CALL, {"role": "tool", "content": "one", "tool_call_id": "1"}, A],
            f"User: Q?\nAssistant: {WRITTEN}\nTool: one\nAssistant:",
            " Yes.",
        ),
        ([U, {**A, "reasoning_content": "hm"}], "User: Q?\nAssistant:", " <think>\nhm\n</think>\n\nYes."),
        ([U, {**A, "weight": 0}, U, {**A, "weight": 1}], "User: Q?\nAssistant: Yes.\nUser: Q?\nAssistant:", " Yes."),
        ([U, A, U, {**A, "content": "No.", "weight": 0}], "User: Q?\nAssistant:", " Yes."),
        ([{**U, "name": "Ada"}, A], "User (Ada): Q?\nAssistant:", " Yes."),
        ([{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "Yes."}], "User: Q?\nAssistant:", " Yes."),
        ([{**U, "tool_calls": None, "name": None}, A], "User: Q?\nAssistant:", " Yes."),
        (json.dumps([U, A]), "User: Q?\nAssistant:", " Yes."),
        ([{"role": "user", "content": 5}, {"role": "assistant", "content": 7}], "User: 5\nAssistant:", " 7"),
        ([U, A, A], "User: Q?\nAssistant: Yes.\nAssistant:", " Yes."),
        ([U, A, S, U, A], "User: Q?\nAssistant: Yes.\nSystem: s\nUser: Q?\nAssistant:", " Yes."),
        ([S, A], "System: s\nAssistant:", " Yes."),
        ([{"role": "user", "content": ""}, A], "User: \nAssistant:", " Yes."),
    ],
)
def test_a_conversation_becomes_its_text(tmp_path, messages, prompt, completion):
    made = example(tmp_path, messages)
    assert (made.prompt, made.completion) == (prompt, completion)


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, A], "type 'image_url'"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, A], "type 'input_audio'"),
        ([{"role": "user", "content": [part(5)]}, A], "holds {'type': 'text', 'text': 5}"),
        ([{"role": "user", "content": ["Q?"]}, A], "holds 'Q.'; expected parts of the form"),
        ([U, {"role": "assistant", "content": True}], "content of turn 2 .* is True, true or false"),
        ([U, {"role": "assistant", "content": {"city": "Rome"}}], "is {'city': 'Rome'}, an object"),
        ([U, {"role": "assistant", "content": 0.5}], "is 0.5, a number with a fraction"),
        ([U, {"role": "assistant", "content": None}], "turn 2 of the messages of task c has no content"),
        ([U, {**A, "weight": 0}], "weight 0 in every turn of the assistant"),
        ([U, {**A, "weight": 0.5}], "has the weight 0.5; expected 0"),
        ([U, {**A, "function_call": {"name": "f"}}], "has the key 'function_call', which cannot be read"),
        ([U, {**A, "audio": {"id": "a"}}], "has the key 'audio'"),
        ([{**U, "tool_calls": CALLS}, A], "expected a list of calls in a turn of the assistant"),
        ([U, {**A, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "the arguments as a JSON object"),
        ([U, A, U], "does not end with a turn of the assistant"),
        ([U, A, S], "does not end with a turn of the assistant"),
        ('[{"role": ', "expected a list of turns"),
        ({"role": "user"}, "expected a list of turns"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_row(tmp_path, messages, told):
    with pytest.raises(DataError, match=rf"c\.jsonl, line 1: .*{told}"):
        example(tmp_path, messages)


def test_all_answers_or_the_last_one(tmp_path):
    talk = [U, A, U, {**A, "weight": 0}, U, A]
    assert [m.loss for m in example(tmp_path, talk).messages] == [False] * 6
    assert [m.loss for m in example(tmp_path, talk, train_on="all").messages] == [False, True, *[False] * 4]


def test_tools_and_trls_columns_are_found(tmp_path):
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    assert json.loads(example(tmp_path, [U, CALL], row={"tools": [tool]}).tools) == [tool]
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": [U], "completion": [A]}) + "\n")
    made = examples_of(load_task({"name": "t", "source": str(tmp_path / "t.jsonl"), "split_sizes": {}}), "train")[0]
    assert (made.prompt, made.completion) == ("User: Q?\nAssistant:", " Yes.")
    (tmp_path / "u.jsonl").write_text(json.dumps({"prompt": [U], "completion": " Yes."}) + "\n")
    with pytest.raises(
        DataError, match=r"prompt is a list of turns and completion is ' Yes\.'; expected a list of turns"
    ):
        load_task({"name": "t", "source": str(tmp_path / "u.jsonl")})


def test_what_a_row_says_twice_is_the_same_text(tmp_path):
    choices = {"choices": [" No.", " Yes."], "answer": 1}
    assert example(tmp_path, [U, A], row=choices).completion == " Yes."
    assert example(tmp_path, [U, A], row={"completion": "Yes."}).completion == " Yes."
    assert example(tmp_path, [U, A], row={"completion": ""}).completion == " Yes."
    no = {"role": "assistant", "content": "No."}
    for row, told in (
        ({"messages": [U, no], **choices}, r"the last turn of task t is 'No\.' but choice 1 is ' Yes\.'"),
        (
            {"prompt": [U], "completion": [no], **choices},
            r"the completion of task t is 'No\.' but choice 1 is ' Yes\.'",
        ),
        (
            {"prompt": "Q?", "completion": "No.", **choices},
            r"the completion of task t is 'No\.' but choice 1 is ' Yes\.'",
        ),
        (
            {"messages": [U, A], "completion": "No."},
            r"the completion of task t is 'No\.' but the last turn is ' Yes\.'",
        ),
    ):
        (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=rf"t\.jsonl, line 1: {told}; they must be the same text"):
            examples_of(load_task({"name": "t", "source": {"test": str(tmp_path / "t.jsonl")}}), "test")


@pytest.mark.parametrize("written", [json.dumps, list], ids=["JSON text", "lists"])
def test_trls_columns_may_be_json_text_as_in_a_csv_file(tmp_path, written):
    row = {"prompt": json.dumps([U, A, U]), "completion": written([A])}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    made = examples_of(load_task({"name": "t", "source": {"test": str(tmp_path / "t.jsonl")}}), "test")[0]
    assert (made.prompt, made.completion) == ("User: Q?\nAssistant: Yes.\nUser: Q?\nAssistant:", " Yes.")


def test_a_template_may_write_the_answer_to_turns_of_a_file(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": [U], "result": 4}) + "\n")
    task = {"name": "t", "source": {"test": str(tmp_path / "t.jsonl")}, "completion": " {{ result }}"}
    assert examples_of(load_task(task), "test")[0].completion == " 4"
