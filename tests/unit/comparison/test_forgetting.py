"""Forgetting is tested against the baseline, paired over seeds and rows, and said in the answer."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from multiflora.comparison.forgetting import forgetting, forgetting_words
from multiflora.comparison.summary import summarise
from tests.unit.comparison.made_cells import EXTRA, made_cells, made_comparison, made_competitors, made_tunings

LABELS = ["lora", "rlora", "multilora"]


def cells_of(lost: float, labels=LABELS, seeds: int = 4):
    """Cells in which rlora loses a share of the rows of the task that was not trained on."""
    cells = made_cells(np.random.default_rng(4), labels, seeds=seeds, rows=300, own=0.0)
    for cell in cells:
        if cell["label"] == "rlora":
            rows = cell["rows"][EXTRA]
            rows["score"] = [0.0 if k < lost * 300 else s for k, s in enumerate(rows["score"])]
            cell["scores"]["tasks"][EXTRA]["score"] = float(np.mean(rows["score"]))
    return cells


def found_in(cells):
    by_label = {label: [cell for cell in cells if cell["label"] == label] for label in LABELS}
    return forgetting(cells[0], by_label, "lora", [EXTRA])


def test_a_method_that_forgets_is_named_in_the_answer_and_the_others_are_not():
    summary = summarise(made_comparison(LABELS, 4), made_competitors(LABELS), cells_of(0.3), made_tunings(LABELS))
    assert summary.forgetting.shown("rlora") == -1
    assert summary.forgetting.shown("multilora") == 0
    said = summary.answer[summary.answer.index("On tasks not trained on") :]
    assert said.startswith(f"On tasks not trained on ({EXTRA}), rlora forgot more than lora (")
    assert "multilora" not in said
    assert "which gained" in said  # the baseline itself, against the untrained model


def test_where_nothing_differs_nothing_is_claimed():
    found = found_in(cells_of(0.0))
    assert {found.shown(label) for label in ("rlora", "multilora")} == {0}
    assert "no method was shown to forget more or less than lora" in forgetting_words(found, "lora")


def test_changes_are_those_from_the_untrained_model():
    cells = cells_of(0.3)
    found = found_in(cells)
    base = cells[0]["scores"]["tasks"][EXTRA]["score"]
    own = [cell["scores"]["tasks"][EXTRA]["score"] - base for cell in cells if cell["label"] == "rlora"]
    assert found.changes["rlora"].mean == pytest.approx(np.mean(own))
    gap = found.changes["rlora"].mean - found.changes["lora"].mean
    assert found.differences["rlora"].interval.mean == pytest.approx(gap)
    assert found.p["rlora"] >= found.differences["rlora"].p


def test_without_such_tasks_there_is_nothing_to_say():
    cells = cells_of(0.0)
    assert forgetting(cells[0], {"lora": cells[1:5]}, "lora", []) is None
    assert forgetting_words(None, "lora") == ""


def test_one_seed_tells_no_forgetting():
    cells = cells_of(0.9, seeds=1)
    assert found_in(cells).shown("rlora") == 0


def test_seeds_with_rows_of_their_own_are_tested_over_seeds_alone():
    cells = cells_of(0.3)
    shared = found_in(cells).differences["rlora"]
    for cell in cells[1:]:
        cell["rows"][EXTRA]["id"] = [f"{cell['seed']}-{k}" for k in range(300)]
    own = found_in(cells).differences["rlora"]
    gains = [
        np.mean(rlora["rows"][EXTRA]["score"]) - np.mean(lora["rows"][EXTRA]["score"])
        for rlora, lora in zip(*([c for c in cells if c["label"] == name] for name in ("rlora", "lora")), strict=True)
    ]
    assert own.p == pytest.approx(stats.ttest_1samp(gains, 0.0).pvalue, rel=2e-3)  # rounding is allowed for
    assert shared.p != pytest.approx(own.p, rel=2e-2)
