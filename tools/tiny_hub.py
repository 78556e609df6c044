"""Tiny random models under the names peft's tests ask the hub for, in the layout of the hub's cache.

huggingface_hub finds a model by name in its cache, so nothing has to be patched: with these in ``HF_HUB_CACHE`` and
``HF_HUB_OFFLINE=1`` every ``from_pretrained`` works as it is written.

    python tools/tiny_hub.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

REVISION = "0" * 40

# Token 1 is fed by most tests, so it must be no padding token: its embedding would be zero, and an adapter no-op.
SPECIAL = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 4}
WIDE = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = WIDE | {"num_key_value_heads": 4, "intermediate_size": 64, "max_position_embeddings": 128}
BERT = WIDE | {"intermediate_size": 64, "max_position_embeddings": 128} | SPECIAL


def opt(layers: int, hidden: int) -> tf.OPTConfig:
    """An OPT; its tests expect twelve layers in one model and a small one elsewhere."""
    return tf.OPTConfig(
        vocab_size=100,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        **SPECIAL,
    )


GPT = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128} | SPECIAL

MODELS: dict[str, tuple[type[Any], Callable[[], Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (tf.OPTForCausalLM, lambda: opt(2, 32)),
    "peft-internal-testing/opt-125m": (tf.OPTForCausalLM, lambda: opt(12, 128)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (tf.GPT2LMHeadModel, lambda: tf.GPT2Config(**GPT)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        tf.GPTJForCausalLM,
        lambda: tf.GPTJConfig(**GPT, rotary_dim=4),
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (
        tf.LlamaForCausalLM,
        lambda: tf.LlamaConfig(**GATED, **SPECIAL),
    ),
    "peft-internal-testing/tiny-dummy-qwen2": (tf.Qwen2ForCausalLM, lambda: tf.Qwen2Config(**GATED, **SPECIAL)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        tf.Gemma3ForCausalLM,
        lambda: tf.Gemma3TextConfig(**GATED, **SPECIAL, head_dim=8),
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        tf.T5ForConditionalGeneration,
        lambda: tf.T5Config(
            vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, **SPECIAL
        ),
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        tf.BartForConditionalGeneration,
        lambda: tf.BartConfig(
            vocab_size=100,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=128,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            **SPECIAL,
        ),
    ),
    "peft-internal-testing/tiny-random-BertModel": (tf.BertModel, lambda: tf.BertConfig(**BERT)),
    "peft-internal-testing/tiny-random-RobertaModel": (tf.RobertaModel, lambda: tf.RobertaConfig(**BERT)),
    "peft-internal-testing/tiny-random-DebertaModel": (
        tf.DebertaModel,
        lambda: tf.DebertaConfig(**BERT, pos_att_type=["c2p", "p2c"], relative_attention=True, type_vocab_size=0),
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        tf.DebertaV2Model,
        lambda: tf.DebertaV2Config(**BERT, type_vocab_size=0),
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        tf.BertForSequenceClassification,
        lambda: tf.BertConfig(**BERT),
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        tf.RobertaForSequenceClassification,
        lambda: tf.RobertaConfig(**BERT),
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        tf.LlamaForSequenceClassification,
        lambda: tf.LlamaConfig(**GATED, **SPECIAL),
    ),
}

# the only adapter asked for: a config that any method's class must be able to read
ADAPTER = "peft-internal-testing/tiny-opt-lora-revision"


def snapshot(hub: Path, name: str, *branches: str) -> Path:
    """The folder of a model's files; every branch named points to it."""
    repository = hub / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    for branch in ("main", *branches):
        (repository / "refs" / branch).write_text(REVISION)
    folder = repository / "snapshots" / REVISION
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Fifty-odd characters, one token each."""
    characters = ["<pad>", "<unk>", "<cls>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,'"]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(characters)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
    )


def main(hub: Path) -> None:
    """Write all models, then the mark that says so."""
    for name, (model_class, config) in MODELS.items():
        torch.manual_seed(0)
        folder = snapshot(hub, name)
        model_class(config()).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    words = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (snapshot(hub, ADAPTER, "test") / "adapter_config.json").write_text(json.dumps(words))
    (hub / "made").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
