"""What the tests of the documentation read: its pages and their blocks, and a reader's files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from cli.parts import write_task

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str


def pages() -> list[str]:
    """Every page, relative to docs/."""
    return sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, those that ask for a made table aside."""
    text = (DOCS / page).read_text("utf-8")
    found = re.finditer(r"^```([^\n`]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    every = [Block(page, text[: match.start()].count("\n") + 1, match[1], match[2]) for match in found]
    return [block for block in every if not block.language.startswith("{")]


def blocks(language: str) -> list[Block]:
    """Every block in a language, over all pages."""
    return [block for page in pages() for block in blocks_of(page) if block.language == language]


def lay_out(folder: Path) -> Path:
    """Write the files that the documents speak of."""
    write_task(folder, "reviews")
    write_task(folder, "questions")
    rows = "".join(f'{{"text": "{i} lamps are dark", "label": {i % 2}}}\n' for i in range(24))
    (folder / "tickets.jsonl").write_text(rows, "utf-8")
    return folder
