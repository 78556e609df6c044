"""Rows of what a model keeps of a text: the keys and values of some rows of a batch, for another forward pass."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["base_of", "has_rows", "is_recurrent", "rows_of"]


def base_of(model: Any) -> Any:
    """The model below an adapter, or the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_recurrent(model: Any) -> bool:
    """Whether a model keeps a state of a text, which holds all of it and cannot be added to from beside."""
    return bool(getattr(base_of(model), "_is_stateful", False))


def has_rows(cache: Any) -> bool:
    """Whether a cache holds keys and values and nothing else, so that rows of it can be taken."""
    return isinstance(cache, DynamicCache) and all(
        type(layer) in {DynamicLayer, DynamicSlidingWindowLayer} for layer in cache.layers
    )


def rows_of(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache of these rows; the one they are taken from stays as it is."""
    taken = copy.copy(cache)
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    taken.batch_select_indices(rows)
    return taken
