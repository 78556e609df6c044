"""LoRA's relatives through the main job and the shipped comparison, on a tiny real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model_state_dict
from transformers import LlamaForCausalLM

import multiflora
from multiflora.comparison.spec import load_comparison
from multiflora.data.prepare import encode_tasks
from multiflora.training.adapter import add_adapter
from multiflora.training.fit import fit
from tests.integration.toys import make_recipe, make_tokenizer, write_tasks

TinyLlama = Callable[..., LlamaForCausalLM]
CONFIGS = Path(__file__).parents[2] / "configs"
METHODS: list[dict[str, Any]] = [
    {"name": "alignlora", "r": 4},
    {"name": "mixlora", "num_experts": 3, "r": 2},
    {"name": "loraga", "r": 4, "gradient_batches": 2},
    {"name": "deltalora", "r": 4, "start_step": 3},
    {"name": "parts", "r": 2, "stem": "own", "gate": "task"},
]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_both_tasks_are_learned(tiny_llama: TinyLlama, tmp_path: Path, method: dict[str, Any], packing: bool) -> None:
    recipe = make_recipe(tmp_path, method, max_steps=30, packing=packing)
    tokenizer = make_tokenizer()
    model = add_adapter(tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2), recipe)
    start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    _, log = fit(model, tokenizer, recipe, encode_tasks(recipe, tokenizer), quiet=True)
    for task in ("echo", "next"):
        history = [line[f"loss/{task}"] for line in log if f"loss/{task}" in line]
        assert history[-1] < 0.85 * history[0]
    if "A0" in "".join(start):
        # LoRA-GA's start came from the gradient; Delta-LoRA's weight began to move after the third step
        frozen = {name: tensor for name, tensor in get_peft_model_state_dict(model).items() if name.endswith("B0")}
        assert frozen
        assert all(tensor.any() for tensor in frozen.values())
        assert not any(start[name].any() for name in frozen)


@pytest.mark.slow
def test_the_shipped_comparison_runs(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    shipped = load_comparison(CONFIGS / "relatives.yaml")
    plan = {
        "model": str(tmp_path / "model"),
        "tasks": write_tasks(tmp_path / "tasks"),
        "train": {"max_steps": 2, "batch_size": 4, "log_every": 1, "learning_rate": 1e-3},
        "evaluate": {"limit": 2, "batch_size": 2},
        "output": str(tmp_path / "out"),
        "compare": {
            "methods": [
                {"name": entry.name, "label": entry.label, "scale": entry.scale, **entry.settings}
                for entry in shipped.compare.methods
            ],
            "shared": dict(shipped.compare.shared),
            "seeds": 1,
        },
    }
    found = multiflora.compare(plan, quiet=True)
    rows = {row.label: row for row in found.rows}
    assert set(rows) == {entry.label for entry in shipped.compare.methods}
    for row in rows.values():
        assert row.parameters == pytest.approx(rows["lora"].parameters, rel=0.4)
