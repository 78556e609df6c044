"""Scorers of generated text: pure functions from the reference and the text to a number from 0 to 1.

Multiple choice is scored by log-likelihood and rouge by its library, both in ``multiflora.evaluate``.
"""

from __future__ import annotations

from collections.abc import Sequence

from multiflora.errors import DataError
from multiflora.tasks.answers import is_plain
from multiflora.tasks.decimals import as_number
from multiflora.tasks.example import Example
from multiflora.tasks.generator import generator_rows
from multiflora.tasks.spec import GeneratorSource, TaskSpec

__all__ = ["before_stop", "exact", "number", "reference_of", "verifier", "verify"]


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
    """1.0 where the number that ``text`` answers with equals the reference, as decimals; see `as_number`.

    Thousands commas, a dollar sign and a trailing full stop do not matter, and 7 equals 7.0.

    Example:
        >>> number("1234", "so it is $1,234.00."), number("#### -3", "... #### 3")
        (1.0, 0.0)
    """
    wanted, got = as_number(reference), as_number(text)
    return float(wanted is not None and wanted == got)


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
        spec: The task; its score must be exact, number, verifier or choices (where the text must be the right one).
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
    if spec.score == "choices":
        return exact(example.completion, answer)
    raise DataError(f"task {spec.name} has score {spec.score!r}; expected exact, number or verifier to verify a text.")
