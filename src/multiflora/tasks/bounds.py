"""What a template may cost: a budget for each rendering, spent by everything that grows or goes round.

A sandbox keeps a template from reaching things; it does not keep ``'a' * 10**12`` from filling the memory, or three
nested loops from running for a year. So every value a template makes is measured, with all that is inside it, and every
turn of a loop is counted; what would be large is refused before it is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

__all__ = ["BUDGET", "TooMuchError", "bounded", "budget", "checked_format", "made", "operated", "spend", "turns"]

BUDGET = 10_000_000
"""Characters, items and steps that one rendering may take: far more than any text a model reads."""
LARGEST = 100_000
"""Largest width, length or count that a filter takes."""
LONGEST_NUMBER = 13_000
"""Bits of the longest whole number, which is about 4,000 digits."""

_LEFT: ContextVar[list[int]] = ContextVar("left")


class TooMuchError(ValueError):
    """A template would have made too much."""


@contextmanager
def budget() -> Iterator[None]:
    """Give what runs inside a fresh budget."""
    token = _LEFT.set([BUDGET])
    try:
        yield
    finally:
        _LEFT.reset(token)


def spend(amount: int) -> None:
    """Take from the budget.

    Raises:
        TooMuchError: It does not suffice.
    """
    left = _LEFT.get()
    left[0] -= amount
    if left[0] < 0:
        raise TooMuchError(f"it would make or go through more than {BUDGET:,} characters and items for one row")


def made(value: Any) -> Any:
    """Pay for a value with all that is inside it, as often as it is inside, and return it."""
    if isinstance(value, str):
        spend(1 + len(value))
        return value
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str | bytes):
            spend(1 + len(item))
            continue
        spend(1)
        if isinstance(item, Mapping):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            waiting.extend(item)
    return value


def turns(items: Iterable[Any], each: int) -> Iterator[Any]:
    """Pay for every turn of a loop; ``each`` is what the body writes in one."""
    for item in items:
        spend(each)
        yield item


def operated(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be large, before it is made.

    Raises:
        TooMuchError: It would be.
    """
    both_whole = isinstance(left, int) and isinstance(right, int)
    if operator == "**" and both_whole:
        _whole_number(max(right, 0) * abs(left).bit_length())
    elif operator == "*" and both_whole:
        _whole_number(left.bit_length() + right.bit_length())
    elif operator == "*":
        times, value = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(times, int) and isinstance(value, str | list | tuple | bytes):
            spend(max(times, 0) * len(value))
    elif operator == "%" and isinstance(left, str | bytes):
        checked_format(str(left))


def _whole_number(bits: int) -> None:
    if bits > LONGEST_NUMBER:
        raise TooMuchError(f"it would make a number of more than {LONGEST_NUMBER:,} bits")


_WIDE = re.compile(r"%[^%a-zA-Z]*(\d{4}|\*)")


def checked_format(text: str) -> str:
    """Return a %-format, unless it asks for a width of four digits or one read from its values."""
    if _WIDE.search(text):
        raise TooMuchError(f"the format {text[:40]!r} asks for a width above 999")
    return text


def _replaced(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> int:
    return str(text).count(str(old)) * len(str(new))


def _indented(text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    return (str(text).count("\n") + 1) * (len(width) if isinstance(width, str) else abs(int(width)))


def _wrapped(text: Any, *_: Any, wrapstring: Any = None, **__: Any) -> int:
    return len(str(text)) * (1 + len(str(wrapstring or next((a for a in _[2:3] if a), ""))))


# what filters and methods that multiply would make
_PRODUCTS: Mapping[str, Callable[..., int]] = {"replace": _replaced, "indent": _indented, "wordwrap": _wrapped}
_COUNTS = {"batch", "center", "indent", "ljust", "rjust", "round", "slice", "tojson", "truncate", "wordwrap", "zfill"}


def bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter or method: refused where its result would be large, paid for where it is not.

    Args:
        name: Its name in Jinja or on its type.
        function: What it is; jinja's marks (``pass_context``) are kept.
    """

    @wraps(function)
    def within(*args: Any, **words: Any) -> Any:
        given = args[1:] if hasattr(function, "jinja_pass_arg") else args
        if name in _COUNTS and any(isinstance(a, int) and abs(a) > LARGEST for a in (*given[1:], *words.values())):
            raise TooMuchError(f"{name} takes numbers up to {LARGEST:,}")
        if name in _PRODUCTS:
            spend(_PRODUCTS[name](*given, **words))
        if name == "tojson" and given:
            made(given[0])
        result = function(*args, **words)
        return turns(result, 1) if isinstance(result, Iterator) else made(result)

    return within
