"""The site builds without a warning, every link within it leads somewhere, and it asks nothing of a network."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from pages import DOCS, pages

pytest.importorskip("sphinx", reason="the docs extra needs Python 3.11 or newer")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of the build is an error, and so is a link to a page or heading that is not there."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-d", folder / "doctrees", DOCS]
    done = subprocess.run(
        [*words, folder / "html"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "html"


class Page(HTMLParser):
    """What a built page links to, what it loads, and what may be linked to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = {""}
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        if "id" in given:
            self.anchors.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif "src" in given or (tag == "link" and "href" in given):
            self.loads.append(given.get("src") or given["href"])

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def built(site: Path) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path.read_text("utf-8")) for path in site.rglob("*.html")}


def is_inline(place: str) -> bool:
    """Whether a link or a source is the thing itself, as a report's tables and pictures are."""
    return urlsplit(place).scheme == "data"


def test_every_page_is_built(built: dict[str, Page]) -> None:
    assert {page.removesuffix(".md") + ".html" for page in pages()} <= set(built)


def test_every_link_leads_somewhere(site: Path, built: dict[str, Page]) -> None:
    lost = []
    for name, page in built.items():
        for link in page.links:
            if is_inline(link):
                continue
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme in {"http", "https", "mailto"}, link
                continue
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            inside = os.path.relpath(target.resolve(), site.resolve()).replace(os.sep, "/")
            there = built[inside].anchors if inside in built else {""} if target.exists() else set()
            if unquote(parts.fragment) not in there:
                lost.append(f"{name}: {link}")
    assert not lost


def test_nothing_is_loaded_from_elsewhere(site: Path, built: dict[str, Page]) -> None:
    for name, page in built.items():
        for place in page.loads:
            if is_inline(place):
                continue
            assert not urlsplit(place).netloc, f"{name} loads {place}"
            assert ((site / name).parent / urlsplit(place).path).exists(), f"{name} loads {place}"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text("utf-8")
        assert "url(http" not in text, sheet
        assert "@import" not in text, sheet


def test_made_tables_are_there(built: dict[str, Page]) -> None:
    text = {name: "".join(page.text) for name, page in built.items()}
    assert "head_dropout" in text["methods/rlora.html"]
    assert "Decoupled weight decay" in text["recipes.html"]
    assert "multiflora convert" in text["reference/command-line.html"]
    assert "reasoning-gym: chain_sum" in text["tasks.html"]


def test_equations_are_drawn_not_printed(built: dict[str, Page]) -> None:
    for name, page in built.items():
        if not name.startswith("_modules"):
            assert "\\operatorname" not in "".join(page.text), name
