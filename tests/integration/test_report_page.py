"""The report in a browser: it says nothing in the console, asks for nothing, sorts, and fits a phone."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from multiflora.reports.run import report
from tests.browser import CHROMIUM, Browser
from tests.made_comparison import write_comparison

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

METHODS = "document.querySelector('#table-score')"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(write_comparison(tmp_path_factory.mktemp("made") / "comparison"), measure=False).page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def column(browser: Browser, number: int) -> list[str]:
    script = f"[...{METHODS}.querySelectorAll('tbody tr')].map(row => row.cells[{number}].dataset.key)"
    found: list[str] = browser.run(script)
    return found


def test_it_opens_without_a_complaint_and_without_a_network(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("document.title") == "Which method earned its parameters?"
    assert browser.run("document.querySelectorAll('.drawing svg').length") > 15
    browser.run("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    assert browser.complaints() == []
    assert set(browser.requests()) == {page.absolute().as_uri()}


def test_a_click_on_a_head_sorts_and_another_turns_it_round(browser: Browser, page: Path) -> None:
    browser.open(page)
    head = f"{METHODS}.querySelectorAll('thead th')[3]"
    browser.run(f"{head}.querySelector('button').click()")
    assert browser.run(f"{head}.getAttribute('aria-sort')") == "descending"
    numbers = [float(key) for key in column(browser, 3)]
    assert numbers == sorted(numbers, reverse=True)
    browser.run(f"{head}.querySelector('button').click()")
    assert [float(key) for key in column(browser, 3)] == sorted(numbers)
    name = f"{METHODS}.querySelector('thead th')"
    browser.run(f"{name}.querySelector('button').click()")
    assert column(browser, 0) == sorted(column(browser, 0))
    assert browser.run(f"{head}.getAttribute('aria-sort')") == "none"


def test_what_was_not_measured_stays_last(browser: Browser, page: Path) -> None:
    browser.open(page)
    for _ in range(2):  # the baseline has no difference to itself
        browser.run(f"{METHODS}.querySelectorAll('thead button')[4].click()")
        assert column(browser, 4)[-1] == ""
        assert "" not in column(browser, 4)[:-1]


def test_the_keyboard_sorts_too(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run(f"{METHODS}.querySelector('.scroll').focus()")
    browser.press("Tab")
    assert browser.run("document.activeElement.textContent") == "Method"
    browser.press("Enter")
    assert browser.run(f"{METHODS}.querySelector('th').getAttribute('aria-sort')") == "ascending"
    assert column(browser, 0) == sorted(column(browser, 0))


def test_a_table_comes_as_csv(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page)
    text = browser.download(f"{METHODS}.querySelector('a[download]').click()", tmp_path)
    assert text.encode() == (page.with_suffix("") / "table-score.csv").read_bytes()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {row["method"] for row in rows} == {"lora", "multilora", "hydralora", "rlora"}


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_a_desk_by_day_and_by_night(
    browser: Browser, page: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width  # tables scroll within themselves
    ink, paper = browser.run(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        ".map(colour => colour.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 765)"
    )
    assert (ink > paper) == dark
    assert abs(ink - paper) > 0.6
    # the words in a figure follow the page
    drawn = browser.run("getComputedStyle(document.querySelector('.drawing svg')).color")
    assert drawn == browser.run("getComputedStyle(document.body).color")
    # MULTIFLORA_SCREENSHOTS=folder keeps what a person should look at
    folder = Path(os.environ.get("MULTIFLORA_SCREENSHOTS", tmp_path))
    shot = folder / f"report-{width}-{'dark' if dark else 'light'}.png"
    browser.screenshot(shot)
    assert shot.stat().st_size > 20_000
