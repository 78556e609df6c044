"""The sandbox that templates run in: text and numbers in, text out, the same every time, and never for long.

Jinja's sandbox keeps ``__class__`` and its like away; three things are added here. What can be called is a short list
(a row of a hub data set may hold objects whose methods write files). There are no macros, imports or other templates,
and nothing random. And rendering happens in a process that the system stops, see `multiflora.stoppable`: in the
caller's own a template is only compiled, which takes time by its length, as no part of it is worked out on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date, time, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any, TypeVar

from jinja2 import (
    StrictUndefined,
    TemplateAssertionError,
    TemplateError,
    TemplateSyntaxError,
    meta,
    nodes,
    pass_context,
)
from jinja2.runtime import LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from multiflora.stoppable import restart_clock, run
from multiflora.suggest import shown
from multiflora.tasks.values import is_text

__all__ = [
    "Failure",
    "NotTextError",
    "NullPrintedError",
    "ahead",
    "check_expression",
    "check_template",
    "columns_of",
    "expression",
    "template",
    "variables",
]

LONGEST = 100_000
"""Characters of the longest template."""
LONGEST_TEXT = 10_000_000
"""Characters of the longest text that one template may make: far more than any text a model reads."""
LONGEST_PATTERN = 1_000
"""Characters of the longest regular expression."""
AHEAD = 256
"""Rows that are rendered in one call."""

T = TypeVar("T")


class NullPrintedError(ValueError):
    """A template would have printed a null as the word None."""


class NotTextError(ValueError):
    """A template would have printed Python's own writing of a value that is no text."""

    def __init__(self, value: Any) -> None:
        super().__init__("a value to print is no text and no whole number")
        self.value = value


Failure = (ValueError,)
"""What `template` and `expression` raise where they do not fit a row."""

# all that a template can raise on a row it was not written for
_FAULTS = (TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


def _not_null(value: Any) -> Any:
    if value is None:
        raise NullPrintedError("a value to print is null")
    return value


def _text_of(value: Any) -> Any:
    if not is_text(_not_null(value)) and not isinstance(value, Undefined):
        raise NotTextError(value)
    return value


def _prefix(items: Iterable[Any], start: str) -> list[str]:
    """Jinja filter: put ``start`` before every item; makes completions of a column of choices."""
    return [f"{start}{_text_of(item)}" for item in items]


def _without(text: str, pattern: str) -> str:
    """Jinja filter: remove every match of a regular expression."""
    import regex  # here, as few templates need it

    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"the pattern has {len(pattern):,} characters; expected at most {LONGEST_PATTERN:,}")
    try:
        return str(regex.sub(pattern, "", str(_not_null(text))))
    except regex.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


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


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# of Jinja's own filters: none that is random, writes HTML or reads attributes by a name made up at run time
_FILTERS = _words(
    "abs batch capitalize center count d default dictsort first float format groupby indent int items join last length "
    "list lower map max min reject rejectattr replace reverse round select selectattr slice sort string sum title "
    "tojson trim truncate unique upper urlencode wordcount wordwrap"
)
_TEXT = _words(
    "capitalize casefold center count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace "
    "istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition "
    "rsplit rstrip split splitlines startswith strip swapcase title upper zfill"
)
_METHODS: Mapping[type, frozenset[str]] = {
    str: _TEXT,
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
    dict: frozenset(("get", "items", "keys", "values")),
    float: frozenset(("is_integer",)),
    date: frozenset(("isoformat", "weekday", "isoweekday")),
    time: frozenset(("isoformat",)),
    timedelta: frozenset(("total_seconds",)),
}
_PLAIN = (str, int, float, complex, list, tuple, date, time, timedelta, Decimal, bytes, type(None))
_OPEN = (*_PLAIN, Mapping, LoopContext, Namespace, Undefined)
"""Types whose attributes a template may look at."""
_NODES = _words(
    "Add And Assign AssignBlock Compare Concat CondExpr Const Dict Div Filter FilterBlock FloorDiv For Getattr Getitem "
    "If Keyword List Mod Mul NSRef Name Neg Not Operand Or Output Pair Pos Pow Slice Sub Template TemplateData Test "
    "Tuple With Call"
)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, narrower."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))  # which are then no constants to fold

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Look only at plain values: an attribute of anything else might be code."""
        return super().getattr(obj, attribute) if isinstance(obj, _OPEN) else self.unsafe_undefined(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """The same for brackets."""
        if isinstance(obj, _OPEN):
            return super().getitem(obj, argument)
        return self.unsafe_undefined(obj, str(argument))

    def is_safe_callable(self, obj: Any) -> bool:
        """Three functions and the methods listed above, of plain values."""
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, LoopContext):
            return name in ("cycle", "changed")
        known = next((names for kind, names in _METHODS.items() if isinstance(owner, kind)), ())
        return any(obj is each for each in self.globals.values()) or name in known

    def _generate(self, source: nodes.Template, name: Any, filename: Any, defer_init: bool = False) -> str:
        """Refuse what templates of tasks have no use for; a hook that Jinja's documentation offers."""
        for node in source.find_all(nodes.Node):
            kind = type(node).__name__
            if kind not in _NODES or getattr(node, "recursive", False):
                tag = "for ... recursive" if kind == "For" else _TAGS.get(kind, kind.lower())
                raise TemplateAssertionError(f"{{% {tag} %}} is not available in templates of tasks", node.lineno or 1)
        return super()._generate(source, name, filename, defer_init)


_TAGS = {
    "CallBlock": "call",
    "FromImport": "from",
    "Continue": "continue",
    "Break": "break",
    "Scope": "autoescape",
}


@pass_context  # so that nothing that is printed is worked out while a template is compiled
def _printed(_: Any, value: Any) -> Any:
    return _text_of(value)


def _sandbox() -> _Sandbox:
    made = _Sandbox(
        undefined=StrictUndefined,
        finalize=_printed,
        keep_trailing_newline=True,  # a template's last newline may be part of the prompt
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        optimized=False,  # constants, such as 9**9**9, are not worked out while a template is compiled either
    )
    own = {"prefix": _prefix, "without": _without, "capitalised": _capitalised, "uncapitalised": _uncapitalised}
    made.filters = {name: made.filters[name] for name in _FILTERS} | own | {"spaced": _spaced}
    made.globals = {name: made.globals[name] for name in ("range", "dict", "namespace")}
    return made


_ENVIRONMENT = _sandbox()


def template(source: str, row: Mapping[str, Any]) -> str:
    """Render a template of text on a row.

    Raises:
        Failure: The template does not fit the row, or would take or make too much.
    """
    return str(_result(source, row, False))


def expression(source: str, row: Mapping[str, Any]) -> Any:
    """Evaluate an expression on a row, to a Python value.

    Raises:
        Failure: The expression does not fit the row, or would take or make too much.
    """
    return _result(source, row, True)


def _result(source: str, row: Mapping[str, Any], is_expression: bool) -> Any:
    held, found = _ready.get((id(row), source, is_expression), (None, None))
    if found is None or held is not row:
        found = run("multiflora.tasks.jinja:rendered", source, is_expression, shared=row)
    kind, value = found
    if kind == "null":
        raise NullPrintedError(value)
    if kind == "no text":
        raise NotTextError(value)
    if kind == "failed":
        raise ValueError(value)
    return Undefined() if kind == "undefined" else value


_ready: dict[tuple[int, str, bool], tuple[Any, tuple[str, Any]]] = {}
"""What `ahead` has rendered: identity of the row, source and kind -> the row, result."""


def ahead(
    items: Sequence[T], row_of: Callable[[T], Mapping[str, Any]], sources: Sequence[tuple[str, bool]]
) -> Iterator[T]:
    """Go through items while their rows are rendered ahead, many in one call: a call costs more than a short template.

    `template` and `expression` then have the result at hand. What cannot be done in one call is done when it is asked
    for, and fails there, where the message can name its row.

    Args:
        items: What to go through.
        row_of: The row of an item.
        sources: Templates, and expressions where the second is true, that will be asked for.
    """
    if not sources:
        yield from items
        return
    for start in range(0, len(items), AHEAD):
        chunk = items[start : start + AHEAD]
        rows = [row_of(item) for item in chunk]
        with suppress(ValueError):
            found = iter(run("multiflora.tasks.jinja:rendered_all", rows, sources))
            _ready.update({(id(row), *source): (row, next(found)) for row in rows for source in sources})
        yield from chunk
        _ready.clear()


def rendered_all(rows: Sequence[Mapping[str, Any]], sources: Sequence[tuple[str, bool]]) -> list[tuple[str, Any]]:
    """Do the work of `ahead`, in the process that can be stopped."""
    found = []
    for row in rows:
        for source in sources:
            restart_clock()
            try:
                found.append(rendered(row, *source))
            except ValueError as error:
                found.append(("failed", str(error)))
    return found


def _holds_huge_number(value: Any) -> bool:
    """Whether there is a whole number in it that Python would not write, as it has more than 4,300 digits."""
    if isinstance(value, int):
        return value.bit_length() > 14_000
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(_holds_huge_number(part) for part in parts)


def rendered(row: Mapping[str, Any], source: str, is_expression: bool) -> tuple[str, Any]:
    """Do the work of `template` and `expression`, in the process that can be stopped."""
    try:
        compiled = _compiled(source, is_expression)
        value = compiled(variables(row)) if is_expression else compiled.render(variables(row))
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise ValueError(f"it gives more than {LONGEST_TEXT:,} characters")
        if _holds_huge_number(value):
            raise ValueError("it gives a whole number of more than 4,000 digits")
        return ("undefined", None) if isinstance(value, Undefined) else ("value", value)
    except NullPrintedError as error:
        return "null", str(error)
    except NotTextError as error:
        return "no text", error.value
    except _FAULTS as error:
        raise ValueError(str(error)) from error


@lru_cache(maxsize=1024)
def _compiled(source: str, is_expression: bool) -> Any:
    if is_expression:
        return _ENVIRONMENT.compile_expression(source, undefined_to_none=False)
    return _ENVIRONMENT.from_string(source)


def check_template(source: str) -> str:
    """Return ``source``, or raise ValueError with the line of its mistake."""
    return _checked(source, False, "template")


def check_expression(source: str) -> str:
    """Return ``source``, or raise ValueError saying why it is no expression."""
    return _checked(source, True, "expression")


def _checked(source: str, is_expression: bool, what: str) -> str:
    if len(source) > LONGEST:
        raise ValueError(f"the {what} has {len(source):,} characters; expected at most {LONGEST:,}.")
    try:
        _compiled(source, is_expression)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"not a Jinja {what}: {error.message} (line {error.lineno} of {shown(source, 200)}). Columns are written "
            + ("{{ column }}." if what == "template" else "bare, without braces.")
        ) from error
    except (RecursionError, MemoryError, SyntaxError) as error:  # Python's own limits on what Jinja makes of it
        raise ValueError(f"not a Jinja {what}: it is nested too deeply. It begins {shown(source, 200)}.") from error
    except ValueError as error:  # numbers of thousands of digits, names Python cannot hold
        raise ValueError(f"not a Jinja {what}: {error}. It begins {shown(source, 200)}.") from error
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
