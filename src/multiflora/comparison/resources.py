"""What a cell took: the memory at its highest, and the time that an adapter adds to a forward pass."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

__all__ = ["latency", "peak_memory", "reset_peak_memory"]

# Linux: writing 5 here sets the process's high-water mark back to what it holds now
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak_memory() -> bool:
    """Begin to watch the memory; says whether the machine can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    with suppress(OSError):
        _CLEAR.write_text("5")
        return True
    return False


def peak_memory() -> int | None:
    """The most bytes in use since `reset_peak_memory`: of the GPU where there is one, else of the process.

    None where the system does not tell.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def latency(model: Any, *, length: int = 128, rounds: int = 7) -> dict[str, float]:
    """Time a forward pass of one row, with the adapter and without it, side by side.

    Args:
        model: A peft model; in any other model there is nothing to switch off, and both times are its own.
        length: Tokens in the row.
        rounds: Pairs of passes; medians are taken, so that one disturbed pass does no harm.

    Returns:
        ``with`` and ``without`` in milliseconds, and ``extra``, the share that the adapter adds.
    """
    from multiflora.context import configs_of, task

    config = model.config.get_text_config()
    ids = torch.arange(length).remainder(config.vocab_size).unsqueeze(0).to(next(model.parameters()).device)
    names = next((c.task_names for c in configs_of(model).values() if c.task_names), None)
    samples: dict[str, list[float]] = {"with": [], "without": []}
    model.eval()
    with torch.no_grad(), task(model, names[0]) if names else nullcontext():
        for _ in range(rounds + 1):
            for key in samples:
                plain = key == "without" and hasattr(model, "disable_adapter")
                with model.disable_adapter() if plain else nullcontext():
                    samples[key].append(_timed(model, ids))
    # the first pass of each pays for caches and kernels that later ones find ready
    medians = {key: 1000 * statistics.median(values[1:]) for key, values in samples.items()}
    return {**medians, "extra": medians["with"] / medians["without"] - 1}


def _timed(model: Any, ids: torch.Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
