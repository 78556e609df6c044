"""docs/contract.md says what these tests say."""

from __future__ import annotations

import ast
import re

from contract.cases import CASES
from contract.table import HEAD, HERE, PAGE, TITLES, Cell, behaviours
from multiflora.methods import METHODS


def rows():
    """The page's rows, split into cells."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_has_every_behaviour_and_every_method():
    heads = [row[1:] for row in rows() if row[0] == ""]
    assert heads
    assert all(head == list(TITLES.values()) for head in heads)
    labels = [row[0] for row in rows() if row[0]]
    assert labels == [behaviour.label for behaviour in behaviours()], "run `make docs-contract`"


def test_the_page_begins_as_the_table_does():
    assert PAGE.read_text().startswith(HEAD)


def test_no_method_is_without_a_contract():
    baselines = ast.parse((HERE.parent / "integration" / "test_baselines.py").read_text())
    (names,) = (ast.unparse(node) for node in baselines.body if ast.unparse(node).startswith("BASELINES = "))
    assert names == "BASELINES = [name for name, card in METHODS.items() if card.module is None]"
    assert (
        list(TITLES)
        == list(dict.fromkeys(case.name for case in CASES))
        == [n for n, card in METHODS.items() if card.module is not None]
    )


def test_every_cell_is_an_answer():
    body = [row for row in rows() if row[0]]
    assert all(len(row) == 1 + len(TITLES) for row in body)
    assert all(re.fullmatch(r"✓|–|refused \[\d+(, \d+)*\]", cell) for row in body for cell in row[1:])
    notes = re.findall(r"^(\d+)\. \S", PAGE.read_text(), re.M)
    used = {int(number) for row in body for cell in row[1:] for number in re.findall(r"\d+", cell)}
    assert used == {int(number) for number in notes}


def test_every_behaviour_is_said_in_words():
    found = list(behaviours())
    assert all(len(row.label.split()) >= 3 and "|" not in row.label for row in found)
    assert len({row.label for row in found}) == len(found)


def test_cells():
    notes = []
    assert Cell({"passed"}).text(notes) == "✓"
    assert Cell({"skipped"}).text(notes) == "–"
    assert Cell({"passed", "skipped"}).text(notes) == "✓"
    assert Cell({"passed"}, ["why"]).text(notes) == "refused [1]"
    assert Cell({"passed"}, ["because"]).text(notes) == "refused [2]"
    assert Cell({"passed"}, ["why", "because", "why"]).text(notes) == "refused [1, 2]"
    assert notes == ["why", "because"]
