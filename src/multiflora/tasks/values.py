"""Which values of a row are text: texts and whole numbers. Python's writing of anything else is never trained on."""

from __future__ import annotations

import json
from itertools import islice
from math import isfinite
from reprlib import Repr
from typing import Any

from multiflora.errors import DataError


# a list may hold itself many times over: small to keep, endless to write
class _Short(Repr):
    """Writes a mapping in its own order."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        if level <= 0 and x:
            return "{...}"
        pairs = [f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in islice(x.items(), self.maxdict)]
        return "{" + ", ".join([*pairs, *(["..."] if len(x) > self.maxdict else [])]) + "}"


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 4, 20, 20, 121, 121

__all__ = ["as_list", "is_text", "kind_of", "shown", "text_of"]


def is_text(value: Any) -> bool:
    """Whether a value may be printed as it is: a text or a whole number.

    Example:
        >>> [is_text(value) for value in ("a", 7, True, 0.5, ["a"], None)]
        [True, True, False, False, False, False]
    """
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def text_of(value: Any, what: str, where: str) -> str:
    """Return a value as text.

    Raises:
        DataError: It is neither a text nor a whole number.

    Example:
        >>> text_of(7, "answer", "row 1")
        '7'
    """
    if is_text(value):
        return str(value)
    raise DataError(
        f"{where}: the {what} is {shown(value)}, {kind_of(value)}; expected a text or a whole number. Make a text of "
        "it in the file or with a template ({{ column | string }}), or leave such rows out with 'keep'."
    )


def kind_of(value: Any) -> str:
    """Name a value's kind in the words of JSON."""
    if isinstance(value, float) and not isfinite(value):
        return "which is no number"
    kinds: dict[type, str] = {
        bool: "true or false",
        float: "a number with a fraction",
        type(None): "a null",
        list: "a list",
    }
    kinds |= {dict: "an object", list: "a list", tuple: "a list"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = _SHORT.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def as_list(value: Any) -> list[Any] | None:
    """Return a list, or what JSON text says is one; None for anything else. A cell of a CSV file can hold no other.

    Example:
        >>> as_list('["a", "b"]'), as_list(("a",)), as_list("a")
        (['a', 'b'], ['a'], None)
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return list(value) if isinstance(value, list | tuple) else None
