"""Ids trained = ids scored = ids served, for every kind of tokenizer and template.

The tokenizers are small and made here: each shows one thing that real ones do. The texts have every kind of boundary
between prompt and completion: spaces, line ends, a word cut in two, a bracket, characters of several bytes.
"""

from __future__ import annotations

import asyncio
import json
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from multiflora.data.encode import encode_example, encode_text, prompt_ids
from multiflora.errors import DataError
from multiflora.evaluation.model import HarnessModel
from multiflora.serve.limits import Limits
from multiflora.serve.models import Served
from multiflora.serve.prepare import RefusedError, prepare
from multiflora.serve.schema import ChatRequest, CompletionRequest
from multiflora.tasks import Example, Message, as_text

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
CORPUS = [
    "The movie was positive and fine, the answer is (A) or so.\n\nReview: Sentiment: user assistant think 2 + 2"
] * 3
SIZE = 700


def byte_level(*, space: bool = False, words: str | None = None) -> Tokenizer:
    """GPT-2's kind; ``words`` is the pattern of newer ones, which glue one sign to the word behind it."""
    core = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=words is None)
    split = [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
    core.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return core


def byte_fallback() -> Tokenizer:
    """SentencePiece's kind: a space before every text, bytes for characters it does not know."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL))
    vocab = core.get_vocab()
    merges = [tuple(merge) for merge in json.loads(core.to_str())["model"]["merges"]]
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    made = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<pad>", fuse_unk=True))
    made.normalizer = core.normalizer
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(SPECIAL)
    return made


NEW_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORES = {
    "none": lambda: byte_level(),
    "prefix-space": lambda: byte_level(space=True),
    "new-words": lambda: byte_level(words=NEW_WORDS),
    "byte-fallback": byte_fallback,
}
FRAMES = {"": "$A", "-bos": "<s> $A", "-eos": "$A </s>", "-both": "<s> $A </s>"}
TOKENIZERS = [core + frame for core in CORES for frame in FRAMES] + ["none-pad", "none-eos-is-bos"]


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    core = next(core for core in CORES if name.startswith(core))
    kind = name.removeprefix(core)
    inner = CORES[core]()
    inner.post_processor = processors.TemplateProcessing(
        single={"-eos-is-bos": "</s> $A", "-pad": "$A"}.get(kind) or FRAMES[kind],
        special_tokens=[(token, inner.token_to_id(token)) for token in SPECIAL],
    )
    pad = {"pad_token": "<pad>"} if kind == "-pad" else {}
    bos = "</s>" if kind == "-eos-is-bos" else "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token="</s>", **pad)


END = "{% if add_generation_prompt %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATES = {
    "none": None,
    "chatml": CHATML + END + "<|im_start|>assistant\n{% endif %}",
    "with-bos": "<s>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} </s>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    "thinking": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + END + "<|im_start|>assistant\n{% endif %}",
    "strips": "<s>{% for m in messages %}<|{{ m.role }}|>\n\n{{ m.content | trim }}</s>{% endfor %}"
    + END
    + "<|assistant|>\n\n{% endif %}",
    "ends-in-space": "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    + END
    + "[assistant] {% endif %}",
    "no-system": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + CHATML
    + END
    + "<|im_start|>assistant\n{% endif %}",
}
PAIRS = [
    ("Review: fine\nSentiment:", " positive"),
    ("Review: fine\nSentiment: ", "positive"),
    ("Review: fine\nSentiment:   ", "positive"),
    ("Review: fine\nSentiment:\n", "positive"),
    ("Review: fine\nSentiment:\n\n", "positive"),
    ("The movie was a posi", "tive one"),
    ("The answer is (", "A) or so"),
    ("a\tb\t", "the end"),
    ("Question\u00a0: oui ?\u00a0", "oui"),
    ("問題：\u3000", "はい"),
    ("é ✓", "ü"),
    ("<s>Written out", " once"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=SIZE, max_position_embeddings=512, **small)).eval()


def served(model: Any, words: PreTrainedTokenizerFast, request: Any) -> list[int]:
    """The prompt's ids as the server hands them to the model."""
    loop = asyncio.new_event_loop()
    try:
        return prepare(request, None, {"m": Served("m", model)}, words, [], Limits(), loop)[0].prompt
    finally:
        loop.close()


def scored(lm: HarnessModel, prompt: str, completion: str) -> tuple[list[int], list[int], list[int]]:
    """Ids of prompt and completion as the harness scores them, and of a prompt it generates behind."""
    first, rest = lm._encode_pair(prompt, completion)
    ids, mask = lm.tok_batch_encode([prompt, prompt + " and longer"])
    return first, rest, ids[0][mask[0].bool()].tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_plain_texts(model: Any, name: str) -> None:
    words = tokenizer(name)
    lm = HarnessModel(model, words, 2)
    lm.templated = False
    eos, frame = words.eos_token_id, "-bos" in name or "-both" in name or name == "none-eos-is-bos"
    for prompt, completion in PAIRS:
        first, rest = encode_text(prompt, completion, words)
        assert rest[-1] == eos
        assert eos not in (first[1:] + rest)[:-1]  # none between prompt and completion, and one at the end
        if frame:
            assert first[0] == words.bos_token_id
            assert first.count(words.bos_token_id) == 1
        assert scored(lm, prompt, completion) == (first, rest[:-1], first)
        assert served(model, words, CompletionRequest(model="m", prompt=prompt)) == first
        assert prompt_ids(prompt, words) == first
        # the row in training, and nothing is lost or added on the way
        encoded = encode_example(Example("t", "t-0", prompt, completion), words)
        assert encoded.ids == first + rest
        text = words.decode(encoded.ids, skip_special_tokens=False).replace("<s>", "").replace("</s>", "")
        assert text.removeprefix(" ") == (prompt + completion).replace("<s>", "").removeprefix(" ")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_space_at_the_end_of_a_prompt_is_the_completions(name: str) -> None:
    words = tokenizer(name)
    assert encode_text("Sentiment: ", "positive", words) == encode_text("Sentiment:", " positive", words)


TALKS = [
    [("user", "2 + 2?"), ("assistant", "4")],
    [("system", "Be fine."), ("user", "The movie"), ("assistant", "was positive")],
    [("user", "é ✓"), ("assistant", "はい"), ("user", "  and\n"), ("assistant", "fine,\n\nthe answer ")],
]


@pytest.mark.parametrize("kind", [kind for kind in TEMPLATES if kind != "none"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_conversations(model: Any, name: str, kind: str) -> None:
    words = tokenizer(name)
    words.chat_template = TEMPLATES[kind]
    lm = HarnessModel(model, words, 2)
    lm.templated = True
    for talk in TALKS:
        asked = ChatRequest(model="m", messages=[{"role": r, "content": c} for r, c in talk[:-1]])
        example = Example("t", "t-0", "p", talk[-1][1], messages=tuple(Message(r, c) for r, c in talk))
        if kind == "no-system" and talk[0][0] == "system":
            with pytest.raises(DataError, match="no system"):
                encode_example(example, words, chat_template=True)
            with pytest.raises(RefusedError, match="no system"):
                served(model, words, asked)
            continue
        encoded = encode_example(example, words, chat_template=True)
        begin = encoded.loss.index(True)
        first, rest = encoded.ids[:begin], encoded.ids[begin:]
        prompt, completion = as_text(example, words, True)
        assert encode_text(prompt, completion, words, chat_template=True) == (first, rest)
        assert scored(lm, prompt, completion) == (first, rest[:-1], first)
        assert served(model, words, asked) == first
        turns = [{"role": r, "content": c} for r, c in talk]
        # what is trained is what the template writes, up to the end of text that it closes with
        written = str(words.apply_chat_template(turns, tokenize=False))
        assert written.startswith(prompt + completion)
        assert written.removeprefix(prompt + completion).strip() in ("", "</s>")
        # every answer in the same text, each with its own loss
        every = Example("t", "t-0", "p", "c", messages=tuple(Message(r, c, "", r == "assistant") for r, c in talk))
        both = encode_example(every, words, chat_template=True)
        stretches = sum(1 for before, here in pairwise([False, *both.loss]) if here and not before)
        assert stretches == sum(role == "assistant" for role, _ in talk)
        if not (encoded.is_split or both.is_split):
            assert both.ids == encoded.ids
