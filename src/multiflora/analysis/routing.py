r"""What routers do: the load of each head, how decided the gate is, and which heads are dead.

A recorder hangs in the one object that all layers share (``multiflora.context.find(model).recorder``) and sees every
gate; padding is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multiflora.context import Routing, find

__all__ = ["DEAD", "LayerRouting", "RoutingCounter", "recording"]

DEAD = 0.1
"""A head is dead when its mean load is below this share of an equal one: with four heads, below 0.025."""


@dataclass(frozen=True)
class LayerRouting:
    """One layer's routing over all tokens seen."""

    load: list[float]
    """Mean gate of each head; a softmax gate's sum to 1."""
    by_task: list[list[float]]
    """The same for the tokens of each task, (tasks, H); empty where no task was known."""
    entropy: float
    """Mean over tokens of the gate's entropy, over log H: 1 is undecided, 0 is one head alone."""

    @property
    def dead(self) -> list[int]:
        """Heads that hardly any token uses."""
        total = sum(self.load)
        return [h for h, load in enumerate(self.load) if load < DEAD * total / len(self.load)]


class RoutingCounter:
    """Adds up gates, layer by layer, on their device; nothing waits for the device until `result`.

    Args:
        routing: The model's shared routing state, which knows the padding.
        num_tasks: How many tasks there are.
    """

    def __init__(self, routing: Routing, num_tasks: int) -> None:
        self.routing = routing
        self.num_tasks = num_tasks
        self._sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, layer: str, gate: Tensor, tasks: Tensor | None) -> None:
        """Take a layer's gate, (T, H), and the task of each token, (T,)."""
        keep = self.routing.keep(gate.shape[0])
        weight = torch.ones(gate.shape[0], device=gate.device) if keep is None else keep.to(gate.device, torch.float32)
        shares = gate.to(torch.float32)
        total = shares.sum(1, keepdim=True).clamp(min=1e-12)
        entropy = -torch.special.xlogy(shares / total, shares / total).sum(1)
        # one row for each task, and a last one for tokens of none
        index = torch.full_like(weight, self.num_tasks, dtype=torch.long) if tasks is None else tasks.to(gate.device)
        load = torch.zeros(self.num_tasks + 1, gate.shape[1], device=gate.device)
        load.index_add_(0, index, shares * weight.unsqueeze(1))
        count = torch.zeros(self.num_tasks + 1, device=gate.device).index_add_(0, index, weight)
        entropy_sum = (entropy * weight).sum()
        if layer in self._sums:
            before = self._sums[layer]
            self._sums[layer] = (before[0] + load, before[1] + count, before[2] + entropy_sum)
        else:
            self._sums[layer] = (load, count, entropy_sum)

    def result(self) -> dict[str, LayerRouting]:
        """Layer -> its routing over all tokens since the last call; the count starts anew."""
        found = {}
        for layer, (load, count, entropy) in self._sums.items():
            tokens = count.sum().clamp(min=1)
            by_task = load[:-1] / count[:-1].clamp(min=1).unsqueeze(1) if count[:-1].any() else load[:0]
            heads = load.shape[1]
            found[layer] = LayerRouting(
                load=(load.sum(0) / tokens).tolist(),
                by_task=by_task.tolist(),
                entropy=float(entropy / tokens) / math.log(heads) if heads > 1 else 0.0,
            )
        self._sums = {}
        return found


@contextmanager
def recording(model: nn.Module, num_tasks: int) -> Iterator[RoutingCounter | None]:
    """Count the gates of every forward pass inside; None for a model that has no gates of ours.

    Args:
        model: Any model.
        num_tasks: How many tasks there are.
    """
    routing: Any = find(model)
    if routing is None:
        yield None
        return
    counter = RoutingCounter(routing, num_tasks)
    before, routing.recorder = routing.recorder, counter
    try:
        yield counter
    finally:
        routing.recorder = before
