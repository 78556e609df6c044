"""Two toy tasks a tiny model can learn within seconds, and their tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from multiflora.data.prepare import encode_tasks
from multiflora.recipe import Recipe, recipe_from
from multiflora.training.adapter import add_adapter
from multiflora.training.fit import fit

DIGITS = [str(i) for i in range(10)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character of the toy tasks."""
    words = ["<pad>", "<eos>", " ", "\n", *"abcdefghijklmnopqrstuvwxyz:", *DIGITS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def write_tasks(folder: Path, examples: int = 48) -> list[dict[str, Any]]:
    """Write both tasks as JSONL: ``echo`` chooses the digit it was shown, ``next`` writes the digits that follow."""
    draw = random.Random(0)
    for split in ("train", "validation", "test"):
        echo, following = [], []
        for i in range(examples if split == "train" else 8):
            digit = draw.randrange(10)
            padding = "".join(draw.choices("abcdef", k=draw.randrange(1, 4)))
            echo.append(
                {
                    "prompt": f"e{padding}{i}{split[0]}:{digit}",
                    "completion": f" {digit}",
                    "choices": [f" {d}" for d in DIGITS],
                    "answer": digit,
                }
            )
            length = draw.randrange(1, 5)
            following.append(
                {
                    "prompt": f"n{padding}{i}{split[0]}:{digit}",
                    "completion": " " + "".join(str((digit + 1 + k) % 10) for k in range(length)),
                }
            )
        for name, rows in (("echo", echo), ("next", following)):
            place = folder / name
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"name": name, "source": str(folder / name)} for name in ("echo", "next")]


def make_recipe(folder: Path, method: Any, *, seed: int = 0, model: str = "toy", **train: Any) -> Recipe:
    """A recipe for both tasks that writes to ``folder/run``."""
    return recipe_from(
        {
            "model": model,
            "method": method,
            "tasks": write_tasks(folder / "tasks"),
            "train": {"learning_rate": 2e-2, "max_steps": 10, "max_length": 40, **train},
            "evaluate": {"limit": 4, "batch_size": 4},
            "seed": seed,
            "output": str(folder / "run"),
        }
    )


def run(tiny_llama: Callable[..., LlamaForCausalLM], recipe: Recipe, **more: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Train a recipe's adapter on a tiny model: the model, and the log."""
    tokenizer = make_tokenizer()
    model = add_adapter(tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=1), recipe)
    _, log = fit(model, tokenizer, recipe, encode_tasks(recipe, tokenizer), quiet=True, **more)
    return model, log


def of_seed(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log's lines that the seed determines."""
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in log if "loss" in line]
