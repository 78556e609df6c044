"""Number types: what the frozen weights are kept in, and whether autocast runs over the model."""

from __future__ import annotations

from typing import Literal

import torch

__all__ = ["has_fast_bf16", "weight_dtype"]


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
