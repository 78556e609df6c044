"""Encoding puts the loss on the completion and its EOS, tells tasks apart and never cuts an example."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from multiflora.data.encode import encode, encode_text
from multiflora.errors import ConfigError, DataError

WORDS = ["<bos>", "<eos>", "▁", "▁up", "▁or", "down", "up", "▁down", "▁▁down", "\n", "\n\n"]
TEMPLATE = (
    "{% for m in messages %}{{ '<bos> up ' + m.content if m.role == 'user' else ' or\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %} or\n{% endif %}"
)


def make_tokenizer(*, bos: bool = False, closes: bool = False, sentencepiece: bool = False) -> PreTrainedTokenizerFast:
    """A word tokenizer; in the manner of SentencePiece it puts a space before every text."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="▁"))
    prepend = [normalizers.Prepend("▁")] if sentencepiece else []
    core.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split(Regex("\n+"), "isolated")]
    )
    core.decoder = decoders.Replace("▁", " ")
    text = ["<bos>"] * bos + ["$A"] + ["<eos>"] * closes
    core.post_processor = processors.TemplateProcessing(
        single=" ".join(text), special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")


def rows(*pairs: tuple[str, str], **columns: Any) -> Dataset:
    prompts, completions = zip(*pairs, strict=True)
    return Dataset.from_dict({"prompt": list(prompts), "completion": list(completions), **columns})


def words(ids: list[int]) -> list[str]:
    return [WORDS[i] for i in ids]


def test_the_loss_is_on_the_completion_and_the_eos() -> None:
    encoded = encode(rows((" up or", " down")), make_tokenizer(bos=True), task="t", task_id=3, max_length=9)
    row = encoded.dataset[0]
    assert words(row["input_ids"]) == ["<bos>", "▁up", "▁or", "▁down", "<eos>"]
    assert row["labels"] == [-100, -100, -100, *row["input_ids"][3:]]
    assert (row["task_id"], row["length"]) == (3, 5)
    assert encoded.note() is None


def test_no_space_is_added_before_the_completion() -> None:
    tokenizer = make_tokenizer(sentencepiece=True)
    assert words(tokenizer(" down").input_ids) == ["▁", "▁down"]  # what tokenising apart would give
    prompt, completion = encode_text("up or", " down", tokenizer)
    assert (words(prompt), words(completion)) == (["▁up", "▁or"], ["▁down", "<eos>"])


def test_a_boundary_that_would_change_is_kept() -> None:
    tokenizer = make_tokenizer()
    assert words(tokenizer("\n\n").input_ids) == ["\n\n"]
    prompt, completion = encode_text("\n", "\n", tokenizer)
    assert (words(prompt), words(completion)) == (["\n"], ["\n", "<eos>"])


def test_a_tokenizer_that_closes_texts_closes_the_whole_once() -> None:
    prompt, completion = encode_text(" up", " down", make_tokenizer(closes=True))
    assert (words(prompt), words(completion)) == (["▁up"], ["▁down", "<eos>"])


def test_an_empty_prompt_leaves_the_first_token_without_loss() -> None:
    row = encode(rows(("", " down or")), make_tokenizer(), task="t", task_id=0, max_length=9).dataset[0]
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_long_examples_are_left_out_whole_and_counted() -> None:
    pairs = [(" up", " down"), (" up or up or", " down"), (" or", " up")]
    encoded = encode(rows(*pairs), make_tokenizer(), task="ab", task_id=0, max_length=3)
    assert [words(ids) for ids in encoded.dataset["input_ids"]] == [["▁up", "▁down", "<eos>"], ["▁or", "▁up", "<eos>"]]
    assert (encoded.num_too_long, encoded.longest) == (1, 6)
    assert encoded.note() == (
        "ab: 1 of 3 examples are longer than train.max_length = 3 tokens (the longest has 6) and are left out."
    )


def test_a_task_of_which_nothing_fits_is_refused() -> None:
    with pytest.raises(DataError, match=r"'ab' has no example of at most train.max_length = 2 tokens.*shortest has 3"):
        encode(rows((" up", " down")), make_tokenizer(), task="ab", task_id=0, max_length=2)


def test_an_empty_task_is_refused() -> None:
    empty = rows((" up", " down")).select([])
    with pytest.raises(DataError, match=r"'ab' has no training examples"):
        encode(empty, make_tokenizer(), task="ab", task_id=0, max_length=9)


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"no EOS token"):
        encode_text(" up", " down", tokenizer)


def test_the_chat_template_writes_its_own_special_tokens() -> None:
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = TEMPLATE
    row = encode(rows(("down", " up")), tokenizer, task="t", task_id=0, max_length=9, chat_template=True).dataset[0]
    assert words(row["input_ids"]) == ["<bos>", "▁up", "▁down", "▁or", "\n", "up", "<eos>"]
    assert words([i for i in row["labels"] if i != -100]) == ["up", "<eos>"]


def test_a_missing_chat_template_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"model.chat_template is true, but the tokenizer"):
        encode(rows((" up", " down")), make_tokenizer(), task="t", task_id=0, max_length=9, chat_template=True)
