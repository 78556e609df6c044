"""The recipe's words reach transformers unchanged, and the number types fit the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from multiflora.recipe import Recipe, recipe_from
from multiflora.training.arguments import steps_of, training_arguments
from multiflora.training.precision import has_fast_bf16, weight_dtype


def make_recipe(**train: Any) -> Recipe:
    task = {"name": "sums", "source": {"generator": "basic_arithmetic"}}
    return recipe_from({"model": "m", "method": "lora", "tasks": [task], "output": "out", "train": train, "seed": 5})


@pytest.mark.parametrize(
    ("settings", "processes", "expected"),
    [
        ({"max_steps": 7, "batch_size": 4, "gradient_accumulation": 2}, 1, (7, 56)),
        ({"max_steps": 7, "batch_size": 4}, 3, (7, 84)),
        ({"epochs": 1, "batch_size": 8}, 1, (13, 100)),
        ({"epochs": 2.5, "batch_size": 8, "gradient_accumulation": 4}, 1, (8, 250)),
        ({"epochs": 0.001, "batch_size": 8}, 1, (1, 1)),
    ],
)
def test_steps_and_examples(settings: dict[str, Any], processes: int, expected: tuple[int, int]) -> None:
    assert steps_of(make_recipe(**settings), epoch_size=100, processes=processes) == expected


def test_settings_arrive(tmp_path: Path) -> None:
    recipe = make_recipe(
        batch_size=3,
        gradient_accumulation=2,
        learning_rate=1e-3,
        warmup_ratio=0.1,
        lr_scheduler="linear",
        weight_decay=0.2,
        max_grad_norm=0.5,
        log_every=7,
        save_every=11,
        gradient_checkpointing=True,
    )
    args = training_arguments(recipe, folder=tmp_path, steps=95, weights=torch.float32, casts_itself=True)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_steps) == (3, 2, 95)
    assert (args.learning_rate, args.warmup_steps, args.lr_scheduler_type) == (1e-3, 10, "linear")
    assert (args.weight_decay, args.max_grad_norm, args.logging_steps, args.save_steps) == (0.2, 0.5, 7, 11)
    assert (args.seed, args.report_to, args.bf16, args.fp16) == (5, [], False, False)
    assert args.optim == "adamw_torch_fused"
    assert args.gradient_checkpointing
    assert args.gradient_checkpointing_kwargs["use_reentrant"] is False
    tracked = make_recipe(report_to=["tensorboard"])
    words = {"folder": tmp_path, "steps": 1, "weights": torch.float32, "casts_itself": True}
    assert training_arguments(tracked, **words).report_to == ["tensorboard"]
    assert not training_arguments(make_recipe(), **words).gradient_checkpointing


@pytest.mark.parametrize(
    ("weights", "casts_itself", "bf16", "autocast"),
    [
        (torch.bfloat16, True, "auto", False),
        (torch.bfloat16, False, "auto", True),
        (torch.float32, False, "auto", False),
        (torch.float32, True, True, True),
    ],
)
def test_autocast_runs_only_where_it_helps(
    tmp_path: Path, weights: torch.dtype, casts_itself: bool, bf16: Any, autocast: bool
) -> None:
    recipe = make_recipe(bf16=bf16)
    args = training_arguments(recipe, folder=tmp_path, steps=1, weights=weights, casts_itself=casts_itself)
    assert args.bf16 is autocast
    assert not args.fp16


@pytest.mark.parametrize("casts_itself", [True, False])
def test_float16_weights_are_trained_with_its_loss_scaler(tmp_path: Path, casts_itself: bool) -> None:
    args = training_arguments(make_recipe(), folder=tmp_path, steps=1, weights=torch.float16, casts_itself=casts_itself)
    assert args.fp16
    assert not args.bf16


def test_weights_are_in_the_type_that_was_asked_for() -> None:
    assert weight_dtype("float16", "auto") == torch.float16
    assert weight_dtype("float32", True) == torch.float32
    assert weight_dtype("auto", True) == torch.bfloat16
    assert weight_dtype("auto", False) == torch.float32
    assert weight_dtype("auto", "auto") == (torch.bfloat16 if has_fast_bf16() else torch.float32)
