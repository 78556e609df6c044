"""Scores on the way: after which steps, of which model, and where they cannot be had."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from multiflora.errors import ConfigError
from multiflora.training.course import Course, at_shares, check_course, course_of, every, figures_of, validation_of
from tests.integration.ranks import FSDP2
from tests.integration.toys import make_recipe


def train(course: Course, steps: int, model: nn.Module) -> list[dict[str, Any]]:
    """The log of a training of so many steps."""
    state, args, control = TrainerState(max_steps=steps), TrainingArguments("out", report_to="none"), TrainerControl()
    course.on_train_begin(args, state, control)
    for step in range(1, steps + 1):
        state.global_step = step
        course.on_step_end(args, state, control, model=model)
    return state.log_history


def test_shares_of_the_steps_are_scored_after_them_and_no_sooner_than_the_first() -> None:
    told: list[tuple[Any, float]] = []
    start = time.perf_counter()
    due = at_shares([0.01, 0.25, 0.26, 0.9], "test")
    log = train(Course(due, lambda model: {"a": 1.0}, lambda *words: told.append(words)), 10, nn.Linear(1, 1))
    assert course_of([{"loss": 1.0}, *log]) == [
        {"step": 1, "share": 0.01, "scores": {"a": 1.0}},
        {"step": 2, "share": 0.25, "scores": {"a": 1.0}},
        {"step": 3, "share": 0.26, "scores": {"a": 1.0}},
        {"step": 9, "share": 0.9, "scores": {"a": 1.0}},
    ]
    assert validation_of(log) == []
    assert [line for line, _ in told] == log
    assert 0 <= sum(seconds for _, seconds in told) <= time.perf_counter() - start


def test_every_so_many_steps_are_scored_and_the_last() -> None:
    log = train(Course(every(3), lambda model: {"a": 1.0}, lambda *_: None), 7, nn.Linear(1, 1))
    assert validation_of([*log, {"loss": 1.0}]) == [{"step": step, "scores": {"a": 1.0}} for step in (3, 6, 7)]
    assert course_of(log) == []


def test_figures_name_the_split_and_leave_out_a_mean_that_there_is_not() -> None:
    scores = {"tasks": {"a": {"score": 2.5}}, "macro": None}
    assert figures_of({"step": 3, "split": "test", "scores": scores}) == {"test/a": 2.5}


def test_the_model_is_scored_without_what_a_library_put_in_its_forward_s_place() -> None:
    model, seen = nn.Linear(1, 1), []
    for wrapper in ({}, {"forward": lambda x: x}):
        vars(model).update(wrapper)
        train(Course(every(2), lambda model: seen.append("forward" in vars(model)) or {}, lambda *_: None), 2, model)
        assert vars(model).get("forward") is wrapper.get("forward")
    assert seen == [False, False]


@pytest.mark.parametrize(("key", "value"), [("during", (0.5,)), ("every", 5)])
def test_a_model_that_is_spread_over_processes_cannot_be_scored_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any
) -> None:
    plain = make_recipe(tmp_path, "lora")
    asked = plain.model_copy(update={"evaluate": plain.evaluate.model_copy(update={key: value})})
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_course(asked)  # whole copies can
    for name, word in FSDP2.items():
        monkeypatch.setenv(name, word)
    check_course(plain)
    with pytest.raises(
        ConfigError, match=rf"evaluate.{key} is (\[0.5\]|5), but the weights are spread over 2 processes"
    ):
        check_course(asked)
