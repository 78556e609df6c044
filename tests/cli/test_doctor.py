"""``multiflora doctor`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from .parts import Command


def test_without_a_recipe_it_always_ends_well(installed: Command) -> None:
    ended = installed("doctor")
    assert ended.code == 0, ended.err
    for title in ("Packages", "Features", "This machine"):
        assert title in ended.out


def test_a_recipe_is_checked_against_the_machine(multiflora: Command, recipe: Path) -> None:
    ended = multiflora("doctor", "recipe.yaml", "--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["can_run"] is True
    assert {"recipe", "output", "memory", "disk"} <= {check["name"] for check in told["recipe"]}
    assert not recipe.with_name("run").exists()


def test_a_recipe_that_cannot_run_ends_with_2_and_says_why(multiflora: Command, recipe: Path) -> None:
    ended = multiflora("doctor", "recipe.yaml", "--set", "method.num_head=3")
    assert ended.code == 2
    assert "problem" in ended.out
    assert "did you mean num_heads?" in " ".join(ended.out.split())
    assert "Traceback" not in ended.err
