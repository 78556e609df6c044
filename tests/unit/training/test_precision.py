"""Number types: what the recipe asks for, and what holds where it leaves the choice to the machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from multiflora.recipe import Recipe, recipe_from
from multiflora.training import precision
from multiflora.training.precision import has_fast_bf16, uses_bf16, weight_dtype, weights_of

FAST = torch.bfloat16 if has_fast_bf16() else torch.float32


def make_recipe(method: str, dtype: str = "auto", bf16: Any = "auto") -> Recipe:
    task = {"name": "sums", "source": {"generator": "basic_arithmetic"}}
    words = {"model": {"name": "m", "dtype": dtype}, "method": method, "tasks": [task], "output": "out"}
    return recipe_from(words | {"train": {"bf16": bf16}})


@pytest.mark.parametrize(
    ("method", "dtype", "bf16", "weights"),
    [
        ("lora", "float16", "auto", torch.float16),
        ("lora", "float32", True, torch.float32),
        ("lora", "auto", True, torch.bfloat16),
        ("lora", "auto", False, torch.float32),
        ("lora", "auto", "auto", FAST),
        ("full", "auto", True, torch.float32),  # small steps would be lost
        ("full", "bfloat16", "auto", torch.bfloat16),
        ("losparse", "auto", True, torch.bfloat16),
    ],
)
def test_the_type_of_the_weights(method: str, dtype: str, bf16: Any, weights: torch.dtype) -> None:
    assert weights_of(make_recipe(method, dtype, bf16)) == weights


@pytest.mark.parametrize("fast", [True, False])
def test_whether_float32_weights_are_multiplied_in_bfloat16(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: fast)
    whole = torch.float32
    assert weight_dtype("auto", "auto") == (torch.bfloat16 if fast else whole)
    assert uses_bf16(make_recipe("lora", bf16=True), whole)
    assert not uses_bf16(make_recipe("lora", bf16=True), torch.bfloat16)
    assert not uses_bf16(make_recipe("lora", bf16=False), whole)
    assert not uses_bf16(make_recipe("lora"), whole)
    assert uses_bf16(make_recipe("full"), whole) == fast
    assert not uses_bf16(make_recipe("full", bf16=False), whole)
    assert not uses_bf16(make_recipe("full", dtype="float32"), whole)
