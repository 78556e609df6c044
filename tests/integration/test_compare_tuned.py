"""A recipe with a rate far above the usual ones: its comparison ends tuned, near the best rate, without a winner."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import multiflora
from multiflora.compare.cell import run_cell
from multiflora.compare.plan import seed_cell
from multiflora.compare.run import plan_of
from multiflora.compare.spec import load_comparison

SHARED = Path(__file__).parents[3] / "shared"
TASKS = ("trec", "sst2", "commonsenseqa")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SHARED / "models" / "tinylm-1m").is_dir(), reason="the shared model is not there"),
]


def test_it_ends_tuned_near_the_best_rate_and_names_no_winner(tmp_path: Path) -> None:
    comparison = load_comparison(
        {
            "model": str(SHARED / "models" / "tinylm-1m"),
            "tasks": [str(SHARED / "data" / "tasks" / task) for task in TASKS],
            "train": {"max_steps": 60, "batch_size": 16, "max_length": 96, "learning_rate": 5e-3},
            "evaluate": {"batch_size": 50},
            "output": str(tmp_path / "compared"),
            "compare": {
                "methods": [{"lora": {"r": 8}}, "multilora", "rlora"],
                "seeds": 3,
                "learning_rate": {"trials": 2},
            },
        }
    )
    summary = multiflora.compare(comparison, quiet=True)
    said = " ".join([summary.answer, *summary.sentences.values()])
    assert "did better" not in said
    assert "did worse" not in said
    planned = {item.label: item for item in plan_of(comparison)}
    for row in summary.rows:
        assert row.tuning is not None
        assert row.tuning.state == "tuned"
        rates = sorted({trial.rate for trial in row.tuning.tried})
        assert {2e-4, 5e-3} <= set(rates)
        # every rate's training is there; it is only scored, on test rows that the choice has not seen
        rows = {}
        for rate in rates:
            cell = run_cell(seed_cell(comparison, planned[row.label], 0, rate), comparison.recipe.output)
            rows[rate] = {task: np.array(found["score"]) for task, found in cell["rows"].items()}
        for rate in rates:
            gains = [rows[rate][task] - rows[row.tuning.chosen][task] for task in rows[rate]]
            mean = np.mean([gain.mean() for gain in gains])
            error = np.sqrt(sum(gain.var(ddof=1) / len(gain) for gain in gains)) / len(gains)
            # no rate is better by more than a point, as far as these rows can tell
            assert mean - 1.64 * error <= 0.01, (row.label, rate, mean, error)
