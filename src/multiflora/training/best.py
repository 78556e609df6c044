"""The adapter of the best validation scores: kept while a run trains, put back at its end; and when to end early."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from multiflora.training.course import validation_of
from multiflora.training.sharded import adapter_tensors, put_tensors

__all__ = ["KeepBest", "best_of", "is_over"]

Goodness = Callable[[Mapping[str, Any]], float]
"""Scores -> a number; the best scores have the largest."""

_FILE = "best.safetensors"


def best_of(points: Sequence[Mapping[str, Any]], goodness: Goodness) -> int:
    """Return which of several scores is the best; of equal ones the first.

    Args:
        points: One or more, see `multiflora.training.course.validation_of`.
        goodness: Of the scores of one.

    Example:
        >>> points = [{"step": step, "scores": {"macro": macro}} for step, macro in ((2, 0.5), (4, 0.75), (6, 0.75))]
        >>> best_of(points, lambda scores: scores["macro"])
        1
    """
    return max(range(len(points)), key=lambda number: goodness(points[number]["scores"]))


def is_over(points: Sequence[Mapping[str, Any]], goodness: Goodness, patience: int | None) -> bool:
    """Whether so many scores in a row have been no better than the best before them.

    Args:
        points: See `best_of`; may be empty.
        goodness: Of the scores of one.
        patience: How many; None: it is never over.
    """
    return patience is not None and bool(points) and len(points) - 1 - best_of(points, goodness) >= patience


class KeepBest(TrainerCallback):
    """Keeps the tensors of the adapter whose validation scores are the best so far, on the CPU and in checkpoints.

    Comes after the callback that scores, and reads the scores in the trainer's log; so a resumed run knows them, too.

    Args:
        goodness: Of scores; see `multiflora.evaluation.results.goodness`.
        patience: End the training after so many scores that are no better; None: never.
    """

    def __init__(self, goodness: Goodness, patience: int | None = None) -> None:
        self._goodness, self._patience = goodness, patience
        self._tensors: dict[str, Tensor] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Keep the adapter if its scores are the best, and end the training when they have not been for long."""
        points = validation_of(state.log_history)
        if not points or points[-1]["step"] != state.global_step:
            return
        if best_of(points, self._goodness) == len(points) - 1:
            self._tensors = adapter_tensors(model)
        if is_over(points, self._goodness, self._patience):
            control.should_training_stop = True
            control.should_save |= args.save_strategy == "steps"  # as at the end of all steps

    def save(self, checkpoint: Path) -> None:
        """Lay the tensors into a checkpoint."""
        save_file(self._tensors, checkpoint / _FILE)

    def load(self, checkpoint: Path) -> None:
        """Take them from a checkpoint; one that was saved before the first scores has none."""
        self._tensors = load_file(checkpoint / _FILE)

    def ended_at(self, checkpoint: Path) -> bool:
        """Whether the training had ended early when a checkpoint was saved: there is nothing left to train."""
        history = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).log_history
        return is_over(validation_of(history), self._goodness, self._patience)

    def put_back(self, model: nn.Module) -> None:
        """Give the model the tensors of its best adapter."""
        put_tensors(model, self._tensors)
