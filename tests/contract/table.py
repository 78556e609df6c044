"""The table method x behaviour in docs/contract.md, made from the results of the tests beside this file.

PYTHONPATH=tests python -m contract.table     (or: make docs-contract)
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from multiflora.methods import METHODS

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "contract.md"
TITLES = {name: card.title for name, card in METHODS.items() if card.module is not None}

HEAD = """\
# The contract

What every method does, and what it refuses to do. Made by `make docs-contract` from the results of `tests/contract`,
where each row is one test that runs on every method; a new method joins by being in `METHODS`.

Methods that are no class of ours (peft's own, full fine-tuning, LoraHub, LoSparse) have a shorter one in
`tests/integration/test_baselines.py`: learned, saved whole, the base untouched, read back on the pristine base with the
same scores, and resumed as if never stopped, or refused.

✓ does it · refused: says why and changes nothing (see the notes) · – does not apply
"""


@dataclass(frozen=True)
class Behaviour:
    """One row: a test that runs on every method."""

    group: str
    test: str
    label: str


def behaviours() -> Iterator[Behaviour]:
    """All rows, in the order of the files: read from the source, so that the page can be checked without a run."""
    for file in sorted(HERE.glob("test_*.py")):
        tree = ast.parse(file.read_text())
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            if "case" in [argument.arg for argument in node.args.args]:
                title = first_line(tree).removeprefix("The contract ")
                yield Behaviour(title, f"{file.stem}::{node.name}", first_line(node))


def first_line(node: ast.Module | ast.FunctionDef) -> str:
    """Of a docstring, without the full stop."""
    return (ast.get_docstring(node) or "?").splitlines()[0].rstrip(".")


@dataclass
class Cell:
    """What the runs of one test on one method came to."""

    outcomes: set[str] = field(default_factory=set)
    refusals: list[str] = field(default_factory=list)

    def text(self, notes: list[str]) -> str:
        """The cell; the reasons of refusals join the notes."""
        if self.refusals:
            for reason in self.refusals:
                if reason not in notes:
                    notes.append(reason)
            return f"refused {sorted({notes.index(reason) + 1 for reason in self.refusals})}"
        return "–" if self.outcomes == {"skipped"} else "✓"


def cells(junit: Path) -> dict[tuple[str, str], Cell]:
    """(test, method) -> cell, from pytest's report."""
    found: dict[tuple[str, str], Cell] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        name, _, parameters = case.attrib["name"].partition("[")
        method = next((part for part in parameters.rstrip("]").split("-") if part in TITLES), None)
        if method is not None:
            cell = found.setdefault((f"{case.attrib['classname'].rpartition('.')[2]}::{name}", method), Cell())
            cell.outcomes.add("skipped" if case.find("skipped") is not None else "passed")
            said = [item.attrib for item in case.iter("property")]
            cell.refusals += [each["value"] for each in said if each["name"] == "refused"]
    return found


def page(found: dict[tuple[str, str], Cell]) -> str:
    """The whole page."""
    lines, notes, group = [HEAD], [], ""
    for row in behaviours():
        if row.group != group:
            group = row.group
            lines += ["", f"## The contract {group}", "", f"| | {' | '.join(TITLES.values())} |"]
            lines += [f"|---|{'---|' * len(TITLES)}"]
        texts = [found[row.test, method].text(notes) for method in TITLES]
        lines.append(f"| {row.label} | {' | '.join(texts)} |")
    lines += ["", "## Notes", "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def main(arguments: list[str]) -> int:
    """Run the tests (with more of pytest's arguments, if any) and write the page; a failed test writes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "results.xml"
        # the tests of the page itself are left out: it is about to be written
        report = ["-o", "junit_family=xunit1", f"--junitxml={junit}", f"--ignore={HERE / 'test_table.py'}"]
        code = subprocess.run([sys.executable, "-m", "pytest", str(HERE), *report, *arguments]).returncode
        if code == 0:
            PAGE.write_text(page(cells(junit)))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
