"""Which choice an answer means: by its index, its text, or the name that the data set gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multiflora.errors import DataError
from multiflora.tasks.values import shown

__all__ = ["index_of"]


def index_of(value: Any, choices: Sequence[str], labels: Sequence[str], what: str, where: str) -> int:
    """Return the index of the choice that an answer means.

    A number is an index, unless the labels have it; so are true (1), false (0) and a whole number with a point (1.0),
    which is how a column with empty cells holds whole numbers. A text is a label where there are any, or the text of a
    choice, white space at the ends aside; without labels it may be an index in digits, as in a CSV file.

    Args:
        value: The answer.
        choices: The candidate completions.
        labels: Their names in the data set, in the same order; empty where it has none.
        what: For messages: ``answer of task t``.
        where: The row's place.

    Raises:
        DataError: It means none of them, or could mean two.

    Example:
        >>> [index_of(value, [" no", " yes"], "AB", "answer", "row 1") for value in (1, "yes", "B")]
        [1, 1, 1]
    """
    text = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else None
    if text is not None and text in labels:
        return list(labels).index(text)
    if isinstance(value, str):
        found = {i for i, choice in enumerate(choices) if choice.strip() == text}
        if not labels and text and text.isascii() and text.isdigit() and len(text) < 10:
            found |= {int(text)} & set(range(len(choices)))
        if len(found) == 1:
            return found.pop()
        if found:
            both = " and ".join(f"choice {i}, {shown(choices[i])}" for i in sorted(found))
            raise DataError(
                f"{where}: the {what} is {shown(value)}, which could mean {both}. Write the index as a number: "
                "answer: answer | int."
            )
    elif isinstance(value, int | float) and value in range(len(choices)):
        return int(value)
    named = f", or one of the labels {', '.join(labels)}" if labels else ""
    letter = text is not None and not labels and len(text) == 1 and text.isalpha()
    hint = " Where letters name the choices, say so: labels: [A, B, ...]." if letter else ""
    raise DataError(
        f"{where}: the {what} is {shown(value)}; expected the index of one of its choices, 0 to {len(choices) - 1}, or "
        f"a choice's text{named}.{hint} An unlabelled row (often -1) is left out with 'keep', e.g. keep: label >= 0."
    )
