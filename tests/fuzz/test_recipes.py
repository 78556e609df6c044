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
from .junk import changed, expressions, odd, spoiled, templates

RECIPES, TASKS, TEMPLATES = 800, 700, 100

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


# what takes for ever where time goes by the square of a size
LARGE = [
    {**RECIPE, **{f"key{i}": i for i in range(30_000)}},
    {**RECIPE, "method": {"name": "rlora", **{f"key{i}": i for i in range(30_000)}}},
    {**RECIPE, "tasks": ["boolq"] * 5_000},
    {**RECIPE, "tasks": [f"task{i}" for i in range(5_000)]},
    {**TASK, **{f"key{i}": i for i in range(30_000)}},
]
TWICE = [
    "model: a\n" * 30_000,
    "".join(f"key{i}: 1\n" for i in range(30_000)) * 2,
    "tasks:\n" + "- {name: boolq, weight: 1, weight: 2}\n" * 5_000,
    "a: " + "[" * 20_000,
    "a: &a [x]\n" + "".join(f"k{i}: *a\n" for i in range(20_000)),
    "model: " + "x" * 3_900_000,
]


def as_text(good: list[Any]) -> st.SearchStrategy[bytes]:
    """YAML: good values that were changed, or good text that was spoiled, or no mapping at all."""
    texts = [dump_yaml(value).encode() for value in good]
    values = st.one_of(changed(good), changed(good), odd)
    # JSON is YAML, and can spell what YAML's own writer refuses
    return st.one_of(
        values.map(lambda value: json.dumps(value).encode()),
        values.map(lambda value: json.dumps(value).encode()),
        st.integers(0, 9).flatmap(
            # those as they are: hypothesis keeps what it makes
            lambda n: st.sampled_from(texts).flatmap(spoiled) if n else st.sampled_from(LARGE_TEXTS)
        ),
    )


LARGE_TEXTS = [json.dumps(value).encode() for value in LARGE] + [text.encode() for text in TWICE]


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


def test_templates(world: World) -> None:
    """Templates made of whatever multiplies, in every place of a task that takes one."""
    places = st.sampled_from(["prompt", "completion", "choices", "keep", "answer", "id", "group"])

    def written(place: str) -> st.SearchStrategy[dict[str, Any]]:
        made = expressions if place in ("keep", "answer", "id", "group") else templates
        plain = {key: value for key, value in TASK.items() if key not in ("keep", "answer", "choices", "score")}
        good = TASK if place in ("choices", "answer", "keep") else plain
        return made.map(lambda text: {**good, place: [text, "b"] if place == "choices" else text})

    rows(world)
    fuzz(
        world,
        places.flatmap(written).map(lambda task: json.dumps(task).encode()),
        TEMPLATES,
        Path("fuzzed.yaml").write_bytes,
        lambda: examples_of(load_task("./fuzzed.yaml"), "train") and None,
        tries=2.5,
    )
