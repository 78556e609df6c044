"""Scores while a run trains: at given shares of its steps, or every so many of them on validation rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from multiflora.errors import ConfigError, DataError
from multiflora.methods.baselines import BASELINES
from multiflora.recipe import EvaluateSpec, Recipe
from multiflora.tasks.load import examples_of
from multiflora.training.agree import Agreement
from multiflora.training.processes import is_sharded, num_processes

__all__ = ["Course", "at_shares", "check_course", "check_method", "course_of", "every", "figures_of", "validation_of"]

_KEY = "scores"  # of the log lines that hold scores and no loss

Due = Callable[[int, int], Mapping[str, Any] | None]
"""A step and all steps -> what to write down beside the scores after it; None: nothing is scored there."""


def at_shares(shares: Sequence[float], split: str) -> Due:
    """Score after shares of all steps, no sooner than after the first.

    Example:
        >>> at_shares([0.25, 0.5], "test")(2, 8), at_shares([0.5], "test")(1, 8)
        ({'split': 'test', 'share': 0.25}, None)
    """

    def due(step: int, steps: int) -> Mapping[str, Any] | None:
        here = [share for share in shares if step == max(1, round(share * steps))]
        return {"split": split, "share": here[-1]} if here else None

    return due


def every(number: int) -> Due:
    """Score the validation rows after every so many steps and after the last.

    Example:
        >>> [step for step in range(1, 8) if every(3)(step, 7)]
        [3, 6, 7]
    """
    return lambda step, steps: {"split": "validation"} if step % number == 0 or step == steps else None


class Course(TrainerCallback):
    """Scores the model on the way, and leaves the scores in the trainer's log, which checkpoints keep.

    Of several processes the first one scores, and the others are told: all go on with the same numbers.

    Args:
        due: After which steps, see `at_shares` and `every`.
        score: Scores a model.
        told: Told the line of the log, and how many seconds the scoring took.
    """

    def __init__(
        self,
        due: Due,
        score: Callable[[nn.Module], Mapping[str, Any]],
        told: Callable[[Mapping[str, Any], float], None],
    ) -> None:
        self._due, self._score, self._told = due, score, told
        self._agreement: Agreement | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make the channel among the processes."""
        self._agreement = Agreement()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Score after the steps that are due."""
        mark = self._due(state.global_step, state.max_steps)
        if mark is None:
            return
        assert self._agreement is not None
        start = time.perf_counter()
        with _as_loaded(model):
            found = self._agreement.from_first(lambda: self._score(model))
        line: dict[str, Any] = {"step": state.global_step, **mark, _KEY: found}
        # transformers' type says floats; it only writes the line down
        state.log_history.append(line)
        self._told(line, time.perf_counter() - start)


def course_of(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was scored at shares of the steps: step, share, scores."""
    return [{key: line[key] for key in ("step", "share", _KEY)} for line in history if _KEY in line and "share" in line]


def validation_of(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was scored every so many steps on validation rows: step, scores."""
    return [{key: line[key] for key in ("step", _KEY)} for line in history if _KEY in line and "share" not in line]


def figures_of(line: Mapping[str, Any]) -> dict[str, float]:
    """A log line's scores as figures for trackers and the screen: ``validation/macro``, ``validation/<task>``.

    Example:
        >>> scores = {"tasks": {"sst2": {"score": 0.75}}, "macro": 0.75}
        >>> figures_of({"step": 9, "split": "validation", "scores": scores})
        {'validation/macro': 0.75, 'validation/sst2': 0.75}
    """
    scores = line[_KEY]
    macro = {} if scores["macro"] is None else {"macro": scores["macro"]}
    by_task = macro | {task: score["score"] for task, score in scores["tasks"].items()}
    return {f"{line['split']}/{name}": value for name, value in by_task.items()}


def check_course(recipe: Recipe) -> None:
    """Refuse scores during training where they cannot be had, before the model is loaded.

    Raises:
        ConfigError: The model is spread over several processes.
        DataError: A task has no validation rows, and they are to be scored.
    """
    wanted = recipe.evaluate
    asked = f"evaluate.every is {wanted.every}" if wanted.every else f"evaluate.during is {list(wanted.during or ())}"
    if (wanted.during or wanted.every) and is_sharded():
        raise ConfigError(
            f"{asked}, but the weights are spread over {num_processes()} processes (FSDP or ZeRO-3), and such a model "
            "cannot be scored on the way. Start it with whole copies (DDP) or on one device, or remove the key."
        )
    for task in recipe.tasks if wanted.every else ():
        try:
            examples_of(task, "validation", wanted.limit)
        except DataError as error:
            raise DataError(f"{asked}, which scores validation rows: {error}") from error


def check_method(name: str, wanted: EvaluateSpec) -> None:
    """Refuse scores on the way, or the best of them, of a method that has none.

    Args:
        name: The method.
        wanted: The recipe's ``evaluate`` section.
    Raises:
        ConfigError: It has none.
    """
    if wanted.every is not None and name == "lorahub":
        raise ConfigError(
            f"evaluate.every is {wanted.every}, but lorahub trains a LoRA for each task, one after the other, and the "
            "adapter of all tasks is there only at the end. Remove evaluate.every, and evaluate.keep_best with it."
        )
    shrinks = BASELINES[name].shrinks if name in BASELINES else ""
    if wanted.keep_best is not None and shrinks:
        raise ConfigError(
            f"evaluate.keep_best is {wanted.keep_best!r}, but {name} takes {shrinks} away until its training ends: an "
            "earlier state is larger than what was asked for. Remove evaluate.keep_best; evaluate.every alone shows "
            "how the scores went."
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
