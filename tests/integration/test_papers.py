"""The small twins of the papers' set-ups are run, very short, on a model of a few thousand parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import multiflora
from tests.cli.parts import save_model

PAPERS = Path(__file__).parents[2] / "configs" / "papers"
TWINS = sorted(path.name for path in PAPERS.glob("small_*.yaml"))
SHORT = [
    "compare.seeds=[0]",
    "train.max_steps=1",
    "train.batch_size=2",
    "train.max_length=512",
    "evaluate.limit=1",
]


def test_there_are_four() -> None:
    assert len(TWINS) == 4


@pytest.mark.whole
@pytest.mark.parametrize("name", TWINS)
def test_a_twin_runs(name: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    words = [*SHORT, f"model={json.dumps(str(model))}", f"output={json.dumps(str(tmp_path / 'run'))}"]
    summary = multiflora.compare(PAPERS / name, words, quiet=True)
    assert {row.label for row in summary.rows} == {json.loads(p.read_text())["label"] for p in _cells(tmp_path)} - {
        "base"
    }
    assert all(row.parameters for row in summary.rows)


def _cells(folder: Path) -> list[Path]:
    return sorted((folder / "run" / "cells").glob("*.json"))
