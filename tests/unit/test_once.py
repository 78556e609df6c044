"""What is kept, for how long, and that a changed file is seen where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest

from multiflora.once import kept, once
from multiflora.tasks import load_task
from multiflora.tasks.load import examples_of


def test_rows_are_read_once_while_they_are_kept_and_anew_elsewhere(tmp_path: Path):
    file = tmp_path / "roses.jsonl"

    def read() -> str:
        return examples_of(load_task({"source": {"test": str(file)}, "name": "roses"}), "test")[0].completion

    for colour in ("red", "white"):
        file.write_text(f'{{"prompt": "A rose is", "completion": " {colour}"}}\n' * 3)
        assert read() == f" {colour}"
    with kept():
        assert read() == " white"
        file.write_text('{"prompt": "A rose is", "completion": " pink"}\n' * 3)
        assert read() == " white"
    assert read() == " pink"


def test_what_failed_is_not_kept():
    def fail() -> None:
        raise ValueError("once")

    with kept():
        with pytest.raises(ValueError, match="once"):
            once("key", fail)
        assert once("key", lambda: 3) == 3
