"""A model's chat template comes from anybody: it is rendered as transformers does, where the system can stop it."""

import datetime

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from multiflora.errors import DataError
from multiflora.tasks import Example, Message
from multiflora.tasks.chat import ahead, around_answer, spans_of
from multiflora.tasks.chat_template import Asked, render_all, render_chat

MARKS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
CHAT = MARKS + "{% if add_generation_prompt %}[assistant] {% endif %}"
TURNS = [{"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": "Yes."}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def tokenizer(template, kind=PreTrainedTokenizerFast):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return kind(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template)


@pytest.mark.parametrize(
    "template",
    [
        CHAT,
        "{{ bos_token }}{% for m in messages %}{% generation %}{{ m | tojson(indent=2) }}{% endgeneration %}"
        "{% endfor %}",
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{% if loop.last %}"
        "{% break %}{% endif %}{{ m.content }}{% endfor %}{{ strftime_now('%d %b %Y') }}{{ eos_token }}",
        {"default": CHAT, "tool_use": "tools {{ tools | length }} " + CHAT},
    ],
)
@pytest.mark.parametrize("words", [{}, {"add_generation_prompt": True}])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_text_is_that_of_transformers(template, words, tools):
    made = tokenizer(template)
    written = made.apply_chat_template(TURNS, tools=tools, tokenize=False, **words)
    assert render_chat(Asked(TURNS, tools, words), made) == written
    assert render_all([Asked(TURNS, tools, words)] * 2, made) == [written] * 2


def test_the_last_turn_can_be_left_open():
    assert render_chat(Asked(TURNS, words={"continue_final_message": True}), tokenizer(CHAT)).endswith(
        "[assistant] Yes."
    )


def test_the_time_of_day_is_the_callers(monkeypatch):
    monkeypatch.setenv("TZ", "Etc/GMT-14")
    monkeypatch.setattr("multiflora.stoppable._running", None)
    there = datetime.datetime.now(datetime.timezone(datetime.timedelta(hours=14)))
    assert render_chat(Asked(TURNS), tokenizer("{{ strftime_now('%d') }}")) in {
        f"{there:%d}",
        f"{there + datetime.timedelta(minutes=1):%d}",
    }


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 'a' * 10**12 }}", "memory"),
        ("{% set l = ['a' * 10**7] * 10**7 %}{{ l | join }}", "memory|seconds"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "seconds"),
        ("{{ 9 ** (9 ** 9) }}", "seconds"),
        ("{% set s = 'ab' * 300000 %}{% for i in range(99999) %}{{ s.count('zz') }}{% endfor %}", "seconds"),
        ("{{ 'a' * 10**6 }}", r"more than 100,\d+ characters"),
        ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "without end"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ raise_exception('no system prompts here') }}", "no system prompts here"),
        ("{{ messages[7].content }}", "undefined|has no"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 1 +", "unexpected|expected"),
        ({"other": "x"}, "multiple chat templates"),
    ],
)
def test_a_template_that_does_harm_is_stopped_and_the_row_named(monkeypatch, template, why):
    monkeypatch.setattr("multiflora.stoppable.SECONDS", 0.5)
    made, example = tokenizer(template), Example("t", "t-7", "Is it red?", " Yes.")
    with pytest.raises(DataError, match=rf"t-7: the chat template of this model refuses .*({why})"):
        spans_of(example, made, chat_template=True)
    # rendered ahead it fails at the same place, with the same name
    with pytest.raises(DataError, match=rf"t-7: the chat template of this model refuses .*({why})"):
        [spans_of(each, made, chat_template=True) for each in ahead([example], made, chat_template=True)]
    assert render_chat(Asked(TURNS), tokenizer(CHAT)).startswith("[user] Is it red?")


def test_what_is_rendered_ahead_is_what_is_rendered_alone():
    talk = (Message("user", "a"), Message("assistant", "b", loss=True), Message("user", "c"), Message("assistant", "d"))
    examples = [
        Example("t", "t-0", "Is it red?", " yes", choices=(" no", " yes"), answer=1),
        Example("t", "t-1", "a c", " d", messages=talk),
        *(Example("t", f"t-{i}", f"Is {i} red?", " Yes.") for i in range(2, 99)),
    ]
    made = tokenizer(CHAT)
    alone = [(spans_of(e, made, True), around_answer(e, made, True)) for e in examples]
    assert [(spans_of(e, made, True), around_answer(e, made, True)) for e in ahead(examples, made, True)] == alone


def test_ahead_asks_for_all_that_is_used(monkeypatch):
    talk = (Message("user", "a"), Message("assistant", "b", loss=True), Message("user", "c"), Message("assistant", "d"))
    examples = [
        Example("t", "t-0", "Is it red?", " yes", choices=(" no", " yes"), answer=1),
        Example("t", "t-1", "a c", " d", messages=talk),
    ]
    made = tokenizer(CHAT)
    for example in ahead(examples, made, True):
        monkeypatch.setattr("multiflora.tasks.chat.render_chat", None)  # a second rendering would fail
        spans_of(example, made, True)
        around_answer(example, made, True)


def test_a_tokenizer_that_writes_conversations_by_its_own_code_is_asked():
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, conversation, **words):
            return f"{len(conversation)} turns {sorted(words)}"

    made = tokenizer(CHAT, Own)
    assert render_chat(Asked(TURNS), made) == "2 turns ['tokenize', 'tools']"
    assert render_all([Asked(TURNS)], made) == [None]
