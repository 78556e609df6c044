"""From cells to claims: methods that do not differ have no winner, and one that does is found."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from multiflora.comparison.summary import summarise
from multiflora.errors import DataError
from tests.unit.comparison.made_cells import EXTRA, TASKS, made_cells, made_comparison, made_competitors, made_tunings

LABELS = ["lora", "one", "two", "three", "four"]


def summed(labels, cells, seeds=3):
    return summarise(made_comparison(labels, seeds), made_competitors(labels), cells, made_tunings(labels))


def summary_of(generator, labels=LABELS, **made):
    seeds = made.get("seeds", 3)
    cells = made_cells(generator, labels, **made)
    return summed(labels, cells, seeds), cells


def has_winner(summary) -> bool:
    return "better" in summary.answer or "worse" in summary.answer


@pytest.mark.parametrize(("labels", "luck"), [(LABELS, 0.1), (LABELS[:2], 0.0), (LABELS[:2], 0.4)])
def test_a_method_against_itself_has_no_winner_in_97_of_100(labels, luck):
    """Competitors that are one method: no claim, by either measure, in at least 97 of 100 comparisons."""
    generator = np.random.default_rng(11)
    winners = sum(has_winner(summary_of(generator, labels, rows=50, luck=luck, own=0.0)[0]) for _ in range(33))
    assert winners <= 1


def test_the_very_same_cells_have_no_winner():
    _, cells = summary_of(np.random.default_rng(0), ["lora"])
    twice = [*cells, *({**cell, "label": "again"} for cell in cells if cell["kind"] == "seed")]
    summary = summed(["lora", "again"], twice)
    assert summary.answer.startswith("Undecided: no difference to lora could be shown for any method (again).")
    assert "was 0.0 points higher (95 % interval 0.0 to 0.0, p = 1.00" in summary.sentences["again"]


def test_a_better_method_is_found_and_the_others_are_not():
    summary, _ = summary_of(np.random.default_rng(1), rows=200, gains={"two": 0.8}, own=0.0, seeds=5)
    assert summary.answer.startswith("two did better than lora. Undecided: for one, three and four no difference")
    assert [row.verdict for row in summary.rows] == ["undecided", "undecided", "better", "undecided", "undecided"]


def test_means_and_intervals_are_those_of_the_seeds():
    summary, cells = summary_of(np.random.default_rng(2))
    own = [cell for cell in cells if cell["label"] == "one"]
    by_seed = [np.mean([cell["scores"]["tasks"][task]["score"] for task in TASKS]) for cell in own]
    row = next(row for row in summary.rows if row.label == "one")
    assert row.score.mean.mean == pytest.approx(np.mean(by_seed))
    low, high = stats.t.interval(0.95, 2, np.mean(by_seed), stats.sem(by_seed))
    assert row.score.mean[1:] == pytest.approx((low, high))
    kept = [cell["scores"]["tasks"][EXTRA]["score"] - cells[0]["scores"]["tasks"][EXTRA]["score"] for cell in own]
    assert row.kept.mean == pytest.approx(np.mean(kept))
    assert row.seconds.mean == 61
    assert (row.memory, row.latency) == (2**30, pytest.approx(0.1))


def test_the_corrected_p_counts_every_method_and_measure():
    summary, _ = summary_of(np.random.default_rng(3))
    plain = [m.difference.p for row in summary.rows for m in (row.score, row.nll) if m.difference]
    corrected = [m.p for row in summary.rows for m in (row.score, row.nll) if m.difference]
    assert len(plain) == 8
    assert min(corrected) == pytest.approx(min(1.0, 8 * min(plain)))


def test_the_order_of_cells_does_not_matter():
    labels = ["lora", "one"]
    cells = made_cells(np.random.default_rng(4), labels)
    assert summed(labels, cells) == summed(labels, cells[::-1])


def test_other_rows_are_refused():
    labels = ["lora", "one"]
    cells = made_cells(np.random.default_rng(5), labels)
    cells[2]["rows"][TASKS[0]]["id"][0] = "another"
    with pytest.raises(DataError, match="one-seed1 and lora-seed1 were scored on different rows of rg_chain_sum"):
        summed(labels, cells)


def with_rows_of_their_own(cells):
    """The same cells, as if each seed's data had been drawn anew."""
    for cell in cells:
        for rows in cell["rows"].values():
            rows["id"] = [f"{cell['seed']}-{row}" for row in rows["id"]]
    return cells


def test_rows_drawn_anew_with_each_seed_are_paired_within_it():
    """The spread over seeds has the rows' chance in it: the paired t-test, whatever the rows do."""
    labels = ["lora", "one"]
    cells = with_rows_of_their_own(made_cells(np.random.default_rng(5), labels, own=2.0, rows=20, seeds=4))
    one = summed(labels, cells, 4).rows[1].score
    assert one.difference.p == pytest.approx(one.over_seeds.p, rel=1e-2)  # and a score's rounding
    cells[2]["rows"][TASKS[0]]["id"] = cells[1]["rows"][TASKS[0]]["id"]
    with pytest.raises(DataError, match="were scored on different rows of rg_chain_sum"):
        summed(labels, cells, 4)


def spec_with(labels, seeds, **keys):
    comparison = made_comparison(labels, seeds)
    return comparison.model_copy(update={"compare": comparison.compare.model_copy(update=keys)})


def test_with_a_margin_equal_methods_are_shown_to_be_no_worse():
    labels = ["lora", "one"]
    cells = made_cells(np.random.default_rng(3), labels, rows=400, seeds=8, own=0.0)
    for margin, verdict in ((None, "undecided"), (0.01, "undecided"), (10.0, "no worse")):
        summary = summarise(spec_with(labels, 8, margin=margin), made_competitors(labels), cells, made_tunings(labels))
        assert summary.rows[1].verdict == verdict
    assert summary.answer.startswith("one is no worse than lora by 10 points or more.")
    assert summary.sentences["one"].startswith("one is no worse than lora by 10 points or more: its macro score was")


def test_undecided_comes_with_the_seeds_that_would_decide_and_what_they_cost():
    summary, _ = summary_of(np.random.default_rng(0), ["lora", "one"], rows=50, gains={"one": 0.12}, own=0.0)
    one = summary.rows[1]
    assert one.verdict == "undecided"
    assert summary.seed_seconds == 2 * 61
    minutes = round(one.further_seeds * 122 / 60)
    assert f"About {one.further_seeds} further seeds ({minutes} min for all methods) would decide it" in one.sentence


def test_before_the_seeds_of_a_planned_look_are_there_nothing_is_claimed():
    """A report that is opened half-way is no look."""
    labels = ["lora", "one"]
    cells = made_cells(np.random.default_rng(1), labels, rows=200, gains={"one": 2.0}, own=0.0, seeds=5)
    early = [cell for cell in cells if cell["seed"] < 4]
    assert summed(labels, cells, 5).rows[1].verdict == "better"
    assert summed(labels, early, 5).rows[1].verdict == "undecided"
    assert "nothing is claimed yet" in summed(labels, early, 5).sentences["one"]


def test_a_method_that_diverged_is_told_of_and_not_averaged():
    labels = ["lora", "one", "two"]
    cells = made_cells(np.random.default_rng(6), labels)
    cells[4]["rows"][TASKS[0]]["nll"][0] = None
    summary = summed(labels, cells)
    assert summary.sentences["one"] == "one diverged in 1 of 3 trainings; lower its learning rate."
    assert summary.rows[1].score is None
    assert summary.rows[2].score is not None
    json.dumps(summary.to_dict(), allow_nan=False)


def test_one_seed_gives_no_test():
    summary, _ = summary_of(np.random.default_rng(7), ["lora", "one"], seeds=1)
    assert "Nothing can be said of one against lora from one seed" in summary.sentences["one"]
    assert summary.rows[1].score.p is None


def test_generated_answers_have_a_score_and_no_nats():
    labels = ["lora", "one"]
    cells = made_cells(np.random.default_rng(8), labels)
    for cell in cells:
        for task, rows in cell["rows"].items():
            rows["nll"] = [None] * len(rows["nll"])
            cell["scores"]["tasks"][task]["metric"] = "verifier"
    summary = summed(labels, cells)
    assert summary.rows[1].nll is None
    assert summary.rows[1].score is not None


def test_the_table_and_the_json_hold_it_all():
    from rich.console import Console

    summary, _ = summary_of(np.random.default_rng(9), ["lora", "one"])
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary.table())
    text = console.export_text()
    assert "lora" in text
    assert "+10%" in text
    plain = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert plain["rows"][1]["score"]["difference"]["interval"].keys() == {"mean", "low", "high"}
    assert plain["curves"]["one"][TASKS[0]][0] == [10, 2.0]


def test_tasks_of_the_harness_are_in_the_summary_and_count_as_not_trained_on():
    summary, cells = summary_of(np.random.default_rng(3), ["lora", "one"], harness=("harness/sky",))
    assert summary.extra == (EXTRA, "harness/sky")
    assert summary.metrics["harness/sky"] == "acc"
    assert summary.counts["harness/sky"] == 100
    own = [cell["scores"]["tasks"]["harness/sky"]["score"] for cell in cells if cell["label"] == "one"]
    row = next(row for row in summary.rows if row.label == "one")
    assert row.tasks["harness/sky"].mean == pytest.approx(np.mean(own))
    base = [cells[0]["scores"]["tasks"][task]["score"] for task in (EXTRA, "harness/sky")]
    after = [np.mean([c["scores"]["tasks"][t]["score"] for t in summary.extra]) for c in cells if c["label"] == "one"]
    assert row.kept.mean == pytest.approx(np.mean(after) - np.mean(base))


@pytest.mark.parametrize("untuned", ["lora", "two"])
def test_where_one_of_two_is_not_tuned_no_winner_is_named(untuned):
    labels = ["lora", "one", "two"]
    cells = made_cells(np.random.default_rng(1), labels, rows=200, gains={"two": 0.8}, own=0.0, seeds=5)
    tunings = {label: found for label, found in made_tunings(labels).items() if label != untuned}
    summary = summarise(made_comparison(labels, 5), made_competitors(labels), cells, tunings)
    assert "did better" not in " ".join([summary.answer, *summary.sentences.values()])
    said = summary.sentences["two"]
    assert said.startswith(f"Nothing is said of two against lora yet: the learning rate of {untuned} is not tuned")
    assert "multiflora compare out/comparison.yaml --set compare.learning_rate.trials=5" in said
    assert next(row for row in summary.rows if row.label == untuned).tuning.state == "not tuned"
    assert "did better than lora" in summed(labels, cells, 5).sentences["two"]
