"""One training: data in order, arguments, trainer, and a model left as it would be scored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from multiflora.context import find
from multiflora.data.mixture import Mixture
from multiflora.data.prepare import Examples, TrainingData, fill_up
from multiflora.errors import ConfigError, Interrupted
from multiflora.kept_rows import base_of
from multiflora.recipe import Recipe
from multiflora.training.arguments import rows_of_step, steps_of, training_arguments
from multiflora.training.baselines import schedules, training_settings
from multiflora.training.best import KeepBest
from multiflora.training.checkpoint import CHECKPOINTS
from multiflora.training.course import Course, at_shares, every, figures_of
from multiflora.training.guard import Guard
from multiflora.training.hooks import training_callbacks
from multiflora.training.interrupt import stop_on_sigterm
from multiflora.training.processes import is_first_process, num_processes, own_seed, uses_zero3
from multiflora.training.progress import progress_bar
from multiflora.training.rewards import load_rewards
from multiflora.training.run_trainer import RunTrainer, own_forward
from multiflora.training.sharded import gather_containers, keep_root_whole
from multiflora.training.trainer import MultitaskTrainer

__all__ = ["fit", "order_examples"]

log = logging.getLogger(__name__)

Score = Callable[[Any], Mapping[str, Any]]

MOST_EXAMPLES = 100_000_000
"""Examples of one training, repeats included: their order is held in memory."""
MOST_PASSES = 100_000
"""Passes over a task: each is shuffled anew."""


def order_examples(recipe: Recipe, examples: Examples, processes: int = 1) -> tuple[TrainingData, int]:
    """Return the data of a run in their order, and its optimiser steps.

    Args:
        recipe: Its ``train`` section is read.
        examples: The tasks' examples and their mixture.
        processes: Devices that train side by side.
    """
    steps, number = steps_of(recipe, examples.mixture.epoch_size, processes)
    settings, per_step = recipe.train, rows_of_step(recipe, processes)
    _check_amount(number, examples.mixture)
    data = examples.take(
        number,
        batch_size=per_step if settings.group_by_length and not settings.packing else None,
        weigh_in=per_step if settings.loss == "tasks" else None,
    )
    return data, steps


def _check_amount(number: int, mixture: Mixture) -> None:
    """Refuse an order of examples that could not be held in memory, or would take for ever to draw.

    Raises:
        ConfigError: There are too many examples, or too many passes over a task.
    """
    drawn = max(number, mixture.epoch_size)
    if drawn > MOST_EXAMPLES:
        raise ConfigError(
            f"train and mixture ask for {drawn:,} examples, repeats included; expected at most {MOST_EXAMPLES:,}. Set "
            "train.max_steps, train.epochs, train.batch_size, train.gradient_accumulation or mixture.epoch_size lower."
        )
    for name, size, count in zip(mixture.names, mixture.sizes, mixture.counts, strict=True):
        passes = -(-drawn * max(1, -(-count // size)) // mixture.epoch_size)
        if passes > MOST_PASSES:
            raise ConfigError(
                f"train asks for {drawn:,} examples, about {passes:,} passes over task {name}, which has {size:,}; "
                f"expected at most {MOST_PASSES:,} passes. Set train.max_steps or train.epochs lower."
            )


def fit(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    examples: Examples,
    *,
    checkpoint: Path | None = None,
    fingerprints: Mapping[str, Any] | None = None,
    quiet: bool = False,
    score: Score | None = None,
    validate: Score | None = None,
    best: KeepBest | None = None,
    paused: Callable[[float], None] = lambda seconds: None,
) -> tuple[TrainingData, list[dict[str, Any]]]:
    """Train the adapter.

    Args:
        model: The base model with its adapter, or one to be trained whole; trained in place.
        tokenizer: The model's tokenizer.
        recipe: The recipe.
        examples: The tasks' examples and their mixture.
        checkpoint: Go on from here.
        fingerprints: Those of the tasks' rows; laid beside checkpoints.
        quiet: Show no progress.
        score: Scores the model, for ``evaluate.during``.
        validate: Scores it on validation rows, for ``evaluate.every``.
        best: Keeps the adapter of the best of these scores, which the model is left with, and may end the training.
        paused: Told how many seconds every scoring took.
    Returns:
        The data that were trained on, and the log: one mapping for each line.
    Raises:
        TrainingError: The loss or the gradients are no longer finite.
        Interrupted: SIGTERM came; a checkpoint was saved.
    """
    folder = recipe.output / CHECKPOINTS
    weights = next((p for p in model.parameters() if not p.requires_grad), next(model.parameters())).dtype
    processes = num_processes()
    data, steps = order_examples(recipe, examples, processes)
    schedule = schedules(model, recipe, steps)
    rows = data.dataset if processes == 1 else fill_up(data.dataset, rows_of_step(recipe, processes))

    def told(line: Mapping[str, Any], seconds: float) -> None:
        trainer.stand_still(seconds)
        paused(seconds)
        trainer.show(figures_of(line))

    wanted, scoring = recipe.evaluate, list[TrainerCallback]()
    if score is not None and wanted.during:
        scoring.append(Course(at_shares(wanted.during, wanted.split), score, told))
    if validate is not None and wanted.every:
        scoring.append(Course(every(wanted.every), validate, told))
    if best is not None:
        scoring.append(best)
    # own_forward: without autocast, or trl's fused head, afterwards: scored in the arithmetic a loaded model will have
    with progress_bar(quiet=quiet) as bars, stop_on_sigterm() as stop, own_forward(base_of(model)), own_forward(model):
        guard = Guard(stop=stop, task_names=examples.mixture.names, store=examples.store, output=recipe.output)
        trainer = _trainer_of(recipe)(
            model=model,
            args=training_arguments(
                recipe, folder=folder, steps=steps, weights=weights, casts_itself=find(model) is not None
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            task_names=examples.mixture.names,
            epoch_size=examples.mixture.epoch_size,
            rows_of_step=rows_of_step(recipe, processes),
            num_examples=len(data.dataset),
            guard=guard,
            recipe=recipe.to_yaml(folder),
            fingerprints=fingerprints,
            callbacks=[*bars, *schedule, *training_callbacks(model), *scoring],
            best=best,
            loraplus_lr_ratio=training_settings(recipe).get("loraplus_lr_ratio"),
            router_lr_ratio=recipe.train.router_lr_ratio,
        )
        trainer.remove_callback(PrinterCallback)  # the bar says the same, in words
        if uses_zero3():
            gather_containers(model)
        if not is_first_process():
            torch.manual_seed(own_seed(recipe.seed))
        if best is not None and checkpoint is not None and best.ended_at(checkpoint):
            best.load(checkpoint)
            trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if guard.stopped:
        raise Interrupted(
            f"The run was asked to stop (SIGTERM) and did so after step {trainer.state.global_step} of {steps}. Its "
            f"checkpoint is {folder / f'checkpoint-{trainer.state.global_step}'}; go on with --resume."
        )
    keep_root_whole(model, trainer.model_wrapped)
    if best is not None:
        best.put_back(model)
    if trainer.state.global_step < steps:
        data = examples.first(data, trainer.state.global_step * rows_of_step(recipe, processes))
    model.eval()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return data, trainer.state.log_history


def _trainer_of(recipe: Recipe) -> Callable[..., RunTrainer]:
    """The trainer of the recipe's objective, with what that alone takes; trl's others are loaded where they are used.

    Raises:
        ConfigError: A reward cannot be imported.
    """
    train, is_fresh = recipe.train, recipe.init_from is None
    if train.grpo is not None:
        from multiflora.training.grpo import GrpoTrainer

        return partial(GrpoTrainer, rewards=load_rewards(recipe), beta=train.grpo.beta, is_fresh=is_fresh)
    if train.dpo is not None:
        from multiflora.training.dpo import DpoTrainer

        return partial(DpoTrainer, is_fresh=is_fresh)
    return partial(MultitaskTrainer, packing=train.packing, max_length=train.max_length)
