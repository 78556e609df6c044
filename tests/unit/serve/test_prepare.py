"""A request's conversation becomes the ids that training had for it, or is refused."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from multiflora.data.encode import encode_example
from multiflora.serve.prepare import RefusedError, _chat
from multiflora.serve.schema import ChatRequest
from multiflora.tasks import Example, Message

NAMED = (
    "{% for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}] {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tokenizer(template):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(["</s>", *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", chat_template=template)


def asked(**turn):
    return ChatRequest(model="m", messages=[{"role": "user", "content": "Is it red?", **turn}])


def test_the_ids_are_those_of_training_with_the_name_of_who_speaks():
    words = tokenizer(NAMED)
    talk = (Message("user", "Is it red?", '{"name": "Ada"}'), Message("assistant", "Yes."))
    ids, loss, _ = encode_example(Example("t", "t-0", "", "Yes.", messages=talk), words, chat_template=True)
    assert _chat(asked(name="Ada"), words) == [ids[: loss.index(True)]]
    assert _chat(asked(), words) != _chat(asked(name="Ada"), words)


@pytest.mark.parametrize(
    ("template", "why"), [("{{ 'a' * 10**12 }}", "MiB of memory"), ("{{ raise_exception('no') }}", "messages: no")]
)
def test_a_template_that_refuses_or_does_harm_is_a_refusal(template, why):
    with pytest.raises(RefusedError, match=f"chat template refuses these .*{why}"):
        _chat(asked(), tokenizer(template))
