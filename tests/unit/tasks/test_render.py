import pytest

from multiflora.errors import DataError
from multiflora.tasks import Message, load_task, render
from multiflora.tasks.render import keeps

ROW = {"question": "2 + 2", "result": 4, "options": ["3", "4"], "right": 1, "note": None, "odd name": "x"}


def task(**keys):
    spec = {"name": "t", "source": {"path": "o/d"}, "prompt": "{{ question }} =", "completion": " {{ result }}", **keys}
    return load_task(spec)


def refused(row=ROW, **keys) -> str:
    with pytest.raises(DataError, match=r"rows\.jsonl, line 7: ") as caught:
        render(task(**keys), row, "rows.jsonl, line 7")
    return str(caught.value)


def test_a_row_becomes_prompt_and_completion():
    example = render(task(answer="result"), ROW, "here", id="t-train-0")
    assert (example.task, example.id, example.prompt, example.completion) == ("t", "t-train-0", "2 + 2 =", " 4")
    assert (example.answer, example.choices, example.messages) == ("4", (), ())


def test_choices_from_templates_and_from_an_expression_give_the_completion():
    for choices in ([" {{ options[0] }}", " {{ options[1] }}"], "options | prefix(' ')"):
        example = render(task(choices=choices, answer="right", completion=None), ROW, "here")
        assert example.choices == (" 3", " 4")
        assert (example.answer, example.completion) == (1, " 4")


def test_columns_whose_names_are_no_identifiers_are_reached_through_row():
    assert render(task(prompt="{{ row['odd name'] }}"), ROW, "here").prompt == "x"


def test_white_space_of_a_template_is_kept_except_after_block_tags():
    text = "A\n{% if right %}\nB\n{% endif %}\nC\n"
    assert render(task(prompt=text), ROW, "here").prompt == "A\nB\nC\n"


def test_an_id_expression_names_the_row():
    assert render(task(id="'q' ~ right"), ROW, "here", id="other").id == "q1"


def test_a_missing_column_is_named_with_the_columns_there_are():
    told = refused(prompt="{{ questoin }} =")
    assert "prompt of task t names the column questoin, which is not there" in told
    assert "the columns are question, result, options, right, note, odd name. Did you mean question?" in told


@pytest.mark.parametrize("key", ["answer", "id"])
def test_a_missing_column_in_an_expression_is_named_too(key):
    assert f"{key} of task t names the column lable" in refused(**{key: "lable"})


def test_a_missing_column_in_keep_is_named_too():
    with pytest.raises(DataError, match="the keep of task t names the column lable"):
        keeps(task(keep="lable >= 0"), ROW, "here")


@pytest.mark.parametrize("answer", ["2", "-1", "'B'", "none", "1.5"])
def test_an_answer_outside_the_choices_is_refused(answer):
    told = refused(choices=[" a", " b"], answer=answer, completion=None)
    assert "expected the index of one of its choices, 0 to 1" in told
    assert "keep: label >= 0" in told


def test_true_digits_and_whole_numbers_are_indices():
    for answer in ("true", "'1'", "1.0"):
        assert render(task(choices=[" a", " b"], answer=answer, completion=None), ROW, "here").answer == 1


def test_a_completion_that_is_not_the_right_choice_is_refused():
    told = refused(choices=[" 3", " 4"], answer="0")
    assert "completion of task t is ' 4' but choice 0 is ' 3'" in told


def test_choices_must_be_texts_two_at_least_and_none_empty():
    assert "choices of task t give 4; expected a list of texts" in refused(choices="result", completion=None)
    assert "give [3, 4]" in refused({**ROW, "options": [3, 4]}, choices="options", completion=None, answer="right")
    assert "expected two or more, none of them empty" in refused(
        choices=[" a", " {{ '' }}"], completion=None, answer="0"
    )
    assert "expected two or more" in refused(choices=[" a"], completion=None, answer="0")


def test_a_null_is_never_printed_as_none():
    told = refused(prompt="{{ note }} =")
    assert "prints a null" in told
    assert "{{ column or '' }}" in told
    assert "prints a null" in refused(
        {"options": ["a", None]}, prompt="x", choices="options | prefix(' ')", completion=None
    )


@pytest.mark.parametrize("value", [True, float("nan"), 1e20, ["a", "b"], {"a": 1}])
def test_the_column_of_a_value_that_is_no_text_is_named(value):
    told = refused({**ROW, "result": value})
    assert "the completion of task t (column result) prints " in told
    told = refused({**ROW, "right": value}, answer="right")
    assert "the answer of task t (column right) is " in told


def test_empty_texts_are_refused():
    assert "the prompt of task t is empty" in refused(prompt=" {{ '' }} ")
    assert "the completion of task t is empty; there is nothing to learn" in refused(completion=" {{ '' }}")


def test_a_template_that_fails_on_a_row_shows_the_columns():
    told = refused(answer="options.index('9')")
    assert "answer of task t fails on this row" in told
    assert "The columns are question" in told


@pytest.mark.parametrize("attack", ["{{ ''.__class__.__mro__ }}", "{{ options.append('x') }}", "{{ row.clear() }}"])
def test_templates_run_in_a_sandbox(attack):
    assert "prompt of task t fails on this row" in refused(prompt=attack)
    assert ROW["options"] == ["3", "4"]


def conversation(*turns):
    return {"turns": [{"role": role, "content": content} for role, content in turns]}


def test_a_conversation_ends_in_the_completion():
    spec = task(prompt=None, completion=None, messages="turns")
    row = conversation(("system", "Be brief."), ("user", "Capital of France?"), ("assistant", "Paris."))
    example = render(spec, row, "here")
    assert example.prompt == "System: Be brief.\nUser: Capital of France?\nAssistant:"
    assert example.completion == " Paris."
    assert example.messages[-1] == Message("assistant", "Paris.")
    assert len(example.messages) == 3


def test_a_conversation_from_templates_with_choices():
    messages = [{"role": "user", "content": "{{ question }}?"}]
    example = render(
        task(prompt=None, completion=None, messages=messages, choices=[" 3", " 4"], answer="1"), ROW, "here"
    )
    assert example.prompt == "User: 2 + 2?\nAssistant:"
    assert example.messages == (Message("user", "2 + 2?"), Message("assistant", "4"))


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([("user", "a")], "does not end with a turn of the assistant"),
        ([("assistant", "a"), ("user", "b")], "opened by the assistant"),
        ([("User", "a"), ("assistant", "b")], "the role 'User'; expected one of system, developer, user, assistant"),
        ([("function", "a"), ("assistant", "b")], "the role 'function'; expected one of system"),
        ([("tool", "a"), ("assistant", "b")], "opened by the tool"),
        ([], "are empty"),
        ([("user", "a"), ("assistant", " ")], "the completion of task t is empty"),
    ],
)
def test_a_conversation_that_cannot_be_learned_is_refused(turns, told):
    row = conversation(*turns)
    assert told in refused(row, prompt=None, completion=None, messages="turns")


def test_turns_need_role_and_content():
    spec = {"prompt": None, "completion": None, "messages": "turns"}
    for turn in ({"role": "user"}, {"content": "a"}, {"from": "user"}, "a", ["user", "a"]):
        assert "expected 'role' and 'content'" in refused({"turns": [turn]}, **spec)
    assert "expected a list of turns" in refused({"turns": "hello"}, **spec)


def test_a_choice_that_stands_twice_among_very_many_is_found():
    """Looking for it took time by the square of their number: minutes for these."""
    row = {**ROW, "options": [*(f" {i}" for i in range(100_000)), " 7"]}
    assert "hold '7' twice" in refused(row, choices="options", answer="right", completion=None)
