import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from multiflora.errors import ConfigError, DataError
from multiflora.tasks import Example, Message, as_text
from multiflora.tasks.chat import answer_in, around_answer, opened, spans_of

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(template=CHATML, eos="<|im_end|>"):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos)
    made.chat_template = template
    return made


PLAIN = Example("t", "t-0", "Question: 2 + 2?\nAnswer:", " 4")
CHAT = Example(
    "t",
    "t-1",
    "System: s\nUser: u\nAssistant:",
    " a",
    messages=(Message("system", "s"), Message("user", "u"), Message("assistant", "a")),
)


def test_without_a_template_the_texts_are_the_examples_own():
    assert as_text(PLAIN, None, chat_template=False) == ("Question: 2 + 2?\nAnswer:", " 4")
    assert as_text(CHAT, None, chat_template=False) == ("System: s\nUser: u\nAssistant:", " a")


def test_a_plain_prompt_is_one_user_turn_and_the_end_of_text_is_left_to_the_tokens():
    prompt, completion = as_text(PLAIN, tokenizer(), chat_template=True)
    assert prompt == "<|im_start|>user\nQuestion: 2 + 2?\nAnswer:<|im_end|>\n<|im_start|>assistant\n"
    assert completion == "4"


def test_a_conversation_keeps_its_turns():
    prompt, completion = as_text(CHAT, tokenizer(), chat_template=True)
    assert prompt == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    assert completion == "a"


def test_the_mark_that_ends_a_turn_is_learned_where_it_is_not_the_end_of_text():
    assert as_text(PLAIN, tokenizer(eos="<eos>"), chat_template=True)[1] == "4<|im_end|>\n"


def test_what_a_template_writes_before_an_answer_is_learned_as_a_server_does_not_send_it():
    thinking = CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    )
    example = Example("t", "t-2", "Say t.", " t")
    prompt, completion = as_text(example, tokenizer(thinking), chat_template=True)
    assert prompt == opened([{"role": "user", "content": "Say t."}], tokenizer(thinking))
    assert (prompt[-10:], completion) == ("assistant\n", "<think></think>t")
    assert around_answer(example, tokenizer(thinking), chat_template=True) == ("<think></think>", "")


QWEN3 = """{%- for m in messages %}{%- set text = m.content %}{%- set think = m.reasoning_content or '' %}
{%- if '</think>' in text %}{%- set think = text.split('</think>')[0].replace('<think>', '').strip() %}
{%- set text = text.split('</think>')[1].lstrip() %}{%- endif %}
{%- if m.role == 'assistant' and loop.last %}
{{- '<|im_start|>assistant\\n<think>\\n' + think + '\\n</think>\\n\\n' + text + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + text }}
{%- for call in m.tool_calls or [] %}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
CALL = '{"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]}'


def talk(*turns):
    return Example("t", "t-3", "p", " c", messages=tuple(Message(*turn) for turn in turns))


@pytest.mark.parametrize(
    ("answer", "completion"),
    [
        (("4",), "<think>\n\n</think>\n\n4"),
        (("<think>\nadd\n</think>\n\n4",), "<think>\nadd\n</think>\n\n4"),
        (("4", '{"reasoning_content": "add"}'), "<think>\nadd\n</think>\n\n4"),
    ],
)
def test_a_given_reasoning_is_where_the_template_puts_it(answer, completion):
    told = as_text(talk(("user", "2 + 2?"), ("assistant", *answer)), tokenizer(QWEN3), chat_template=True)
    assert told == ("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n", completion)


def test_every_answer_carries_loss_with_the_mark_that_ends_its_turn():
    example = talk(("user", "a"), ("assistant", "b", "", True), ("user", "c"), ("assistant", "d"))
    spans = spans_of(example, tokenizer(), chat_template=True)
    assert [text for text, loss in spans if loss] == ["b<|im_end|>", "d"]
    made = tokenizer(eos="<eos>").apply_chat_template([m.for_template() for m in example.messages], tokenize=False)
    assert "".join(text for text, _ in spans_of(example, tokenizer(eos="<eos>"), chat_template=True)) == made


def test_a_call_of_a_tool_is_written_by_the_template():
    example = talk(("user", "a"), ("assistant", "", CALL), ("tool", "sunny"), ("assistant", "Sun."))
    prompt, _ = as_text(example, tokenizer(QWEN3), chat_template=True)
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' in prompt


@pytest.mark.parametrize(
    ("turns", "lost"),
    [
        ([("user", "a"), ("assistant", "", CALL), ("tool", "sunny"), ("assistant", "b")], "its call of weather"),
        ([("user", "a"), ("assistant", "b", '{"reasoning_content": "because"}')], "its reasoning"),
    ],
)
def test_what_a_template_leaves_out_is_refused(turns, lost):
    with pytest.raises(DataError, match=f"t-3: the chat template of .* leaves out of turn . .assistant. {lost}"):
        as_text(talk(*turns), tokenizer(), chat_template=True)


def test_a_conversation_that_the_template_refuses_is_named():
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"t-1: the chat template of .* \(system, user, assistant\): no system, please"):
        as_text(CHAT, tokenizer(strict), chat_template=True)


def test_the_answer_is_found_in_what_a_model_writes_around_it():
    around = around_answer(talk(("user", "a"), ("assistant", "b")), tokenizer(QWEN3, eos="<eos>"), chat_template=True)
    assert around == ("<think>\n\n</think>\n\n", "<|im_end|>\n")
    assert answer_in("<think>\nhm\n</think>\n\n42<|im_end|>\n", around) == "42"
    assert answer_in("42", ("", "")) == answer_in("42", around) == "42"


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(
        ConfigError, match=r"model\.chat_template is true, but the tokenizer of .* has no chat template"
    ):
        as_text(PLAIN, tokenizer(template=None), chat_template=True)


def test_a_template_that_rewrites_what_came_before_is_refused():
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="writes an answered conversation in another way than an open one"):
        as_text(PLAIN, tokenizer(template=rewriting), chat_template=True)
