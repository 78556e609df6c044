"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from multiflora.errors import ExportError
from multiflora.files import check_writable, saving

__all__ = ["check_free", "staged"]


def check_free(folder: Path) -> None:
    """Refuse an output folder that holds something, before any work is done.

    Raises:
        ExportError: It does.
        EnvironmentProblem: It could not be written to.
    """
    check_writable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(
            f"{folder} exists and is not empty; nothing was changed there. Choose another output folder, or remove it."
        )


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a folder to write to, beside ``folder``; it takes its place once everything in it is written and checked.

    Raises:
        ExportError: ``folder`` holds something already.
        EnvironmentProblem: The system refuses to write there.
    """
    check_free(folder)
    with saving(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        with saving(folder):
            scratch.chmod(0o777 & ~_umask())  # mkdtemp's folders are private
            if folder.exists():
                folder.rmdir()
            os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
