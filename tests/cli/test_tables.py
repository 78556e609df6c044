"""Every table of the command line: at 80 columns and in a file all its words are there, and no line is longer."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console, Group
from rich.text import Text
from typer.testing import CliRunner

from multiflora.bench.results import load
from multiflora.bench.table import verdict_table
from multiflora.cli import app
from multiflora.comparison.summary import summarise
from multiflora.comparison.table import plan_table
from multiflora.data.table import mixture_table
from multiflora.doctor import diagnose
from multiflora.evaluation.table import results_table
from multiflora.export.compose import Composition
from multiflora.export.report import AdapterReport, LayerReport, Report, TaskScores
from multiflora.text_table import TextTable
from tests.unit.comparison.made_cells import made_cells, made_comparison, made_competitors

LABELS = ["lora", "multilora_with_three_branches", "moelora", "rlora"]
PAGE = Path(__file__).parents[2] / "docs" / "performance" / "results.json"


def _converted() -> Report:
    layers = tuple(LayerReport(f"model.layers.{k}.self_attn.q_proj", 24, 0.1234, 0.0123, 0.001) for k in range(2))
    made = tuple(AdapterReport(f"adapter-of-{task}", task, False, layers) for task in ("commonsenseqa", "sst2"))
    scores = (TaskScores("commonsenseqa", "acc_norm", 1221, 0.5123, 0.5011, 0.0142, 1.2345, 1.2346),)
    return Report(method="rlora", how="fit", output=Path("runs/" + "a-long-name/" * 6), adapters=made, scores=scores)


def _summary() -> TextTable:
    cells = made_cells(np.random.default_rng(0), LABELS, rows=60, gains={"rlora": 1.2}, own=0.0)
    table = summarise(made_comparison(LABELS), made_competitors(LABELS), cells, {}).table()
    assert isinstance(table, TextTable)
    return table


def _results() -> TextTable:
    score = {"score": 0.5, "metric": "exact_match", "n": 12345, "stderr": 0.0123, "nll": None, "other": {}}
    tasks = {
        "a_task_with_a_long_name_that_says_it_all": {**score, "group": "tasks"},
        "harness/another_task": {**score, "group": "harness"},
    }
    found: Any = {"tasks": tasks, "macro": 0.5}
    return results_table(found, found)


def _mixture() -> TextTable:
    row = {"examples": 12_345_678, "share_of_examples": 0.5, "tokens": 123_456_789, "share_of_tokens": 0.123}
    row |= {"loss_tokens": 12_345_678, "share_of_loss_tokens": 0.89, "passes": 12.5}
    return mixture_table({"a_task_with_a_long_name": row})


TABLES: dict[str, Callable[[], Any]] = {
    "compare": _summary,
    "compare --dry-run": lambda: plan_table(made_competitors(LABELS), made_comparison(LABELS)),
    "train": _results,
    "train --dry-run": _mixture,
    "convert": lambda: _converted().table(),
    "convert --score": lambda: _converted().score_table(),
    "convert --layers": lambda: _converted().layer_table(_converted().adapters[0]),
    "compose": lambda: Composition(Path("out"), ("runs/one", "runs/other" * 9), (0.5, -0.25), "sum").table(),
    "bench": lambda: verdict_table(load(PAGE)),
    "doctor": lambda: diagnose().report(),
}


def words(table: TextTable) -> Iterator[str]:
    for column in table.columns:
        for cell in ([column.header] if table.show_header else []) + list(column.cells):
            yield from (cell if isinstance(cell, Text) else Text.from_markup(str(cell))).plain.split()


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("command", TABLES)
def test_no_word_is_cut_and_no_line_too_long(command: str, width: int) -> None:
    table = TABLES[command]()
    file = io.StringIO()
    Console(width=width, file=file, color_system=None).print(table)
    text = file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    for part in table.renderables if isinstance(table, Group) else [table]:
        for word in words(part):
            if len(word) <= width // 3:  # a longer one may be folded
                assert word in text, word


@pytest.mark.parametrize("line", ["tasks", "methods", "methods show prefix", "doctor"])
def test_the_same_from_the_command_into_a_file(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ended = CliRunner().invoke(app, line.split())
    assert ended.exit_code == 0
    assert len(ended.output.splitlines()) > 5
    assert "…" not in ended.output
    assert all(len(text) <= 80 for text in ended.output.splitlines())
