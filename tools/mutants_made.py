"""Small faults in Python source: one changed operator, condition, constant, keyword, return or removed statement each.

Left alone are annotations, docstrings, messages (what is raised, and strings with a space), f-strings and what only the
type checker reads: a test that pins these pins words.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter
from dataclasses import dataclass, replace

OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.BitOr: ("|", "&"),
    ast.BitAnd: ("&", "|"),
}
"""Each operator and what it becomes."""

_KEPT = ("stacklevel", "device")
"""Keywords that are not dropped: what they do shows in another place, or on a GPU alone."""
_READ_BY_PEOPLE = ("title", "paper")
"""Keywords whose text no program reads."""


@dataclass(frozen=True)
class Mutant:
    """One fault: in a file's bytes, ``start`` to ``stop`` become ``after``."""

    path: str
    start: int
    stop: int
    before: str
    after: str
    line: int
    lines: tuple[int, int]
    """Of the statement it is in (of a compound statement, of its head)."""
    function: tuple[int, int] | None
    """Lines of the body of the function it is in; ``None`` for what runs on import."""
    source: str
    """The line as it is."""
    key: str = ""
    """Says which it is, wherever the line stands."""

    def text(self, source: str) -> str:
        """The file with the fault."""
        data = source.encode()
        return (data[: self.start] + self.after.encode() + data[self.stop :]).decode()

    def __str__(self) -> str:
        before, after = (" ".join(text.split())[:100] for text in (self.before, self.after))
        return f"{self.path}:{self.line}: {before} -> {after or '(nothing)'}    [{self.source.strip()[:110]}]"


def mutants_of(path: str, source: str) -> list[Mutant]:
    """All faults of one file, in its order."""
    made = _Maker(path, source)
    made.visit_body(ast.parse(source).body)
    times: Counter[str] = Counter()
    keyed = []
    for mutant in made.mutants:
        key = f"{path} [{mutant.source.strip()}] {mutant.before} -> {mutant.after}"
        times[key] += 1
        keyed.append(replace(mutant, key=f"{key} #{times[key]}"))
    return keyed


class _Maker:
    """Walks a file; ``span`` and ``function`` are where it is."""

    def __init__(self, path: str, source: str) -> None:
        self.path, self.source, self.data = path, source, source.encode()
        starts = [0]
        for line in self.data.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        self.starts = starts
        self.mutants: list[Mutant] = []
        self.span = (0, 0)
        self.function: tuple[int, int] | None = None

    def at(self, node: ast.AST) -> tuple[int, int]:
        return (
            self.starts[node.lineno - 1] + node.col_offset,  # type: ignore[attr-defined]
            self.starts[node.end_lineno - 1] + node.end_col_offset,  # type: ignore[attr-defined]
        )

    def add(self, start: int, stop: int, after: str, line: int) -> None:
        before = self.data[start:stop].decode()
        text = self.source.splitlines()[line - 1]
        self.mutants.append(Mutant(self.path, start, stop, before, after, line, self.span, self.function, text))

    def replace(self, node: ast.AST, after: str) -> None:
        self.add(*self.at(node), after, node.lineno)  # type: ignore[attr-defined]

    def between(self, left: ast.AST, right: ast.AST, words: tuple[str, str]) -> None:
        """The operator that stands between two expressions."""
        start, stop = self.at(left)[1], self.at(right)[0]
        place = self.data[start:stop].decode().find(words[0])
        if place >= 0:
            self.add(start + place, start + place + len(words[0]), words[1], left.end_lineno)  # type: ignore[attr-defined]

    def visit_body(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        first = getattr(node, "body", None)
        self.span = (node.lineno, max(node.lineno, first[0].lineno - 1) if first else node.end_lineno or node.lineno)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            outer, span = self.function, self.span
            for default in (*node.args.defaults, *node.args.kw_defaults, *node.decorator_list):
                if default:
                    self.expression(default)
            self.function, self.span = (node.body[0].lineno, node.end_lineno or node.lineno), span
            self.visit_body(node.body)
            self.function = outer
            return
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        listed = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if docstring or listed or typing:
            return
        self.removed(node)
        if isinstance(node, (ast.If, ast.While)):
            self.negated(node.test)
        if isinstance(node, ast.Return) and node.value and ast.unparse(node.value) not in ("None", "False"):
            self.replace(node.value, "None")
        if not isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom)):
            for name, value in ast.iter_fields(node):
                if name in ("body", "orelse", "finalbody", "handlers", "annotation", "returns"):
                    continue
                for part in value if isinstance(value, list) else [value]:
                    if isinstance(part, ast.AST) and not isinstance(part, (ast.operator, ast.expr_context)):
                        self.expression(part)
        if isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
            words = OPERATORS[type(node.op)]
            self.between(node.target, node.value, (words[0] + "=", words[1] + "="))
        for name in ("body", "orelse", "finalbody"):
            self.visit_body(getattr(node, name, []))
        for handler in getattr(node, "handlers", []):
            self.visit_body(handler.body)

    def removed(self, node: ast.stmt) -> None:
        """A call, a raise, an assignment to something that stays: gone. Not what sets a name: its users would raise."""
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        stays = isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(targets[0], (ast.Attribute, ast.Subscript))
        gone = isinstance(node, (ast.Raise, ast.Delete, ast.Continue, ast.Break, ast.AugAssign))
        if gone or stays or (isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Yield, ast.YieldFrom))):
            self.replace(node, "pass")

    def negated(self, test: ast.expr) -> None:
        if not isinstance(test, ast.UnaryOp):
            self.replace(test, f"(not ({ast.get_source_segment(self.source, test)}))")

    def expression(self, node: ast.AST) -> None:
        if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
            return
        if isinstance(node, ast.IfExp):
            self.negated(node.test)
        if isinstance(node, ast.comprehension):
            for test in node.ifs:
                self.negated(test)
        if isinstance(node, ast.Compare):
            for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                self.between(left, right, OPERATORS[type(op)])
        if isinstance(node, ast.BoolOp):
            for left, right in itertools.pairwise(node.values):
                self.between(left, right, OPERATORS[type(node.op)])
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            self.between(node.left, node.right, OPERATORS[type(node.op)])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
            self.replace(node, f"({ast.get_source_segment(self.source, node.operand)})")
        if isinstance(node, ast.Constant):
            self.constant(node)
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg and keyword.arg not in _KEPT:
                    start, stop = self.at(keyword)
                    comma = re.match(rb"\s*,", self.data[stop:])
                    self.add(start, stop + (comma.end() if comma else 0), "", keyword.lineno)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.keyword) and child.arg in _READ_BY_PEOPLE:
                continue
            if not isinstance(
                child, (ast.operator, ast.cmpop, ast.boolop, ast.unaryop, ast.expr_context, ast.arguments)
            ):
                self.expression(child)

    def constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.replace(node, str(not value))
        elif isinstance(value, int):
            self.replace(node, str(value + 1))
        elif isinstance(value, float):
            self.replace(node, repr(value * 2 + 0.5))
        elif isinstance(value, str) and value and " " not in value:
            self.replace(node, repr(value + "_"))
