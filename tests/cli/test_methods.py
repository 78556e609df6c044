"""``multiflora methods``: every method in a few lines that fit a terminal, and one in full."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from multiflora.methods import METHODS

from .parts import COMMAND


def said(*words: str, width: int = 100) -> str:
    env = os.environ | {"COLUMNS": str(width), "NO_COLOR": "1"}
    return subprocess.run([str(COMMAND), "methods", *words], env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("width", [80, 100])
def test_every_method_is_listed_within_the_width(width: int) -> None:
    lines = said(width=width).splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    first = [line.split()[0] for line in lines[1:] if not line.startswith(" ")]
    assert first == list(METHODS)
    text = " ".join(" ".join(lines).split())
    for card in METHODS.values():
        assert card.line in text
        assert ", ".join(card.settings) in text


def test_one_method_in_full() -> None:
    text = said("show", "adalora")
    assert text.startswith("AdaLoRA (adalora), arXiv 2303.10512")
    assert "peft.AdaLoraConfig(...)" in text
    assert "0.001, where a recipe gives none" in text
    assert "experts of a mixture  with target_parameters" in said("show", "rlora")
    assert "no (virtual tokens)" in said("show", "prefix")
    assert "peft." not in said("show", "full")


def test_json_holds_every_card() -> None:
    found = json.loads(said("--json"))
    assert list(found) == sorted(METHODS)
    assert found["full"]["config"] is None
    assert found["loraplus"]["training"] == {"loraplus_lr_ratio": 16.0}
