"""Nearest names: what the user probably meant when a key, a method or a task is unknown."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from typing import Any

__all__ = ["did_you_mean", "listed", "nearest", "shown"]

MOST = 10_000
"""Names that one is compared with."""
LONGEST = 200
"""Characters of the longest name that is compared with others, or shown; nobody mistypes more."""


def shown(value: Any, longest: int = 80) -> str:
    """Write a value a user gave for a message, cut where it is long: a name may have a million characters.

    Example:
        >>> shown("rlora"), shown("x" * 1000, 10)
        ("'rlora'", "'xxxxxx...")
    """
    text = repr(value[:longest] if isinstance(value, str | bytes) else value)
    is_short = len(text) <= longest and (not isinstance(value, str | bytes) or len(value) <= longest)
    return text if is_short else f"{text[: longest - 3]}..."


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to ``name``, or None where nothing is close.

    Case, hyphens and underscores are not held against a name. A prefix counts as close: ``grad`` finds ``gradient``.

    Example:
        >>> nearest("learning-rat", ["learning_rate", "batch_size"])
        'learning_rate'
        >>> nearest("zzz", ["learning_rate"]) is None
        True
    """
    if len(name) > LONGEST:
        return None
    plain = {_plain(k): k for k in islice((k for k in known if len(k) <= LONGEST), MOST)}
    wanted = _plain(name)
    if found := get_close_matches(wanted, plain, n=1, cutoff=0.6):
        return plain[found[0]]
    starts = [k for k in plain if len(wanted) > 2 and (k.startswith(wanted) or wanted.startswith(k))]
    return plain[min(starts, key=len)] if starts else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Say which known name is meant, and list them all: the tail of every 'unknown name' message.

    Example:
        >>> did_you_mean("rlor", ["lora", "rlora"])
        'did you mean rlora? Known: lora, rlora.'
        >>> did_you_mean("x", ["lora", "rlora"])
        'known: lora, rlora.'
    """
    names = sorted(known)
    guess = nearest(name, names)
    return f"did you mean {guess}? Known: {listed(names)}." if guess else f"known: {listed(names)}."


def listed(names: Iterable[Any], most: int = 100) -> str:
    """List names in a message: the first of them, where there are many.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    every = list(names)
    text = ", ".join(str(name) if len(str(name)) <= LONGEST else shown(name) for name in every[:most]) or "none"
    return text if len(every) <= most else f"{text} and {len(every) - most:,} more"


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")
