"""A step's numbers are read one step later, or at once where they would be kept; what was bad is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from multiflora.errors import TrainingError
from multiflora.training.guard import Guard
from multiflora.training.interrupt import StopAsked

BAD = float("nan")


class Training:
    """Steps as a trainer takes them, of examples number 0 to 39: those of even number are of task a, others of b."""

    def __init__(self, folder: Path, max_steps: int = 9, *, fp16: bool = False, columns: tuple[str, ...] = ("id",)):
        rows = {"task_id": [i % 2 for i in range(40)], "id": [f"row {i}" for i in range(40)]}
        store = Dataset.from_dict({key: rows[key] for key in ("task_id", *columns)})
        self.stop, self.control, self.state = StopAsked(), TrainerControl(), TrainerState(max_steps=max_steps)
        self.args = TrainingArguments("out", report_to="none", use_cpu=True)
        self.args.fp16 = fp16
        self.guard = Guard(stop=self.stop, task_names=("a", "b"), store=store, output=folder)
        self.model = nn.Linear(2, 2)
        self.model.bias.requires_grad_(False)
        self.guard.on_train_begin(self.args, self.state, self.control, model=self.model)

    def step(self, losses: list[float], examples: list[int], gradient: float = 1.0, *, save: bool = False) -> None:
        self.guard.numbers.add(torch.tensor(losses), torch.tensor(examples))
        self.model.weight.grad = torch.full((2, 2), gradient)
        self.guard.on_pre_optimizer_step(self.args, self.state, self.control)
        self.state.global_step += 1
        self.control.should_save = save
        self.guard.on_step_end(self.args, self.state, self.control)


def test_sound_steps_go_on(tmp_path: Path) -> None:
    run = Training(tmp_path)
    for _ in range(9):
        run.step([1.0], [0])
    assert not run.guard.stopped
    assert not run.control.should_training_stop


def test_a_bad_loss_is_told_of_a_step_later_with_its_step_its_tasks_and_its_examples(tmp_path: Path) -> None:
    run = Training(tmp_path)
    run.step([1.0, 1.0], [0, 2])
    run.step([1.0, BAD, BAD, 1.0], [2, 5, 3, -1])
    with pytest.raises(TrainingError) as caught:
        run.step([BAD], [4])
    message = str(caught.value)
    assert "The loss is no longer finite at step 2 (tasks: b). The examples with a bad loss: row 3, row 5. " in message
    assert "there is no checkpoint yet" in message


@pytest.mark.parametrize("words", [{"save": True}, {}], ids=["before a checkpoint", "at the end"])
def test_nothing_bad_is_kept(tmp_path: Path, words: dict[str, Any]) -> None:
    run = Training(tmp_path, max_steps=9 if words else 2)
    run.step([1.0], [0])
    with pytest.raises(TrainingError, match=r"The loss is .* step 2 \(tasks: a\).*bad loss: row 4\. The run"):
        run.step([BAD], [4], **words)


def test_nothing_bad_is_kept_of_a_training_that_ends_early(tmp_path: Path) -> None:
    run = Training(tmp_path)
    run.control.should_training_stop = True
    with pytest.raises(TrainingError, match="The loss is no longer finite at step 1"):
        run.step([BAD], [1])


def test_bad_gradients_name_all_of_the_step_but_no_more_than_a_person_reads(tmp_path: Path) -> None:
    run = Training(tmp_path, max_steps=1)
    with pytest.raises(TrainingError) as caught:
        run.step([1.0] * 19, [*range(18), -1], gradient=float("inf"))
    message = str(caught.value)
    assert "The gradients are no longer finite at step 1 (tasks: a, b). The examples of the step: row 0, row" in message
    assert "row 15 and 2 more. The run stopped" in message


def test_sixteen_are_named_and_rows_without_a_name_by_their_number(tmp_path: Path) -> None:
    run = Training(tmp_path, max_steps=1, columns=())
    with pytest.raises(TrainingError, match=r"The examples of the step: 0, 1, .*, 14, 15\. The run stopped"):
        run.step([1.0] * 16, [*range(16)], gradient=float("inf"))


def test_infinite_gradients_are_the_loss_scaler_s_own_business(tmp_path: Path) -> None:
    run = Training(tmp_path, max_steps=1, fp16=True)
    run.step([1.0], [0], gradient=float("inf"))


def test_who_asks_for_an_end_gets_a_checkpoint_of_sound_numbers(tmp_path: Path) -> None:
    run = Training(tmp_path)
    run.step([1.0], [0])
    run.stop()
    run.step([1.0], [0])
    assert run.guard.stopped
    assert run.control.should_training_stop
    assert run.control.should_save
    run = Training(tmp_path)
    run.stop()
    with pytest.raises(TrainingError, match=r"at step 1 \(tasks: b\)"):
        run.step([BAD], [1])


def test_a_training_that_goes_on_counts_from_its_checkpoint(tmp_path: Path) -> None:
    run = Training(tmp_path)
    run.state.global_step = 6
    run.guard.on_train_begin(run.args, run.state, run.control, model=run.model)
    run.step([BAD], [3])
    with pytest.raises(TrainingError, match="no longer finite at step 7 "):
        run.step([1.0], [4])
