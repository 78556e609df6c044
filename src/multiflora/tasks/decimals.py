"""Numbers in answers, read exactly: decimals, not floats, and only where the whole word is a number."""

from __future__ import annotations

import re
from decimal import Decimal

__all__ = ["as_number", "whole_number"]

_NUMBER = r"""
    (?: [0-9]{1,3} (?: , [0-9]{3} )+ (?![0-9,]) | [0-9]+ )?    # 1,234 or 1234, but not the comma of a list
    (?: \.[0-9]+ | (?<=[0-9]) )                                 # .5, but not the full stop of a sentence
    (?: [eE] [-+]? [0-9]{1,3} (?![0-9]) )?                      # 1e20
"""
_WHOLE = re.compile(rf"([-−+]?) \$? \s? ({_NUMBER})", re.VERBOSE)
_WORD = re.compile(r"\S*[0-9]\S*")
_IN_WORD = re.compile(
    rf"""(?: [^\w.,/+\-−$]* | [^0-9]* [^\w.,/+\-−$] )    # brackets and stars, or a label that ends in a sign: Answer:7
         ( [-−+]? ) \$? ( [-−+]? ) ({_NUMBER})
         [^0-9]*                                         # a unit, a bracket, a full stop: 7km, 10%, 7.
    """,
    re.VERBOSE,
)
_NAME = re.compile(r"0[0-9]")
"""Digits that are no number: 007."""


def whole_number(text: str) -> Decimal | None:
    """Read a text that is a number and nothing else, or whose part after the first ``####`` is one.

    A sign, a dollar sign and thousands commas do not matter. Digits that begin with 0, as in 007, are a name and no
    number.

    Example:
        >>> whole_number("$1,234.50"), whole_number("some working #### -3"), whole_number("5 km"), whole_number("007")
        (Decimal('1234.50'), Decimal('-3'), None, None)
    """
    bare = text.partition("####")[2].strip() or text.strip()
    found = _WHOLE.fullmatch(bare)
    if found is None or not found.group(2) or _NAME.match(found.group(2)):
        return None
    return _signed(found.group(1), found.group(2))


def as_number(text: str) -> Decimal | None:
    """Read the number a text answers with, or None where it has none.

    The answer is in the first word with a digit after the first ``####`` where there is one (GSM8K's mark), else in the
    last word with a digit. Brackets, a currency and a unit may stand around the number; a word that is a date, a time,
    a fraction, a range, a list, a version or a name (B12) is no number, and no other word is taken in its place.

    Example:
        >>> as_number("3 + 4 = 7."), as_number("#### 12 eggs, of 30"), as_number("none"), as_number("at 10:30")
        (Decimal('7'), Decimal('12'), None, None)
    """
    _, mark, after = text.partition("####")
    words = _WORD.findall(after if mark else text)
    if not words:
        return None
    found = _IN_WORD.fullmatch((words[0] if mark else words[-1]).rpartition("=")[2])
    if found is None or not found.group(3) or (found.group(1) and found.group(2)):
        return None
    return _signed(found.group(1) + found.group(2), found.group(3))


def _signed(sign: str, digits: str) -> Decimal:
    return Decimal(("-" if sign in ("-", "−") else "") + digits.replace(",", ""))
