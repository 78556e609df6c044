import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from multiflora.errors import ConfigError
from multiflora.tasks import Example, Message, as_text

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


def test_what_a_template_writes_before_an_answer_belongs_to_the_prompt():
    thinking = CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    )
    prompt, completion = as_text(Example("t", "t-2", "Say t.", " t"), tokenizer(thinking), chat_template=True)
    assert prompt.endswith("assistant\n<think></think>")
    assert completion == "t"


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(
        ConfigError, match=r"model\.chat_template is true, but the tokenizer of .* has no chat template"
    ):
        as_text(PLAIN, tokenizer(template=None), chat_template=True)


def test_a_template_that_rewrites_what_came_before_is_refused():
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="writes an answered conversation in another way than an open one"):
        as_text(PLAIN, tokenizer(template=rewriting), chat_template=True)
