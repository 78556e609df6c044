"""Together or alone: Δm by hand, negative transfer found where it is, and nothing claimed where there is nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from multiflora.comparison.transfer import delta_m, transfer_of, transfer_words
from tests.unit.comparison.made_cells import TASKS, made_cells

LABELS = ["lora", "rlora"]


def cells_of(harm: bool = False, seeds: int = 4) -> tuple[dict[str, list[Any]], dict[str, list[Any]], Any]:
    """Methods' cells, single tasks' cells (the very same skill, but for the first task), and the untrained model's."""
    generator = np.random.default_rng(5)
    base, *rest = made_cells(generator, [*LABELS, "alone"], seeds=seeds, rows=400, own=0.0, gains={"alone": 0.0})
    by_label = {label: [cell for cell in rest if cell["label"] == label] for label in (*LABELS, "alone")}
    alone = by_label.pop("alone")
    if harm:
        for cell in alone:
            rows = cell["rows"][TASKS[0]]
            rows["score"] = [1.0] * len(rows["score"])
            cell["scores"]["tasks"][TASKS[0]]["score"] = float(np.mean(rows["score"]))
    return by_label, dict.fromkeys(TASKS, alone), base


def test_delta_m_is_the_mean_relative_gain() -> None:
    assert delta_m({"a": 0.6, "b": 0.3}, {"a": 0.5, "b": 0.4}) == pytest.approx((0.2 - 0.25) / 2)
    assert delta_m({"a": 0.6, "n": 1.0}, {"a": 0.5, "n": 2.0}, lower=["n"]) == pytest.approx((0.2 + 0.5) / 2)
    assert delta_m({"a": 0.6}, {"a": 0.0}) is None


def test_the_gains_of_each_seed_are_taken_beside_that_seeds_own_models() -> None:
    by_label, single, base = cells_of()
    found = transfer_of("each", by_label, single, base, rank=8, parameters=4000, matrix=True)
    by_seed = [
        np.mean([c["scores"]["tasks"][t]["score"] / single[t][k]["scores"]["tasks"][t]["score"] - 1 for t in TASKS])
        for k, c in enumerate(by_label["rlora"])
    ]
    assert found.delta_m["rlora"].interval.mean == pytest.approx(np.mean(by_seed))
    gain = found.matrix[TASKS[0]][TASKS[1]]
    own = np.mean([cell["scores"]["tasks"][TASKS[1]]["score"] for cell in single[TASKS[0]]])
    assert gain == pytest.approx(own - base["scores"]["tasks"][TASKS[1]]["score"])
    assert not transfer_of("each", by_label, single, base, rank=8, parameters=1, matrix=False).matrix


def test_negative_transfer_is_found_where_it_is_and_nowhere_else() -> None:
    for harm, expected in ((False, ()), (True, (TASKS[0],))):
        found = transfer_of("together", *cells_of(harm), rank=2, parameters=1000, matrix=False)
        assert dict(found.negative) == dict.fromkeys(LABELS, expected)
        assert ("do worse together than alone" in transfer_words([found])) == bool(expected)


def test_seeds_with_rows_of_their_own_are_tested_over_seeds_alone() -> None:
    by_label, single, base = cells_of(harm=True)
    shared = transfer_of("together", by_label, single, base, rank=2, parameters=1000, matrix=False)
    for cell in (cell for cells in (*by_label.values(), *single.values()) for cell in cells):
        for rows in cell["rows"].values():
            rows["id"] = [f"{cell['seed']}-{k}" for k in range(400)]
    own = transfer_of("together", by_label, single, base, rank=2, parameters=1000, matrix=False)
    gains = [
        np.mean(rlora["rows"][TASKS[1]]["score"]) - np.mean(alone["rows"][TASKS[1]]["score"])
        for rlora, alone in zip(by_label["rlora"], single[TASKS[1]], strict=True)
    ]
    assert own.tasks["rlora"][TASKS[1]].p == pytest.approx(
        stats.ttest_1samp(gains, 0.0).pvalue, rel=2e-3
    )  # rounding is allowed for
    assert shared.tasks["rlora"][TASKS[1]].p != pytest.approx(own.tasks["rlora"][TASKS[1]].p, rel=2e-2)


def test_nothing_is_claimed_against_loras_that_are_not_tuned() -> None:
    waits = {"lora": "", "rlora": "the rate is not tuned (multiflora compare c.yaml)"}
    found = transfer_of("together", *cells_of(harm=True), rank=2, parameters=1000, matrix=False, missing=waits)
    assert dict(found.negative) == {"lora": (TASKS[0],), "rlora": ()}
    said = transfer_words([found])
    assert "Nothing is said of rlora against one LoRA per task that share the budget yet: the rate is not tuned" in said
    assert "rlora" not in said.replace("Nothing is said of rlora", "")
    assert f"Tasks that do worse together than alone: {TASKS[0]} with lora." in said


def test_the_words_say_what_was_shown_and_no_more() -> None:
    found = transfer_of("each", *cells_of(), rank=8, parameters=4000, matrix=False)
    start = "Against one LoRA per task of the whole budget each, on average over tasks (Δm): "
    assert transfer_words([found]).startswith(f"{start}no gain or loss could be shown for lora (")
    assert transfer_words([]) == ""
