r"""What gates do: the load of each head, how decided the gate is, and which heads are dead.

A :class:`RoutingCounter` hangs in the object that all layers share (``multiflora.context.find(model).recorder``) and
sees every gate. It adds up on the device, a few numbers for each layer, and waits for the device only when it is
asked for the result; padding is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from multiflora.context import Routing

__all__ = ["DEAD", "LayerRouting", "RoutingCounter"]

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
        return [h for h, share in enumerate(self.shares) if share < DEAD]

    @property
    def shares(self) -> list[float]:
        """Each head's load over an equal one: 1 is a head that carries as much as the mean of all."""
        total = sum(self.load)
        return [load * len(self.load) / total if total else 0.0 for load in self.load]


class RoutingCounter:
    """Adds up gates, layer by layer, on their device; nothing waits for the device until `result`.

    Args:
        routing: The model's shared routing state, which knows the padding.
        num_tasks: How many tasks to keep apart; 0: none.
    """

    def __init__(self, routing: Routing, num_tasks: int = 0) -> None:
        self.routing = routing
        self.num_tasks = num_tasks
        # layer -> a row for each task and a last one for tokens of none: loads, entropy and number of tokens, summed
        self.sums: dict[str, Tensor] = {}

    def __call__(self, layer: str, gate: Tensor, tasks: Tensor | None) -> None:
        """Take a layer's gate, (T, H), and the task of each token, (T,)."""
        shares = gate.to(torch.float32)
        parts = shares / shares.sum(1, keepdim=True).clamp(min=1e-12)
        entropy = -torch.special.xlogy(parts, parts).sum(1, keepdim=True)
        rows = torch.cat((shares, entropy, torch.ones_like(entropy)), 1)
        keep = self.routing.keep(len(gate))
        if keep is not None:
            rows = rows * keep.to(rows.device, rows.dtype).unsqueeze(1)
        if tasks is None or not self.num_tasks:
            sums = torch.zeros(self.num_tasks + 1, rows.shape[1], device=rows.device)
            sums[-1] = rows.sum(0)
        else:
            sums = torch.zeros(self.num_tasks + 1, rows.shape[1], device=rows.device)
            sums.index_add_(0, tasks.to(rows.device), rows)
        self.sums[layer] = self.sums[layer] + sums if layer in self.sums else sums

    def result(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, LayerRouting]:
        """Layer -> its routing over all tokens since the last call; the count starts anew.

        Args:
            reduce: Adds up a tensor over several processes, which have seen the same layers.
        """
        if not self.sums:
            return {}
        device = next(iter(self.sums.values())).device
        # one tensor for all layers, so that the device is waited for once
        flat = torch.cat([sums.reshape(-1).to(device) for sums in self.sums.values()])
        numbers = iter((flat if reduce is None else reduce(flat)).tolist())
        found = {}
        for layer, sums in self.sums.items():
            found[layer] = _of([[next(numbers) for _ in range(sums.shape[1])] for _ in range(sums.shape[0])])
        self.sums = {}
        return found


def _of(rows: list[list[float]]) -> LayerRouting:
    """One layer's routing from its sums: a row for each task and one for tokens of none."""
    loads, entropy, tokens = [row[:-2] for row in rows], sum(row[-2] for row in rows), sum(row[-1] for row in rows)
    heads = len(loads[0])
    each = [[load / max(row[-1], 1) for load in own] for own, row in zip(loads[:-1], rows[:-1], strict=True)]
    return LayerRouting(
        load=[sum(column) / max(tokens, 1) for column in zip(*loads, strict=True)],
        by_task=each if any(row[-1] for row in rows[:-1]) else [],
        entropy=entropy / max(tokens, 1) / math.log(heads) if heads > 1 else 0.0,
    )
