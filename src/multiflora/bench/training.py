"""Training as users start it: `multiflora train` beside a plain trl ``SFTTrainer`` with peft's LoRA of equal size.

Both read the same encoded examples, with the same weights, number type, batch size, optimiser and adapter parameters,
and both are warm. What differs is what the two do with that: the order of the examples, the head, the adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from multiflora.bench.results import TrainingCase
from multiflora.bench.steps import HEADS, RANK, matched_rank
from multiflora.bench.timing import Phases, interleave, samples, stopwatch

__all__ = ["measure_training"]


def measure_training(
    *,
    model: str,
    tasks: Sequence[str],
    steps: int,
    batch_size: int,
    dropout: float,
    rounds: int,
    device: torch.device,
    after_round: Callable[[], None] | None = None,
) -> TrainingCase:
    """Train both side by side, some steps a round.

    Our time is that of all `multiflora train` does between the scores before and after, setting its trainer up
    included; trl's is that of ``trainer.train()`` alone.

    Args:
        model: A recipe's ``model``.
        tasks: A recipe's ``tasks``.
        steps: Optimiser steps of one run.
        batch_size: Examples in a step.
        dropout: On every head's input for R-LoRA, on x for peft's LoRA.
        rounds: Runs of each that count.
        device: Where.
        after_round: Called after every round.
    """
    from peft import LoraConfig, get_peft_model

    from multiflora.base_model import load_model, load_tokenizer
    from multiflora.data.prepare import encode_tasks
    from multiflora.recipe import recipe_from
    from multiflora.training.adapter import add_adapter
    from multiflora.training.fit import fit, order_examples
    from multiflora.training.precision import weight_dtype
    from multiflora.training.quiet import quiet_libraries

    with TemporaryDirectory() as folder, quiet_libraries(), _silent():
        recipe = recipe_from(
            {
                "model": model,
                "method": {"name": "rlora", "r": RANK, "num_heads": HEADS, "head_dropout": dropout},
                "tasks": list(tasks),
                "train": {"max_steps": steps, "batch_size": batch_size},
                "output": str(Path(folder) / "ours"),
            }
        )
        tokenizer = load_tokenizer(recipe.model)
        examples = encode_tasks(recipe, tokenizer)
        dtype = weight_dtype(recipe.model.dtype, recipe.train.bf16)
        packed = add_adapter(load_model(recipe.model, dtype).to(device), recipe)
        plain = load_model(recipe.model, dtype).to(device)
        rank = matched_rank(plain, packed.get_nb_trainable_parameters()[0])
        plain = get_peft_model(
            plain, LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules="all-linear")
        )
        data = order_examples(recipe, examples)[0].dataset
        encoded = data.select_columns(["input_ids", "labels"])

        def ours() -> Phases:
            lap = stopwatch(device)
            fit(packed, tokenizer, recipe, examples, quiet=True)
            return {"train": lap()}

        def trl() -> Phases:
            trainer = _plain_trainer(plain, tokenizer, encoded, Path(folder) / "trl", recipe.train.model_dump(), dtype)
            lap = stopwatch(device)
            trainer.train()
            return {"train": lap()}

        timed = interleave({"multiflora": ours, "trl": trl}, rounds, after_round=after_round)
    return TrainingCase(
        model=model,
        tasks=tuple(task.name for task in recipe.tasks),
        steps=steps,
        batch_size=batch_size,
        dtype=str(dtype).removeprefix("torch."),
        dropout=dropout,
        parameters={
            "multiflora": packed.get_nb_trainable_parameters()[0],
            "trl": plain.get_nb_trainable_parameters()[0],
        },
        tokens=sum(len(ids) for ids in encoded["input_ids"]),
        seconds=samples(timed),
    )


def _plain_trainer(
    model: Any, tokenizer: Any, data: Any, folder: Path, settings: Mapping[str, Any], dtype: torch.dtype
) -> Any:
    """trl's own defaults, but for what a recipe sets as well; gradient checkpointing would only slow it down."""
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(folder),
        max_steps=settings["max_steps"],
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["lr_scheduler"],
        max_grad_norm=settings["max_grad_norm"],
        logging_steps=settings["log_every"],
        max_length=settings["max_length"],
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def _silent() -> Iterator[None]:
    """Warnings of the libraries would tear the benchmark's own bar."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
