"""Scores while a run trains: the course of learning, at given shares of its steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from multiflora.errors import ConfigError
from multiflora.recipe import Recipe
from multiflora.training.processes import num_processes

__all__ = ["Course", "course_of", "require_one_process"]

log = logging.getLogger(__name__)

_KEY = "scores"  # of the log lines that hold scores and no loss


class Course(TrainerCallback):
    """Scores the model at shares of its steps, and leaves the scores in the trainer's log, which checkpoints keep.

    Args:
        shares: Of all steps, above 0 and below 1.
        score: Scores a model.
        paused: Told how many seconds every scoring took.
    """

    def __init__(
        self, shares: Sequence[float], score: Callable[[nn.Module], Mapping[str, Any]], paused: Callable[[float], None]
    ) -> None:
        self._shares, self._score, self._paused = shares, score, paused

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Score after the steps that make up a share."""
        due = [share for share in self._shares if state.global_step == max(1, round(share * state.max_steps))]
        if not due:
            return
        start = time.perf_counter()
        with _as_loaded(model):
            found = self._score(model)
        # transformers' type says floats; it only writes the line down
        state.log_history.append({"step": state.global_step, "share": due[-1], _KEY: found})
        self._paused(time.perf_counter() - start)
        log.info("Scored after %d of %d steps", state.global_step, state.max_steps)


def course_of(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What `Course` left in a log: step, share of the steps, scores."""
    return [{key: line[key] for key in ("step", "share", _KEY)} for line in history if _KEY in line]


def require_one_process(recipe: Recipe) -> None:
    """Refuse scores during training where they cannot be had.

    Raises:
        ConfigError: Several processes train.
    """
    if not recipe.evaluate.during:
        return
    if num_processes() > 1:
        raise ConfigError(
            f"evaluate.during is {list(recipe.evaluate.during)}, but {num_processes()} processes train, and a model "
            "spread over them cannot be scored on the way. Train in one process, or remove the key."
        )


@contextmanager
def _as_loaded(model: nn.Module) -> Iterator[None]:
    """Take a training library's wrapper (autocast) off the model's forward: scored as a saved model will be."""
    wrapper = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if wrapper is not None:
            vars(model)["forward"] = wrapper
