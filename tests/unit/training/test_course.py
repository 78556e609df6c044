"""Scores on the way: after which steps, of which model, and where they cannot be had."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from multiflora.errors import ConfigError
from multiflora.training.course import Course, course_of, require_one_process
from tests.integration.toys import make_recipe


def train(course: Course, steps: int, model: nn.Module) -> list[dict[str, Any]]:
    """The log of a training of so many steps."""
    state, args = TrainerState(max_steps=steps), TrainingArguments("out", report_to="none")
    for step in range(1, steps + 1):
        state.global_step = step
        course.on_step_end(args, state, TrainerControl(), model=model)
    return state.log_history


def test_shares_of_the_steps_are_scored_after_them_and_no_sooner_than_the_first() -> None:
    pauses: list[float] = []
    start = time.perf_counter()
    log = train(Course([0.01, 0.25, 0.26, 0.9], lambda model: {"a": 1.0}, pauses.append), 10, nn.Linear(1, 1))
    assert course_of([{"loss": 1.0}, *log]) == [
        {"step": 1, "share": 0.01, "scores": {"a": 1.0}},
        {"step": 2, "share": 0.25, "scores": {"a": 1.0}},
        {"step": 3, "share": 0.26, "scores": {"a": 1.0}},
        {"step": 9, "share": 0.9, "scores": {"a": 1.0}},
    ]
    assert len(pauses) == 4
    assert 0 <= sum(pauses) <= time.perf_counter() - start


def test_the_model_is_scored_without_what_a_library_put_in_its_forward_s_place() -> None:
    model, seen = nn.Linear(1, 1), []
    for wrapper in ({}, {"forward": lambda x: x}):
        vars(model).update(wrapper)
        train(Course([0.5], lambda model: seen.append("forward" in vars(model)) or {}, lambda seconds: None), 2, model)
        assert vars(model).get("forward") is wrapper.get("forward")
    assert seen == [False, False]


def test_several_processes_cannot_score_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_recipe(tmp_path, "lora")
    during = plain.model_copy(update={"evaluate": plain.evaluate.model_copy(update={"during": (0.5,)})})
    require_one_process(during)
    monkeypatch.setenv("WORLD_SIZE", "2")
    require_one_process(plain)
    with pytest.raises(ConfigError, match=r"evaluate.during is \[0.5\], but 2 processes train"):
        require_one_process(during)
