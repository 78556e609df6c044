"""Values that files hold who mean no good, or whose authors slipped."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

TEMPLATES = [
    "{{ 'a' * 10**12 }}",
    "{{ 10**10**3 }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ prompt }}{% endfor %}{% endfor %}",
    "{{ prompt | center(10**11) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ prompt.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch x') }}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
    "{% include '/etc/passwd' %}",
    "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{{ prompt | without('(a+)+$') | nothing }}",
    "{{ prompt",
    "{% if %}",
    "{{ no_such_column }}",
    "{{ " + "(" * 3000,
    "{{ [prompt] * 10**9 }}",
    "{{ dict(a=prompt) | tojson(indent=10**9) }}",
    "{% autoescape true %}{{ prompt }}{% endautoescape %}",
    "{{ prompt | truncate(1) }}",
    # much within one call
    "{% set s = prompt * 300000 %}{% for i in range(99999) %}{{ s.count('zz') }}{% endfor %}",
    "{% set r = range(99999) | list %}{% for i in r %}{{ r | sum }}{{ r | max }}{{ 1.5 in r }}{% endfor %}",
    "{{ (9**99999)**99 }}",
    "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
    "{{ (prompt * 99) | without('(?:(?:[a-z ]*)*x?)*9') }}",
]
# what templates are made of: texts, numbers and lists, small and beyond all measure, and what makes more of them
_VALUES = [
    "prompt", "messages", "'x'", "''", "none", "0", "1", "-1", "2.5", "99999", "10**9", "10**18", "9**9999",
    "prompt * 99999", "[prompt] * 99999", "range(99999)", "range(99999) | list", "{'a': prompt}", "dict(a=1)",
    "no_such", "row", "loop", "self",
]  # fmt: skip
_FILTERS = [
    "center(10**9)", "list", "sum", "max", "sort", "join", "join(prompt)", "string", "upper", "tojson",
    "tojson(indent=9)", "int", "truncate(1)", "wordwrap(1)", "replace('', prompt)", "indent(99999)",
    "format(1, 2)", "urlencode", "unique | list", "first", "batch(2) | list", "slice(99999) | list",
    "groupby('a')", "map('upper') | list", "select('in', prompt) | list", "length", "round(99999)",
    "reverse | list", "random", "attr('__class__')", "without('(a|a)*$')", "prefix(' ')", "spaced", "no_such",
]  # fmt: skip
_CALLS = [
    "count('a')", "replace('', 'ab')", "split()", "zfill(10**9)", "format(1)", "__class__",
    "join(range(99999))", "items()",
]  # fmt: skip
_SIGNS = ["+", "-", "*", "/", "//", "%", "**", "~", "in", "==", "<", "and", "or"]

expressions = st.recursive(
    st.sampled_from(_VALUES),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(_SIGNS), inner).map(lambda three: "({} {} {})".format(*three)),
        st.tuples(inner, st.sampled_from(_FILTERS)).map(" | ".join).map("({})".format),
        st.tuples(inner, st.sampled_from(_CALLS)).map(".".join),
        st.tuples(inner, inner).map(lambda two: "{}[{}]".format(*two)),
        st.lists(inner, max_size=3).map(lambda many: f"[{', '.join(many)}]"),
    ),
    max_leaves=5,
)
templates = st.one_of(
    st.sampled_from(TEMPLATES),
    st.tuples(
        st.sampled_from(
            [
                "{{ E }}",
                "{% for i in E %}{{ i }}{% endfor %}",
                "{% set x = E %}{% for i in range(99999) %}{% if x == E %}a{% endif %}{% endfor %}",
                "{% for i in E %}{% for j in E %}{{ i }}{% endfor %}{% endfor %}",
                "{% set n = namespace(x=E) %}{% for i in range(50) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
                "{% macro m(x) %}{{ E }}{{ m(x) }}{% endmacro %}{{ m(E) }}",
                "{{ raise_exception(E) }}",
                "{% generation %}{{ E }}{% endgeneration %}",
            ]
        ),
        expressions,
    ).map(lambda two: two[0].replace("E", two[1])),
)
PATHS = [
    "../../outside/keep.txt",
    "/etc/passwd",
    "~/.bashrc",
    "/dev/zero",
    "/dev/null",
    "..",
    "",
    "\x00",
    "a" * 5000,
    "//",
    "file:///etc/passwd",
    "http://x/y.jsonl",
    "~nouser/x.yaml",
    "/proc/x",
    "/**/*.jsonl",
    "x" * 10**6,
]
PATTERNS = [
    r"(\w+\.?)+!",
    "(a+)+$",
    "(.*)*(.*)*x",
    "(?:a|a)*b",
    "[",
    "(?P<x",
    "x" * 30000,
    "a{99999999999}",
    "((((((.*)*)*)*)*)*)*",
]

odd_text = st.one_of(
    st.text(max_size=30),
    st.sampled_from(TEMPLATES + PATHS + PATTERNS),
    st.sampled_from(
        ["\ud800", "\ufeff", "\u202e", "\x1b[31m", "é" * 1000, "None", "true", "1e999", "!!python/object:os"]
    ),
)
numbers = st.one_of(
    st.sampled_from(
        [0, -1, 10**9, 10**12, 2**63, 2**64, 10**29, -(10**30), 0.0, -0.5, 1e-300, 1e308, float("inf"), float("nan")]
    ),
    st.integers(-5, 5),
    st.floats(),
)
# what takes for ever where time goes by the square of a size
large = st.sampled_from(
    [
        {f"key{i}": i for i in range(30_000)},
        ["x"] * 50_000,
        {"k": {"k" * 100_000: 1}},
        "!!map [a]",
        [[[[[[[[1]]]]]]]] * 1000,
    ]
)
odd = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, odd_text),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(odd_text.filter(lambda t: "\ud800" not in t), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values within one."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def _apart(value: Any) -> Any:
    """A copy in which nothing stands twice: a thousand equal lists are a thousand, of which one can be changed."""
    if isinstance(value, dict):
        return {key: _apart(inner) for key, inner in value.items()}
    return [_apart(inner) for inner in value] if isinstance(value, list) else copy.deepcopy(value)


def put(value: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A copy with one value changed: replaced, left out, or given a neighbour."""
    kind, new = change
    if not path:
        return new
    value = _apart(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if kind == "leave out":
        del inner[path[-1]]
    elif kind == "add" and isinstance(inner, dict):
        inner[f"{path[-1]}s"] = new
    else:
        inner[path[-1]] = new
    return value


@st.composite
def changed(draw: Any, good: list[Any]) -> Any:
    """One of some good values with one to three changes."""
    value = draw(st.sampled_from(good))
    some = large if draw(st.integers(0, 30)) == 0 else odd
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)[1:] or [()]))
        value = put(value, path, (draw(st.sampled_from(["replace", "replace", "leave out", "add"])), draw(some)))
        if not isinstance(value, dict | list):
            break
    return value


@st.composite
def spoiled(draw: Any, good: bytes) -> bytes:
    """Bytes with a cut, a turned bit, or something put in."""
    at = draw(st.integers(0, max(0, len(good) - 1)))
    kind = draw(st.sampled_from(["cut", "turn", "put in", "take out", "double"]))
    if kind == "cut":
        return good[:at]
    if kind == "turn":
        return good[:at] + bytes([good[at] ^ draw(st.integers(1, 255))]) + good[at + 1 :]
    if kind == "take out":
        return good[:at] + good[at + draw(st.integers(1, 20)) :]
    if kind == "double":
        return good[:at] + good[: draw(st.integers(1, len(good)))] + good[at:]
    return (
        good[:at]
        + draw(
            st.sampled_from(
                [
                    b"\x00",
                    b"\xff\xfe",
                    b"{",
                    b"]" * 9,
                    b"[" * 5000,
                    b'"',
                    b"\r",
                    b"9" * 5000,
                    b"*a",
                    b"&a [*a]",
                    b"\t",
                    b"!!python/name:os.system ",
                    b"\\ud800",
                ]
            )
        )
        + good[at:]
    )
