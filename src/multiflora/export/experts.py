r"""An adapter gated by task alone as its experts: a plain LoRA each, and how much of each a task takes.

.. math:: \Delta W_t = \sum_e \omega_e(t) \cdot s B_e A_e

A server scales an adapter as a whole, by one number for all layers. So this is exact where all layers have one gate in
common, and nothing stands between A and B that is another for each task: MOELoRA as published. However many tasks there
are, the experts together are no larger than the adapter; one LoRA for each task is as large for every single task.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multiflora.errors import ExportError
from multiflora.export.exact import prove
from multiflora.export.plain import Pair
from multiflora.export.saved import Layer, SavedAdapter, method_of

__all__ = ["check_experts", "expert_pairs", "scaled", "task_scales"]


def check_experts(source: Path, config: Any) -> None:
    """Refuse an adapter that is no sum of experts with one scale each.

    Raises:
        ExportError: Says why, and what to do instead.
    """
    method = method_of(config)
    if method is None or method.merges() == "exactly":
        name = "LoRA" if method is None else method.name
        raise ExportError(
            f"{source} is a {name} adapter, which is the same sum for every task: it becomes one adapter, whose scale "
            "is 1. Leave per_expert out."
        )
    if method.merges() == "no":
        raise ExportError(
            f"{source} is a {method.name} adapter, which weighs its heads for each token anew, and a server scales an "
            "adapter by one number for a whole request. Leave per_expert out and give calibration examples, or serve "
            "the adapter as it is: multiflora serve."
        )
    why = [
        *(() if set(method.gate.names) <= set(method.shared(config)) else ("weighs its heads in each layer anew",)),
        *(("has a matrix for each task between A and B",) if method.middle is not None else ()),
    ]
    if why:
        raise ExportError(
            f"{source} is a {method.name} adapter, which {' and '.join(why)}; a server scales an adapter by one number "
            "for all layers. Leave per_expert out: one adapter for each task is exact, and a server can have them all "
            "at once."
        )


def experts_of(adapter: SavedAdapter, layer: Layer) -> list[Pair]:
    """A layer's experts, each as it adds to the layer's output at weight 1."""
    method, config = adapter.method, adapter.config
    A, B = method.factors(config, layer.parts, torch.ones(method.heads(config)), layer.scale)
    apart = zip(torch.split(A, layer.rank), torch.split(B, layer.rank, dim=1), strict=True)
    return [Pair(layer.name, a, b) for a, b in apart]


def expert_pairs(adapter: SavedAdapter, expert: int) -> Iterator[Pair]:
    """Every layer's update by one expert."""
    return (experts_of(adapter, layer)[expert] for layer in adapter.layers())


def scaled(adapters: Sequence[Sequence[Pair]], scales: Sequence[float]) -> list[Pair]:
    """The pairs of several adapters, each adapter scaled as a whole."""
    return [
        Pair(pair.name, pair.A, pair.B * scale) for pairs, scale in zip(adapters, scales, strict=True) for pair in pairs
    ]


def task_scales(adapter: SavedAdapter) -> Tensor:
    """How much of each expert each task takes, (tasks, experts); with them every layer is proven, task by task.

    Raises:
        ExportError: A layer is not the scaled sum of its experts.
    """
    config, scales = adapter.config, None
    for layer in adapter.layers():
        gates = [adapter.method.static_gate(config, layer.parts, task) for task in range(config.num_tasks)]
        scales = torch.stack(gates) if scales is None else scales
        experts = experts_of(adapter, layer)
        A = torch.cat([expert.A for expert in experts])
        for task, gate in enumerate(gates):
            weighed = scaled([[expert] for expert in experts], scales[task].tolist())
            prove(adapter, layer, gate, task, A, torch.cat([expert.B for expert in weighed], 1))
    assert scales is not None  # an adapter without a layer is refused when it is opened
    return scales
