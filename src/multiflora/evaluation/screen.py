"""What an evaluation shows and leaves behind: a progress bar on stderr, nothing on stdout, the model as it was."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["Bar", "quiet", "restored"]


class Bar:
    """A progress bar for one task after the other; it is gone when all are scored.

    Args:
        is_shown: False: draw nothing.
    """

    def __init__(self, is_shown: bool) -> None:
        self.is_shown = is_shown
        # sys.stderr as it is now: the harness's own bars are turned off by other means
        console = Console(file=sys.stderr)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not (is_shown and console.is_terminal)
        )
        self._current: TaskID | None = None

    def __enter__(self) -> Bar:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wipe the bar."""
        self._progress.stop()

    def begin(self, name: str) -> None:
        """Turn to the next task, whose number of answers is not known yet."""
        if self._current is not None:
            self._progress.remove_task(self._current)
        self._current = self._progress.add_task(name, total=None)

    def show(self, done: int, total: int) -> None:
        """Show how many of the task's answers are there."""
        if self._current is not None:
            self._progress.update(self._current, completed=done, total=total)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness's chatter off stdout, its log to errors, and its bar of a few milliseconds off the screen."""
    from lm_eval.api import task

    harness = logging.getLogger("lm_eval")
    level, bar = harness.level, task.tqdm
    harness.setLevel(logging.ERROR)
    task.tqdm = partial(bar, disable=True)  # it has no option
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        harness.setLevel(level)
        task.tqdm = bar


@contextmanager
def restored(model: Any) -> Iterator[None]:
    """Put the model's mode and the global random numbers back afterwards, so that scoring never changes a training."""
    import numpy as np
    import torch

    was_training, python, numpy = model.training, random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        model.train(was_training)
        random.setstate(python)
        np.random.set_state(numpy)
