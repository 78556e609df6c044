"""Where words go: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich.console import Console
from rich.text import Text

__all__ = ["log_on_stderr", "print_json", "stderr", "stdout"]

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON document and nothing else, so that another program can read stdout."""
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


class _Lines(logging.Handler):
    """One dim line on stderr for each record; rich's own handler costs more start-up than all of --help."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        stderr.print(Text(self.format(record), style=style), soft_wrap=True)


# loggers that tell a user nothing: of a build of torchao for another Python, and of torch's inner workings
_NOT_FOR_USERS = ("torchao", "torch.utils._pytree")


@contextmanager
def log_on_stderr() -> Iterator[None]:
    """Send our log and any library's stray ``print`` to stderr while a command works.

    The training stack prints on stdout in places (``Trainer`` when it has no progress bar); a command whose stdout is
    piped into another program must not pass that on.
    """
    log = logging.getLogger("multiflora")
    handler, level, propagate = _Lines(), log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    for name in _NOT_FOR_USERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between libraries, about code a user did not write
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
