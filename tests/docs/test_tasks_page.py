"""docs/tasks.md shows every form of a row that is read: each is read here, as a file of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import blocks_of

from multiflora.tasks import load_task
from multiflora.tasks.load import examples_of

ROWS = [line for block in blocks_of("tasks.md") if block.language == "text" for line in block.text.splitlines() if line]


def test_there_are_rows() -> None:
    assert len(ROWS) > 20


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_read(row: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    task = load_task({"name": "t", "source": {"test": str(tmp_path / "rows.jsonl")}})
    example = examples_of(task, "test")[0]
    assert example.completion.strip().endswith("yes" if "even" in row else "4")
    assert "weight" not in row or "5" in example.prompt
    assert ("answer" in row) == (example.answer is not None)
