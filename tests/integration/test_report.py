"""The report of real trainings: a comparison that is finished, one that is not, and a single run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import multiflora
from multiflora.analysis.files import has_update
from multiflora.comparison.saved import read_comparison
from multiflora.errors import ConfigError
from tests.cli.parts import save_model, write_task

SMALL = {"max_steps": 2, "batch_size": 4, "max_length": 64, "log_every": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    save_model(folder / "model")
    for name in ("roses", "tulips"):
        write_task(folder, name)
    return folder


@pytest.fixture(scope="module")
def comparison(place: Path) -> Path:
    plan: dict[str, Any] = {
        "model": str(place / "model"),
        "tasks": [str(place / "roses.jsonl"), str(place / "tulips.jsonl")],
        "train": SMALL,
        "evaluate": {"limit": 2, "batch_size": 4},
        "output": str(place / "comparison"),
        "compare": {"methods": [{"lora": {"r": 4}}, {"rlora": {"num_heads": 2}}, "ia3"], "seeds": 2},
    }
    multiflora.compare(plan, quiet=True)
    return place / "comparison"


def test_a_finished_comparison_is_looked_into_and_shown(comparison: Path) -> None:
    written = multiflora.report(comparison)
    text = written.page.read_text("utf-8")
    assert written.answer in text
    assert "Cumulative energy of the update" in text
    assert "rlora: Load of each head by task" in text
    assert "is not finished" not in text
    assert str(comparison.parent) not in text  # where things lie on this machine is nobody's business
    assert ".../roses.jsonl" in text


def test_an_adapter_is_measured_once_in_its_cell(comparison: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {path.parents[1].name for path in (comparison / "runs").glob("*/analysis/analysis.json")}
    assert own == {path.name for path in (comparison / "runs").glob("*-seed*") if not path.name.startswith("ia3")} | {
        path.name for path in (comparison / "runs").glob("ia3-seed*") if has_update("ia3")
    }
    with monkeypatch.context() as patch:  # neither a report nor an analysis loads a model again

        def load(*_: Any) -> None:
            raise AssertionError("a model was loaded")

        patch.setattr("multiflora.analysis.run.load_target", load)
        text = multiflora.report(comparison).page.read_text("utf-8")
        assert "Cumulative energy of the update" in text
        multiflora.analyze(comparison, draw=False)
    # a comparison of an earlier version has no measures: then they are made
    for path in (comparison / "runs").glob("*/analysis/analysis.json"):
        path.unlink()
    (comparison / "analysis" / "analysis.json").unlink()
    assert "have not been measured" in multiflora.report(comparison, measure=False).page.read_text("utf-8")
    assert "Cumulative energy of the update" in multiflora.report(comparison).page.read_text("utf-8")


def test_what_is_saved_reads_back_as_it_was(comparison: Path) -> None:
    saved = read_comparison(comparison)
    assert saved.missing == 0
    assert json.loads((comparison / "summary.json").read_text()) == json.loads(json.dumps(saved.summary.to_dict()))


def unfinished(comparison: Path, to: Path, *gone: str) -> Path:
    """A copy beside it (paths in it are relative to its folder) as it was before some cells were finished."""
    to = comparison.with_name(to.name)
    shutil.copytree(comparison, to, ignore=shutil.ignore_patterns("summary.json", "analysis"))
    for cell in gone:
        (found,) = (to / "cells").glob(f"{cell}-*.json")
        found.unlink()
    return to


def test_an_unfinished_comparison_says_what_it_rests_on(comparison: Path, tmp_path: Path) -> None:
    folder = unfinished(comparison, tmp_path / "half", "rlora-seed1", "ia3-seed0", "ia3-seed1")
    saved = read_comparison(folder)
    assert (saved.missing, saved.left_out, saved.summary.seeds) == (3, 1, (0,))
    assert [row.label for row in saved.summary.rows] == ["lora", "rlora"]
    text = multiflora.report(folder, measure=False).page.read_text("utf-8")
    assert "This comparison is not finished: 3 of 6 trainings are missing." in text
    assert "What follows rests on seed 0 of lora, rlora. 1 finished training" in text
    assert "Nothing can be said of rlora against lora from one seed" in text


def test_a_comparison_of_an_earlier_recipe_is_not_mixed_in(comparison: Path, tmp_path: Path) -> None:
    folder = unfinished(comparison, tmp_path / "changed")
    plan = folder / "comparison.yaml"
    plan.write_text(plan.read_text().replace("max_steps: 2", "max_steps: 3"))
    with pytest.raises(ConfigError, match=r"No training of the comparison in .*changed has finished yet"):
        read_comparison(folder)


def test_without_its_baseline_nothing_is_compared(comparison: Path, tmp_path: Path) -> None:
    folder = unfinished(comparison, tmp_path / "bare", "lora-seed0", "lora-seed1")
    saved = read_comparison(folder)
    assert saved.summary.answer == (
        "lora, the baseline, has no finished training yet, so nothing can be compared with it."
    )
    assert "Nothing was measured that rlora and lora could be compared by." in saved.summary.sentences["rlora"]
    multiflora.report(folder, measure=False)


def test_a_whole_comparison_without_its_summary_says_the_same(comparison: Path, tmp_path: Path) -> None:
    folder = unfinished(comparison, tmp_path / "whole")
    ours, theirs = read_comparison(folder).summary, read_comparison(comparison).summary
    assert json.loads(json.dumps(ours.to_dict())) == json.loads(json.dumps(theirs.to_dict()))


def test_one_run_shows_before_and_after(place: Path) -> None:
    tasks = [str(place / "roses.jsonl"), str(place / "tulips.jsonl")]
    recipe = {"model": str(place / "model"), "tasks": tasks, "train": SMALL, "evaluate": {"limit": 4}}
    for method, name in (("rlora", "one"), ("lora", "other")):
        multiflora.train({**recipe, "method": method, "output": str(place / name)}, quiet=True)
    multiflora.analyze(place / "one", against=place / "other", examples=2, draw=False)
    written = multiflora.report(place / "one")
    text = written.page.read_text("utf-8")
    results = json.loads((place / "one" / "results.json").read_text())
    before, after = (f"{100 * results[when]['macro']:.1f}" for when in ("base", "adapted"))
    moved = f"stayed at {after}" if before == after else f"from {before} to {after}"
    assert f"{moved} points of 100 on these test rows" in written.answer
    for part in (
        "Scores before and after",
        "What was trained on",
        "Training loss by task",
        "Singular values by layer and module",
        "Similarity of the update&#39;s directions by layer",
        "Do tasks pull the same way?",
        "multiflora train recipe.yaml",
    ):
        assert part in text, part
    assert (place / "one" / "report" / "scores.png").is_file()
    assert (place / "one" / "report" / "table-scores.csv").is_file()
