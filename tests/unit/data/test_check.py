"""What does not fit the model is found out before the work: ids without an embedding, texts beyond its positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from multiflora.data.check import check_ids, context_length
from multiflora.data.prepare import encode_tasks
from multiflora.errors import ConfigError, DataError
from multiflora.recipe import Recipe
from tests.unit.data.test_encode import make_tokenizer


def recipe(tmp_path: Path, prompts: list[str]) -> Recipe:
    rows = [{"prompt": prompt, "completion": " down"} for prompt in prompts]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "t", "source": {"train": str(tmp_path / "t.jsonl")}, "split_sizes": {}}
    given: dict[str, Any] = {"model": "m", "method": "lora", "tasks": [task], "output": str(tmp_path / "out")}
    return Recipe.model_validate(given)


@pytest.mark.parametrize(
    "config",
    [GPT2Config(n_positions=5, vocab_size=11), LlamaConfig(max_position_embeddings=5, vocab_size=11)],
    ids=["gpt2", "llama"],
)
def test_examples_beyond_the_models_positions_are_left_out(config: Any, tmp_path: Path) -> None:
    asked = recipe(tmp_path, [" up", " up or up or up"])
    examples = encode_tasks(asked, make_tokenizer(), config)
    assert len(examples.store) == 1
    assert examples.notes == (
        "t: 1 of 2 examples are longer than the model's context = 5 tokens (the longest has 7) and are left out.",
    )
    assert len(encode_tasks(asked, make_tokenizer()).store) == 2
    with pytest.raises(DataError, match=r"no example of at most the model's context = 2 tokens"):
        encode_tasks(asked, make_tokenizer(), config, taken=3)


def test_an_id_without_an_embedding_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(max_position_embeddings=50, vocab_size=5)
    with pytest.raises(DataError, match="task t: the tokenizer makes the id 7, but the model has embeddings for 5"):
        encode_tasks(recipe(tmp_path, [" up"]), make_tokenizer(), config)
    check_ids([0, 4], 5, "t")
    check_ids([], 5, "t")


def test_a_learned_prompt_that_fills_the_context_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(n_positions=5, vocab_size=11)
    with pytest.raises(ConfigError, match=r"num_virtual_tokens is 5, but the model reads 5 tokens, those included"):
        encode_tasks(recipe(tmp_path, ["a b"]), make_tokenizer(), config, taken=5)


def test_answers_that_fill_the_context_are_refused_before_training(tmp_path: Path) -> None:
    asked = recipe(tmp_path, [" up"])
    exact = asked.tasks[0].model_copy(update={"score": "exact"})
    asked = asked.model_copy(update={"tasks": (exact,)})
    with pytest.raises(ConfigError, match=r"task t may answer with 256 tokens .* but the model reads 200 tokens"):
        encode_tasks(asked, make_tokenizer(), LlamaConfig(max_position_embeddings=200, vocab_size=11))


def test_a_config_that_says_nothing_of_positions() -> None:
    assert context_length(GPT2Config(n_positions=128)) == 128
    assert context_length(LlamaConfig(max_position_embeddings=0)) is None


def test_what_a_reader_might_not_expect_is_told(tmp_path: Path) -> None:
    notes = encode_tasks(recipe(tmp_path, ["up ", "up"]), make_tokenizer()).notes
    assert notes == (
        "t: 1 of 2 prompts end in a space; it is read as the beginning of the completion, in training, scoring and "
        "serving alike.",
    )
