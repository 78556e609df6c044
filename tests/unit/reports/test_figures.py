"""What the figures of a report are drawn from."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

from multiflora.analysis import plots
from multiflora.comparison.statistics import Interval
from multiflora.comparison.summary import summarise
from multiflora.comparison.tuning import not_tuned
from multiflora.reports import figures
from multiflora.reports.recipes import shown_recipe
from multiflora.reports.tables import interval, number, p_value, size
from multiflora.reports.tuning import tuning_section
from tests.unit.comparison.made_cells import made_cells, made_comparison, made_competitors, made_tunings

LABELS = ["lora", "one", "two"]


@pytest.fixture(scope="module")
def summary():
    cells = made_cells(np.random.default_rng(1), LABELS, rows=60)
    return summarise(made_comparison(LABELS), made_competitors(LABELS), cells, made_tunings(LABELS))


def by_name(drawings):
    return {drawing.name: drawing for drawing in drawings}


def test_every_measure_has_its_means_and_differences(summary):
    found = by_name(figures.scores(summary))
    assert list(found) == [f"{what}-{key}" for key in ("score", "nll") for what in ("means", "differences")]
    one = summary.rows[1].score
    low, high = (100 * end for end in one.difference.interval[1:])
    assert f"one {100 * one.difference.interval.mean:.1f} ({low:.1f} to {high:.1f})" in found["differences-score"].alt
    assert "lora" not in found["differences-score"].alt.partition(":")[2].partition(":")[2]


def test_score_and_loss_are_drawn_against_the_learning_rate(summary):
    section = tuning_section(summary)
    assert [drawing.name for drawing in section.figures] == ["rates-score", "rates-loss"]
    assert "lora: 40 at 0.000333, 50 at 0.001, 40 at 0.003" in section.figures[0].alt
    assert "one: 2 at 0.000333, 1 at 0.001" in section.figures[1].alt
    [table] = section.tables
    assert [row[-1].text for row in table.rows] == ["", "tuned", ""] * 3
    ET.fromstring(section.figures[0].svg)
    assert not any("shorter" in text for text in section.text)


def test_a_search_by_short_trials_is_told_of(summary):
    short = [replace(row, tuning=replace(row.tuning, max_steps=20)) for row in summary.rows]
    text = tuning_section(replace(summary, rows=tuple(short))).text
    assert "shorter than the comparison's trainings: 20 steps" in text[1]
    untuned = replace(summary, rows=tuple(replace(row, tuning=not_tuned(1e-3)) for row in summary.rows))
    assert not tuning_section(untuned).figures


def test_the_course_is_drawn_where_it_was_scored(summary):
    assert not list(figures.course(summary))
    course = ((0.5, Interval(0.3, 0.2, 0.4)), (1.0, Interval(0.4, 0.3, 0.5)))
    rows = tuple(replace(row, course=course) for row in summary.rows)
    [drawing] = figures.course(replace(summary, rows=rows))
    assert "one 30.0 after 50 %, 40.0 after 100 %" in drawing.alt


def test_differences_by_task_are_told_in_points(summary):
    (drawing,) = figures.task_differences(summary)
    task = "rg_spell_backward"
    expected = 100 * summary.rows[1].task_differences[task].interval.mean
    assert f"{task} {expected:+.1f}" in drawing.alt.partition("one ")[2].partition(";")[0]


def test_a_learning_curve_for_each_task(summary):
    found = list(figures.learning_curves(summary))
    assert [drawing.title for drawing in found] == [
        f"Training loss on {task}" for task in summary.metrics if task not in summary.extra
    ]
    assert "lora 0.500, one 0.500" in found[0].alt


def test_long_curves_are_thinned_by_averaging():
    line = [(step, float(step % 2)) for step in range(1, 10_001)]
    steps, losses = figures._thinned(line)
    assert len(steps) <= 120
    assert np.mean(losses) == pytest.approx(0.5, abs=0.01)
    assert steps[0] == pytest.approx(42.5, abs=1)
    assert figures._thinned(line[:5])[0] == [1, 2, 3, 4, 5]


def test_scores_before_and_after_leave_out_where_less_is_better():
    score = {"score": 0.5, "metric": "acc", "n": 10, "stderr": 0.1, "nll": None, "other": {}, "group": "tasks"}
    before = {"tasks": {"a": score, "b": score}}
    after = {"tasks": {"a": {**score, "score": 0.75}, "b": {**score, "metric": "nll"}, "c": score}}
    (drawing,) = figures.run_scores(before, after)
    assert drawing.alt == "Scores: a 50.0 to 75.0, c 50.0."
    assert list(figures.run_scores(None, {"tasks": {"b": {**score, "metric": "nll"}}})) == []


def test_scores_on_the_way_are_drawn_by_task_and_nats_apart():
    points = [
        {"step": step, "scores": {"tasks": {"a": {"score": a, "metric": "acc"}, "b": {"score": b, "metric": "nll"}}}}
        for step, a, b in ((5, 0.25, 2.0), (10, 0.75, 1.0), (15, 0.5, 3.0))
    ]
    one, two = figures.validation_curves(points, {"step": 10, "by": "macro"})
    assert one.alt == (
        "First, highest and last score on validation rows: a 25.0, 75.0, 50.0. The adapter of step 10 was kept."
    )
    assert two.alt.startswith("First, lowest and last score on validation rows: b 2.000, 1.000, 3.000.")
    assert list(figures.validation_curves(points[:1])) == list(figures.validation_curves([])) == []


@pytest.mark.parametrize("name", ["$\\frac{1}{0}$", "_hidden", "<b>&\"'", "$", "αβ"])
def test_any_name_can_be_drawn_and_is_shown_as_it_is(name):
    words = {"x": "x", "y": "y", "alt": f"about {name}"}
    drawings = [
        plots.lines("n", "t", "r", {name: [1.0, 2.0], "b": [2.0, 1.0]}, **words),
        plots.heat_map("n", "t", "r", [[1.0, None]], rows=[name], columns=[name, "b"], alt=words["alt"]),
        plots.bars("n", "t", "r", {name: 1.0}, x="x", alt=words["alt"]),
        plots.points("n", "t", "r", {name: {name: [(0.0, 1.0)], "b": [(1.0, 0.0)]}}, alt=words["alt"]),
    ]
    for drawing in drawings:
        root = ET.fromstring(drawing.svg)  # well-formed, whatever the name
        assert root.get("aria-label") == words["alt"]
        assert any(name in (element.text or "") for element in root.iter())
        assert drawing.png.startswith(b"\x89PNG")


def test_figures_on_one_page_keep_their_ids_apart():
    words = {"x": "x", "y": "y", "alt": "a"}
    one, other = (plots.lines(name, "t", "r", {"a": [1.0, 2.0]}, **words) for name in ("one", "other"))
    ids = [{e.get("id") for e in ET.fromstring(d.svg).iter() if e.get("id")} for d in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_numbers_are_told_as_people_tell_them():
    assert number(None).text == "–"
    assert number(1234567).text == "1,234,567"
    assert number(0.05, factor=100, unit=" %", signed=True).text == "+5 %"
    assert interval((0.5, None, None)).below == ""
    assert p_value(0.0001).text == "< 0.001"
    assert size(3 * 2**20).text == "3 MiB"


def test_a_shown_recipe_has_no_secret_and_no_folder_of_the_machine():
    text = (
        "model: /srv/models/small\n"
        "tasks:\n- name: a\n  source: {folder: ../../data/a}\n  prompt: 'Answer /yes or ../no:'\n"
        "- name: b\n  source: {train: [./b.jsonl], test: [/mnt/b.jsonl]}\n"
    )
    shown = shown_recipe(text)
    assert shown.startswith("# paths outside this folder are shortened")
    assert "/srv" not in shown
    assert "/mnt" not in shown
    assert "folder: '.../a'" in shown
    assert "./b.jsonl" in shown
    assert "Answer /yes or ../no:" in shown
    assert shown_recipe("model: small\n") == "model: small\n"
