"""How a task is scored where its file alone says so: from all rows, never from the first one.

With choices it is the likelihood of each; with reference answers ``number`` where every one of them is a number and
nothing else, and ``exact`` where any is not; with neither the nats per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from multiflora.errors import DataError
from multiflora.tasks.decimals import whole_number
from multiflora.tasks.files import read_rows, split_files
from multiflora.tasks.jinja import check_expression
from multiflora.tasks.render import evaluated
from multiflora.tasks.spec import FilesSource, Score, TaskSpec
from multiflora.tasks.values import as_list, is_text, shown

__all__ = ["Facts", "explain", "facts_of", "is_conversation"]


@dataclass
class Facts:
    """What the rows of a task's files have."""

    number: int = 0
    """Rows."""
    first: Mapping[str, Any] = field(default_factory=dict)
    """The first of them."""
    with_column: dict[str, str] = field(default_factory=dict)
    """Column -> the place of the first row that has a value in it."""
    without_column: dict[str, str] = field(default_factory=dict)
    """Column -> the place of the first row that has none."""
    not_a_number: str | None = None
    """The first answer that is no number, with its place."""
    stop_inside: frozenset[Score] = frozenset()
    """Scores whose usual stop would cut a right text: a line in ``exact``'s answer, a blank line before a number."""

    def everywhere(self, column: str) -> bool:
        """Whether all rows have a value in a column.

        Raises:
            DataError: Some have one and others have none.
        """
        if column not in self.with_column:
            return False
        if column in self.without_column:
            raise DataError(
                f"{self.without_column[column]} has no {column!r}, but {self.with_column[column]} has; expected it in "
                "every row or in none, as it decides how the task is scored. Make two files, or leave rows out with "
                "'keep'."
            )
        return True

    def score(self) -> tuple[Score, str]:
        """The score that the rows ask for, and why."""
        if "choices" in self.with_column:
            return "choices", "every row has choices"
        if "answer" not in self.with_column:
            return "nll", "no row has choices or an answer"
        if self.not_a_number is None:
            return "number", f"each of the {self.number:,} answers is a number"
        return "exact", f"not every answer is a number: {self.not_a_number}"


_DECIDING = ("prompt", "completion", "messages", "choices", "answer", "id", "tools", "chosen", "rejected")


def facts_of(source: FilesSource, keep: str | None = None) -> Facts:
    """Look at all rows of a source of files.

    Args:
        source: The files.
        keep: Rows where this expression is false do not count.

    Raises:
        DataError: A file is missing or malformed, or there is no row.
    """
    facts, condition = Facts(), _valid(keep)
    files = [path for paths in split_files(source).values() for path in paths]
    for path in files:
        for where, row in read_rows(path):
            if condition is None or evaluated(condition, row, "keep", where):
                _look_at(facts, row, where)
    if not facts.number:
        if condition is None:
            raise DataError(f"{files[0]} has no rows. Check the file, or leave the task out.")
        raise DataError(
            f"{files[0]} has no rows that 'keep' ({condition}) takes, so the task is empty. Mend 'keep', or leave the "
            "task out."
        )
    return facts


def _valid(keep: Any) -> str | None:
    """The condition, unless it is none that can be evaluated: then the task is refused, with all its problems."""
    try:
        return check_expression(keep) if isinstance(keep, str) else None
    except ValueError:
        return None


def _look_at(facts: Facts, row: Mapping[str, Any], where: str) -> None:
    facts.number += 1
    facts.first = facts.first or row
    for column in _DECIDING:
        places = facts.without_column if row.get(column) in (None, "") else facts.with_column
        places.setdefault(column, where)
    answer, completion = row.get("answer"), row.get("completion")
    if isinstance(completion, str) and "\n\n" in completion.strip():
        facts.stop_inside |= {"number"}
    if answer is not None:
        text = str(answer).strip()
        if "\n" in text:
            facts.stop_inside |= {"exact"}
        if facts.not_a_number is None and not (is_text(answer) and whole_number(text) is not None):
            facts.not_a_number = f"{shown(answer)} in {where}"


def is_conversation(value: Any) -> bool:
    """Whether a prompt or completion is a list of turns, as trl writes it."""
    turns = as_list(value)
    return bool(turns) and all(isinstance(turn, Mapping) for turn in turns or ())


def explain(specs: Iterable[TaskSpec]) -> dict[str, str]:
    """Say how each task is scored and why, in a sentence each.

    Raises:
        DataError: A file cannot be read.
    """
    return {spec.name: f"{spec.name} is scored by {spec.score}: {_why(spec)}." for spec in specs}


def _why(spec: TaskSpec) -> str:
    said = {
        "choices": "the likelihood of each of a row's choices",
        "exact": "the text must be the answer, white space aside",
        "number": "the number the text answers with must be the answer's",
        "verifier": "reasoning-gym judges the text",
        "rouge": "the longest common subsequence of words with the reference",
        "nll": "nats per token of the completion",
    }[spec.score]
    by_columns = spec.answer in (None, "answer") and spec.choices in (None, "choices")
    if isinstance(spec.source, FilesSource) and by_columns:
        score, why = facts_of(spec.source, spec.keep).score()
        if score == spec.score:
            return f"{said}; {why}"
    return f"{said}, as the task says"
