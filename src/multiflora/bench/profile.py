"""Where a run's time goes: seconds by operator."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["profile"]


def profile(run: Callable[[], object], device: torch.device, *, keep: int = 12) -> dict[str, float]:
    """Seconds that each operator itself takes in one run, the largest first.

    Args:
        run: What is looked at, warm.
        device: Where it computes.
        keep: How many operators.
    """
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as seen:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    spent = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        for event in seen.key_averages()
    }
    return dict(sorted(spent.items(), key=lambda item: -item[1])[:keep])
