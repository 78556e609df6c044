"""What routers do on examples: a counter of gates, hung into a model for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from multiflora.context import find
from multiflora.methods.head_load import DEAD, LayerRouting, RoutingCounter

__all__ = ["DEAD", "LayerRouting", "RoutingCounter", "recording"]


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
