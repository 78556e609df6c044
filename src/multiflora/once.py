"""Work that gives the same every time, done once: a comparison reads and encodes its tasks for all trainings together.

Only inside `kept` is anything kept; elsewhere every call does the work anew, so that a changed file is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

__all__ = ["kept", "once"]

T = TypeVar("T")

_KEPT: ContextVar[dict[Hashable, Any] | None] = ContextVar("kept", default=None)


@contextmanager
def kept() -> Iterator[None]:
    """Keep what `once` makes until the end of this block."""
    before = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(before)


def once(key: Hashable, make: Callable[[], T]) -> T:
    """Return what ``make`` gives, or gave before under this key; nobody may change it.

    Args:
        key: Everything that it depends on.
        make: Does the work.

    Example:
        >>> with kept():
        ...     made = [once("list", list) for _ in range(2)]
        >>> made[0] is made[1], once("list", list) is once("list", list)
        (True, False)
    """
    store = _KEPT.get()
    if store is None:
        return make()
    if key not in store:
        store[key] = make()
    found: T = store[key]
    return found
