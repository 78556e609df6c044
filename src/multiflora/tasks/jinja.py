"""The sandbox that templates run in: text and numbers in, text out, within a budget, the same every time.

Jinja's sandbox keeps ``__class__`` and its like away; three things are added here. What can be called is a short list
(a row of a hub data set may hold objects whose methods write files). There are no macros, imports or other templates,
and nothing random. And everything a template makes is paid for from a budget, see `multiflora.tasks.bounds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any

from jinja2 import (
    StrictUndefined,
    TemplateAssertionError,
    TemplateError,
    TemplateSyntaxError,
    meta,
    nodes,
    pass_environment,
)
from jinja2.filters import make_attrgetter
from jinja2.runtime import LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from multiflora.tasks.bounds import bounded, budget, checked_format, made, operated, spend, turns
from multiflora.tasks.values import is_text

__all__ = [
    "Failure",
    "NotTextError",
    "NullPrintedError",
    "check_expression",
    "check_template",
    "columns_of",
    "expression",
    "template",
    "variables",
]

LONGEST = 100_000
"""Characters of the longest template."""
REGEX_SECONDS = 5.0
"""How long one regular expression may work on one text."""


class NullPrintedError(ValueError):
    """A template would have printed a null as the word None."""


class NotTextError(ValueError):
    """A template would have printed Python's own writing of a value that is no text."""

    def __init__(self, value: Any) -> None:
        super().__init__("a value to print is no text and no whole number")
        self.value = value


# all that a template can raise on a row it was not written for; anything else is a bug of ours
Failure = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def _not_null(value: Any) -> Any:
    if value is None:
        raise NullPrintedError("a value to print is null")
    return value


def _printed(value: Any) -> Any:
    if not is_text(_not_null(value)) and not isinstance(value, Undefined):
        raise NotTextError(value)
    return made(value)


def _prefix(items: Iterable[Any], start: str) -> list[str]:
    """Jinja filter: put ``start`` before every item; makes completions of a column of choices."""
    return [made(f"{start}{_printed(item)}") for item in items]


def _without(text: str, pattern: str) -> str:
    """Jinja filter: remove every match of a regular expression."""
    import regex  # here, as few templates need it; it can stop a search that would never end

    if len(pattern) > 1000:
        raise ValueError(f"the pattern has {len(pattern):,} characters; expected at most 1,000")
    try:
        return str(regex.sub(pattern, "", str(_not_null(text)), timeout=REGEX_SECONDS))
    except regex.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    except TimeoutError as error:
        raise ValueError(f"the pattern {pattern!r} works on this text for more than {REGEX_SECONDS:.0f} s") from error


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
    """Jinja's sandbox, narrower and with a budget."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Pay for the result, or refuse it before it is made."""
        operated(operator, left, right)
        return made(super().call_binop(context, operator, left, right))

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

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as Jinja has it
        """Pay for the result of a call."""
        name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        if name == "join" and args:
            args = (made(list(args[0])), *args[1:])
            spend(len(str(owner)) * len(args[0]))
        bare = __obj if isinstance(owner, str) else None
        if bare is not None and __self.is_safe_callable(__obj):
            # as a function of its text, so that filters and methods of one name have one bound
            def method(text: str, *inner: Any, **words: Any) -> Any:
                return super(_Sandbox, __self).call(__context, bare, *inner, **words)

            return bounded(name, method)(owner, *args, **kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(result, range | Namespace) else made(result)

    def _generate(self, source: nodes.Template, name: Any, filename: Any, defer_init: bool = False) -> str:
        """Check a parsed template and have it pay its way; a hook that Jinja's documentation offers."""
        return super()._generate(_PayingItsWay().visit(source), name, filename, defer_init)


class _PayingItsWay(NodeTransformer):
    """Refuses what templates of tasks have no use for, and puts a meter on what no other hook sees."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        kind = type(node).__name__
        if kind not in _NODES or getattr(node, "recursive", False):
            tag = "for ... recursive" if kind == "For" else _TAGS.get(kind, kind.lower())
            raise TemplateAssertionError(f"{{% {tag} %}} is not available in templates of tasks", node.lineno, None)
        for_text = sum(len(data.data) for data in node.find_all(nodes.TemplateData)) if kind == "For" else 0
        node = super().visit(node, *args, **kwargs)
        if isinstance(node, nodes.For):
            node.iter = _filtered(node.iter, "_turns", nodes.Const(20 + for_text))
        elif isinstance(node, nodes.Concat):
            node.nodes = [_filtered(item, "_made") for item in node.nodes]
        elif isinstance(node, nodes.Compare | nodes.Operand):
            node.expr = _filtered(node.expr, "_made")
        elif isinstance(node, nodes.Test):
            node.node, node.args = _filtered(node.node, "_made"), [_filtered(item, "_made") for item in node.args]
        elif (
            isinstance(node, nodes.List | nodes.Dict)
            or (isinstance(node, nodes.Tuple) and node.ctx == "load")
            or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))
        ):
            return _filtered(node, "_made")
        return node


_TAGS = {"CallBlock": "call", "FromImport": "from", "Continue": "continue", "Break": "break"}


def _filtered(node: Any, name: str, *args: nodes.Expr) -> nodes.Expr:
    """The expression behind a filter of ours; constants need none."""
    if isinstance(node, nodes.Const) and not args:
        return node
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _format(value: Any, *args: Any, **words: Any) -> str:
    """Jinja's ``format``, with bounded widths."""
    return str(checked_format(str(value)) % (words or args))


@pass_environment
def _sum(environment: Any, items: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """Jinja's ``sum``, of numbers."""
    if not isinstance(start, int | float):
        raise TypeError("sum adds numbers")
    return sum(items if attribute is None else map(make_attrgetter(environment, attribute), items), start)


@pass_environment
def _join(environment: Any, items: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    """Jinja's ``join``, paid for before it is made."""
    chosen = items if attribute is None else map(make_attrgetter(environment, attribute), items)
    texts = [str(made(item)) for item in chosen]
    spend(len(str(d)) * len(texts))
    return str(d).join(texts)


def _sandbox() -> _Sandbox:
    made_here = _Sandbox(
        undefined=StrictUndefined,
        finalize=_printed,
        keep_trailing_newline=True,  # a template's last newline may be part of the prompt
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    own = {"prefix": _prefix, "without": _without, "capitalised": _capitalised, "uncapitalised": _uncapitalised}
    own |= {"spaced": _spaced, "format": _format, "join": _join, "sum": _sum}
    found = {name: made_here.filters[name] for name in _FILTERS} | own
    made_here.filters = {name: bounded(name, function) for name, function in found.items()}
    made_here.filters |= {"_made": made, "_turns": turns}
    made_here.globals = {name: made_here.globals[name] for name in ("range", "dict", "namespace")}
    return made_here


_ENVIRONMENT = _sandbox()


def template(source: str, row: Mapping[str, Any]) -> str:
    """Render a template of text on a row.

    Raises:
        Failure: Any of these, where the template does not fit the row or would make too much.
    """
    compiled = _compiled(source, False)
    with budget():
        return str(compiled.render(variables(row)))


def expression(source: str, row: Mapping[str, Any]) -> Any:
    """Evaluate an expression on a row, to a Python value.

    Raises:
        Failure: Any of these, where the expression does not fit the row or would make too much.
    """
    compiled = _compiled(source, True)
    with budget():
        return compiled(variables(row))


@lru_cache(maxsize=1024)
def _compiled(source: str, is_expression: bool) -> Any:
    with budget():  # constant parts are worked out while compiling
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
    shown = repr(source) if len(source) < 200 else f"{source[:197]!r}..."
    try:
        _compiled(source, is_expression)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"not a Jinja {what}: {error.message} (line {error.lineno} of {shown}). Columns are written "
            + ("{{ column }}." if what == "template" else "bare, without braces.")
        ) from error
    except (RecursionError, MemoryError, SyntaxError) as error:  # Python's own limits on what Jinja makes of it
        raise ValueError(f"not a Jinja {what}: it is nested too deeply. It begins {shown}.") from error
    except ValueError as error:  # numbers of thousands of digits, names Python cannot hold
        raise ValueError(f"not a Jinja {what}: {error}. It begins {shown}.") from error
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
