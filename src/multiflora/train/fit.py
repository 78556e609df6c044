"""One training: data in order, arguments, trainer, and a model left as it would be scored."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from multiflora.context import find
from multiflora.data.prepare import Examples, TrainingData
from multiflora.files import write_text
from multiflora.recipe import Recipe
from multiflora.train.arguments import steps_of, training_arguments
from multiflora.train.baselines import schedules, training_settings
from multiflora.train.output import CHECKPOINTS
from multiflora.train.processes import is_first_process, num_processes
from multiflora.train.progress import progress_bar
from multiflora.train.trainer import MultitaskTrainer, own_forward

__all__ = ["fit", "order_examples"]

log = logging.getLogger(__name__)


def order_examples(recipe: Recipe, examples: Examples, processes: int = 1) -> tuple[TrainingData, int]:
    """Return the data of a run in their order, and its optimiser steps.

    Args:
        recipe: Its ``train`` section is read.
        examples: The tasks' examples and their mixture.
        processes: Devices that train side by side.
    """
    steps, number = steps_of(recipe, examples.mixture.epoch_size, processes)
    batch_size = None if recipe.train.packing else recipe.train.batch_size
    return examples.take(number, batch_size=batch_size), steps


def fit(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    examples: Examples,
    *,
    checkpoint: Path | None = None,
    quiet: bool = False,
) -> tuple[TrainingData, list[dict[str, Any]]]:
    """Train the adapter.

    Args:
        model: The base model with its adapter, or one to be trained whole; trained in place.
        tokenizer: The model's tokenizer.
        recipe: The recipe.
        examples: The tasks' examples and their mixture.
        checkpoint: Go on from here.
        quiet: Show no progress.
    Returns:
        The data that were trained on, and the log: one mapping for each line.
    """
    folder = recipe.output / CHECKPOINTS if recipe.train.save_every else recipe.output
    weights = next((p for p in model.parameters() if not p.requires_grad), next(model.parameters())).dtype
    data, steps = order_examples(recipe, examples, num_processes())
    schedule = schedules(model, recipe, steps)
    with progress_bar(quiet=quiet) as callbacks:
        trainer = MultitaskTrainer(
            model=model,
            args=training_arguments(
                recipe, folder=folder, steps=steps, weights=weights, casts_itself=find(model) is not None
            ),
            train_dataset=data.dataset,
            processing_class=tokenizer,
            task_names=examples.mixture.names,
            packing=recipe.train.packing,
            max_length=recipe.train.max_length,
            epoch_size=examples.mixture.epoch_size,
            callbacks=[*callbacks, *schedule],
            **training_settings(recipe),
        )
        trainer.remove_callback(PrinterCallback)  # the bar says the same, in words
        if recipe.train.save_every and is_first_process():
            write_text(folder / "recipe.yaml", recipe.to_yaml(folder))  # what `--resume` compares with
        with own_forward(model):  # without autocast afterwards: scored in the arithmetic a loaded model will have
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.eval()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return data, trainer.state.log_history
