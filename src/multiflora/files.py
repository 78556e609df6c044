"""Writing files so that a failure half-way loses nothing: whole beside the target, then moved into its place."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from typing import Any

from multiflora.errors import EnvironmentProblem

__all__ = [
    "cache_folder",
    "check_inside",
    "check_writable",
    "matching",
    "saving",
    "write_bytes",
    "write_json",
    "write_text",
]


def cache_folder(name: str) -> Path:
    """Where something made once is kept for the user: ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``multiflora/…``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "multiflora" / name


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn what the file system refuses while ``path`` is written into one clear paragraph.

    Raises:
        EnvironmentProblem: No space, no permission, or another refusal of the system.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise EnvironmentProblem(
                f"No space left to write {path}: {reason}. What was there before is unchanged. Free some space, or "
                "choose an output folder on another disk."
            ) from error
        raise EnvironmentProblem(
            f"Cannot write {path}: {reason}. What was there before is unchanged. Choose an output folder that you "
            "may write to."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file: readers see the old file or the new one, never a part.

    Raises:
        EnvironmentProblem: The system refuses, e.g. as no space is left; an old file is then unchanged.

    Example:
        >>> write_text(Path("runs/notes.txt"), "ready")  # doctest: +SKIP
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; where ``path`` is a link, the link is replaced and what it leads to is not."""
    with saving(path):
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())  # a full disk may only be told of here
            os.chmod(scratch, 0o666 & ~_umask())  # mkstemp's files are private
            os.replace(scratch, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(scratch)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes; see `write_text`."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def check_inside(folder: Path, path: Path) -> None:
    """Refuse to write where a link within a folder leads out of it: the folder may come from anybody.

    Raises:
        EnvironmentProblem: ``path`` does not lie in ``folder`` once links are followed.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise EnvironmentProblem(
            f"{path} leads out of {folder}, to {path.resolve()}; nothing was written there. Remove the link, or name "
            "another folder to write to."
        )


def matching(pattern: str) -> list[str]:
    """The files that a glob matches, ``**`` going down; may take long, see `multiflora.stoppable`."""
    return [path for path in glob(pattern, recursive=True) if os.path.isfile(path)]


def check_writable(folder: Path) -> None:
    """Refuse a folder that could not be made or written to; nothing stays there.

    Raises:
        EnvironmentProblem: It is a file or below one, a link that leads nowhere, or the system refuses.
    """
    try:
        place = folder.absolute()
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            what = "a link that leads nowhere" if place.is_symlink() and not place.exists() else "no folder"
            raise EnvironmentProblem(f"Cannot write {folder}: {place} is {what}. Choose another output folder.")
        with tempfile.TemporaryDirectory(prefix=".writable-", dir=place) as trial:
            # the part that is not there yet is made beneath the trial, with room for files in it: it may be too long
            Path(trial, *folder.absolute().relative_to(place).parts, "x" * 100).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EnvironmentProblem(f"Cannot write {folder}: {reason}. Choose another output folder.") from error


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
