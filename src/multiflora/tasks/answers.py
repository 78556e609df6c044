"""Which answers may be handed to a verifier that evaluates them as Python.

Some verifiers of reasoning-gym call ``eval`` on the answer, or sympy's ``parse_expr``, which does. The answer is what a
model wrote, and a model may come from anybody. So for those generators an answer must be plainly what is asked for, a
list of literals or a formula, and of a size that can be worked out; anything else is scored as no answer.
"""

from __future__ import annotations

import ast
import re

__all__ = ["EVALUATE_FORMULAS", "EVALUATE_LITERALS", "is_plain"]

EVALUATE_LITERALS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Generators whose verifier calls eval to read a list."""
EVALUATE_FORMULAS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
"""Generators whose verifier calls sympy's parse_expr to read a formula."""

LONGEST = 2000
"""Characters of the longest answer that is evaluated."""
_NO_CODE = re.compile(r"[^()\[\]{}*<>@`\"'=!]*")
_FUNCTIONS = "sin|cos|tan|sec|csc|cot|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|Abs|Integral|pi"
_FORMULA = re.compile(
    rf"(?: \s | \d{{1,12}}(?:\.\d{{1,12}})?(?!\d) | (?:{_FUNCTIONS})(?![A-Za-z_0-9]) | [A-Za-z](?![A-Za-z_0-9(])"
    r" | [-+*/(),] )*",
    re.VERBOSE,
)
# a power has a small number, a fraction of two or a variable above it, and no further power
_POWER = re.compile(r"\*\*\s*(?:-?\d{1,2}(?!\d)|[A-Za-z]|\(\s*-?\d{1,2}(?:\s*/\s*\d{1,2})?\s*\))(?!\s*\*\*)")


def is_plain(generator: str, answer: str) -> bool:
    """Whether an answer to a row of this generator may be verified.

    Args:
        generator: Name of the generator.
        answer: What the model wrote.

    Example:
        >>> is_plain("countdown", "(7 + 3) * 5"), is_plain("countdown", "__import__('os').getcwd()")
        (True, False)
        >>> is_plain("n_queens", "[['Q', '_'], ['_', 'Q']]"), is_plain("n_queens", "exit()")
        (True, False)
    """
    if generator in EVALUATE_LITERALS:
        return len(answer) <= LONGEST and (_NO_CODE.fullmatch(answer) is not None or _is_literal(answer))
    if generator in EVALUATE_FORMULAS:
        return len(answer) <= LONGEST and _FORMULA.fullmatch(answer) is not None and _powers_are_small(answer)
    return True


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _powers_are_small(formula: str) -> bool:
    """Whether no tower of powers stands there, which is a number that nobody can write down."""
    towers = len(re.findall(r"\)\s*\*\*", formula))  # a power of something that may hold powers
    return len(_POWER.findall(formula)) == formula.count("**") and towers <= 2
