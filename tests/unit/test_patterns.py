"""Regular expressions out of a file: those that could run for ever are refused, those in use are not."""

from __future__ import annotations

import pytest

from multiflora.errors import ConfigError
from multiflora.patterns import pattern_problems, why_refused
from multiflora.recipe import recipe_from
from multiflora.stoppable import run

NAMES = [f"model.layers.{i}.{part}" for i in range(40) for part in ("self_attn.q_proj", "mlp.up_proj", "a" * 50 + "b")]


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r".*\.(q|k|v|o)_proj",
        r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj$",
        r"(?!.*vision).*\.layers\.[0-9]+\..*(q_proj|v_proj)",
        r"(a{2})+",
        r"(?:^|\.)lm_head",
        # one repeat within another, which does no harm here
        r"(?:\w+\.)*(?:q|v)_proj",
        # as unsloth writes it
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj)))",
    ],
)
def test_patterns_of_use_are_taken(pattern):
    assert why_refused(pattern, NAMES) == ""


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(.*)*(.*)*x!", "takes more than 0.2 seconds"),
        (r"model\.layers\.0\.(?:a|a)*c", "takes more than 0.2 seconds"),
        (r"(?=(\w+\.?)+!)b", "takes more than 0.2 seconds"),
        ("[", "not a regular expression"),
        ("a{99999999999}", "not a regular expression"),
        ("(" * 5000, "not a regular expression"),
        ("x" * 20_001, "20,001 characters"),
    ],
)
def test_patterns_that_would_not_end_on_the_names_are_refused(pattern, why, monkeypatch):
    monkeypatch.setattr("multiflora.stoppable.SECONDS", 0.2)
    assert why in why_refused(pattern, NAMES)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r"(\w+\.?)+!"},
        {"exclude_modules": r"(\w+\.?)+!"},
        {"layers_pattern": r"(\w+\.?)+!"},
        {"modules_to_save": [r"(\w+\.?)+!"]},
        {"rank_pattern": {r"(\w+\.?)+!": 2}},
        {"alpha_pattern": {r"(\w+\.?)+!": 2}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_setting_that_peft_searches_by_is_tried_as_peft_does(settings, monkeypatch):
    monkeypatch.setattr("multiflora.stoppable.SECONDS", 0.2)
    names = [f"model.layers.0.{'a' * 40}"]
    assert [problem.partition(" ")[0] for problem in pattern_problems(settings, names)] == list(settings)
    assert list(pattern_problems({"target_modules": ["(a+)+$"]}, ["a" * 50 + "b"])) == []  # names, no patterns


def test_a_recipe_with_what_is_no_pattern_is_refused():
    recipe = {"model": "x/y", "method": {"name": "lora", "target_modules": "(a"}, "tasks": ["boolq"], "output": "o"}
    with pytest.raises(ConfigError, match=r"target_modules holds '\(a': it is not a regular expression"):
        recipe_from(recipe)


def test_a_list_of_very_many_patterns_is_tried_in_few_calls_or_refused(monkeypatch):
    """One by one, each took longer than the search itself; and peft matches all with the name of every module."""
    calls = []
    monkeypatch.setattr("multiflora.patterns.run", lambda *words: calls.append(words) or run(*words))
    assert list(pattern_problems({"modules_to_save": [f"m{i}" for i in range(1_000)] * 50}, NAMES)) == []
    assert len(calls) == 8
    (problem,) = pattern_problems({"rank_pattern": {f"m{i}": 2 for i in range(30_000)}}, NAMES)
    assert problem == "rank_pattern holds 30,000 patterns; expected at most 5,000."
    bad = [f"m{i}" for i in range(600)] + ["["]
    (problem,) = pattern_problems({"modules_to_save": bad}, NAMES)
    assert problem.startswith("modules_to_save holds '[': it is not a regular expression")
