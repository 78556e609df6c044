"""The routers' health while they train: a few figures for every log line, and an alarm when a head dies."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from multiflora.context import Routing
from multiflora.methods.head_load import DEAD, LayerRouting, RoutingCounter

__all__ = ["RoutingWatch", "figures_of"]

log = logging.getLogger(__name__)

_STATE = "routing/"


class RoutingWatch:
    """Counts the gates of a training, window by window.

    It listens during the forward pass only. Gradient checkpointing computes a layer again in the backward pass; what it
    sees there it has seen already, and would count twice.

    Args:
        routing: The model's shared routing state.
    """

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self._counter = RoutingCounter(routing)
        self._dead: set[tuple[str, int]] = set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Count the gates of the forward pass inside."""
        before, self.routing.recorder = self.routing.recorder, self._counter
        try:
            yield
        finally:
            self.routing.recorder = before

    def state(self) -> dict[str, Tensor]:
        """What the window has gathered, for a checkpoint: a tensor for each layer."""
        return {_STATE + layer: sums for layer, sums in self._counter.sums.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave; other tensors are passed over."""
        self._counter.sums = {key[len(_STATE) :]: sums for key, sums in state.items() if key.startswith(_STATE)}

    def close(self, reduce: Callable[[Tensor], Tensor], *, warn: bool = True) -> dict[str, float]:
        """Return the window's figures (none for a method without gates), warn of heads that died, and begin anew.

        Args:
            reduce: Adds up a tensor over all processes.
            warn: Whether this process is the one that speaks.
        """
        layers = self._counter.result(reduce)
        if not layers:
            return {}
        dead = {(name, head) for name, layer in layers.items() for head in layer.dead}
        if warn and dead - self._dead:
            log.warning("%s", alarm(dead - self._dead, layers))
        self._dead = dead  # one that comes back and dies again is told of again
        return figures_of(layers)


def figures_of(layers: Mapping[str, LayerRouting]) -> dict[str, float]:
    """Sum up all layers' routing in four figures.

    Args:
        layers: Layer -> its routing.
    Returns:
        ``routing/entropy``, the mean over layers, 1 for an undecided gate and 0 for one head alone;
        ``routing/least_load`` and ``routing/most_load``, the loads of the least and the most used head of all layers
        over an equal one; ``routing/dead_heads``, how many are dead.
    Example:
        >>> figures_of({"up": LayerRouting(load=[0.75, 0.25], by_task=[], entropy=0.8)})["routing/least_load"]
        0.5
    """
    shares = [share for layer in layers.values() for share in layer.shares]
    return {
        # exact whatever the order of the layers, which a checkpoint does not keep
        "routing/entropy": math.fsum(layer.entropy for layer in layers.values()) / len(layers),
        "routing/least_load": min(shares),
        "routing/most_load": max(shares),
        "routing/dead_heads": float(sum(len(layer.dead) for layer in layers.values())),
    }


def alarm(died: set[tuple[str, int]], layers: Mapping[str, LayerRouting]) -> str:
    """Say which heads died, the least used one by name, and what helps."""
    name, head = min(died, key=lambda which: (layers[which[0]].shares[which[1]], which))
    others = f" and {len(died) - 1} more" if len(died) > 1 else ""
    total = sum(len(layer.load) for layer in layers.values())
    return (
        f"Head {head} of {name}{others} (of {total} heads) died: its load in this window was "
        f"{layers[name].shares[head]:.2f} of an equal one, and below {DEAD} hardly any token trains it. A lower "
        "learning rate, fewer heads or, where the method has them, router_z_loss and balance_weight help."
    )
