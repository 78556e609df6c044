"""What a user sees when something is wrong: one paragraph on stderr and an exit code."""

from __future__ import annotations

import errno
import re
import traceback
from types import TracebackType

import typer
from rich.text import Text

from multiflora.cli.screen import stderr
from multiflora.errors import Interrupted, MultifloraError

__all__ = ["BAD_INPUT", "STOPPED", "TERMINATED", "ErrorsInWords", "explain"]

BAD_INPUT = 2
"""Exit code for everything the user can mend; the same as for a mistyped option."""

STOPPED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""

TERMINATED = 143
"""Exit code after SIGTERM, where a checkpoint could be saved: 128 + SIGTERM."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
# safetensors and tokenizers are written in Rust: their errors are no OSError and name the number only in the text
_RUST = re.compile(r"\(os error (\d+)\)")


def explain(error: BaseException) -> tuple[str, int] | None:
    """Turn an error that a user can mend into a paragraph and an exit code; ``None`` for what is a bug of ours.

    Args:
        error: Whatever a command raised.

    Example:
        >>> from multiflora.errors import ConfigError
        >>> explain(ConfigError("seed is 'x'; expected a whole number."))
        ("seed is 'x'; expected a whole number.", 2)
        >>> explain(ZeroDivisionError()) is None
        True
    """
    if isinstance(error, Interrupted):
        return str(error), TERMINATED
    if isinstance(error, MultifloraError):
        return str(error), BAD_INPUT
    if isinstance(error, KeyboardInterrupt):
        return "Stopped. Whatever was saved before is still there.", STOPPED
    number = _os_error(error)
    place = getattr(error, "filename", None)
    at = f" at {place}" if place else ""
    if number in _FULL:
        return (
            f"No space left to write{at}: {error}. Free some space, or write elsewhere with --output FOLDER. "
            "Files that were finished before are untouched.",
            BAD_INPUT,
        )
    if number in _FORBIDDEN:
        return (
            f"Permission denied{at}: {error}. Choose a file or folder that you may use (--output FOLDER for results), "
            "or change its permissions.",
            BAD_INPUT,
        )
    return None


def _os_error(error: BaseException) -> int | None:
    """The operating system's error number behind an exception, if there is one."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _RUST.search(str(error))
    return int(found.group(1)) if found else None


class ErrorsInWords:
    """Context manager around a command; leaves bugs alone, answers everything else in one paragraph.

    A class and not ``try``/``except``: ``__exit__`` sees every error without catching those it has no answer for.
    """

    def __init__(self, *, debug: bool) -> None:
        self.debug = debug

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Print the paragraph and end with its exit code."""
        answer = explain(error) if error is not None else None
        if error is None or answer is None:
            return
        message, code = answer
        if self.debug:
            stderr.print(Text("".join(traceback.format_exception(error))), soft_wrap=True)
        # a terminal wraps at words; a pipe or a log file gets the paragraph as one line
        stderr.print(Text("Error: ", style="bold red") + Text(message), soft_wrap=not stderr.is_terminal)
        raise typer.Exit(code) from None
