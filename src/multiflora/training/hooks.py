"""What a method needs from a training besides steps, as callbacks of transformers' ``Trainer``.

A method says it in its description: ``gradient_start`` (a start taken from the gradient, before the first step) and
``after_step``. One callback serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from multiflora.context import configs_of
from multiflora.methods.base import Method
from multiflora.methods.gradient_pass import start_from_gradients
from multiflora.methods.layer import BranchLinear

__all__ = ["MethodCallback", "training_callbacks"]

# what our collator adds for the trainer alone
_NOT_FOR_THE_MODEL = ("row_length", "example", "loss_weight")


def training_callbacks(model: nn.Module) -> list[TrainerCallback]:
    """What the adapters on a model need from a ``Trainer`` besides steps; nothing for most methods.

    LoRA-GA takes its start from the gradient before the first step, Delta-LoRA notes where its weight begins to move.
    `multiflora.train` sees to it; for a trainer of your own:

    Args:
        model: A model with adapters.

    Example:
        >>> for callback in multiflora.training_callbacks(model):  # doctest: +SKIP
        ...     trainer.add_callback(callback)
    """
    # also of adapters that are not in use yet: which are trained is seen when the training begins
    methods = (
        layer.method_of(name) for layer in model.modules() if isinstance(layer, BranchLinear) for name in layer.configs
    )
    needed = any(method.gradient_start is not None or method.after_step is not None for method in methods)
    return [MethodCallback(model)] if needed else []


class MethodCallback(TrainerCallback):
    """Calls what the adapters' methods ask for.

    Only adapters that are in use and being trained are touched, and only those that have learned nothing yet: a second
    training of a saved adapter goes on from what the first has made of it.

    Args:
        model: The model to be trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._fresh = _fresh(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Take the start from the gradient of the first batches, unless the training goes on from a checkpoint."""
        self._fresh = _fresh(model)
        for name, method, config, _ in _adapters(model):
            if method.gradient_start is not None and name in self._fresh and not state.global_step:
                batches = _first_batches(train_dataloader, args.train_batch_size, config.gradient_batches)
                device = next(model.parameters()).device
                start_from_gradients(model, [_on(batch, device) for batch in batches], adapter_name=name)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Let the methods see the weights as the step has left them."""
        for name, method, config, layers in _adapters(model):
            if method.after_step is not None and name in self._fresh:
                method.after_step(config, [layer.parts(name) for layer in layers], state.global_step)


def _fresh(model: nn.Module) -> set[str]:
    """The adapters that have learned nothing yet, of those whose methods ask for anything."""
    return {
        name
        for name, method, _, layers in _adapters(model)
        if (method.gradient_start is not None or method.after_step is not None)
        and not any(layer.has_learned(name) for layer in layers)
    }


def _adapters(model: nn.Module) -> Iterator[tuple[str, Method, Any, list[BranchLinear]]]:
    """The adapters that are in use and being trained."""
    for name, config in configs_of(model).items():
        layers = [module for module in model.modules() if isinstance(module, BranchLinear) and name in module.configs]
        if any(layer.learns(name) for layer in layers):
            yield name, layers[0].method_of(name), config, layers


def _first_batches(loader: Any, batch_size: int, number: int) -> list[Mapping[str, Any]]:
    """The first rows of the data, the same in every process, without touching the trainer's own place in them."""
    return list(islice(DataLoader(loader.dataset, batch_size, collate_fn=loader.collate_fn), number))


def _on(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
        if key not in _NOT_FOR_THE_MODEL
    }
