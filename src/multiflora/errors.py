"""Every error multiflora raises on purpose: what was wrong, what was expected, how to mend it, and where."""

from __future__ import annotations

import re

__all__ = [
    "AdapterError",
    "ConfigError",
    "DataError",
    "EnvironmentProblem",
    "ExportError",
    "Interrupted",
    "MultifloraError",
    "TrainingError",
]


LONGEST_WORD = 300
"""Characters of the longest word in a message, such as a path."""
LONGEST = 10_000
"""Characters of the longest message."""


class MultifloraError(Exception):
    """The base: ``except MultifloraError`` catches all that multiflora raises on purpose, and no bug.

    A message repeats names and values that a user wrote, and those may have a million characters: it is cut.
    """

    def __init__(self, message: str = "", *more: object) -> None:
        super().__init__(_cut(message) if isinstance(message, str) else message, *more)


def _cut(message: str) -> str:
    if len(message) > LONGEST_WORD:
        message = re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: f"{word[0][:200]}...{word[0][-20:]}", message)
    if len(message) > LONGEST:
        message = f"{message[: LONGEST - 2000]} ... {message[-1500:]}"
    return message


class ConfigError(MultifloraError, ValueError):
    """A recipe, a method's settings or a command's options cannot work."""


class DataError(MultifloraError, ValueError):
    """A task's rows, files or templates cannot be used."""


class AdapterError(MultifloraError, ValueError):
    """An adapter, or what is asked of it, does not fit the model or the method."""


class ExportError(MultifloraError, ValueError):
    """A merge or conversion that would not be exact, or that failed its own check."""


class TrainingError(MultifloraError, RuntimeError):
    """A training that cannot go on: its loss or its gradients are no longer finite."""


class Interrupted(MultifloraError, RuntimeError):  # noqa: N818  # nothing is wrong; the run was asked to stop
    """A run that was asked to stop and has saved a checkpoint to go on from."""


class EnvironmentProblem(MultifloraError, RuntimeError):  # noqa: N818  # "EnvironmentError" is Python's own
    """Something outside the input is missing: a package, a device, space on the disk."""
