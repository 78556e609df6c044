"""Activation memory: what a layer keeps for its backward pass, and the peak while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["kept_bytes", "peak_bytes"]


def kept_bytes(forward: Callable[[], Tensor], free: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass: whole storages, each once, without those of ``free``.

    A view keeps all of its storage, so storages are counted and not the tensors saved.

    Args:
        forward: The pass.
        free: Tensors that are there anyway: the layer's input and its weights.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in free}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # holding the storage keeps its address from being used again
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for address, storage in kept.items() if address not in known)
    del result
    return total


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory in use at once during ``run``, above what was in use before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    # a CPU has no such counter; the profiler sees every allocation and release
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak
