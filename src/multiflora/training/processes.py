"""One process or several, as ``torchrun`` and ``accelerate launch`` start them: how many, which one, on what device."""

from __future__ import annotations

import os

import torch

__all__ = [
    "is_first_process",
    "is_sharded",
    "num_processes",
    "own_device",
    "own_seed",
    "uses_deepspeed",
    "uses_zero3",
]


def num_processes() -> int:
    """Return how many processes train side by side."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Tell whether this process is the one that writes files and shows progress."""
    return int(os.environ.get("RANK", "0")) == 0


def is_sharded() -> bool:
    """Tell whether parameters are to be spread over the processes (FSDP, ZeRO-3), by what ``accelerate launch`` set."""
    return num_processes() > 1 and (_is_set("ACCELERATE_USE_FSDP") or uses_zero3())


def uses_deepspeed() -> bool:
    """Tell whether DeepSpeed drives the training, by what ``accelerate launch`` set."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def uses_zero3() -> bool:
    """Tell whether DeepSpeed is to spread the parameters, as ``accelerate launch`` or DeepSpeed's own file says."""
    if not uses_deepspeed():
        return False
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    return bool(HfDeepSpeedConfig(file).is_zero3())


def _is_set(switch: str) -> bool:
    return os.environ.get(switch, "false").lower() == "true"


def own_seed(seed: int) -> int:
    """Return the seed of this process's dropout: the run's own in the first, far from any run's in the others.

    With one seed for all, every process would drop the same units, and a step would see one mask instead of many.
    """
    return seed + int(os.environ.get("RANK", "0")) * 2**32


def own_device() -> torch.device:
    """Return the device this process computes on: its own accelerator where there is one, else the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None  # there is one
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))
