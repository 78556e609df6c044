"""The recipe's words for training in the words of transformers and trl."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, SFTConfig

from multiflora.recipe import Recipe
from multiflora.training.precision import uses_bf16

__all__ = ["rows_of_step", "steps_of", "training_arguments"]


def rows_of_step(recipe: Recipe, processes: int = 1) -> int:
    """Return how many rows of the mixture an optimiser step reads; of grpo's each is answered several times.

    Args:
        recipe: Its ``train`` section.
        processes: Devices that train side by side.
    """
    settings = recipe.train
    answers = 1 if settings.grpo is None else settings.grpo.num_generations
    return settings.batch_size * settings.gradient_accumulation * processes // answers


def steps_of(recipe: Recipe, epoch_size: int, processes: int = 1) -> tuple[int, int]:
    """Return how many optimiser steps a recipe asks for, and how many examples they read.

    Args:
        recipe: Its ``train`` section.
        epoch_size: Examples in one epoch of the mixture.
        processes: Devices that train side by side.
    Example:
        >>> steps_of(recipe, epoch_size=100)  # doctest: +SKIP
        (13, 100)
    """
    settings = recipe.train
    per_step = rows_of_step(recipe, processes)
    if settings.max_steps is not None:
        return settings.max_steps, settings.max_steps * per_step
    examples = max(1, round(settings.epochs * epoch_size))
    steps = math.ceil(examples / per_step)
    # a mean over tokens may have fewer in the last step; answers and pairs are compared within whole ones
    return steps, examples if settings.objective == "sft" else steps * per_step


def training_arguments(
    recipe: Recipe, *, folder: Path, steps: int, weights: torch.dtype, casts_itself: bool
) -> TrainingArguments:
    """Write a recipe's ``train`` section as trl's configuration for the objective.

    Args:
        recipe: The recipe.
        folder: Where checkpoints go.
        steps: Optimiser steps of the whole run.
        weights: Type of the frozen weights.
        casts_itself: The adapter's layers compute in the type of their input, so autocast would only add work. peft's
            LoRA instead casts its input to float32, the type of its weights; with half-precision weights, autocast
            brings that product back to half precision.
    """
    settings = recipe.train
    half = weights != torch.float32
    autocast = (half and not casts_itself) or uses_bf16(recipe, weights)
    config, own = _of_objective(recipe)
    args: TrainingArguments = config(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=math.ceil(settings.warmup_ratio * steps),
        lr_scheduler_type=settings.lr_scheduler,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        # the same AdamW with all tensors in one kernel
        optim="adamw_torch_fused" if settings.optimizer == "adamw_torch" else settings.optimizer,
        seed=recipe.seed,
        logging_steps=settings.log_every,
        # a loss that is not a number must be seen, not replaced by the mean of the earlier ones
        logging_nan_inf_filter=False,
        save_strategy="no" if settings.save_every is None else "steps",
        save_steps=settings.save_every or 500,
        report_to=list(settings.report_to) or "none",
        use_cpu=not torch.accelerator.is_available(),  # else autocast on a CPU is refused
        bf16=autocast and weights != torch.float16,
        fp16=weights == torch.float16,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **_checkpointing(settings.gradient_checkpointing),
        **own,
    )
    if args.n_gpu > 1:
        # transformers would spread each batch over all GPUs it sees by nn.DataParallel, which trl refuses; one process
        # drives one device, and several processes are for `torchrun` or `accelerate launch`
        args._n_gpu = 1
    return args


def _of_objective(recipe: Recipe) -> tuple[type[TrainingArguments], dict[str, Any]]:
    """trl's class of settings, and what the objective sets in it."""
    settings = recipe.train
    if settings.grpo is not None:
        # the mixture has shuffled already; beta is the trainer's, see `multiflora.training.grpo`
        return GRPOConfig, {**settings.grpo.model_dump(exclude={"rewards", "beta"}), "shuffle_dataset": False}
    if settings.dpo is not None:
        return DPOConfig, {**settings.dpo.model_dump(), "max_length": None}
    return SFTConfig, {"dataset_kwargs": {"skip_prepare_dataset": True}}


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Spell gradient checkpointing as the installed transformers does; newer versions have another word for it."""
    known = {field.name for field in fields(SFTConfig)}
    word = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    # re-entrant checkpointing would hide the routers' losses
    return {word: wanted, f"{word}_kwargs": {"use_reentrant": False} if wanted else None}
