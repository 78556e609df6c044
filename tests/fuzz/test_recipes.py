"""Malformed recipes and task files, as YAML text: refused in words, whatever they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from multiflora.methods import build_config
from multiflora.recipe import load_recipe
from multiflora.tasks import load_task
from multiflora.tasks.load import examples_of
from multiflora.yaml_file import dump_yaml

from .conftest import World, fuzz
from .junk import changed, odd, spoiled

RECIPES, TASKS = 800, 700

TASK: dict[str, Any] = {
    "name": "flowers",
    "source": {"train": ["rows.jsonl"], "test": ["rows.jsonl"]},
    "keep": "answer >= 0",
    "prompt": "Is {{ prompt | trim }} a flower?\nAnswer:",
    "choices": [" no", " yes"],
    "answer": "answer",
    "score": "choices",
    "weight": 2.0,
    "split_sizes": {"validation": 0.1},
    "stop": ["\n"],
    "max_new_tokens": 8,
}
RECIPE: dict[str, Any] = {
    "model": {"name": "nobody/nothing", "dtype": "float32", "chat_template": False},
    "method": {"name": "rlora", "r": 4, "num_heads": 3, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}},
    "tasks": [TASK, "boolq", {"name": "gsm8k", "weight": 2}],
    "mixture": {"strategy": "temperature", "temperature": 2.0, "resample": True},
    "train": {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-4, "bf16": "auto", "report_to": ["tensorboard"]},
    "evaluate": {"limit": 2, "extra_tasks": ["rte"], "harness_tasks": []},
    "seed": 3,
    "output": "out",
}
CHAT = {
    "name": "talk",
    "source": {"train": "rows.jsonl"},
    "messages": [{"role": "user", "content": "{{ prompt }}"}, {"role": "assistant", "content": "{{ completion }}"}],
}
SUMS = {
    "name": "sums",
    "source": {"generator": "chain_sum", "seed": 1, "sizes": {"train": 4}, "settings": {"max_terms": 3}},
}


def as_text(good: list[Any]) -> st.SearchStrategy[bytes]:
    """YAML: good values that were changed, or good text that was spoiled, or no mapping at all."""
    texts = [dump_yaml(value).encode() for value in good]
    values = st.one_of(changed(good), changed(good), odd)
    # JSON is YAML, and can spell what YAML's own writer refuses
    return st.one_of(
        values.map(lambda value: json.dumps(value).encode()),
        values.map(lambda value: json.dumps(value).encode()),
        st.sampled_from(texts).flatmap(spoiled),
    )


def rows(world: World) -> None:
    lines = [{"prompt": f"a rose {i}", "completion": " yes", "answer": i % 2} for i in range(8)]
    (world.work / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def test_malformed_recipes(world: World) -> None:
    def read() -> None:
        recipe = load_recipe("fuzzed.yaml")
        build_config(recipe.method.name, recipe.method.settings)
        recipe.to_yaml()

    rows(world)
    fuzz(world, as_text([RECIPE]), RECIPES, Path("fuzzed.yaml").write_bytes, read)


def test_malformed_task_files(world: World) -> None:
    def read() -> None:
        examples_of(load_task("./fuzzed.yaml"), "train")

    rows(world)
    fuzz(world, as_text([TASK, TASK, CHAT, SUMS]), TASKS, Path("fuzzed.yaml").write_bytes, read)
