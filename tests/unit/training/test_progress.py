"""The progress on the screen: a table in a terminal, lines elsewhere, and nothing where it shall be quiet."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from multiflora.training.progress import (
    LiveView,
    ProgressBar,
    log_line,
    progress_bar,
    routing_line,
    score_line,
    sparkline,
)

ROUTED = {"routing/entropy": 0.966, "routing/least_load": 0.8, "routing/most_load": 1.25, "routing/dead_heads": 0.0}


def test_the_line_names_every_task() -> None:
    logs = {"loss": 1.23456, "loss/a": 0.5, "loss/b": 2.0, "tokens_per_second": 1234.4, "epoch": 0.5}
    assert log_line(10, logs) == "step 10  loss 1.235  (a 0.500, b 2.000)  1,234 tokens/s"
    assert log_line(3, {"loss": 1.0}) == "step 3  loss 1.000"


def test_the_line_tells_of_the_routers() -> None:
    assert routing_line(ROUTED) == "gates 97 % undecided, heads carry 0.80 to 1.25 of an equal load"
    assert routing_line({**ROUTED, "routing/dead_heads": 2.0}).endswith("of an equal load, 2 dead")
    assert log_line(1, {"loss": 1.0, **ROUTED}) == f"step 1  loss 1.000  {routing_line(ROUTED)}"


SCORED = {"validation/macro": 0.625, "validation/a": 0.75, "validation/b/c": 0.5}


def test_scores_on_the_way_are_a_line_of_their_own() -> None:
    assert score_line(40, SCORED) == "step 40  validation scores 0.625  (a 0.750, b/c 0.500)"
    assert score_line(4, {"test/a": 2.5}) == "step 4  test scores  (a 2.500)"
    assert score_line(4, {"loss": 1.0, "loss/validation/x": 1.0}) == ""


def test_bars_stand_between_the_least_and_the_most() -> None:
    assert sparkline([1.0, 8.0]) == "▁█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""
    assert len(sparkline([float(i) for i in range(99)])) == 24
    assert sparkline([float("nan"), 1.0, 2.0]) == "▁█"


def feed(view: Any, entries: list[dict[str, float]]) -> None:
    """A training of as many steps as there are entries, each of them logged."""
    state, control, args = TrainerState(max_steps=10), TrainerControl(), TrainingArguments("out", report_to="none")
    bar = ProgressBar(view)
    bar.on_train_begin(args, state, control)
    for logs in entries:
        state.global_step += 1
        bar.on_step_end(args, state, control)
        bar.on_log(args, state, control, logs=logs)
    bar.on_log(args, state, control, logs={"train_runtime": 1.0})


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=16, color_system=None)
    tasks = {f"loss/task_{i}_with_a_name_that_is_much_longer_than_any_screen_{'x' * 60}": 1.0 + i for i in range(12)}
    view = LiveView(console)
    feed(
        view,
        [{"loss": 6.5, **tasks, "tokens_per_second": 1234.5, **ROUTED}, SCORED, {"loss": 6.0, **tasks, **ROUTED}],
    )
    with console.capture() as capture:
        console.print(view.get_renderable())
    lines = capture.get().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    assert len(lines) <= 16
    assert "3/10" in lines[0]
    assert "1,234 tokens/s" in lines[0]
    assert "left" in lines[0]
    assert "6.000  -0.500  █▁" in lines[2]
    assert "task_11" in lines[3]  # the highest loss first
    assert any("and 5 lower" in line for line in lines)
    assert score_line(2, SCORED) in lines[-2]
    assert routing_line(ROUTED) in lines[-1]


@pytest.mark.parametrize(("height", "shown"), [(16, 8), (9, 1), (3, 1)])
def test_as_many_tasks_are_shown_as_the_terminal_has_lines_and_one_at_least(height: int, shown: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=height, color_system=None)
    view = LiveView(console)
    feed(view, [{"loss": 1.0, **{f"loss/task_{i}": float(i) for i in range(12)}}])
    with console.capture() as capture:
        console.print(view.get_renderable())
    text = capture.get()
    assert [i for i in range(12) if f"task_{i} " in text] == list(range(12 - shown, 12))
    assert f"and {12 - shown} lower" in text


def test_a_narrow_terminal_cuts_names_and_wraps_nothing() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=48, height=9, color_system="standard")
    view = LiveView(console)
    for step in range(24):
        view.add({"loss": 1.0, "loss/a_name_that_is_long": 1.0 + step % 2, "loss/b": 0.5})
    with console.capture() as capture:
        console.print(view._losses())
    _, total, task, rest = capture.get().rstrip().splitlines()
    assert "all tasks" in total
    assert "a_name_that…" in task  # twelve cells of it
    assert "\x1b[2mand 1 lower" in rest  # dim
    assert total.startswith("\x1b[1m")  # bold
    assert not task.startswith("\x1b[1m")


def test_lines_go_to_stderr_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(quiet=False) as [bar]:
        feed(bar._progress, [{"loss": 0.25, "loss/a": 0.25, "tokens_per_second": 99.0}, SCORED])
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"step 1  loss 0.250  (a 0.250)  99 tokens/s\n{score_line(2, SCORED)}\n"


def test_quiet_shows_nothing() -> None:
    with progress_bar(quiet=True) as callbacks:
        assert callbacks == []
