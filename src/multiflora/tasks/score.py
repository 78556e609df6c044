"""Scorers of generated text: pure functions from the reference and the text to a number from 0 to 1.

Multiple choice is scored by log-likelihood and rouge by its library, both in ``multiflora.evaluate``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from multiflora.errors import DataError
from multiflora.tasks.answers import is_plain
from multiflora.tasks.example import Example
from multiflora.tasks.generator import generator_rows
from multiflora.tasks.spec import GeneratorSource, TaskSpec

__all__ = ["as_number", "before_stop", "exact", "number", "reference_of", "verifier", "verify"]

_NUMBER = re.compile(
    r"""(?: (?<!\d) [-−] )?                            # a minus, but not the one of 5-2
        (?: \$ \s? )?
        (?: \d{1,3} (?: , \d{3} )+ (?!\d) | \d+ )?    # 1,234 or 1234, but not the comma of a list
        (?: \.\d+ | (?<=\d) )                         # .5, but not the full stop of a sentence
    """,
    re.VERBOSE,
)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Cut ``text`` before the first of the stops: what a model writes after its answer is not its answer.

    A model may open with the line end or space that it should have put first; a stop that lies within the white space
    before an answer is none.

    Example:
        >>> before_stop(" 7\\nQuestion: 2 + 2?\\nAnswer: 4", ["\\nQuestion:"])
        ' 7'
        >>> before_stop("\\n7\\n8", ["\\n"])
        '\\n7'
    """
    begin = len(text) - len(text.lstrip())
    places = (text.find(s, max(begin - len(s) + 1, 0)) for s in stop)
    return text[: min((i for i in places if i >= 0), default=len(text))]


def exact(reference: str, text: str) -> float:
    """1.0 where both are the same but for white space at the ends and within.

    Example:
        >>> exact("a b", "  a  b\\n"), exact("Yes", "yes")
        (1.0, 0.0)
    """
    return float(reference.split() == text.split())


def number(reference: str, text: str) -> float:
    """1.0 where the number that ``text`` answers with equals the reference.

    The answer is the number after the first ``####`` where there is one (GSM8K's mark), else the last number.
    Thousands commas, a dollar sign and a trailing full stop do not matter, and 7 equals 7.0.

    Example:
        >>> number("1234", "so it is $1,234.00."), number("#### -3", "... #### 3")
        (1.0, 0.0)
    """
    wanted, got = as_number(reference), as_number(text)
    return float(wanted is not None and wanted == got)


def as_number(text: str) -> float | None:
    """Read the number a text answers with, or None where it has none.

    Example:
        >>> as_number("3 + 4 = 7."), as_number("#### 12 eggs, of 30"), as_number("none")
        (7.0, 12.0, None)
    """
    _, mark, after = text.partition("####")
    found = [m.group() for m in _NUMBER.finditer(after if mark else text) if any(c.isdigit() for c in m.group())]
    if not found:
        return None
    chosen = found[0] if mark else found[-1]
    return float(re.sub(r"[$,\s]", "", chosen).replace("−", "-"))


def verifier(source: GeneratorSource, index: int, text: str) -> float:
    """Let reasoning-gym judge an answer to the row it generated: its own score, from 0 to 1.

    Args:
        source: The generator.
        index: The row's number in the generator; an example's id ends in it.
        text: The answer; one that its verifier would run as code, see `multiflora.tasks.answers`, is none.
    """
    rows, answer = generator_rows(source), text.strip()
    judged = answer if answer and is_plain(source.generator, answer) else None
    try:
        return float(rows.score_answer(judged, rows[index]))
    except (ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError):
        return 0.0  # several of its verifiers parse an answer without expecting one that is no answer at all


def reference_of(example: Example) -> str:
    """What the scorer compares with: the answer, or the completion where the task gives no answer."""
    return example.completion.strip() if example.answer is None else str(example.answer)


def verify(spec: TaskSpec, example: Example, text: str) -> float:
    """Score one generated answer by the task's own rule; only ``text`` before the first stop counts.

    Args:
        spec: The task; its score must be exact, number or verifier.
        example: The row that was answered.
        text: What the model wrote after the prompt.

    Returns:
        From 0 (wrong) to 1 (right).

    Raises:
        DataError: The task is scored by log-likelihood or rouge, not from one text.
    """
    answer = before_stop(text, spec.stop)
    if spec.score == "verifier" and isinstance(spec.source, GeneratorSource):
        return verifier(spec.source, int(example.id.rpartition("-")[2]), answer)
    if spec.score == "number":
        return number(reference_of(example), answer)
    if spec.score == "exact":
        return exact(reference_of(example), answer)
    raise DataError(f"task {spec.name} has score {spec.score!r}; expected exact, number or verifier to verify a text.")
