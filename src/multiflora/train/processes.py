"""One process or several, as ``torchrun`` and ``accelerate launch`` start them: how many, which one, on what device."""

from __future__ import annotations

import os

import torch

__all__ = ["is_first_process", "num_processes", "own_device"]


def num_processes() -> int:
    """Return how many processes train side by side."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Tell whether this process is the one that writes files and shows progress."""
    return int(os.environ.get("RANK", "0")) == 0


def own_device() -> torch.device:
    """Return the device this process computes on: its own accelerator where there is one, else the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None  # there is one
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))
