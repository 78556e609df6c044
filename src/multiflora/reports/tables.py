"""Tables as values: what a cell shows, what it is sorted by, and all its numbers for the CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from multiflora.comparison.statistics import Interval

__all__ = ["NOTHING", "Cell", "Column", "Table", "difference", "interval", "number", "p_value", "size", "word"]

Value: TypeAlias = str | float | None


@dataclass(frozen=True)
class Cell:
    """One cell."""

    text: str
    """What it shows."""
    values: tuple[Value, ...]
    """Its numbers in full, for the CSV; the first one is what it is sorted by."""
    below: str = ""
    """A second, smaller line."""
    sign: int = 0
    """1 where it is better beyond chance, -1 where it is worse."""

    @property
    def key(self) -> str:
        """What it is sorted by, as an attribute; empty for what is missing."""
        first = self.values[0] if self.values else None
        return "" if first is None else str(first)


@dataclass(frozen=True)
class Column:
    """A column: its head, and its names in the CSV, one for each value of its cells."""

    head: str
    names: tuple[str, ...]
    numeric: bool = True


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first cell of a row names it."""

    name: str
    """Of its file, and its place on the page."""
    title: str
    reading: str
    """How to read it."""
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def to_csv(self) -> str:
        """Every number in full, under names that say what it is."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\r\n")
        writer.writerow([name for column in self.columns for name in column.names])
        for row in self.rows:
            line: list[Value] = []
            for column, cell in zip(self.columns, row, strict=True):
                padded = (*cell.values, *(None,) * len(column.names))[: len(column.names)]
                line += [_harmless(value) for value in padded]
            writer.writerow(line)
        return text.getvalue()


def _harmless(value: Value) -> Value:
    """A name that a spreadsheet would run as a formula gets an apostrophe, as spreadsheets write it themselves."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t")) else value


def word(text: str, below: str = "") -> Cell:
    """A cell of words."""
    return Cell(text, (text,), below)


NOTHING = Cell("–", ())
"""What was not measured."""


def number(value: float | None, digits: int = 0, *, factor: float = 1.0, unit: str = "", signed: bool = False) -> Cell:
    """A number.

    Example:
        >>> number(0.1234, 1, factor=100, unit=" %").text
        '12.3 %'
    """
    if value is None:
        return NOTHING
    return Cell(f"{value * factor:{'+' if signed else ''},.{digits}f}{unit}", (value,))


def interval(found: Interval | None, digits: int = 1, *, factor: float = 100.0, signed: bool = False) -> Cell:
    """A mean with its interval below.

    Example:
        >>> cell = interval(Interval(0.5, 0.4, 0.6))
        >>> cell.text, cell.below
        ('50.0', '40.0 to 60.0')
    """
    if found is None:
        return NOTHING
    shown = [f"{value * factor:{'+' if signed else ''}.{digits}f}" for value in found if value is not None]
    return Cell(shown[0], tuple(found), " to ".join(shown[1:]))


def difference(found: Interval | None, sign: int = 0, digits: int = 1, *, factor: float = 100.0) -> Cell:
    """A difference with its interval below, marked where it was shown not to be chance."""
    cell = interval(found, digits, factor=factor, signed=True)
    return Cell(cell.text, cell.values, cell.below, sign)


def p_value(p: float | None) -> Cell:
    """The chance of a difference as large or larger, were there none."""
    return NOTHING if p is None else Cell("< 0.001" if p < 0.001 else f"{p:.3f}", (p,))


def size(count: float | None) -> Cell:
    """Bytes, in the unit that reads best.

    Example:
        >>> size(3 * 2**30).text
        '3.0 GiB'
    """
    if count is None:
        return NOTHING
    return Cell(f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB", (count,))
