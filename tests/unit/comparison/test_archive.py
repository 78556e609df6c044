"""The analysis can be redone from one file."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from multiflora.comparison.archive import analyse, write_archive
from multiflora.comparison.summary import summarise
from multiflora.errors import ConfigError
from tests.unit.comparison.made_cells import made_cells, made_comparison, made_competitors, made_tunings

LABELS = ["lora", "one", "two"]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "cells.json.gz"
    cells = made_cells(np.random.default_rng(0), LABELS, gains={"one": 1.0}, own=0.0, seeds=5)
    write_archive(path, made_comparison(LABELS, 5), made_competitors(LABELS), cells, made_tunings(LABELS))
    return path


def test_the_analysis_is_the_same_again(written: Path):
    cells = made_cells(np.random.default_rng(0), LABELS, gains={"one": 1.0}, own=0.0, seeds=5)
    first = summarise(made_comparison(LABELS, 5), made_competitors(LABELS), cells, made_tunings(LABELS))
    again = analyse(written)
    assert again.sentences == first.sentences
    assert again.rows[1].score == first.rows[1].score
    assert again.rows[1].verdict == "better"
    assert again.rows[2].nll.difference.p == pytest.approx(first.rows[2].nll.difference.p, rel=1e-4)


def test_a_margin_can_be_set_afterwards(written: Path):
    assert analyse(written).rows[2].verdict == "undecided"
    assert analyse(written, ["compare.margin=30"]).rows[2].verdict == "no worse"


def test_the_same_cells_make_the_same_small_file(written: Path, tmp_path: Path):
    cells = made_cells(np.random.default_rng(0), LABELS, gains={"one": 1.0}, own=0.0, seeds=5)
    write_archive(tmp_path / "b", made_comparison(LABELS, 5), made_competitors(LABELS), cells, made_tunings(LABELS))
    assert (tmp_path / "b").read_bytes() == written.read_bytes()
    assert written.stat().st_size < 8 * 15 * 500  # bytes for each row of each training, its ids included


@pytest.mark.parametrize(
    "data",
    [b"", b"no gzip", gzip.compress(b"{}", mtime=0), gzip.compress(b"[1,", mtime=0), b"\x1f\x8b\x08"],
    ids=["empty", "no gzip", "no list", "cut JSON", "cut gzip"],
)
def test_what_is_no_such_file_is_told(tmp_path: Path, data: bytes):
    (tmp_path / "cells.json.gz").write_bytes(data)
    with pytest.raises(ConfigError, match="is no file of a comparison's cells"):
        analyse(tmp_path / "cells.json.gz")
