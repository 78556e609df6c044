"""The work of `multiflora.tasks.chat_template`, in the process that can be stopped, which imports this and no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from multiflora.stoppable import restart_clock

__all__ = ["rendered", "rendered_all"]

LONGEST_TEXT = 100_000
"""Characters that a template may write of its own; besides, `TIMES` as many as the turns and the tools have."""
TIMES = 20
"""Tools are written with line ends and spaces, and every turn has its marks."""

# all that a template can raise on turns it was not written for
_FAULTS = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
)


def rendered_all(special: Mapping[str, str], work: Sequence[tuple[str, Sequence[Any]]]) -> list[str | None]:
    """Do the work of `render_all`."""
    found: list[str | None] = []
    for template, asked in work:
        restart_clock()
        text = None
        with suppress(ValueError):
            text = rendered(template, special, asked)
        found.append(text)
    return found


def rendered(template: str, special: Mapping[str, str], asked: Sequence[Any]) -> str:
    """Do the work of `render_chat`."""
    turns, tools, words = asked
    given = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    try:
        (text,), _ = render_jinja_template([given], tools=tools, chat_template=template, **{**special, **words})
    except RecursionError as error:
        raise ValueError("it calls itself without end, or is nested too deeply.") from error
    except _FAULTS as error:
        raise ValueError(str(error) or type(error).__name__) from error
    most = LONGEST_TEXT + TIMES * (_size(turns) + _size(tools))
    if len(text) > most:
        raise ValueError(f"it gives more than {most:,} characters.")
    return str(text)


def _size(value: Any) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, Mapping):
        return sum(_size(inner) for pair in value.items() for inner in pair)
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str) else 0
