"""The output folder: never overwritten, resumed only by its own recipe, and a full disk said in plain words."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from multiflora.errors import ConfigError, EnvironmentProblem
from multiflora.files import TRIAL, check_writable, lock, saving
from multiflora.recipe import Recipe, load_recipe
from multiflora.suggest import listed
from multiflora.training.checkpoint import CHECKPOINTS, DATA, SEAL, last_checkpoint, processes_of
from multiflora.training.processes import num_processes

__all__ = ["check_data", "disk_guard", "only_run", "open_output"]

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors (Rust) gives the operating system's number in its text only, and torch.save (C++) none at all
_FULL_IN_TEXT = re.compile(rf"\(os error ({'|'.join(map(str, _FULL))})\)|No space left|inline_container\.cc")


def open_output(recipe: Recipe, *, resume: bool) -> Path | None:
    """Check that the output folder may be written, before any work is done.

    Args:
        recipe: Its ``output`` names the folder.
        resume: Go on from the folder's last checkpoint.
    Returns:
        The checkpoint to go on from; None for a new run.
    Raises:
        ConfigError: The folder holds something already, or there is nothing to resume, or another recipe or another
            number of processes wrote it.
    """
    folder = recipe.output
    check_writable(folder)
    checkpoint = last_checkpoint(folder)
    if checkpoint is None and _is_abandoned(folder):
        log.info("%s holds what is left of a run that was ended before its first checkpoint; it starts anew", folder)
        for path in folder.iterdir():
            _remove(path)
        return None
    if not resume:
        # of several processes each tries whether it can write there, at a moment of its own
        if folder.exists() and any(not path.name.startswith(TRIAL) for path in folder.iterdir()):
            held = "holds a run" if (folder / "recipe.yaml").exists() else "exists and is not empty"
            hint = " or go on from its checkpoints with --resume," if checkpoint else ""
            raise ConfigError(
                f"output is {folder}, which {held} already; nothing was changed there. Choose another output folder,"
                f"{hint} or remove it."
            )
        return None
    if recipe.method.name == "lorahub":
        raise ConfigError(
            "A run with method: lorahub cannot be resumed: it trains a LoRA for each task, one after the other, and "
            "writes nothing before all are put together. Start it again, without --resume."
        )
    if checkpoint is None:
        raise ConfigError(
            f"There is nothing to resume: {folder / CHECKPOINTS} has no whole checkpoint. Set train.save_every to a "
            "number of steps before a run that may be interrupted, and start it without --resume."
        )
    if (folder / "README.md").exists():  # the model card is what a run writes last
        raise ConfigError(
            f"The run in {folder} is finished; there is nothing to resume. Evaluate it, or choose another output."
        )
    written = load_recipe(folder / CHECKPOINTS / "recipe.yaml")
    if written != recipe:
        keys = list(_differences(written.model_dump(mode="json"), recipe.model_dump(mode="json")))
        raise ConfigError(
            f"The checkpoints in {folder} come from another recipe: {listed(keys, 10)} "
            f"{'differs' if len(keys) == 1 else 'differ'}. Resume with that one "
            f"({folder / CHECKPOINTS / 'recipe.yaml'}), or choose another output folder."
        )
    before, now = processes_of(checkpoint), num_processes()
    if before != now:
        raise ConfigError(
            f"{checkpoint} was written by {before} processes, and this run has {now}: each one has its own random "
            f"streams and its own share of every batch. Resume with {before} processes."
        )
    for path in _left_behind(folder):
        _remove(path)
    return checkpoint


def _differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """The keys, with their paths, by which two recipes differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one | other:
            yield from _differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            yield from _differences(mine, theirs, f"{path}.{i}")
    elif one != other:
        yield path


def check_data(folder: Path, fingerprints: Mapping[str, Any]) -> None:
    """Refuse to go on from checkpoints that were trained on other rows.

    Args:
        folder: The run's output folder.
        fingerprints: Task -> what `multiflora.artifact.fingerprint` gives for its training rows.

    Raises:
        ConfigError: Rows of a task were changed, added or taken away since; names the tasks.
    """
    path = folder / CHECKPOINTS / DATA
    if not path.is_file():  # written by a version that did not
        return
    written = json.loads(path.read_text("utf-8"))
    told = [
        f"{name} ({written.get(name, {}).get('rows', 0):,} training rows then, {now['rows']:,} now)"
        for name, now in fingerprints.items()
        if written.get(name) != now
    ]
    if told:
        raise ConfigError(
            f"The checkpoints in {folder} were trained on other data: {listed(told, 10)} changed since. A resumed run "
            "would be neither the one nor the other. Put the files back as they were, or start anew in another output "
            "folder."
        )


# names that `tempfile` gives to what is written beside its place and moved there
_SCRATCH = re.compile(r"\..+-[a-z0-9_]{8}")


def _left_behind(folder: Path) -> list[Path]:
    """What a process that was killed had not moved to its place yet."""
    found = (path for path in folder.rglob(".*-*") if _SCRATCH.fullmatch(path.name))
    return [path for path in found if not path.name.startswith(TRIAL)]  # another process's, which removes it itself


def _is_abandoned(folder: Path) -> bool:
    """Whether a folder holds nothing but what a run leaves that was killed before its first checkpoint was whole."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    inside = [path for path in folder.iterdir() if not _SCRATCH.fullmatch(path.name)]
    if [path.name for path in inside] != [CHECKPOINTS]:
        return False
    return all(
        _SCRATCH.fullmatch(path.name)
        or path.name in ("recipe.yaml", DATA, "runs")
        or (path.name.startswith("checkpoint-") and not (path / SEAL).exists())
        for path in inside[0].iterdir()
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold an output folder: of two runs that would write to it at once, the second is refused.

    The lock is the system's, on the folder itself: nothing is written, and it ends with the process however that ends.

    Args:
        folder: The run's output folder; made where it is not there, and removed again where it stayed empty.

    Raises:
        ConfigError: Another process writes to it.
    """
    check_writable(folder)
    with saving(folder):
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        # Windows neither opens folders nor has the lock
        handle = os.open(folder, os.O_RDONLY) if os.name == "posix" else None
    try:
        if handle is not None and not lock(folder, handle):
            raise ConfigError(
                f"output is {folder}, which another run is writing to at this moment; nothing was changed there. Wait "
                "until it ends, or choose another output folder."
            )
        yield
    finally:
        for path in made:
            with suppress(OSError):  # not empty: the run has written to it
                path.rmdir()
        if handle is not None:
            os.close(handle)


class disk_guard:  # noqa: N801  # used as a function is, `with disk_guard(folder):`
    """Turn a full disk, a used-up quota or a file-size limit, in whatever library, into one clear error.

    A class and no ``try``: ``__exit__`` looks at every error without catching those that are none of its business.

    Args:
        folder: Where the run writes.
    Raises:
        EnvironmentProblem: There was no space to write to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        """Raise the clear error in place of the obscure one."""
        number = getattr(error, "errno", None)
        if error is None or (number not in _FULL and not _FULL_IN_TEXT.search(str(error))):
            return
        place = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(place).free / 2**20
        raise EnvironmentProblem(
            f"No space left to write the run to {self.folder} ({free:,.0f} MiB are free there): {error}. Free some "
            "space or choose another output folder. What was there before, and every finished checkpoint, is untouched."
        ) from error
