"""The machine a benchmark runs on: its name, its libraries, and how fast it multiplies and copies."""

from __future__ import annotations

import os
import platform
import shutil
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from multiflora.bench.floor import copy_rate, gemm_rate
from multiflora.bench.results import Machine
from multiflora.ops import native
from multiflora.training.precision import has_fast_bf16

__all__ = ["has_compiler", "machine"]


def machine(device: torch.device) -> Machine:
    """Name and measure the machine, with torch's present number of threads."""
    return Machine(
        kind="cuda" if device.type == "cuda" else "cpu",
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        native_bf16=has_fast_bf16(),
        versions={
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "peft", "transformers", "trl", "multiflora")},
            "branches": "compiled" if device.type == "cpu" and native.state()[0] else "in Python",
        },
        gemm_rate={str(dtype).removeprefix("torch."): gemm_rate(dtype, device) for dtype in _TYPES},
        copy_rate=copy_rate(device),
    )


_TYPES = (torch.float32, torch.bfloat16)


def has_compiler(device: torch.device) -> bool:
    """Whether ``torch.compile`` can make code here: with a C++ compiler for a processor, with triton for a GPU."""
    if device.type == "cuda":
        with suppress(metadata.PackageNotFoundError):
            return bool(metadata.version("triton"))
        return False
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
