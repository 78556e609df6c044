"""The output folder: never overwritten, resumed only by its own recipe, and a full disk said in plain words."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

from multiflora.errors import ConfigError, EnvironmentProblem
from multiflora.recipe import Recipe, load_recipe
from multiflora.train.checkpoint import CHECKPOINTS, last_checkpoint, processes_of
from multiflora.train.processes import num_processes

__all__ = ["disk_guard", "open_output"]

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
    if not resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            held = "holds a run" if (folder / "recipe.yaml").exists() else "exists and is not empty"
            hint = " or go on from its checkpoints with --resume," if last_checkpoint(folder) else ""
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
    checkpoint = last_checkpoint(folder)
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
        keys = ", ".join(key for key in Recipe.model_fields if getattr(written, key) != getattr(recipe, key))
        raise ConfigError(
            f"The checkpoints in {folder} come from another recipe: {keys} differ. Resume with that one "
            f"({folder / CHECKPOINTS / 'recipe.yaml'}), or choose another output folder."
        )
    before, now = processes_of(checkpoint), num_processes()
    if before != now:
        raise ConfigError(
            f"{checkpoint} was written by {before} processes, and this run has {now}: each one has its own random "
            f"streams and its own share of every batch. Resume with {before} processes."
        )
    return checkpoint


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
