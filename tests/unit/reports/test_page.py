"""The page: whole, small, and safe whatever the names in it are."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from multiflora.comparison.saved import read_comparison
from multiflora.errors import ConfigError
from multiflora.reports.page import LIMIT, Fold, Page, Section, fit, render
from multiflora.reports.run import report
from multiflora.reports.tables import Column, Table, word
from tests.made_comparison import METHODS, write_comparison

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"> & $\\frac{1}{0}$ '"


class Tags(HTMLParser):
    """Counts tags and attributes that could do something, and keeps the ids and the words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts, self.ids, self.outside, self.words = 0, [], [], []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key.startswith("on"):
                self.handlers.append(f"{tag} {key}")
            if key in ("src", "href", "xlink:href") and not value.startswith(("#", "data:")):
                self.outside.append(value)

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = write_comparison(tmp_path_factory.mktemp("made") / "comparison")
    return report(folder, measure=False)


def test_the_answer_comes_first_and_claims_what_was_shown(written):
    text = written.page.read_text("utf-8")
    tags = Tags(text)
    summary = read_comparison(written.page.parent).summary
    assert summary.answer.startswith("rlora did better than lora.")
    assert text.index(summary.answer) < text.index("<table")
    for row in summary.rows:
        assert row.sentence in "".join(tags.words)


def test_it_has_everything_that_was_asked_for(written):
    text = "".join(Tags(written.page.read_text("utf-8")).words)
    for part in (
        "Four methods & four tasks",
        "Macro score",
        "Nats per token of the right answers",
        "p, corrected",
        "What could be seen",
        "Scores of every task",
        "Differences to lora in every task",
        "Training, seconds",
        "Peak memory",
        "Extra latency",
        "Tasks that were not trained on",
        "Training loss on rg_chain_sum",
        "Cumulative energy of the update",
        "Similarity of heads",
        "Load of each head by task",
        "Do tasks pull the same way?",
        "Averages & more",
        "arXiv 0000.00000, Table 1",
        "four tasks",
        "multiflora compare comparison.yaml",
        "multiflora 0.1.0",
        "multilora spreads its update over more directions than lora, as arXiv 2311.11501 reports",
        "rlora has heads that differ more than those of hydralora, as arXiv 2502.15455 reports",
    ):
        assert part in text, part


def test_it_is_one_file_that_asks_for_nothing(written):
    tags = Tags(written.page.read_text("utf-8"))
    assert tags.scripts == 1
    assert tags.outside == []
    assert tags.handlers == []
    assert len(tags.ids) == len(set(tags.ids))


def test_every_figure_has_words_and_is_a_file_beside_the_page(written):
    text = written.page.read_text("utf-8")
    labels = re.findall(r'<svg role="img" aria-label="([^"]{20,})"', text)
    assert len(labels) == text.count("<svg ") == text.count('class="drawing"') > 15
    names = set(re.findall(r'<figure class="drawing" id="([^"]+)"', text))
    assert {path.stem for path in written.folder.glob("*.svg")} == names
    folded = {name for name in names if name.startswith(tuple(f"{label}-" for label in METHODS))}
    assert folded
    assert {path.stem for path in written.folder.glob("*.png")} == names - folded  # what is folded away is drawn once


def test_a_table_as_csv_has_its_numbers_in_full(written):
    rows = list(csv.DictReader(io.StringIO((written.folder / "table-score.csv").read_text("utf-8"))))
    summary = read_comparison(written.page.parent).summary
    by_label = {row["method"]: row for row in rows}
    for row in summary.rows:
        assert float(by_label[row.label]["mean"]) == row.score.mean.mean
        assert float(by_label[row.label]["mean_high"]) == row.score.mean.high
    assert by_label["lora"]["p_corrected"] == ""
    assert float(by_label["rlora"]["p_corrected"]) == next(r.score.p for r in summary.rows if r.label == "rlora")


def test_hostile_names_are_words_and_nothing_else(tmp_path):
    folder = write_comparison(tmp_path / "comparison", analysed=False)
    for path in (*folder.glob("*.json"), *folder.glob("*/*.json")):
        name = json.dumps(HOSTILE)[1:-1]
        path.write_text(path.read_text().replace('"rlora"', f'"{name}"'))
    plan = folder / "comparison.yaml"
    about = json.dumps(HOSTILE, ensure_ascii=False)
    plan.write_text(plan.read_text().replace("Four methods & four tasks", about).replace("Averages & more", about))
    page = report(folder, tmp_path / "page.html", measure=False).page
    tags = Tags(page.read_text("utf-8"))
    assert (tags.scripts, tags.handlers, tags.outside) == (1, [], [])
    assert "<img src=x" not in page.read_text("utf-8")
    assert sum(HOSTILE in words for words in tags.words) > 3


def test_a_formula_in_a_name_is_no_formula_in_a_spreadsheet():
    column = Column("Method", ("method",), numeric=False)
    table = Table(name="t", title="", reading="", columns=[column], rows=[[word("=1+1")], [word("a,b")]])
    assert table.to_csv() == 'method\r\n\'=1+1\r\n"a,b"\r\n'


@pytest.mark.slow
def test_a_large_comparison_stays_below_five_megabytes(tmp_path):
    folder = write_comparison(tmp_path / "large", layers=40, heads=8)
    page = report(folder, measure=False).page
    assert page.stat().st_size < 5_000_000


def test_figures_that_would_make_a_page_too_large_stay_beside_it(written):
    from multiflora.analysis.plots import Drawing

    large = Drawing("large", "A large figure", "", "words", f"<svg>{'x' * 5_000}</svg>", b"")
    small = Drawing("small", "A small figure", "", "words", "<svg>s</svg>", b"")
    page = Page(
        title="t",
        kind="k",
        about="",
        warnings=[],
        answer="a",
        sentences=[],
        facts=[],
        sections=[Section(name="s", title="s", folds=[Fold(title="f", figures=[large, small])])],
        files="beside",
    )
    size = len(render(page).encode())
    assert fit(page, size) is page
    found = fit(page, size - 100)
    assert [d.name for d in found.figures()] == ["small"]
    assert "these figures are only there: A large figure." in render(found)
    assert LIMIT < 5_000_000


def test_without_an_analysis_the_page_says_how_to_get_one(tmp_path):
    folder = write_comparison(tmp_path / "bare", analysed=False)
    text = report(folder, measure=False).page.read_text("utf-8")
    assert "multiflora analyze bare" in text
    assert "Cumulative energy" not in text


def test_a_summary_without_its_cells_is_refused(tmp_path):
    folder = write_comparison(tmp_path / "torn", analysed=False)
    for path in (folder / "cells").glob("rlora-*.json"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"cells that are not there \(rlora-seed0 and 2 more\)"):
        report(folder, measure=False)


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    folder = write_comparison(tmp_path / "bare", analysed=False)
    pages = [report(folder, tmp_path / name / "report.html", measure=False).page for name in ("one", "two")]
    assert pages[0].read_bytes() == pages[1].read_bytes()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda folder: None, "holds neither a run .results.json. nor a comparison"),
        (lambda folder: (folder / "report.html").mkdir(), "is a folder; give the name of the page"),
    ],
)
def test_a_folder_without_results_is_refused(tmp_path: Path, make, match):
    make(tmp_path)
    with pytest.raises(ConfigError, match=match):
        report(tmp_path)


def test_tasks_of_the_harness_are_on_the_page(written):
    words = "".join(Tags(written.page.read_text("utf-8")).words)
    assert "harness/lambada (acc, not trained)" in words
    assert "lm-evaluation-harness" in words
