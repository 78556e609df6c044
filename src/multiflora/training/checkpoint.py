"""Checkpoints that are whole or not there: sealed last with the size and digest of every file, and checked by them.

A killed process, a full disk or a machine that loses power leave a folder that lacks its seal, or one whose files do
not match it. Either is passed over, and the checkpoint before it is taken: that one is removed only after its successor
has its seal.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from multiflora.errors import EnvironmentProblem
from multiflora.files import write_json

__all__ = [
    "CHECKPOINTS",
    "DATA",
    "SEAL",
    "Window",
    "is_whole",
    "last_checkpoint",
    "processes_of",
    "remove_older",
    "seal",
]

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints within the output folder."""

DATA = "data.json"
"""The file beside the checkpoints that says what they were trained on: task -> fingerprint of its rows."""

SEAL = "complete.json"
"""The file that is written last."""

_KEPT = 2


def seal(checkpoint: Path, *, processes: int) -> None:
    """Declare a checkpoint whole: all its files are brought to the disk, then listed with size and digest.

    Args:
        checkpoint: Its folder, with every process's files.
        processes: How many processes trained side by side; a resumed run must have as many.
    Raises:
        EnvironmentProblem: Files of other processes are missing, as the folder is not shared among the machines.
    """
    missing = [rank for rank in range(processes) if not Window.path(checkpoint, rank).exists()]
    if missing:
        raise EnvironmentProblem(
            f"The checkpoint {checkpoint} lacks the files of {len(missing)} of {processes} processes (first: number "
            f"{missing[0]}). The machines of a run must share its output folder; choose one on a shared file system."
        )
    files = {}
    for path in _files(checkpoint):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            files[path.relative_to(checkpoint).as_posix()] = [path.stat().st_size, _digest(stream)]
    write_json(checkpoint / SEAL, {"files": files, "processes": processes})


def is_whole(checkpoint: Path) -> bool:
    """Tell whether every file of a checkpoint is there as it was when the checkpoint was sealed.

    Args:
        checkpoint: Its folder.
    """
    files = _sealed(checkpoint).get("files")
    if not isinstance(files, dict) or not files:
        return False
    for name, (size, digest) in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return False
        with path.open("rb") as stream:
            if _digest(stream) != digest:
                return False
    return True


def processes_of(checkpoint: Path) -> int:
    """Return how many processes wrote a whole checkpoint."""
    return int(_sealed(checkpoint)["processes"])


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None.

    Args:
        folder: The run's output folder.
    """
    return next((path for path in _newest_first(folder / CHECKPOINTS) if is_whole(path)), None)


def remove_older(folder: Path, kept: int = _KEPT) -> None:
    """Remove all sealed checkpoints but the newest, and everything that never got its seal.

    Args:
        folder: Where the checkpoints are.
        kept: How many stay.
    """
    sealed = [path for path in _newest_first(folder) if (path / SEAL).exists()]
    for path in _newest_first(folder):
        if path not in sealed[:kept]:
            (path / SEAL).unlink(missing_ok=True)  # first: a half-removed checkpoint must not look whole
            shutil.rmtree(path, ignore_errors=True)


class Window:
    """What the log has gathered since its last line; a resumed run must go on from it to write the same next line.

    One file for each process, as each has gathered from its own batches.
    """

    @staticmethod
    def path(checkpoint: Path, rank: int) -> Path:
        """The file of one process."""
        return checkpoint / f"log_window_{rank}.safetensors"

    @staticmethod
    def save(checkpoint: Path, rank: int, tensors: dict[str, Tensor]) -> None:
        """Write the tensors of one process."""
        save_file({name: tensor.detach().cpu() for name, tensor in tensors.items()}, Window.path(checkpoint, rank))

    @staticmethod
    def load(checkpoint: Path, rank: int, device: torch.device) -> dict[str, Tensor]:
        """Read them back, onto a device."""
        return {name: tensor.to(device) for name, tensor in load_file(Window.path(checkpoint, rank)).items()}


def _newest_first(folder: Path) -> list[Path]:
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(numbered, key=lambda path: -int(path.name.rpartition("-")[2]))


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)


def _sealed(checkpoint: Path) -> dict[str, Any]:
    """Read the seal; empty where there is none, or half of one."""
    try:
        found = json.loads((checkpoint / SEAL).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest(stream: Any) -> str:
    """SHA-256 of an open file, from where it stands."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
