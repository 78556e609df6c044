"""What the page on choosing says follows from the summary's own tests, whichever way they went."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import choosing  # noqa: E402
import docs_tables  # noqa: E402

PAGE = (ROOT / "docs" / "choosing.md").read_text("utf-8")


def ends(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def row(
    label: str, score: float, *, difference: float | None = None, p: float | None = None, seconds: float = 60.0
) -> dict[str, Any]:
    """A method's row as a summary's JSON has it."""
    found = None if difference is None else {"interval": ends(difference, 0.01), "p": p}
    measure = {
        "mean": ends(score, 0.01),
        "difference": found,
        "p": p,
    }
    return {
        "label": label,
        "method": label,
        "rank": 8,
        "parameters": 1234,
        "score": measure,
        "nll": None,
        "seconds": ends(seconds, 5.0),
        "memory": 2e9,
        "latency": 0.2,
        "sentence": f"What was found of {label}.",
    }


def summary(*rows: Any, seeds: tuple[int, ...] = (0, 1, 2)) -> Mapping[str, Any]:
    return {
        "answer": "The answer.",
        "reference": "lora",
        "rows": rows,
        "seeds": seeds,
        "budget": "1,234 trainable parameters",
        "counts": {"sst2": 200},
        "device": "cpu",
    }


def test_where_nothing_was_shown_the_baseline_is_advised() -> None:
    text = choosing.measured(summary(row("lora", 0.5), row("rlora", 0.52, difference=0.02, p=0.3)))
    assert "start with **LoRA**: nothing was shown to be better" in text
    assert "+2.0 (1.0 to 3.0)" in text
    assert "What was found of rlora." in text


def test_the_best_of_those_shown_to_be_better_is_advised() -> None:
    rows = [
        row("lora", 0.5),
        row("rlora", 0.55, difference=0.05, p=0.01),
        row("mlora", 0.58, difference=0.08, p=0.001),
        row("multilora", 0.7, difference=0.2, p=0.2),  # higher, and not shown
    ]
    text = choosing.measured(summary(*rows))
    assert "start with **M-LoRA**: better than LoRA by 7.0 to 9.0 points." in text
    assert "resamples" not in text


def test_what_was_shown_to_be_worse_is_named() -> None:
    text = choosing.measured(summary(row("lora", 0.5), row("multilora", 0.4, difference=-0.1, p=0.01)))
    assert "start with **LoRA**" in text
    assert "MultiLoRA did worse" in text


def test_one_seed_is_not_enough_to_choose_by() -> None:
    text = choosing.measured(summary(row("lora", 0.5), row("rlora", 0.6, difference=0.1), seeds=(0,)))
    assert "not enough to choose by" in text
    assert "start with" not in text


@pytest.mark.parametrize(("seconds", "overlap"), [(62.0, True), (90.0, False)])
def test_times_are_told_apart_only_where_their_intervals_are(seconds: float, overlap: bool) -> None:
    text = choosing.measured(summary(row("lora", 0.5), row("rlora", 0.5, difference=0.0, p=1.0, seconds=seconds)))
    assert ("intervals overlap" in text) == overlap


@pytest.mark.parametrize("name", ["measured", "relatives"])
def test_only_the_named_section_is_replaced(name: str) -> None:
    page = choosing.put(PAGE, "new", name)
    assert choosing.put(page, "newer", name) == choosing.put(PAGE, "newer", name)
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, after = PAGE.split(begin)[0], PAGE.split(end)[1]
    assert page == f"{before}{begin}\n\nnew\n\n{end}{after}"


def test_a_section_that_is_not_there_is_said() -> None:
    with pytest.raises(SystemExit, match="no place for 'absent'"):
        choosing.put(PAGE, "new", "absent")


@pytest.mark.parametrize(
    ("name", "folder"), [("measured", "four_tasks"), ("relatives", "relatives"), ("smaller", "smaller")]
)
def test_the_page_is_as_its_summary_has_it(name: str, folder: str) -> None:
    summary = json.loads((ROOT / "docs" / "results" / folder / "summary.json").read_text("utf-8"))
    text = choosing.measured(summary)
    assert choosing.put(PAGE, text, name) == PAGE, f"run tools/choosing.py on {folder}'s summary.json again"


@pytest.mark.parametrize(
    ("difference", "p", "word"),
    [(0.1, 0.01, "better (+9.0 to +11.0 points)"), (-0.1, 0.01, "worse"), (0.1, 0.2, "no difference shown")],
)
def test_a_methods_page_says_what_was_measured_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, difference: float, p: float, word: str
) -> None:
    folder = tmp_path / "results" / "two_tasks"
    folder.mkdir(parents=True)
    rows = row("lora", 0.5), row("rlora", 0.6, difference=difference, p=p)
    folder.with_suffix(".md").write_text("# Two methods on two tasks\n", "utf-8")
    (folder / "summary.json").write_text(json.dumps(summary(*rows)), "utf-8")
    monkeypatch.setattr(docs_tables, "DOCS", tmp_path)
    (found,) = docs_tables.measured("rlora")
    assert found.startswith("[Two methods on two tasks](/results/two_tasks.md): 60.0% macro score, lora 50.0%: ")
    assert word in found
    assert list(docs_tables.measured("lora")) == [
        "[Two methods on two tasks](/results/two_tasks.md): 50.0% macro score"
    ]
    assert not list(docs_tables.measured("mlora"))
