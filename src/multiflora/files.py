"""Writing files so that a failure half-way loses nothing: whole beside the target, then moved into its place."""

from __future__ import annotations

import errno
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from typing import Any

from multiflora.errors import ConfigError, EnvironmentProblem
from multiflora.suggest import shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "TRIAL",
    "beside",
    "cache_folder",
    "check_inside",
    "check_writable",
    "expanded",
    "lock",
    "matching",
    "saving",
    "user_path",
    "write_bytes",
    "write_json",
    "write_text",
]

log = logging.getLogger(__name__)

TRIAL = ".writable-"
"""How the names of folders begin that are made and removed again at once, to see whether that can be done."""


def cache_folder(name: str) -> Path:
    """Where something made once is kept for the user: ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``multiflora/…``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "multiflora" / name


def expanded(word: str | Path) -> Path:
    """Put the user's home in the place of ``~``.

    Raises:
        ConfigError: There is no such user, or the path holds a NUL.
    """
    if "\0" in str(word):
        raise ConfigError(f"{shown(str(word))} holds a NUL, which no path can have.")
    try:
        return Path(word).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{shown(str(word))}: there is no user of that name. Write the folder out.") from error


def user_path(word: str | Path) -> Path:
    """The path that a user wrote, ``~`` expanded; whether something is there is left open.

    Raises:
        ConfigError: It can name nothing: it is empty or too long, its links go round, it is no text that can be
            printed, or see `expanded`.

    Example:
        >>> str(user_path("runs/rlora"))
        'runs/rlora'
    """
    path = expanded(word)
    try:
        if not str(word):
            raise ValueError("it is empty")
        str(path).encode()
        path.stat()
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in (None, errno.ELOOP, errno.ENAMETOOLONG):
            reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or str(error)
            raise ConfigError(f"{shown(str(word))} names no file or folder: {reason}. Check the path.") from error
    return path


def beside(word: str | Path, ending: str) -> Path:
    """Where something made from a folder goes when nothing else is said: FOLDER-ending, in the same place.

    Raises:
        ConfigError: The folder has no name of its own, or see `user_path`.
    """
    path = user_path(word)
    name = path.resolve().name
    if path.name in ("", ".."):
        path = path.resolve()
    if not name:
        raise ConfigError(f"{path} has no name to make another of; say where the result goes: --output FOLDER.")
    return path.with_name(f"{name}-{ending}")


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn what the file system refuses while ``path`` is written into one clear paragraph.

    Raises:
        EnvironmentProblem: No space, no permission, or another refusal of the system.
    """
    try:
        yield
    except OSError as error:
        reason = _reason(error) if path.parent.is_dir() else error.strerror or str(error)
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


def lock(path: Path, handle: int) -> bool:
    """Keep other processes from locking a file or folder; the system lets go when ``handle`` or the process ends.

    Args:
        path: As it is called in the log.
        handle: Of the open file or folder.

    Returns:
        False where another process holds it. Where the system or the file system has no such lock, True: there it is
        the user's to start one process at a time.
    """
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        log.debug("%s cannot be locked: %s", path, error)
    return True


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
        with tempfile.TemporaryDirectory(prefix=TRIAL, dir=place) as trial:
            # the part that is not there yet is made beneath the trial, with room for files in it: it may be too long
            Path(trial, *folder.absolute().relative_to(place).parts, "x" * 100).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"Cannot write {folder}: {_reason(error)}. Choose another output folder.") from error


def _reason(error: Exception) -> str:
    """Why the system does not write, in its own words but where those mislead."""
    if isinstance(error, FileNotFoundError):  # of a file that was to be made, in a folder that is there
        return "the system lets nobody make files or folders there"
    return getattr(error, "strerror", None) or str(error)


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
