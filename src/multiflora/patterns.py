"""Regular expressions that come out of a file: only those that end in a time anyone would wait.

Python's matcher tries every way to split a text between repeats that could all take it; ``(a+)+$`` needs 2^n steps for
n letters. Names of modules are short, so a few repeats beside each other do no harm, but one within another does.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

if sys.version_info >= (3, 11):
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_parse as parser

__all__ = ["why_refused"]

LONGEST = 20_000
"""Characters of the longest pattern: peft writes all layers' names into one."""
MOST_REPEATS = 4
"""Open-ended repeats beside each other."""


def why_refused(pattern: str) -> str:
    """Say why a pattern is not used; empty where it is.

    Example:
        >>> why_refused(r"model\\.layers\\.\\d+\\.(q|v)_proj")
        ''
        >>> why_refused("(a+)+$")
        'one repeat stands within another, which may never end'
    """
    if len(pattern) > LONGEST:
        return f"it has {len(pattern):,} characters; expected at most {LONGEST:,}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            depths = list(_repeats(parser.parse(pattern), 0))
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        return f"it is not a regular expression ({error})"
    if any(depth > 1 for depth in depths):
        return "one repeat stands within another, which may never end"
    if len(depths) > MOST_REPEATS:
        return f"it has {len(depths)} open-ended repeats; expected at most {MOST_REPEATS}"
    return ""


def _repeats(tree: Any, depth: int) -> Iterator[int]:
    """The depth of every repeat that may go on for long, from 1; a choice within one counts as another."""
    for operator, argument in tree:
        name = str(operator)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            long = argument[1] > 10
            if long:
                yield depth + 1
            yield from _repeats(argument[2], depth + long)
        elif name == "BRANCH":
            if depth:
                yield depth + 1
            for branch in argument[1]:
                yield from _repeats(branch, depth)
        elif name in ("SUBPATTERN", "ATOMIC_GROUP"):
            yield from _repeats(argument[-1] if name == "SUBPATTERN" else argument, depth)
        elif name in ("ASSERT", "ASSERT_NOT"):
            yield from _repeats(argument[1], depth)
        elif name == "GROUPREF_EXISTS":
            for branch in argument[1:]:
                yield from _repeats(branch or (), depth)
