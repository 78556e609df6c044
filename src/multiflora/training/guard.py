"""What ends a run early, at the same step in all processes: a request to stop, or numbers gone bad."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from multiflora.errors import TrainingError
from multiflora.training.agree import Agreement
from multiflora.training.checkpoint import last_checkpoint
from multiflora.training.finite import StepNumbers, gradients_finite
from multiflora.training.interrupt import StopAsked

__all__ = ["Guard"]

_NAMED = 16  # ids in a message


class Guard(TrainerCallback):
    """Looks after a training, step by step.

    A step's numbers are read at the end of the next one, when the device has long computed them: finding the labelled
    positions of a batch waits for it anyway. Before a checkpoint and at the end they are read at once, so that no
    checkpoint holds bad ones.

    Args:
        stop: Raised by a signal.
        task_names: Names of the tasks, in the order of their numbers.
        store: The examples by their numbers, with ``task_id`` and, for a message, ``id``.
        output: The run's output folder, where its checkpoints are.
    """

    def __init__(self, *, stop: StopAsked, task_names: tuple[str, ...], store: Dataset, output: Path) -> None:
        self.stop = stop
        self.stopped = False
        self.numbers = StepNumbers(1)
        self._task_names = task_names
        self._store = store
        self._output = output
        self._agreement: Agreement | None = None
        self._trained: list[Tensor] = []
        self._steps: deque[StepNumbers] = deque()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Make the channel among the processes."""
        self._agreement = Agreement()
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.numbers = StepNumbers(state.global_step + 1)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Look at the gradients, before they are used. A loss scaler expects infinite ones and skips their step."""
        if not args.fp16:
            self.numbers.gradients = gradients_finite(self._trained)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Agree on whether to go on."""
        assert self._agreement is not None
        self._steps.append(self.numbers)
        self.numbers = StepNumbers(state.global_step + 1)
        at_once = control.should_save or control.should_training_stop or state.global_step >= state.max_steps
        waiting = 0 if at_once else 1
        bad = not all(step.are_finite() for step in list(self._steps)[: len(self._steps) - waiting])
        flags = [self.stop.asked, bad]
        stopped, bad = self._agreement.now(flags) if at_once else self._agreement.later(flags)
        if bad:
            raise self._error()
        while len(self._steps) > 2 * waiting:  # with a delay, the others may yet find fault with the step before
            self._steps.popleft()
        if stopped:
            if not at_once:  # this step's numbers go into a checkpoint
                unsound = not all(step.are_finite() for step in self._steps)
                if self._agreement.now([True, unsound])[1]:
                    raise self._error()
            self.stopped = control.should_training_stop = True
            control.should_save = True

    def _error(self) -> TrainingError:
        """Name the first bad step and what was in it, in whichever process."""
        assert self._agreement is not None
        mine = next((step for step in self._steps if not step.are_finite()), None)
        found = self._agreement.gather(None if mine is None else (mine.step, *mine.suspects()))
        first = min(item[0] for item in found if item is not None)
        # gradients are summed over the processes, so one bad loss spoils them all; the losses tell whose it was
        reports = [item for item in found if item is not None and item[0] == first]
        by_loss = any(item[2] for item in reports)
        numbers = sorted({number for item in reports if item[2] == by_loss for number in item[1] if number >= 0})
        rows = self._store.select_columns([c for c in ("task_id", "id") if c in self._store.column_names])[numbers]
        tasks = dict.fromkeys(self._task_names[task] for task in sorted(rows["task_id"]))
        ids = [str(name) for name in rows.get("id", numbers)]
        kept = last_checkpoint(self._output)
        return TrainingError(
            f"{'The loss is' if by_loss else 'The gradients are'} no longer finite at step {first} (tasks: "
            f"{', '.join(tasks)}). {'The examples with a bad loss' if by_loss else 'The examples of the step'}: "
            f"{', '.join(ids[:_NAMED])}{f' and {len(ids) - _NAMED} more' if len(ids) > _NAMED else ''}. The run "
            f"stopped; {f'the last good checkpoint is {kept}' if kept else 'there is no checkpoint yet'}. Look at "
            "these examples with `multiflora tasks show`; if they are sound, lower train.learning_rate, raise "
            "train.warmup_ratio, set train.max_grad_norm, or compute in a wider type (model.dtype: float32)."
        )
