"""What this machine has: memory and disk, in bytes, as far as the process may use them."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

__all__ = ["disk_free", "memory_available", "memory_total", "size_words"]

# where a container's bound is written: cgroup 2, then cgroup 1
_BOUNDS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_USED = (Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"))


def memory_total() -> int:
    """Main memory, or the container's share of it."""
    import psutil

    total = int(psutil.virtual_memory().total)
    return min(total, _first_number(_BOUNDS) or total)


def memory_available() -> int:
    """Main memory that can be had without swapping, within the container's share."""
    import psutil

    free = int(psutil.virtual_memory().available)
    bound, used = _first_number(_BOUNDS), _first_number(_USED)
    return free if bound is None or used is None else max(0, min(free, bound - used))


def disk_free(folder: Path) -> int:
    """Free space where a folder is, or would be made."""
    place = Path(folder).expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def size_words(count: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point.

    Example:
        >>> size_words(1536)
        '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1024
    return f"{count:,.3g} TiB"


def _first_number(paths: tuple[Path, ...]) -> int | None:
    for path in paths:
        with suppress(OSError, ValueError):  # absent, or the word "max"
            return int(path.read_text("utf-8"))
    return None
