r"""Methods whose update is a matrix become a plain LoRA exactly: their factors, stacked, are its factors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from multiflora import ops
from multiflora.errors import ExportError
from multiflora.export.plain import Pair
from multiflora.export.saved import Layer, SavedAdapter

__all__ = ["exact_pairs", "prove"]


def exact_pairs(adapter: SavedAdapter, task: int | None) -> Iterator[Pair]:
    """Every layer's update as A' and B', each proven against the sum over the heads.

    Args:
        adapter: Of a method that merges, for this task at least.
        task: Index of the task, for methods gated by task.

    Raises:
        ExportError: The update is no matrix, or a tensor is missing or damaged.
    """
    method = adapter.method
    for layer in adapter.layers():
        gate = method.static_gate(layer.config, layer.parts, task)
        A, B = method.factors(layer.config, layer.parts, gate, layer.scale, task)
        prove(adapter, layer, gate, task, A, B)
        yield Pair(layer.name, A, B)


def prove(adapter: SavedAdapter, layer: Layer, gate: Tensor, task: int | None, A: Tensor, B: Tensor) -> None:
    """Send a few random inputs through the heads one by one, and through B' A'; they must agree.

    Raises:
        ExportError: They do not.
    """
    method, config = adapter.method, layer.config
    wide = {name: part.to(torch.float32) for name, part in layer.parts.items()}
    x = torch.randn(4, A.shape[1], generator=torch.Generator().manual_seed(0))
    heads = method.heads(config)
    hidden = None
    if method.middle is not None:
        hidden = x @ wide["A"].t() @ method.middle.constant(config, wide, task, None).t()
    frozen = method.frozen_term(config, wide) or (None, None)
    looped = ops.loop(
        torch.zeros(len(x), B.shape[0]),
        x,
        wide["A"],
        gate.to(torch.float32).expand(len(x), heads),
        method.gate.fold(config, wide, wide["B"]),
        *frozen,
        num_heads=heads,
        rank=layer.rank,
        scale=layer.scale,
        hidden=hidden,
    )
    stems = x @ A.t()
    off = float((stems @ B.t() - looped).norm())
    # rounding grows with the terms that are summed, not with what is left of them once they cancel
    terms = float((stems.abs() @ torch.linalg.vector_norm(B, dim=0)).norm())
    if not off <= 1e-5 * terms:
        raise ExportError(
            f"{adapter.folder}: the converted update of {layer.name} differs from the adapter's by {off:.1e} (its "
            f"terms are of size {terms:.1e}); nothing was written. Look for NaN in the adapter; else please report it."
        )
