"""Number types: what the frozen weights are kept in, and whether autocast runs over the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from multiflora.methods import METHODS

if TYPE_CHECKING:
    from multiflora.recipe import Recipe

__all__ = ["has_fast_bf16", "uses_bf16", "weight_dtype", "weights_of"]


def has_fast_bf16() -> bool:
    """Tell whether the machine multiplies in bfloat16 faster than in float32.

    A CPU needs AMX or AVX512-BF16 for that. Without them torch emulates it: on an AVX512 Xeon without either,
    a product took 4.5 times as long in bfloat16 as in float32. A GPU must do it natively, too.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def weight_dtype(dtype: Literal["auto", "float32", "bfloat16", "float16"], bf16: bool | Literal["auto"]) -> torch.dtype:
    """Choose the type of the frozen weights.

    Half the bytes and the fastest arithmetic of the machine: the weights are never updated, so bfloat16 costs
    them nothing. The adapter's weights are float32 in any case, as small updates would be lost in bfloat16.

    Args:
        dtype: What the recipe asks for in ``model.dtype``.
        bf16: What it asks for in ``train.bf16``.
    """
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    wanted = has_fast_bf16() if bf16 == "auto" else bf16
    return torch.bfloat16 if wanted else torch.float32


def weights_of(recipe: Recipe) -> torch.dtype:
    """Choose the type of a recipe's base weights: float32 where they are trained and the recipe leaves it open.

    An AdamW step moves a weight by about the learning rate; bfloat16 has eight bits, so next to a weight of 0.1 all
    steps below 0.0002 would be lost.

    Args:
        recipe: Its ``model``, ``method`` and ``train.bf16`` are read.
    """
    if METHODS[recipe.method.name].trains == "weights" and recipe.model.dtype == "auto":
        return torch.float32
    return weight_dtype(recipe.model.dtype, recipe.train.bf16)


def uses_bf16(recipe: Recipe, weights: torch.dtype) -> bool:
    """Tell whether float32 weights are multiplied in bfloat16: where asked for, or where the weights are trained."""
    if weights != torch.float32:
        return False
    trained = METHODS[recipe.method.name].trains == "weights" and recipe.model.dtype == "auto"
    return recipe.train.bf16 is True or (recipe.train.bf16 == "auto" and trained and has_fast_bf16())
