"""Every method's card, by name: peft's methods first, then ours in the order of their papers.

A method of ours has its card in its own file, ``CARD = MethodCard(...)``. That file imports torch, and ``multiflora
methods`` answers at once, so the card is read there as what it is, a literal, and the file is not run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from multiflora.methods.baselines import BASELINES
from multiflora.methods.method_card import MethodCard

__all__ = ["METHODS", "MethodCard"]

_CARD = re.compile(r"^CARD = (MethodCard\(.*?^\))$", re.MULTILINE | re.DOTALL)


def _ours() -> Iterator[MethodCard]:
    for path in Path(__file__).parent.glob("*.py"):
        found = _CARD.search(path.read_text("utf-8"))
        if found:
            (line,) = ast.parse(found[1]).body
            assert isinstance(line, ast.Expr)
            assert isinstance(line.value, ast.Call)
            words = {word.arg: ast.literal_eval(word.value) for word in line.value.keywords if word.arg}
            yield MethodCard(**words, module=f"{__package__}.{path.stem}")


METHODS: dict[str, MethodCard] = {
    card.name: card
    for card in (
        *(baseline.card for baseline in BASELINES.values()),
        *sorted(_ours(), key=lambda card: (card.paper, card.name)),
    )
}
