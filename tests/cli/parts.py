"""What the tests of the command line speak of: the command, how it ended, and data small enough to train on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COMMAND = Path(sys.executable).parent / "multiflora"


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


def write_task(folder: Path, name: str, *, rows: int = 24, long: int = 0) -> Path:
    """Write a task of two choices as JSONL, with some rows far longer than any context of the tests."""
    lines = []
    for i in range(rows):
        label = i % 2
        words = f"{name} {i} is the flower red" + " very" * (400 if i < long else 0)
        row = {"prompt": f"{words}?", "choices": [" no", " yes"], "answer": label, "completion": [" no", " yes"][label]}
        lines.append(json.dumps(row))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


SENTENCES = ["the flower is red", "the flower is blue", "the stem is green", "the leaf is green", "the root is brown"]


def save_model(folder: Path) -> Path:
    """Save a Llama of two layers, random but always the same, with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokens.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    set_seed(0)
    shape = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder
