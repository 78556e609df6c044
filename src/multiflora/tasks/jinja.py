"""The sandbox that templates run in: no attribute tricks, no undefined names, no null printed as 'None'."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = [
    "Failure",
    "NullPrintedError",
    "check_expression",
    "check_template",
    "columns_of",
    "expression",
    "template",
]


class NullPrintedError(ValueError):
    """A template would have printed a null as the word None."""


# all that a template can raise on a row it was not written for; anything else is a bug of ours
Failure = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def _not_null(value: Any) -> Any:
    if value is None:
        raise NullPrintedError("a value to print is null")
    return value


def _prefix(items: Iterable[Any], start: str) -> list[str]:
    """Jinja filter: put ``start`` before every item; makes completions of a column of choices."""
    return [f"{start}{_not_null(item)}" for item in items]


def _without(text: str, pattern: str) -> str:
    """Jinja filter: remove every match of a regular expression."""
    return re.sub(pattern, "", str(_not_null(text)))


def _capitalised(text: str) -> str:
    """Jinja filter: the first letter in upper case, the rest as it is."""
    return str(_not_null(text))[:1].upper() + text[1:]


def _uncapitalised(text: str) -> str:
    """Jinja filter: the first letter in lower case, unless the first word is I or a name of capitals."""
    first = str(_not_null(text)).partition(" ")[0]
    return text if first[:2].isupper() or first in {"I", "I'm", "I'd"} else text[:1].lower() + text[1:]


def _spaced(text: str) -> str:
    """Jinja filter: every run of white space is one space, none at the ends."""
    return " ".join(str(_not_null(text)).split())


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined,
    finalize=_not_null,
    keep_trailing_newline=True,  # a template's last newline may be part of the prompt
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,
)
_ENVIRONMENT.filters.update(
    prefix=_prefix, without=_without, capitalised=_capitalised, uncapitalised=_uncapitalised, spaced=_spaced
)


@cache
def template(source: str) -> Template:
    """Compile a template of text."""
    return _ENVIRONMENT.from_string(source)


@cache
def expression(source: str) -> Callable[..., Any]:
    """Compile an expression; called with the columns as keywords it returns a Python value."""
    return _ENVIRONMENT.compile_expression(source, undefined_to_none=False)


def check_template(source: str) -> str:
    """Return ``source``, or raise ValueError with the line of its mistake."""
    return _checked(source, template, "template")


def check_expression(source: str) -> str:
    """Return ``source``, or raise ValueError saying why it is no expression."""
    return _checked(source, expression, "expression")


def _checked(source: str, compiler: Callable[[str], Any], what: str) -> str:
    try:
        compiler(source)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"not a Jinja {what}: {error.message} (line {error.lineno} of {source!r}). Columns are written "
            + ("{{ column }}." if what == "template" else "bare, without braces.")
        ) from error
    return source


def columns_of(source: str, *, is_expression: bool) -> set[str]:
    """Names a template or expression reads.

    Example:
        >>> sorted(columns_of("{{ question }} {{ choices[answer] }}", is_expression=False))
        ['answer', 'choices', 'question']
    """
    text = f"{{{{ {source} }}}}" if is_expression else source
    return set(meta.find_undeclared_variables(_ENVIRONMENT.parse(text)))


def variables(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a template sees: each column by name, and the whole row for names that are no identifiers."""
    return {"row": row, **row}
