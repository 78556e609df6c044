"""A table that is never cut: what does not fit side by side stands in blocks below one another.

rich shortens what has no room: ``latency`` to ``lat…``. Here a column is never narrower than its longest word (than
its whole cells, where they are numbers). Where the columns do not fit, the table is printed in blocks, each of which
begins with the first column, so that every row keeps its name. A file gets what a terminal of 80 columns shows.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table

__all__ = ["TextTable"]

_GAP = 2
_PLAIN: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, _GAP, 0, 0)}
_PROSE = 20  # letters; a column of sentences that is narrower is hard to read


class _Width(NamedTuple):
    """How wide a column must be, and how wide it would be on one line."""

    least: int
    whole: int


class TextTable(Table):
    """A rich table, without lines and with a bold head, that shows all of its words at any width.

    Args:
        headers: Names of columns, or rich's columns.
        options: Of `rich.table.Table`: ``title``, ``caption``, ``show_header`` and their styles.

    Example:
        >>> table = TextTable("method", "score")
        >>> table.add_row("rlora", "0.5")
        >>> print(table)
        method  score
        rlora   0.5
    """

    def __init__(self, *headers: Column | str, **options: Any) -> None:
        super().__init__(
            *headers, **_PLAIN, header_style="bold", title_justify="left", caption_justify="left", **options
        )

    def __str__(self) -> str:
        text = io.StringIO()
        Console(width=80, file=text, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the whole table where it fits, else its blocks."""
        if not self.columns:
            return
        room = options.max_width
        widths = [_measured(column, console, options) for column in self.columns]
        blocks = _blocks(widths, room)
        for number, block in enumerate(blocks):
            if number:
                yield ""
            part = self._part(block, _shared([widths[k] for k in block], room))
            part.title = self.title if number == 0 else None
            part.caption = self.caption if number == len(blocks) - 1 else None
            yield from Table.__rich_console__(part, console, options)

    def _part(self, block: Sequence[int], widths: Sequence[int]) -> Table:
        """A table of some of the columns, each as wide as is said."""
        part = Table(
            **_PLAIN,
            header_style=self.header_style,
            show_header=self.show_header,
            title_style=self.title_style,
            title_justify=self.title_justify,
            caption_style=self.caption_style,
            caption_justify=self.caption_justify,
        )
        for k, width in zip(block, widths, strict=True):
            old = self.columns[k]
            part.add_column(
                old.header, style=old.style, justify=old.justify, vertical=old.vertical, width=width, overflow="fold"
            )
        cells = [list(self.columns[k].cells) for k in block]
        for number, row in enumerate(self.rows):
            part.add_row(*(column[number] for column in cells), style=row.style, end_section=row.end_section)
        return part


def _measured(column: Column, console: Console, options: ConsoleOptions) -> _Width:
    """A column's widths; numbers stay on one line, words may wrap between words."""
    wide = options.update(max_width=10_000, no_wrap=False)
    head = Measurement.get(console, wide, column.header)
    cells = [Measurement.get(console, wide, cell) for cell in column.cells]
    whole = max((cell.maximum for cell in cells), default=0)
    if column.no_wrap or column.justify == "right":
        least = whole
    else:
        least = max((cell.minimum for cell in cells), default=0)
        least = max(least, min(whole, _PROSE))
    return _Width(max(least, head.minimum, 1), max(whole, head.maximum, 1))


def _blocks(widths: Sequence[_Width], room: int) -> list[list[int]]:
    """The columns of each block: as many as fit, the first column in every one."""
    blocks: list[list[int]] = [[0]]
    # a name that would leave no room beside it is folded
    first = min(widths[0].least, room // 2)
    used = first
    for k, width in enumerate(widths[1:], start=1):
        if used + _GAP + width.least > room and len(blocks[-1]) > 1:
            blocks.append([0])
            used = first
        blocks[-1].append(k)
        used += _GAP + width.least
    return blocks


def _shared(widths: Sequence[_Width], room: int) -> list[int]:
    """Widths that fill the room: what each column must have, then equal shares of what is left."""
    room -= _GAP * (len(widths) - 1)
    shares = [width.least for width in widths]
    while sum(shares) > room and max(shares) > 1:  # a word that is wider than the screen is folded
        shares[shares.index(max(shares))] -= 1
    left = room - sum(shares)
    needs = sorted(range(len(widths)), key=lambda k: widths[k].whole - shares[k])
    for done, k in enumerate(needs):
        more = min(widths[k].whole - shares[k], left // (len(needs) - done))
        shares[k] += more
        left -= more
    return shares
