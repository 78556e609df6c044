"""The progress on the screen names the step, the speed and each task's loss; quiet means quiet."""

from __future__ import annotations

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from multiflora.train.progress import log_line, progress_bar


def test_the_line_names_every_task() -> None:
    logs = {"loss": 1.23456, "loss/a": 0.5, "loss/b": 2.0, "tokens_per_second": 1234.4, "epoch": 0.5}
    assert log_line(10, logs) == "step 10  loss 1.235  (a 0.500, b 2.000)  1,234 tokens/s"
    assert log_line(3, {"loss": 1.0}) == "step 3  loss 1.000"


def test_the_bar_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    state, control, args = TrainerState(max_steps=4), TrainerControl(), TrainingArguments("out", report_to="none")
    with progress_bar(quiet=False) as [bar]:
        bar.on_train_begin(args, state, control)
        state.global_step = 3
        bar.on_step_end(args, state, control)
        bar.on_log(args, state, control, logs={"loss": 0.25, "loss/a": 0.25, "tokens_per_second": 99.0})
        bar.on_log(args, state, control, logs={"train_runtime": 1.0})
    out, err = capsys.readouterr()
    assert out == ""
    assert "step 3  loss 0.250  (a 0.250)  99 tokens/s" in err


def test_quiet_shows_nothing() -> None:
    with progress_bar(quiet=True) as callbacks:
        assert callbacks == []
