"""Where a run's time goes: seconds by operator and shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["profile"]


def profile(run: Callable[[], object], device: torch.device, *, keep: int = 16) -> dict[str, float]:
    """Seconds that each operator itself takes in one run, the largest first, matrix products by their shapes.

    Args:
        run: What is looked at, warm.
        device: Where it computes.
        keep: How many operators.

    Example:
        >>> x = torch.ones(200, 300)
        >>> next(iter(profile(lambda: x @ x.t(), torch.device("cpu"))))
        'aten::mm 200×300 · 300×200'
    """
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities, record_shapes=True) as seen:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    spent: dict[str, float] = {}
    for event in seen.key_averages(group_by_input_shape=True):
        name = _name(event)
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        spent[name] = spent.get(name, 0.0) + seconds
    return dict(sorted(spent.items(), key=lambda item: -item[1])[:keep])


def _name(event: Any) -> str:
    """The operator, for a product with its two factors: what is added to comes before them, where to write after."""
    if "mm" not in event.key:
        return str(event.key)
    first = 1 if "add" in event.key else 0
    factors = ["×".join(map(str, shape)) for shape in event.input_shapes[first : first + 2]]
    return " ".join((event.key, " · ".join(factors))).strip()
