"""Regular expressions out of a file: those that could run for ever are refused, those in use are not."""

from __future__ import annotations

import pytest

from multiflora.errors import ConfigError
from multiflora.patterns import why_refused
from multiflora.recipe import recipe_from


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r".*\.(q|k|v|o)_proj",
        r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj$",
        r"(?!.*vision).*\.layers\.[0-9]+\..*(q_proj|v_proj)",
        r"(a{2})+",
        r"(?:^|\.)lm_head",
    ],
)
def test_patterns_of_use_are_taken(pattern):
    assert why_refused(pattern) == ""


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(a+)+$", "one repeat stands within another"),
        ("(.*)*(.*)*x", "one repeat stands within another"),
        ("(?:a|a)*b", "one repeat stands within another"),
        ("(?=(a+)+)b", "one repeat stands within another"),
        ("(a{1,99})*b", "one repeat stands within another"),
        (".*.*.*.*.*x", "5 open-ended repeats"),
        ("[", "not a regular expression"),
        ("a{99999999999}", "not a regular expression"),
        ("(" * 5000, "not a regular expression"),
        ("x" * 20_001, "20,001 characters"),
    ],
)
def test_patterns_that_may_never_end_are_refused(pattern, why):
    assert why in why_refused(pattern)


def test_a_recipe_with_one_is_refused():
    recipe = {"model": "x/y", "method": {"name": "lora", "target_modules": "(a+)+$"}, "tasks": ["boolq"], "output": "o"}
    with pytest.raises(ConfigError, match=r"target_modules holds '\(a\+\)\+\$': one repeat stands within another"):
        recipe_from(recipe)
