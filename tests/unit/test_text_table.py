"""A table shows every word of it at any width, and every line of it fits."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from multiflora.text_table import TextTable


def shown(table: object, width: int) -> str:
    file = io.StringIO()
    Console(width=width, file=file, color_system=None).print(table)
    return file.getvalue()


def wide(rows: int = 2) -> TextTable:
    table = TextTable("method", title="Methods", caption="and so on")
    for header in ("rank", "parameters", "macro", "± to baseline", "p", "place", "nats", "train s", "latency"):
        table.add_column(header, justify="right")
    for k in range(rows):
        table.add_row(
            f"m{k}", "16", "12,345,678", "36.1 ±2.4", "+1.3 [-1.2, +3.1]", "0.003", "1-3", "1.2345", "7", "+9%"
        )
    return table


def test_a_table_that_fits_is_one_table():
    assert len(shown(wide(), 200).splitlines()) == 5


@pytest.mark.parametrize("width", [28, 40, 80])
def test_what_does_not_fit_stands_in_blocks_under_the_first_column(width):
    lines = shown(wide(), width).splitlines()
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    heads = sum(line.startswith("method") for line in lines)
    assert heads > 1
    for cell in ("12,345,678", "36.1 ±2.4", "+1.3 [-1.2, +3.1]", "0.003", "1-3", "1.2345", "+9%"):
        assert text.count(cell) == 2, cell
    assert text.count("m0") == text.count("m1") == heads
    assert (text.count("Methods"), text.count("and so on")) == (1, 1)


def test_sentences_wrap_between_words_and_long_words_are_folded():
    table = TextTable("task", "what it asks")
    table.add_row("roses", "whether a rose is red, " * 8)
    table.add_row("x" * 50, Text("y" * 70))
    lines = shown(table, 40).splitlines()
    assert all(len(line) <= 40 for line in lines)
    assert "".join(lines).count("y") == 70
    assert "…" not in "".join(lines)
    assert "".join(lines).count("whether") == 8


def test_sections_and_styles_are_kept():
    table = TextTable("a", "b")
    table.add_row("1", "[green]2[/]", end_section=True)
    table.add_row("3", "4", style="bold")
    assert str(table).splitlines() == ["a  b", "1  2", "3  4"]


def test_a_table_without_columns_is_empty():
    assert shown(TextTable(), 80).strip() == ""
