"""The smallest real run: a Llama of two layers with random weights, two made-up tasks, and a recipe for both."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_toy(folder: Path, *, hidden_size: int = 32, rows: int = 64, **train: Any) -> Path:
    """Write model, tasks and recipe into ``folder``, and return the recipe's path.

    Args:
        folder: A new folder.
        hidden_size: Width of the model.
        rows: Training examples of each task.
        train: The recipe's section ``train``.
    """
    _model(folder / "model", hidden_size)
    draw = random.Random(0)
    tasks = []
    for name, turn in (("copy", 1), ("reverse", -1)):
        place = folder / name
        place.mkdir(parents=True)
        for split, count in (("train", rows), ("validation", 2), ("test", 2)):
            words = ["".join(draw.choices(LETTERS, k=draw.randrange(2, 8))) for _ in range(count)]
            lines = [{"prompt": f"{name} {word}:", "completion": f" {word[::turn]}"} for word in words]
            (place / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tasks.append({"name": name, "source": str(place)})
    recipe = {
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        # dropout on both sides, so that a resumed run must draw the same masks
        "method": {"name": "rlora", "r": 2, "num_heads": 2, "lora_dropout": 0.1, "head_dropout": 0.1},
        "tasks": tasks,
        "train": {"max_length": 40, "batch_size": 4, "learning_rate": 1e-2, "bf16": False, **train},
        "evaluate": {"before": False, "limit": 1, "max_new_tokens": 4},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    return path


def _model(folder: Path, hidden_size: int) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", " ", ":", *LETTERS]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
